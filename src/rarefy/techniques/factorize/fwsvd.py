"""FWSVD: low rank in which a weight counts by how much the likelihood depends on it.

The Fisher information of a weight, F_ij = E[(d log p / d W_ij)^2], says what changing it costs. A low-rank
fit under weights F has no closed form in general, so the paper gives all weights of one input the same. Here
the Fisher is an outer product (K-FAC's independence of inputs x and output gradients g),

    F_ij = f_i h_j,    f_i = E[g_i^2],    h_j = E[x_j^2],

and then the closed form needs no such compromise: with a = sqrt(f), b = sqrt(h)

    min_{L R} sum_ij F_ij (W - L R)_ij^2    is solved by    diag(a) W diag(b) = U S V^T,
    L = diag(a)^-1 U_r S_r^1/2,    R = S_r^1/2 V_r^T diag(b)^-1.

Inputs that move together are still counted one by one; ``svd_llm`` counts them together. An embedding has no
such inputs: row v is read as often as token v occurs, f_v, and h is the squared gradient behind each column,
so that what is minimised is all there is, and the planner is offered it there. The table becomes a narrow one
and a matrix that widens the rows that are looked up, as ALBERT's does.

Paper: Hsu et al. 2022, "Language model compression with weighted low-rank factorization", section 3 and eq.
7; the factored Fisher is that of Martens & Grosse 2015, "K-FAC"; Lan et al. 2020, "ALBERT", section 3.1
(factorized embeddings).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.core.edit import Edited, Leaf
from rarefy.core.factors import Extent, dtype_of, edited, ladder, stored, wanted
from rarefy.core.nodes import Dense, Node, Product
from rarefy.core.nouns import Choice, Option
from rarefy.numerics.decompose import spectrum

FLOOR = 1e-4  # of the mean: an output or input that the sample did not need is not free


@dataclass(frozen=True)
class FWSVD:
    """Fisher-weighted SVD; one of rank, energy and ratio gives its size, none of them means ratio 0.8.

    Shapes: leaf target [out, in] -> Product of [out, rank] and [rank, in], in the leaf's dtype.

    rank: number of components. energy: least share of the squared singular values of the weighted matrix.
    ratio: share of the leaf's bits that the factors may cost. multiple: the rank is a multiple of this.
    inputs: weigh the columns by their inputs' mean square as well, not only the rows by the Fisher.
    """

    rank: int | None = None
    energy: float | None = None
    ratio: float | None = None
    multiple: int = 1
    inputs: bool = True

    edits: ClassVar[tuple[type[Node], ...]] = (Dense,)
    needs: ClassVar[frozenset[str]] = frozenset({"fisher"})
    beats: ClassVar[str] = "svd"
    whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._extent()

    def _extent(self) -> Extent:
        return Extent(self.rank, self.energy, self.ratio, self.multiple)

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        assert leaf.evidence is not None and leaf.evidence.fisher is not None
        a, note = _root(leaf.evidence.fisher, "the Fisher is zero: all outputs count alike")
        b, also = _root(leaf.evidence.gram.diagonal(), "no input was ever active: all inputs count alike")
        scaled = (wanted(leaf) * b).float() if self.inputs else wanted(leaf)
        found, dtype = spectrum(scaled, rows=a), dtype_of(leaf)
        unit = sum(leaf.target.shape) * dtype.itemsize * 8
        rank = self._extent().rank_for(leaf, min(leaf.target.shape), unit, found.energies)
        left, right = found.cut(rank)
        right = right / b if self.inputs else right
        node = Product(stored(leaf.site, left, dtype), stored(leaf.site, right, dtype))
        return edited(leaf, node, note, also if self.inputs else "")

    @classmethod
    def options(cls, leaf: Leaf, choices: Mapping[str, Choice]) -> Iterator[Option]:
        """A ladder of ranks where columns count one by one: at embeddings.

        Then ``1/2 sum_{k > r} s_k^2`` of the weighted matrix is the damage itself, in the means of f and h.
        """
        assert leaf.evidence is not None and leaf.evidence.fisher is not None
        fisher, diagonal = leaf.evidence.fisher, leaf.evidence.gram.diagonal()
        if all(choice.stored is not None for choice in choices.values()) or not leaf.evidence.separate:
            return
        a, b = _root(fisher, "")[0], _root(diagonal, "")[0]
        mean = float(fisher.mean()) * float(diagonal.mean()) / max(leaf.evidence.tokens, 1)
        energies = spectrum((wanted(leaf) * b).float(), rows=a).energies
        yield from ladder(leaf, choices, "fwsvd", 0.5 * mean * energies)


def _root(importance: Float[Tensor, " n"], note: str) -> tuple[Float[Tensor, " n"], str]:
    """Square roots with a mean square of one, none below the floor; the note if all are zero."""
    mean = importance.double().clamp_min(0).mean()
    if not 0 < float(mean) < float("inf"):
        return torch.ones_like(importance, dtype=torch.float64), note
    return (importance.double() / mean).clamp_min(FLOOR).sqrt(), ""
