"""SVD: the nearest matrix of low rank, every weight counting alike.

Of all matrices of rank r the truncated singular value decomposition

    W ~ L R,    L = U_r S_r^1/2  [out, r],    R = S_r^1/2 V_r^T  [r, in]

has the least ``||W - L R||_F^2 = sum_{k > r} s_k^2``. It pays where ``r (out + in) < out in``. What the
inputs look like is not asked: a direction that no activation ever has costs as much as one that all of them
have. That is what ``svd_llm`` adds. An embedding becomes a narrow table and a matrix that widens its rows.

Paper: Eckart & Young 1936, "The approximation of one matrix by another of lower rank"; Denton et al. 2014,
"Exploiting Linear Structure Within Convolutional Networks for Efficient Evaluation", section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rarefy.core.edit import Edited, Leaf
from rarefy.core.factors import Extent, dtype_of, edited, stored, wanted
from rarefy.core.nodes import Dense, Node, Product
from rarefy.numerics.decompose import spectrum


@dataclass(frozen=True)
class SVD:
    """Truncated SVD; one of rank, energy and ratio gives its size, none of them means ratio 0.8.

    Shapes: leaf target [out, in] -> Product of [out, rank] and [rank, in], in the leaf's dtype.

    rank: number of components. energy: least share of the squared singular values that they hold. ratio:
    share of the leaf's bits that the factors may cost. multiple: the rank is a multiple of this (pass a
    quantizer's group to quantize the factors).
    """

    rank: int | None = None
    energy: float | None = None
    ratio: float | None = None
    multiple: int = 1

    edits: ClassVar[tuple[type[Node], ...]] = (Dense,)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self._extent()

    def _extent(self) -> Extent:
        return Extent(self.rank, self.energy, self.ratio, self.multiple)

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        found, dtype = spectrum(wanted(leaf)), dtype_of(leaf)
        unit = sum(leaf.target.shape) * dtype.itemsize * 8
        rank = self._extent().rank_for(leaf, min(leaf.target.shape), unit, found.energies)
        left, right = found.cut(rank)
        return edited(leaf, Product(stored(leaf.site, left, dtype), stored(leaf.site, right, dtype)))
