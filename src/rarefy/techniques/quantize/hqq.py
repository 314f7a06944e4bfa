"""Half-quadratic quantization: the zero of every group that few large errors do not pull aside.

No data is needed. With levels q, scale s and zero z of a group fixed in turn, the loss

    min_z  sum_j |w_j - (s q_j + z)|^p,          p < 1,      q_j = nearest level to (w_j - z) / s,

is split by an auxiliary error e (half-quadratic splitting), and both halves have closed forms:

    e_j <- shrink(w_j - s q_j - z),    shrink(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0),
    z   <- mean_j(w_j - e_j - s q_j),  beta <- kappa beta.

What shrink leaves in e is an outlier, and the mean no longer sees it. Errors are measured in steps of the
grid (w / s in place of w), so that the result does not depend on the unit of the weights, and every group
keeps the best zero that it met. The scale is what the range of the group gives; `clip` runs the alternation
for narrower ranges as well, and every group keeps the one of least loss. That loss forgives a few large
errors: with 4 bits clipping trades them for small ones and doubles the squared error, with 2 bits it is far
better in both.

Paper: Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", eq. 2-9 (the
method's report, published on the authors' pages).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rarefy.core.edit import Edited, Leaf
from rarefy.core.errors import EditError
from rarefy.core.nodes import Dense, Node, Quantized
from rarefy.numerics.grids import Grid, Stored
from rarefy.numerics.rounding import RATIOS, Fit, encode, inverse, join, level_of, nearest, store_affine

CHUNK = 1 << 20  # weights rounded at once, so that temporaries stay in cache
GRID = Grid("int4fg64", tuple(float(level) for level in range(16)), 64, Stored(), Stored())


@dataclass(frozen=True)
class HQQ:
    """Data-free rounding on an affine ``grid``.

    Shapes: leaf target [out, in] float32 -> Quantized [out, in]. grid: must have a zero (like the default, or
    llama.cpp's Q4_1, Q5_1, Q4_K, Q2_K). norm: the p of the loss; nearer to 0, fewer errors count as outliers.
    beta: where errors begin to count as outliers. kappa: growth of beta per round. rounds: of the
    alternation. clip: try narrower ranges too, worth it below 3 bits (false: the published algorithm).
    """

    grid: Grid = GRID
    norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    rounds: int = 20
    clip: bool = False

    edits: ClassVar[tuple[type[Node], ...]] = (Dense, Quantized)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        rows, columns = leaf.target.shape
        self.grid.check(leaf.site, columns)
        if self.grid.zero is None:
            raise EditError(f"{leaf.site}: hqq moves zeros, and the grid {self.grid.name!r} has none; use an "
                            "affine one (Q4_1, Q5_1, Q4_K, Q2_K), or gptq or rtn on this one")
        if not 0 < self.norm < 1:
            raise EditError(f"{leaf.site}: norm={self.norm} must lie between 0 and 1, both excluded; "
                            "0.7 does for most weights")
        codes, fits = torch.empty((rows, columns), dtype=torch.uint8), []
        step = max(1, CHUNK // columns)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            weights = leaf.target[part]
            keep = torch.ones_like(weights, dtype=torch.bool) if leaf.keep is None else leaf.keep[part]
            fits.append(self._fit(weights, keep))
            codes[part] = encode(weights, fits[-1])
        return Edited(Quantized.of(codes, join(fits, axis=0)))

    def _fit(self, weights: Float[Tensor, "rows in_"], keep: Bool[Tensor, "rows in_"]) -> Fit:
        """Scales from the range of every group, zeros from the alternation; dropped weights have no say."""
        rows, columns = weights.shape
        group = self.grid.group or columns
        w = torch.where(keep, weights, 0.0).reshape(rows, columns // group, group)
        m = keep.reshape(w.shape).to(torch.float32)
        bottom, span = self.grid.levels[0], self.grid.levels[-1] - self.grid.levels[0]
        low, high = self._range(w, m)
        best, least = (torch.zeros_like(low), low), torch.full_like(low, torch.inf)
        for ratio in RATIOS if self.clip else RATIOS[:1]:
            scale = (high - low) * (ratio / span)
            start = low * ratio - bottom * scale
            z, loss = self._best_zero(w * inverse(scale), m, start * inverse(scale))
            zero = torch.where(scale > 0, z * scale, start)  # one value alone: the zero holds it
            loss = loss * scale.pow(self.norm)  # from steps to the unit of the weights
            better = loss < least
            best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
            least = torch.where(better, loss, least)
        scale, zero = (each.squeeze(-1) for each in best)
        if self.grid.zero is not None and self.grid.zero.bits:
            zero = zero.clamp_max(0)  # a format that only subtracts
        return store_affine(w, m, scale, zero, self.grid)

    def _range(self, w: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest kept weight of every group; with 0 between them where the storage asks for it."""
        low = torch.where(m > 0, w, torch.inf).amin(-1, keepdim=True)
        high = torch.where(m > 0, w, -torch.inf).amax(-1, keepdim=True)
        low, high = torch.where(low <= high, low, 0.0), torch.where(low <= high, high, 0.0)
        assert self.grid.zero is not None
        around = self.grid.zero.relative or self.grid.zero.bits > 0  # an integer of either sign, or one sign
        return (low.clamp_max(0), high.clamp_min(0)) if around else (low, high)

    def _best_zero(self, u: Tensor, m: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The alternation on weights ``u`` in steps of the grid, per group [.., group]; m: 1 where kept.

        Returns the zero of least loss of every group, and that loss.
        """
        def round_to(z: Tensor) -> tuple[Tensor, Tensor]:
            level = level_of(nearest(u - z, self.grid), self.grid)
            return level, u - level - z

        mass = m.sum(-1, keepdim=True).clamp_min(1)
        level, error = round_to(z)
        best, least = z, (m * error.abs().pow(self.norm)).sum(-1, keepdim=True)
        beta = self.beta
        for _ in range(self.rounds):
            size = error.abs()
            outlier = error.sign() * (size - size.pow(self.norm - 1) / beta).clamp_min(0)
            z = (m * (u - outlier - level)).sum(-1, keepdim=True) / mass
            beta *= self.kappa
            level, error = round_to(z)
            loss = (m * error.abs().pow(self.norm)).sum(-1, keepdim=True)
            best, least = torch.where(loss < least, z, best), torch.minimum(loss, least)
        return best, least
