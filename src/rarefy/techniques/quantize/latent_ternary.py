"""Ternary training: real weights learn behind weights that are -a, 0 or +a.

Every weight keeps a latent value v; the network computes with

    w = a round(clip(v / a, -1, 1)),      a = mean|v|             (absmean)
    w = a sign(v) [|v| > t],              t = 0.7 mean|v|,  a = mean of |v| above t     (twn)

over a group, a row or the whole weight, and the gradient of w moves v as if nothing had been rounded. A
trained network loses much when its weights become ternary at once; trained like this, it moves to where
three levels are enough. Both rules end exactly where the ``ternary`` technique would put the latent weights.

Paper: Ma et al. 2024, "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits", eq. 1-3; Li et al.
2016, "Ternary Weight Networks", section 2 (twn).
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
from rarefy.numerics.grids import Grid, Stored
from rarefy.numerics.rounding import TINY, Fit, Number, cast

TERNARY = (-1.0, 0.0, 1.0)
GRID = Grid("ternary64", TERNARY, 64, Stored())
RULES, UNITS = ("absmean", "twn"), ("group", "row", "tensor")


@dataclass(frozen=True)
class LatentTernary:
    """Straight-through training of ternary weights.

    Shapes: leaf [out, in] -> Quantized [out, in]. grid: any that has the levels -1, 0 and 1 and plain scales,
    like llama.cpp's TQ1_0 and TQ2_0. rule: absmean or twn. per: what a scale is found for: group (of the
    grid), row or tensor (as in BitNet); the grid's storage holds a scale per group all the same.
    """

    grid: Grid = GRID
    rule: str = "absmean"
    per: str = "group"

    edits: ClassVar[tuple[type[Node], ...]] = (Dense, Quantized)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = "ternary"
    scope: ClassVar[str] = "training"

    def __post_init__(self) -> None:
        for name, value, known in (("rule", self.rule, RULES), ("per", self.per, UNITS)):
            if value not in known:
                raise RecipeError(f"{name} {value!r}: choose one of {', '.join(known)}"
                                  f"{did_you_mean(value, list(known))}")

    def soften(self, leaf: Leaf, generator: torch.Generator) -> Soft:
        self.grid.check(leaf.site, leaf.target.shape[1])
        held = set(TERNARY) <= set(self.grid.levels)
        if not held or self.grid.scale.bits or self.grid.zero is not None:
            raise EditError(f"{leaf.site}: the grid {self.grid.name!r} does not hold -1, 0 and 1 times a "
                            "plain scale; use TQ1_0, TQ2_0, Q2_0 or the technique's own")
        return _Ternary(started(leaf), leaf.keep, self)


class _Ternary(Soft):
    """A latent weight [out, in] behind three levels."""

    def __init__(self, latent: Tensor, keep: Tensor | None, settings: LatentTernary) -> None:
        super().__init__()
        self.settings = settings
        self.keep: Tensor | None
        self.register_buffer("keep", keep, persistent=False)
        self.latent = nn.Parameter(latent)

    def forward(self) -> Tensor:
        return passed(self._node().dense(), self.latent)

    def harden(self) -> Node:
        return self._node()

    @torch.no_grad()
    def _node(self) -> Quantized:
        grid = self.settings.grid
        rows, columns = self.latent.shape
        group = grid.group or columns
        unit = {"group": group, "row": columns, "tensor": self.latent.numel()}[self.settings.per]
        size = self.latent.abs().view(-1, unit)
        counted = torch.ones_like(size) if self.keep is None else self.keep.view(-1, unit).float()
        scale, threshold = _rule(size, counted, self.settings.rule)
        level = torch.where(size > threshold, self.latent.view(-1, unit).sign(), 0.0).view(rows, columns)
        index = torch.tensor([grid.levels.index(value) for value in TERNARY], dtype=torch.uint8)
        plain = scale.repeat(1, max(1, unit // group)).view(rows, columns // group)
        number = Number(cast(plain, grid.scale.dtype), None)
        return Quantized.of(index[level.int() + 1], Fit(number, None, grid))


def _rule(size: Float[Tensor, "units n"], counted: Float[Tensor, "units n"],
          rule: str) -> tuple[Float[Tensor, "units 1"], Float[Tensor, "units 1"]]:
    """Scale and threshold of every unit, from its magnitudes; dropped weights are not counted."""
    mean = (counted * size).sum(-1, keepdim=True) / counted.sum(-1, keepdim=True).clamp_min(TINY)
    if rule == "absmean":
        return mean, mean / 2
    large = counted * (size > 0.7 * mean)
    return (large * size).sum(-1, keepdim=True) / large.sum(-1, keepdim=True).clamp_min(1), 0.7 * mean
