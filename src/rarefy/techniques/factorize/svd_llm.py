"""SVD-LLM: the matrix of low rank whose outputs are nearest, on the inputs that really come.

With ``H = X X^T`` the second moment of the inputs and ``C C^T = H`` its Cholesky factor, the columns of
``C^-1 X`` are white, so each singular value of W C is exactly what dropping its component costs:

    W C = U S V^T,    || (W - L R) X ||_F^2 = sum_{k > r} s_k^2    for    L R = U_r S_r V_r^T C^-1,

and no matrix of rank r does better. Then R is stored as its dtype rounds it, and L is the least-squares fit
to what was stored, the paper's closed-form update:

    L = W H R^T (R H R^T)^-1.

All of it in float64: activations are so correlated that in float32 most Grams have no Cholesky factor. H gets
a share of its mean diagonal added, which also keeps the sample from being fitted too closely.

Paper: Wang et al. 2024, "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model
Compression", section 3 and algorithms 1-3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from rarefy.core.edit import Edited, Leaf
from rarefy.core.factors import Extent, dtype_of, edited, ladder, stored, wanted, whitened
from rarefy.core.nodes import Dense, Node, Product
from rarefy.core.nouns import Choice, Option
from rarefy.numerics.decompose import refit, spectrum

UNDAMPED = 1e-6  # the planner wants the loss itself, and not what damping adds to it


@dataclass(frozen=True)
class SVDLLM:
    """Activation-whitened SVD; one of rank, energy and ratio gives its size, none of them means ratio 0.8.

    Shapes: leaf target [out, in] -> Product of [out, rank] and [rank, in], in the leaf's dtype.

    rank: number of components. energy: least share of the squared singular values of the whitened weight,
    that is of the outputs' energy. ratio: share of the leaf's bits that the factors may cost. multiple: the
    rank is a multiple of this (pass a quantizer's group to quantize the factors). damping: share of the
    Gram's mean diagonal added to it; climbs 10x and 100x when the factorization fails, and then falls back to
    the plain SVD, which the receipt lists.
    """

    rank: int | None = None
    energy: float | None = None
    ratio: float | None = None
    multiple: int = 1
    damping: float = 0.01

    edits: ClassVar[tuple[type[Node], ...]] = (Dense,)
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    beats: ClassVar[str] = "svd"
    whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._extent()

    def _extent(self) -> Extent:
        return Extent(self.rank, self.energy, self.ratio, self.multiple)

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        weight, dtype = wanted(leaf), dtype_of(leaf)
        C, notes = whitened(leaf, self.damping)
        found = spectrum(weight, factor=C)
        unit = sum(weight.shape) * dtype.itemsize * 8
        rank = self._extent().rank_for(leaf, min(weight.shape), unit, found.energies)
        right = stored(leaf.site, found.cut(rank)[1], dtype)
        left = stored(leaf.site, refit(weight, right.dense(), C), dtype)
        return edited(leaf, Product(left, right), *notes)

    @classmethod
    def options(cls, leaf: Leaf, choices: Mapping[str, Choice]) -> Iterator[Option]:
        """A ladder of ranks with factors in float16, the damage of each a sum of what is cut.

        Row i of the residual costs ``1/2 f_i sum_{k > r} s_k^2 U_ik^2``, so all ranks share one
        decomposition.
        """
        if all(choice.stored is not None for choice in choices.values()):
            return
        assert leaf.evidence is not None and leaf.evidence.fisher is not None
        C, _ = whitened(leaf, UNDAMPED)
        if C is not None:
            cost = 0.5 * spectrum(leaf.target, factor=C).weighed(leaf.evidence.fisher)
            yield from ladder(leaf, choices, "svd_llm", cost)
