"""Ternary weights: every weight becomes -a, 0 or +a, with one a per group, row or tensor.

For a unit (group, row or tensor) of weights w, importances h and threshold t the best scale is

    a = sum_{|w_j| > t} h_j |w_j| / sum_{|w_j| > t} h_j,

and three rules say where the threshold lies:

    twn       t = 0.7 mean|w|, h = 1: the approximation of Ternary Weight Networks
    absmean   a = mean|w| and codes round(w / a) within [-1, 1], hence t = a/2: the rule of BitNet b1.58
    optimal   the t of least sum_j h_j (w_j - a q_j)^2, found exactly: only |w| matters, so the best set of
              nonzero weights is one of the prefixes of w sorted by magnitude

Weights that were trained without these levels lose much; this is for models trained ternary (then `absmean`
restores them exactly), for training that follows, and for layers that a plan can spare.

Paper: Li et al. 2016, "Ternary Weight Networks", eq. 3-6; Ma et al. 2024, "The Era of 1-bit LLMs: All Large
Language Models are in 1.58 Bits", eq. 1-3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.core.edit import Edited, Leaf
from rarefy.core.errors import EditError, did_you_mean
from rarefy.core.nodes import Dense, Node, Quantized
from rarefy.numerics.grids import Grid, Stored
from rarefy.numerics.rounding import TINY, Fit, Number, cast, join

CHUNK = 1 << 20  # weights rounded at once, so that temporaries stay in cache
TERNARY = (-1.0, 0.0, 1.0)
GRID = Grid("ternary64", TERNARY, 64, Stored())
RULES, UNITS = ("optimal", "twn", "absmean"), ("group", "row", "tensor")


@dataclass(frozen=True)
class Ternary:
    """Three levels and a scale.

    Shapes: leaf target [out, in] float32 -> Quantized [out, in]. rule: optimal, twn or absmean. per: what a
    threshold and scale are found for: group (of the grid), row or tensor; the grid's storage holds a scale
    per group all the same. grid: any that has the levels -1, 0 and 1 and plain scales, like llama.cpp's
    TQ1_0 and TQ2_0 (rows divisible by 256) or Q2_0 (by 64). Only the optimal rule looks at calibration.
    """

    grid: Grid = GRID
    rule: str = "optimal"
    per: str = "group"

    edits: ClassVar[tuple[type[Node], ...]] = (Dense, Quantized)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        self._check(leaf)
        rows, columns = leaf.target.shape
        importance = (torch.ones(columns) if leaf.evidence is None or self.rule != "optimal"
                      else leaf.evidence.gram.diagonal() / max(leaf.evidence.tokens, 1))
        codes, fits = torch.empty((rows, columns), dtype=torch.uint8), []
        step = rows if self.per == "tensor" else max(1, CHUNK // columns)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            weights = leaf.target[part]
            h = importance.expand_as(weights)
            if leaf.keep is not None:
                h = h * leaf.keep[part]
            codes[part], fit = self._round(weights, h)
            fits.append(fit)
        return Edited(Quantized.of(codes, join(fits, axis=0)))

    def _check(self, leaf: Leaf) -> None:
        self.grid.check(leaf.site, leaf.target.shape[1])
        for name, value, known in (("rule", self.rule, RULES), ("per", self.per, UNITS)):
            if value not in known:
                raise EditError(f"{leaf.site}: {name}={value!r}: choose one of {', '.join(known)}"
                                f"{did_you_mean(value, list(known))}")
        held = set(TERNARY) <= set(self.grid.levels)
        if not held or self.grid.scale.bits or self.grid.zero is not None:
            raise EditError(f"{leaf.site}: the grid {self.grid.name!r} does not hold -1, 0 and 1 times a "
                            "plain scale; use TQ1_0, TQ2_0, Q2_0 or the technique's own")

    def _round(self, weights: Float[Tensor, "rows in_"], h: Tensor) -> tuple[Tensor, Fit]:
        """Codes and scales of some rows; where h is 0 a weight has no say (masked, or never used)."""
        rows, columns = weights.shape
        group = self.grid.group or columns
        unit = {"group": group, "row": columns, "tensor": weights.numel()}[self.per]
        w, h = weights.reshape(-1, unit), h.reshape(-1, unit)
        h = torch.where(h.sum(-1, keepdim=True) > 0, h, 1.0)
        scale, threshold = _RULES[self.rule](w, h)
        plain = cast(scale.repeat(1, unit // group).view(rows, columns // group), self.grid.scale.dtype)
        level = torch.where(w.abs() > threshold, w.sign(), 0.0).view(rows, columns)
        index = torch.tensor([self.grid.levels.index(value) for value in TERNARY], dtype=torch.uint8)
        return index[level.int() + 1], Fit(Number(plain, None), None, self.grid)


def _twn(w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    counted = (h > 0).to(w.dtype)
    threshold = 0.7 * (counted * w.abs()).sum(-1, keepdim=True) / counted.sum(-1, keepdim=True)
    large = counted * (w.abs() > threshold)
    return (large * w.abs()).sum(-1, keepdim=True) / large.sum(-1, keepdim=True).clamp_min(1), threshold


def _absmean(w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    counted = (h > 0).to(w.dtype)
    scale = (counted * w.abs()).sum(-1, keepdim=True) / counted.sum(-1, keepdim=True)
    return scale, scale / 2


def _optimal(w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Of all prefixes by falling |w| the one that explains most: (sum h|w|)^2 / sum h."""
    size, order = w.abs().sort(dim=-1, descending=True)
    weight = h.gather(-1, order).double()
    mass, dot = weight.cumsum(-1), (weight * size).cumsum(-1)
    best = (dot.square() / mass.clamp_min(TINY)).argmax(-1, keepdim=True)
    scale = dot.gather(-1, best) / mass.gather(-1, best).clamp_min(TINY)
    return scale.to(w.dtype), scale.to(w.dtype) / 2  # at the optimum a weight is nonzero when +-a is nearer


_RULES = {"optimal": _optimal, "twn": _twn, "absmean": _absmean}
