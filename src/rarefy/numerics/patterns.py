"""Patterns of sparsity: which weights may be dropped one by one, and which only together.

A pattern turns costs (what dropping each weight would do; they add up) into a mask that keeps the dearest:

    unstructured   every weight for itself, compared over the whole weight or within its row
    n:m            of every m neighbours in a row the n dearest stay
    tiles          R rows x C columns stay or go as one, by the sum of their costs; whole rows and whole
                   columns are tiles as wide or as high as the weight

The share that is dropped is a share of the whole weight: what an earlier mask dropped counts, and is dropped
first. Ties go to the earlier weight, so a mask is a function of the costs alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Literal, final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor


@final
@dataclass(frozen=True)
class Unstructured:
    """Every weight for itself. scope: what it is compared with, the whole weight or its row."""

    scope: Literal["layer", "row"] = "layer"

    def __str__(self) -> str:
        return f"unstructured per {self.scope}"

    def misfit(self, rows: int, columns: int) -> str:
        return ""

    def keep(self, cost: Float[Tensor, "out in_"], sparsity: float,
             allowed: Bool[Tensor, "out in_"] | None = None) -> Bool[Tensor, "out in_"]:
        sets = _last(cost, allowed).reshape(-1, cost.shape[1] if self.scope == "row" else cost.numel())
        kept = largest(sets, sets.shape[1] - round(sparsity * sets.shape[1])).view_as(cost)
        return kept if allowed is None else kept & allowed


@final
@dataclass(frozen=True)
class NM:
    """Of every ``m`` neighbours in a row, ``n`` stay. The pattern decides the sparsity: ``1 - n/m``."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def misfit(self, rows: int, columns: int) -> str:
        if columns % self.m == 0:
            return ""
        return f"rows of {columns} weights do not divide into groups of {self.m}; {_remedy(columns, self.m)}"

    def keep(self, cost: Float[Tensor, "out in_"], sparsity: float,
             allowed: Bool[Tensor, "out in_"] | None = None) -> Bool[Tensor, "out in_"]:
        kept = largest(_last(cost, allowed).reshape(-1, self.m), self.n).view_as(cost)
        return kept if allowed is None else kept & allowed


@final
@dataclass(frozen=True)
class Tiles:
    """``rows`` x ``columns`` weights stay or go as one (0: all that the weight has)."""

    rows: int
    columns: int

    def __str__(self) -> str:
        if self.rows and self.columns:
            return f"block {self.rows}x{self.columns}"
        axis, count = ("row", self.rows) if self.rows else ("column", self.columns)
        return axis if count == 1 else f"{axis} {count}"

    def misfit(self, rows: int, columns: int) -> str:
        for axis, have, size in (("rows", rows, self.rows), ("columns", columns, self.columns)):
            if size and have % size:
                return f"{have} {axis} do not divide into groups of {size}; {_remedy(have, size)}"
        return ""

    def keep(self, cost: Float[Tensor, "out in_"], sparsity: float,
             allowed: Bool[Tensor, "out in_"] | None = None) -> Bool[Tensor, "out in_"]:
        """Drop the cheapest tiles until the share is reached, to the nearest tile."""
        height, width = self.rows or cost.shape[0], self.columns or cost.shape[1]

        def summed(x: Tensor) -> Tensor:
            return x.view(x.shape[0] // height, height, x.shape[1] // width, width).sum((1, 3))

        total = summed(cost if allowed is None else torch.where(allowed, cost, 0.0))
        size = torch.full_like(total, height * width) if allowed is None else summed(allowed.float())
        order = torch.where(size > 0, total, -torch.inf).flatten().argsort(stable=True)
        filled = size.flatten()[order].double()
        wanted = sparsity * cost.numel() - (cost.numel() - float(filled.sum()))
        dropped = order[filled.cumsum(0) - filled / 2 < wanted]
        kept = torch.ones_like(total, dtype=torch.bool).flatten().index_fill(0, dropped, False)
        kept = kept.view_as(total).repeat_interleave(height, 0).repeat_interleave(width, 1)
        return kept if allowed is None else kept & allowed


Pattern = Unstructured | NM | Tiles


def largest(cost: Float[Tensor, "sets n"], count: int) -> Bool[Tensor, "sets n"]:
    """True at the ``count`` largest of every set; of equals, the earlier ones."""
    if count <= 0 or count >= cost.shape[1]:
        return torch.full_like(cost, count > 0, dtype=torch.bool)
    place = cost.shape[1] - count
    # numpy's partition: torch's topk and kthvalue carry an index of 8 bytes beside every weight
    border = torch.from_numpy(np.partition(cost.numpy(), place, axis=1)[:, place:place + 1].copy())
    kept = cost >= border
    if int(kept.sum()) == count * cost.shape[0]:
        return kept
    above = cost > border
    room = count - above.sum(1, keepdim=True)
    tied = kept & ~above
    return above | (tied & (tied.cumsum(1, dtype=torch.int32) <= room))


def _last(cost: Tensor, allowed: Tensor | None) -> Tensor:
    """The costs, with what is dropped already below everything else."""
    return cost if allowed is None else cost.masked_fill(~allowed, -torch.inf)


def _remedy(have: int, size: int) -> str:
    fitting = gcd(have, size)
    return f"use groups of {fitting}, or leave this weight out" if fitting > 1 else "leave this weight out"
