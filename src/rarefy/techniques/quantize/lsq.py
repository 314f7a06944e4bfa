"""Learned step sizes: scales are trained together with the weights.

Every group has a step s (and, on an affine grid, an offset z) of its own, and the network computes with

    w = s level + z,       level = nearest level to x = (v - z) / s,

and passes the rounding straight through. Then the step has a gradient too,

    dw/ds = level - x   inside the range,   the outermost level   outside of it,

which pulls it to where the loss wants it: at 2 and 3 bits that is far from where the range of the weights
would put it. The offset's is 0 inside and 1 outside. So that steps move no faster than weights, relative to
their size, their gradients are multiplied by ``g = 1 / sqrt(n Q)``, n weights in a group and Q the highest
level. Scales are used as they will be stored, rounding them is passed straight through as well.

Paper: Esser et al. 2020, "Learned Step Size Quantization", eq. 1-3 and section 2.2; Bhalgat et al. 2020,
"LSQ+: Improving low-bit quantization through learnable offsets and better initialization", section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rarefy.core.edit import Leaf
from rarefy.core.errors import EditError, RecipeError, did_you_mean
from rarefy.core.latent import passed, started
from rarefy.core.nodes import Dense, Node, Quantized
from rarefy.core.tune import Soft
from rarefy.numerics.grids import Grid, Stored, integer_grid
from rarefy.numerics.rounding import Fit, Number, cast, encode, fit, level_of

STARTS = ("search", "mean")
PACE = 10.0  # how much faster than weights steps learn, relative to their own size


@dataclass(frozen=True)
class LSQ:
    """Training of latent weights, steps and offsets.

    Shapes: leaf [out, in] -> Quantized [out, in]. grid: any with plain scales; one with a zero (``int2zg32``,
    ``Q4_1``) has offsets that learn (LSQ+). start: of the steps: ``search`` (those of round to nearest; of
    a weight that is on this grid already: its own) or ``mean`` (2 mean|v| / sqrt(Q), as in the paper).
    """

    grid: Grid = integer_grid(4, 32)
    start: str = "search"

    edits: ClassVar[tuple[type[Node], ...]] = (Dense, Quantized)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = "qat"
    scope: ClassVar[str] = "training"

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise RecipeError(f"start {self.start!r}: choose one of {', '.join(STARTS)}"
                              f"{did_you_mean(self.start, list(STARTS))}")

    def soften(self, leaf: Leaf, generator: torch.Generator) -> Soft:
        self.grid.check(leaf.site, leaf.target.shape[1])
        if self.grid.scale.bits or (self.grid.zero is not None and self.grid.zero.bits):
            raise EditError(f"{leaf.site}: scales of the grid {self.grid.name!r} are steps of a coarser "
                            "number, which do not learn one by one; use a grid with plain scales, or qat")
        latent = started(leaf)
        return _Stepped(latent, self._first(leaf, latent), self.grid)

    def _first(self, leaf: Leaf, latent: Tensor) -> Fit:
        """Steps and offsets to begin with; no step is zero, so that dead groups can wake up."""
        counted = torch.ones_like(latent) if leaf.keep is None else leaf.keep.float()
        match leaf.node:
            case Quantized(grid=grid) as node if grid == self.grid and self.start == "search":
                found = node.fit()
            case _:
                found = fit(latent * counted, counted, self.grid)
        scale = found.scale.plain.float()
        if self.start == "mean":
            size = (latent.abs() * counted).view(*scale.shape, -1).sum(-1)
            mean = size / counted.view(*scale.shape, -1).sum(-1).clamp_min(1)
            scale = 2 * mean / self.grid.levels[-1] ** 0.5
        alive = scale[scale != 0].abs()
        usual = alive.mean() if alive.numel() else torch.ones(())
        return Fit(Number(torch.where(scale == 0, usual, scale), None), found.zero, self.grid)


class _Stepped(Soft):
    """latent [out, in], steps [out, groups], offsets [out, groups] as they are stored (or None)."""

    def __init__(self, latent: Tensor, first: Fit, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.latent = nn.Parameter(latent)
        self.step = nn.Parameter(first.scale.plain.float().clone())
        self.offset = None if first.zero is None else nn.Parameter(first.zero.plain.float().clone())
        self.least: Tensor
        self.register_buffer("least", self.step.detach() / 100)
        self.pace = PACE * float(self.step.detach().square().mean().sqrt())

    def forward(self) -> Tensor:
        step, zero = self._stored()
        grouped = self.latent.view(*step.shape, -1)
        s = scaled(step, self._factor()).unsqueeze(-1)
        z = None if zero is None else scaled(zero, self._factor()).unsqueeze(-1)
        if z is not None and self._relative:
            z = z * s
        x = (grouped if z is None else grouped - z) / s
        level = level_of(encode(self.latent.detach(), self._fit()), self.grid).view(x.shape)
        w = passed(level, x.clamp(self.grid.levels[0], self.grid.levels[-1])) * s
        return (w if z is None else w + z).view(self.latent.shape)

    def paces(self) -> dict[str, float]:
        """Steps, and offsets in units of steps, learn by a share of their size."""
        found = {"step": self.pace}
        if self.offset is not None:
            found["offset"] = PACE if self._relative else self.pace
        return found

    @torch.no_grad()
    def update(self, step: int, total: int) -> None:
        """A step that was carried close to zero, or through it, is put back to a hundredth of its start."""
        lost = self.step * self.least.sign() < self.least.abs()
        self.step.copy_(torch.where(lost, self.least, self.step))

    @torch.no_grad()
    def harden(self) -> Node:
        found = self._fit()
        return Quantized.of(encode(self.latent, found), found)

    @property
    def _relative(self) -> bool:
        return self.grid.zero is not None and self.grid.zero.relative

    def _factor(self) -> float:
        return (self.latent.numel() / self.step.numel() * self.grid.levels[-1]) ** -0.5

    def _fit(self) -> Fit:
        step = Number(cast(self.step.detach(), self.grid.scale.dtype), None)
        zero = None
        if self.offset is not None and self.grid.zero is not None:
            zero = Number(_as_stored(self.offset.detach(), self.grid.zero), None)
        return Fit(step, zero, self.grid)

    def _stored(self) -> tuple[Tensor, Tensor | None]:
        """Steps and offsets as a file will hold them, with their gradients."""
        now = self._fit()
        step = passed(now.scale.plain.float(), self.step)
        if self.offset is None or now.zero is None:
            return step, None
        return step, passed(now.zero.plain.float(), self.offset)


def scaled(x: Float[Tensor, "*shape"], factor: float) -> Float[Tensor, "*shape"]:
    """``x``, with its gradient multiplied by ``factor``."""
    return passed(x, x, factor)


def _as_stored(offset: Tensor, stored: Stored) -> Tensor:
    if stored.relative:
        return offset.round().clamp(-128, 127).to(stored.dtype)
    return cast(offset, stored.dtype)
