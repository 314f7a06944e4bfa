"""Rounding groups of weights onto a grid: the nearest level, and the scale that loses least.

For a group of weights w with importances h the loss of a scale s (and zero z) is

    loss(s, z) = sum_j h_j (w_j - s * level(q_j) - z)^2,      q_j = nearest level to (w_j - z) / s.

It is searched over a ladder of clipping ratios, each refined in closed form: given the codes, the best
scale (and zero) is a weighted least-squares fit (Lloyd's alternation, as in llama.cpp's and HQQ's
searches). Scales that are integers times a coarser number are fitted per group first; then the coarse
number is fitted to the codes of all its groups together.

Tensors in, tensors out. Weights are [rows, width], width a multiple of the grid's block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from rarefy.numerics.grids import Grid, Stored

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.72, 0.64, 0.55)
COARSE_ROUNDS = 2
SLAB = 1 << 18  # weights searched at once: rows are independent, and the search goes over a slab many times
TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Number:
    """The scales (or zeros) of a weight as they are stored.

    plain: [rows, groups] numbers, or [rows, supers] under double quantization, in the stored dtype.
    codes: [rows, groups] uint8, offset so that the integer is ``stored.low + code``; or None.
    """

    plain: Tensor
    codes: UInt8[Tensor, "rows groups"] | None

    def value(self, stored: Stored) -> Float[Tensor, "rows groups"]:
        """The float32 numbers that readers of the file will compute."""
        plain = self.plain.to(torch.float32)
        if self.codes is None:
            return plain
        rows, supers = plain.shape
        steps = (self.codes.to(torch.float32) + stored.low).view(rows, supers, -1)
        return (steps * plain.unsqueeze(-1)).view(rows, -1)


@dataclass(frozen=True, eq=False)
class Fit:
    """The stored scales and zeros of a weight, and their values per group, [rows, groups]."""

    scale: Number
    zero: Number | None
    grid: Grid

    def values(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero as they act: ``w = scale * level + zero``."""
        scale = self.scale.value(self.grid.scale)
        if self.zero is None or self.grid.zero is None:
            return scale, None
        zero = self.zero.value(self.grid.zero)
        return scale, zero * scale if self.grid.zero.relative else zero


def join(fits: list[Fit], axis: int = 1) -> Fit:
    """One fit from the fits of neighbouring columns (axis 1) or rows (axis 0)."""
    def cat(numbers: list[Number]) -> Number:
        codes = [number.codes for number in numbers if number.codes is not None]
        # bytes, because torch cannot concatenate every 8-bit float
        plain = torch.cat([number.plain.view(torch.uint8).view(*number.plain.shape, -1)
                           for number in numbers], axis)
        dtype = numbers[0].plain.dtype
        return Number(plain.view(dtype).squeeze(-1), torch.cat(codes, axis) if codes else None)

    if len(fits) == 1:
        return fits[0]
    zeros = [fit.zero for fit in fits if fit.zero is not None]
    return Fit(cat([fit.scale for fit in fits]), cat(zeros) if zeros else None, fits[0].grid)


def nearest(values: Tensor, grid: Grid) -> Tensor:
    """Codes (float32, same shape) of the levels nearest to ``values``; NaN-free input assumed."""
    low, high = grid.levels[0], grid.levels[-1]
    if grid.uniform:
        return values.round().clamp_(low, high).sub_(low)
    return _half_steps(grid)[(values * 2).floor_().clamp_(2 * low, 2 * high).sub_(2 * low).int()]


@lru_cache(maxsize=64)
def _half_steps(grid: Grid) -> Tensor:
    """Code of the nearest level for every half step from the lowest level to the highest.

    Levels are whole numbers, so the borders between them are half steps: one look-up is exact, and
    several times faster than a binary search.
    """
    levels = torch.tensor(grid.levels)
    middles = torch.arange(2 * grid.levels[0], 2 * grid.levels[-1] + 1) / 2 + 0.25
    return torch.bucketize(middles, (levels[1:] + levels[:-1]) / 2).to(torch.float32)


def rounded(values: Tensor, grid: Grid) -> Tensor:
    """The levels (float32, same shape) nearest to ``values``: code and level in one look-up."""
    low, high = grid.levels[0], grid.levels[-1]
    if grid.uniform:
        return values.round().clamp_(low, high)
    return _half_step_levels(grid)[(values * 2).floor_().clamp_(2 * low, 2 * high).sub_(2 * low).int()]


@lru_cache(maxsize=64)
def _half_step_levels(grid: Grid) -> Tensor:
    return _levels(grid)[_half_steps(grid).int()]


@lru_cache(maxsize=64)
def _levels(grid: Grid) -> Tensor:
    return torch.tensor(grid.levels)


def level_of(codes: Tensor, grid: Grid) -> Tensor:
    """Levels (float32) that float or integer codes stand for."""
    return codes + grid.levels[0] if grid.uniform else _levels(grid)[codes.int()]


def encode(weights: Float[Tensor, "rows width"], fit: Fit) -> UInt8[Tensor, "rows width"]:
    """Nearest codes under the stored scales."""
    rows, width = weights.shape
    scale, zero = fit.values()
    grouped = weights.view(rows, scale.shape[1], -1)
    if zero is not None:
        grouped = grouped - zero.unsqueeze(-1)
    return nearest(grouped * inverse(scale).unsqueeze(-1), fit.grid).to(torch.uint8).view(rows, width)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that is no number: a group of zeros, or of what a subtraction left of them."""
    sound = scale.reciprocal().isfinite()
    return torch.where(sound, 1 / torch.where(sound, scale, 1.0), 0.0)


def fit(weights: Float[Tensor, "rows width"], importance: Tensor, grid: Grid) -> Fit:
    """Scales and zeros of least weighted loss. ``importance``: [width] or [rows, width], >= 0."""
    importance, step = importance.expand(weights.shape), max(1, SLAB // weights.shape[1])
    slabs = [slice(start, start + step) for start in range(0, max(1, weights.shape[0]), step)]
    return join([_fit(weights[slab], importance[slab], grid) for slab in slabs], axis=0)


def _fit(weights: Tensor, importance: Tensor, grid: Grid) -> Fit:
    rows, width = weights.shape
    group = grid.group or width
    w = weights.reshape(rows, width // group, group)
    h = importance.reshape(w.shape)
    # a group that nothing weighs still gets a finite scale
    h = torch.where(h.sum(-1, keepdim=True) > 0, h, 1.0)
    if grid.zero is None:
        scale = _search_scale(w, h, grid)
        return Fit(store_scale(w, h, scale, grid), None, grid)
    scale, zero = _search_affine(w, h, grid)
    return store_affine(w, h, scale, zero, grid)


def _search_scale(w: Tensor, h: Tensor, grid: Grid) -> Tensor:
    """Best scale per group, [rows, groups], signed where the storage allows it."""
    peak = w.gather(-1, w.abs().argmax(-1, keepdim=True))
    ends = [end for end in {grid.levels[0], grid.levels[-1]} if end != 0]
    signed = (grid.scale.bits == 0 and grid.scale.dtype.is_signed) or grid.scale.low < 0
    if grid.scale.dtype == torch.float8_e8m0fnu:
        return _search_power(w, h, peak.abs() / max(map(abs, ends)), grid)
    if not signed or -grid.levels[0] == grid.levels[-1]:
        ends, peak = [max(map(abs, ends))], peak.abs()
    best_gain = torch.full_like(peak, -1.0)
    best = torch.zeros_like(peak)
    for end in ends:
        for ratio in RATIOS:
            level = rounded(w * inverse(peak * (ratio / end)), grid)
            hl = h * level
            dot, norm = (hl * w).sum(-1, keepdim=True), (hl * level).sum(-1, keepdim=True)
            gain = dot.square() / norm.clamp_min(TINY)  # how much of sum h w^2 the fit explains
            better = gain > best_gain
            best_gain = torch.where(better, gain, best_gain)
            best = torch.where(better, dot / norm.clamp_min(TINY), best)
    return best.squeeze(-1)


def _search_power(w: Tensor, h: Tensor, start: Tensor, grid: Grid) -> Tensor:
    """Best power of two per group (MXFP's e8m0 scales have no mantissa and no sign)."""
    exponent = torch.ceil(torch.log2(start.clamp_min(2.0**-126)))
    best_loss = torch.full_like(start, torch.inf)
    best = torch.ones_like(start)
    for step in (-2, -1, 0, 1):
        scale = torch.exp2((exponent + step).clamp(-127, 127))
        loss = (h * (w - scale * rounded(w / scale, grid)).square()).sum(-1, keepdim=True)
        better = loss < best_loss
        best_loss, best = torch.where(better, loss, best_loss), torch.where(better, scale, best)
    return best.squeeze(-1)


def store_scale(w: Tensor, h: Tensor, scale: Tensor, grid: Grid) -> Number:
    """The scale as the format stores it: one number each, or integer steps of a coarser number."""
    stored = grid.scale
    if stored.bits == 0:
        return Number(cast(scale, stored.dtype), None)
    rows = w.shape[0]
    number = _steps(scale, stored)
    for _ in range(COARSE_ROUNDS):
        value = number.value(stored)
        level = rounded(w * inverse(value).unsqueeze(-1), grid)
        assert number.codes is not None
        steps = (number.codes.float() + stored.low).unsqueeze(-1) * level
        shape = (rows, number.plain.shape[1], -1)
        dot = (h * steps * w).reshape(shape).sum(-1)
        norm = (h * steps.square()).reshape(shape).sum(-1)
        coarse = torch.where(norm > 0, dot / norm.clamp_min(TINY), number.plain.float())
        number = Number(cast(coarse, stored.dtype), number.codes)
        number = restep(scale, number, stored)
    return number


def _steps(values: Tensor, stored: Stored) -> Number:
    """Values [rows, groups] as integers times the smallest coarse number that covers their peak."""
    rows = values.shape[0]
    grouped = values.view(rows, -1, stored.over)
    high = stored.low + (1 << stored.bits) - 1
    if stored.low < 0:  # the value of largest magnitude takes the longer, negative end
        peak = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)
        coarse = cast(peak / stored.low, stored.dtype)
    else:
        coarse = cast(grouped.amax(-1).clamp_min(0) / high, stored.dtype)
    return restep(values, Number(coarse, None), stored)


def restep(values: Tensor, number: Number, stored: Stored) -> Number:
    """The nearest integers for values [rows, groups] under given coarse numbers."""
    rows = values.shape[0]
    coarse = number.plain.float().unsqueeze(-1)
    high = stored.low + (1 << stored.bits) - 1
    steps = (values.view(rows, -1, stored.over) * inverse(coarse)).round().clamp(stored.low, high)
    return Number(number.plain, (steps - stored.low).to(torch.uint8).view(rows, -1))


def _search_affine(w: Tensor, h: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Best scale and zero per group. Zeros of unsigned storage are kept at or below 0."""
    assert grid.zero is not None
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    if grid.zero.bits or grid.zero.relative:
        low, high = low.clamp_max(0), high.clamp_min(0)
    mass = h.sum(-1, keepdim=True)
    mean_w = (h * w).sum(-1, keepdim=True) / mass
    best_loss = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.zeros_like(low), low.clone()
    span, bottom = grid.levels[-1] - grid.levels[0], grid.levels[0]
    for ratio in RATIOS:
        scale = (high - low) * (ratio / span)
        zero = low * ratio - bottom * scale
        for _ in range(2):
            level = rounded((w - zero) * inverse(scale), grid)
            mean_l = (h * level).sum(-1, keepdim=True) / mass
            centred = level - mean_l
            variance = (h * centred.square()).sum(-1, keepdim=True)
            slope = (h * centred * w).sum(-1, keepdim=True) / variance.clamp_min(TINY)
            # a fit that collapses to one level, or turns the axis round, keeps its starting range
            scale = torch.where((variance > 0) & (slope > 0), slope, scale)
            zero = mean_w - scale * mean_l
            if grid.zero.bits:
                zero = zero.clamp_max(0)
            if grid.zero.relative:
                zero = (zero * inverse(scale)).round().clamp(-128, 127) * scale
        level = rounded((w - zero) * inverse(scale), grid)
        loss = (h * (w - scale * level - zero).square()).sum(-1, keepdim=True)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale.squeeze(-1), best_zero.squeeze(-1)


def store_affine(w: Tensor, h: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Fit:
    """Scale and zero as the format stores them; coarse numbers are refitted together."""
    assert grid.zero is not None
    if grid.zero.relative:
        zero = zero * inverse(scale)
    if grid.scale.bits == 0:
        zeros = zero.round().to(torch.int8) if grid.zero.relative else cast(zero, grid.zero.dtype)
        return Fit(Number(cast(scale, grid.scale.dtype), None), Number(zeros, None), grid)
    # the zero is stored as a positive step of a negative coarse number: zero = coarse * code
    steps_zero = _steps(-zero, grid.zero)
    done = Fit(_steps(scale, grid.scale), Number(-steps_zero.plain, steps_zero.codes), grid)
    for _ in range(COARSE_ROUNDS):
        done = _refit_coarse(w, h, done)
    return done


def _refit_coarse(w: Tensor, h: Tensor, now: Fit) -> Fit:
    """Least squares for the two coarse numbers of every super-block, given all codes below them."""
    assert now.zero is not None and now.scale.codes is not None and now.zero.codes is not None
    scale, zero = now.values()
    assert zero is not None and now.grid.zero is not None
    rows, supers = now.scale.plain.shape
    level = rounded((w - zero.unsqueeze(-1)) * inverse(scale).unsqueeze(-1), now.grid)
    a = (level * (now.scale.codes.float() + now.grid.scale.low).unsqueeze(-1)).reshape(rows, supers, -1)
    b = (now.zero.codes.float() + now.grid.zero.low).unsqueeze(-1).expand_as(w).reshape(rows, supers, -1)
    hh, ww = h.reshape(rows, supers, -1), w.reshape(rows, supers, -1)
    aa, ab, bb = (hh * a * a).sum(-1), (hh * a * b).sum(-1), (hh * b * b).sum(-1)
    aw, bw = (hh * a * ww).sum(-1), (hh * b * ww).sum(-1)
    determinant = aa * bb - ab * ab
    sound = determinant > 1e-6 * aa * bb
    safe = determinant.clamp_min(TINY)
    coarse = torch.where(sound, (aw * bb - bw * ab) / safe, now.scale.plain.float())
    negative = torch.where(sound, (bw * aa - aw * ab) / safe, now.zero.plain.float())
    usable = (coarse > 0) & (negative <= 0)
    coarse = torch.where(usable, coarse, now.scale.plain.float())
    negative = torch.where(usable, negative, now.zero.plain.float())
    return Fit(Number(cast(coarse, now.grid.scale.dtype), now.scale.codes),
               Number(cast(negative, now.grid.zero.dtype), now.zero.codes), now.grid)


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """To the stored dtype; finite: beyond float16's range the scale saturates instead of becoming inf."""
    if dtype == torch.float16:
        values = values.clamp(-65504.0, 65504.0)
    return values.to(dtype)
