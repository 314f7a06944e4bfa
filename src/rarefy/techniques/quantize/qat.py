"""Quantization-aware training: the forward pass computes with rounded weights, the gradient moves real ones.

Every weight keeps a latent value v. After each step of the optimizer the range of every group is taken anew
from the latent values (or follows them as a moving average), and the network computes with

    w = s round(clip((v - z) / s)) + z,         dL/dv = dL/dw  where v is not clipped, else 0:

rounding is passed straight through. So the weights settle where rounding does least harm, and the others
learn to make up for the rest. Ranges are those of the white paper: from the smallest latent value to the
largest; at 2 or 3 bits learned steps (``lsq``) do better.

Paper: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 3 and 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from rarefy.core.edit import Leaf
from rarefy.core.errors import RecipeError
from rarefy.core.latent import passed, started
from rarefy.core.nodes import Dense, Node, Quantized
from rarefy.core.tune import Soft
from rarefy.numerics.covering import covering, extremes
from rarefy.numerics.grids import Grid, integer_grid
from rarefy.numerics.rounding import Fit, encode


@dataclass(frozen=True)
class QAT:
    """Straight-through training of weights on ``grid``.

    Shapes: leaf [out, in] -> Quantized [out, in]. grid: any, those with scales of scales included. memory:
    share of the old range that a moving average keeps at every step; 0: the range of this moment.
    """

    grid: Grid = integer_grid(4, 32)
    memory: float = 0.0

    edits: ClassVar[tuple[type[Node], ...]] = (Dense, Quantized)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = "rtn"
    scope: ClassVar[str] = "training"

    def __post_init__(self) -> None:
        if not 0 <= self.memory < 1:
            raise RecipeError(f"memory {self.memory}: must be a share from 0 (no memory) to below 1 (ranges "
                              "that never move)")

    def soften(self, leaf: Leaf, generator: torch.Generator) -> Soft:
        self.grid.check(leaf.site, leaf.target.shape[1])
        return _Rounded(started(leaf), leaf.keep, self)


class _Rounded(Soft):
    """A latent weight [out, in] and the ranges of its groups [out, groups]."""

    def __init__(self, latent: Tensor, keep: Tensor | None, settings: QAT) -> None:
        super().__init__()
        self.settings = settings
        self.keep: Tensor | None
        self.register_buffer("keep", keep, persistent=False)
        self.latent = nn.Parameter(latent)
        low, high = extremes(latent, keep, settings.grid)
        self.low: Tensor
        self.high: Tensor
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self) -> Tensor:
        with torch.no_grad():
            fit = self._fit()
            stored = Quantized.of(encode(self.latent, fit), fit).dense()
            inside = _inside(self.latent, fit)
        return passed(stored, self.latent, inside)

    @torch.no_grad()
    def update(self, step: int, total: int) -> None:
        """The ranges follow the latent values."""
        for held, now in zip((self.low, self.high), extremes(self.latent, self.keep, self.settings.grid),
                             strict=True):
            held.lerp_(now, 1 - self.settings.memory)

    @torch.no_grad()
    def harden(self) -> Node:
        fit = self._fit()
        return Quantized.of(encode(self.latent, fit), fit)

    def _fit(self) -> Fit:
        latent = self.latent if self.keep is None else torch.where(self.keep, self.latent, 0.0)
        return covering(latent, self.low, self.high, self.settings.grid)


def _inside(latent: Tensor, fit: Fit) -> Tensor:
    """1 where a latent value is within half a step of the range, else 0."""
    scale, zero = fit.values()
    grouped = latent.view(*scale.shape, -1)
    if zero is not None:
        grouped = grouped - zero.unsqueeze(-1)
    ends = [(fit.grid.levels[0] - 0.5) * scale, (fit.grid.levels[-1] + 0.5) * scale]
    low, high = torch.minimum(*ends).unsqueeze(-1), torch.maximum(*ends).unsqueeze(-1)
    # a dead group has no range, and must be able to grow one
    inside = ((grouped >= low) & (grouped <= high)) | (scale == 0).unsqueeze(-1)
    return inside.view(latent.shape).float()
