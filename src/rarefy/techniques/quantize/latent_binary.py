"""Binary training: real weights learn behind their signs.

Every weight keeps a latent value v; the network computes with

    w = a sign(v),      a = mean|v| over the n weights of a row or group,

and the gradient reaches v through the scale and, where v is not far out already, through the sign:

    dL/dv = dL/dw (1/n + a [|v| <= clip]).

Signs flip when a latent weight crosses zero, so small weights decide and large ones remember.

Paper: Rastegari et al. 2016, "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks",
section 3.1 (training Binary-Weight-Networks).
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
from rarefy.numerics.grids import Grid, Stored
from rarefy.numerics.rounding import Fit, Number, cast


@dataclass(frozen=True)
class LatentBinary:
    """Straight-through training of signs. Shapes: leaf [out, in] -> Quantized [out, in].

    group: neighbouring columns that share a scale; 0: the whole row, as in the paper. clip: latent values
    beyond it no longer move with their sign's gradient.
    """

    group: int = 0
    clip: float = 1.0

    edits: ClassVar[tuple[type[Node], ...]] = (Dense, Quantized)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = "binary"
    scope: ClassVar[str] = "training"

    def __post_init__(self) -> None:
        if not self.clip > 0:
            raise RecipeError(f"clip {self.clip}: must be positive, or no sign would ever learn")

    def soften(self, leaf: Leaf, generator: torch.Generator) -> Soft:
        grid = Grid(f"binary{self.group or 'row'}", (-1.0, 1.0), self.group, Stored())
        grid.check(leaf.site, leaf.target.shape[1])
        return _Binary(started(leaf), leaf.keep, grid, self.clip)


class _Binary(Soft):
    """A latent weight [out, in] behind two levels."""

    def __init__(self, latent: Tensor, keep: Tensor | None, grid: Grid, clip: float) -> None:
        super().__init__()
        self.grid, self.clip = grid, clip
        self.keep: Tensor | None
        self.register_buffer("keep", keep, persistent=False)
        self.latent = nn.Parameter(latent)

    def forward(self) -> Tensor:
        node = self._node()
        near = self.latent.detach().abs() <= self.clip
        scale = node.scale.dense().repeat_interleave(self._group, 1)
        return passed(node.dense(), self.latent, 1 / self._group + scale * near)

    def harden(self) -> Node:
        return self._node()

    @property
    def _group(self) -> int:
        return self.grid.group or self.latent.shape[1]

    @torch.no_grad()
    def _node(self) -> Quantized:
        rows, columns = self.latent.shape
        shape = (rows, columns // self._group, self._group)
        counted = torch.ones(shape) if self.keep is None else self.keep.view(shape).float()
        scale = (counted * self.latent.abs().view(shape)).sum(-1) / counted.sum(-1).clamp_min(1)
        codes = (self.latent >= 0).to(torch.uint8)
        return Quantized.of(codes, Fit(Number(cast(scale, self.grid.scale.dtype), None), None, self.grid))
