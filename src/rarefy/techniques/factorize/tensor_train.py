"""Tensor train: a matrix by the digits of its rows and columns, one small core for each pair of digits.

Write row o and column i in mixed bases, ``o = (o_1 ... o_d)`` and ``i = (i_1 ... i_d)``. Then

    W[o, i] ~ G_1[o_1, i_1] G_2[o_2, i_2] ... G_d[o_d, i_d],

each G_k[o_k, i_k] a matrix of r_(k-1) x r_k, r_0 = r_d = 1. A row of an embedding is a short chain of
products: looking one up never rebuilds the table. TT-SVD finds the cores from left to right, one truncated
SVD for each cut; the error is at most the sum of what the cuts lose.

The digits are the most even factors of the sizes, without padding; rows ascend and columns descend, so that
the pairs are even as well. Ranks by energy: all cuts together lose at most ``1 - energy``. By ratio: rank by
rank at the cut that gains most energy for its bits.

Paper: Oseledets 2011, "Tensor-Train Decomposition", algorithm 1; Novikov et al. 2015, "Tensorizing Neural
Networks", section 3-4; Hrinchuk et al. 2020, "Tensorized Embedding Layers", section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from rarefy.core.edit import Edited, Leaf
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.factors import Extent, dtype_of, edited, rank_of_energy, stored, wanted
from rarefy.core.nodes import Dense, Node
from rarefy.core.tensors import TensorTrain as TensorTrainNode
from rarefy.numerics.decompose import digits, paired, prime_factors, train, train_energies


@dataclass(frozen=True)
class TensorTrain:
    """TT-SVD of a matrix; one of rank, energy and ratio gives its size, none of them means ratio 0.8.

    Shapes: leaf target [out, in] -> TensorTrain of cores [rank_k * rows_k, columns_k * rank_k+1], in the
    leaf's dtype.

    rank: largest rank of a cut. energy: least share of the squared weights that the train holds. ratio: share
    of the leaf's bits that the cores may cost. cores: how many digits rows and columns are cut into.
    row_digits, column_digits: the bases, instead of the most even ones.
    """

    rank: int | None = None
    energy: float | None = None
    ratio: float | None = None
    cores: int = 3
    row_digits: Sequence[int] | None = None
    column_digits: Sequence[int] | None = None

    edits: ClassVar[tuple[type[Node], ...]] = (Dense,)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self._extent()
        for name, told in (("row_digits", self.row_digits), ("column_digits", self.column_digits)):
            if told is not None and len(told) != self.cores:
                raise RecipeError(f"{name}={list(told)}: cores={self.cores} takes {self.cores} of them")
        if self.cores < 2:
            raise RecipeError(f"cores={self.cores}: a train has 2 or more; for one matrix use svd")

    def _extent(self) -> Extent:
        return Extent(self.rank, self.energy, self.ratio)

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        weight, dtype = wanted(leaf), dtype_of(leaf)
        rows = self._digits(leaf.site, "row", weight.shape[0], self.row_digits)
        columns = self._digits(leaf.site, "column", weight.shape[1], self.column_digits)
        if self.column_digits is None:
            columns = columns[::-1]
        tensor = paired(weight, rows, columns)
        cores = []
        for core, m, n in zip(train(tensor, self._ranks(leaf, tensor)), rows, columns, strict=True):
            values = core.reshape(core.shape[0] * m, n * core.shape[2])
            cores.append(stored(leaf.site, values, dtype))
        return edited(leaf, TensorTrainNode(tuple(cores), rows, columns))

    def _digits(self, site: str, axis: str, size: int, told: Sequence[int] | None) -> tuple[int, ...]:
        """The bases of one axis, ascending unless they were told."""
        if told is not None:
            if prod(told) != size or min(told) < 1:
                raise EditError(f"{site}: {axis}_digits={list(told)} make {prod(told)}, not {size} {axis}s; "
                                "pass factors of that")
            return tuple(told)
        found = digits(size, self.cores)
        if found is None:
            factors = prime_factors(size)
            made = " x ".join(map(str, factors))
            remedy = (f"pass cores={len(factors)}" if len(factors) > 1
                      else "no train is cut from a prime; use svd or svd_llm")
            raise EditError(f"{site}: {size} {axis}s = {made} cannot be cut into cores={self.cores} digits; "
                            f"{remedy}")
        return found

    def _ranks(self, leaf: Leaf, tensor: Tensor) -> list[int]:
        """The rank of every cut."""
        full = [min(prod(tensor.shape[:k]), prod(tensor.shape[k:])) for k in range(1, tensor.ndim)]
        if self.rank is not None:
            if self.rank > max(full):
                raise EditError(f"{leaf.site}: rank={self.rank} is above the full ranks {full}; "
                                f"pass rank={max(full)} or less")
            return [min(self.rank, each) for each in full]
        energies = train_energies(tensor)
        if self.energy is not None:
            share = 1 - (1 - self.energy) / len(full)
            return [rank_of_energy(each, share) for each in energies]
        allowed = self._extent().allowed(leaf)
        assert allowed is not None
        width = dtype_of(leaf).itemsize * 8
        self._extent().afford(leaf, sum(tensor.shape) * width, allowed)
        return _grown(tensor.shape, [each.tolist() for each in energies], allowed // width)


def _grown(sizes: Sequence[int], energies: list[list[float]], allowed: int) -> list[int]:
    """Ranks grown one by one at the cut with the most energy per number, while the cores fit ``allowed``."""
    ranks, left = [1] * len(energies), allowed - sum(sizes)
    while True:
        edge = [1, *ranks, 1]
        prices = [sizes[k] * edge[k] + sizes[k + 1] * edge[k + 2] for k in range(len(ranks))]
        open_ = [k for k, price in enumerate(prices) if price <= left and ranks[k] < len(energies[k])]
        if not open_:
            return ranks
        best = max(open_, key=lambda k: energies[k][ranks[k]] / prices[k])
        left -= prices[best]
        ranks[best] += 1
