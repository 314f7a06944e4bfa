"""Repair: a small product of low rank that supplies what an earlier step lost.

Whatever a weight became, N, it left a residual ``E = W - N``. Add the matrix of rank r that is nearest to it
on the inputs that come:

    W ~ N + L R,    E C = U S V^T,    C C^T = X X^T,    L R = U_r S_r V_r^T C^-1.

The residual of rounding is nearly white as a matrix, and its plain SVD gains little; whitened by the inputs
its singular values fall steeply, because few directions carry most of the activations' energy. N may be
anything: quantized, pruned (the product lies outside the mask and supplies what was dropped), factored,
shared, already repaired. N itself stays as it is.

Paper: Zhang et al. 2024, "LQER: Low-Rank Quantization Error Reconstruction for LLMs", section 3; Liu et al.
2024, "EoRA: Training-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation", eq. 3-5;
Mozaffari et al. 2024, "SLiM", section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rarefy.core.codebooks import Clustered, Hashed
from rarefy.core.edit import Edited, Leaf
from rarefy.core.errors import RecipeError
from rarefy.core.factors import Extent, stored, wanted, whitened
from rarefy.core.nodes import Dense, Masked, Node, Product, Quantized, Sum
from rarefy.core.tensors import CP, TensorTrain, Tucker
from rarefy.numerics.decompose import refit, spectrum

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Repair:
    """Low-rank repair; one of rank, energy and ratio gives its size, none of them means ratio 0.25.

    Shapes: any node [out, in] -> Sum of that node and a Product of [out, rank] and [rank, in].

    rank: number of components. energy: least share of the residual's energy at the outputs that they supply.
    ratio: bits of the factors as a share of the bits of what is repaired. multiple: the rank is a multiple of
    this. dtype: of the factors: float16, bfloat16 or float32. damping: as in svd_llm, and with the same
    fallback; without calibration evidence the SVD is the plain one, and the receipt says so.
    """

    rank: int | None = None
    energy: float | None = None
    ratio: float | None = None
    multiple: int = 1
    dtype: str = "float16"
    damping: float = 0.01

    edits: ClassVar[tuple[type[Node], ...]] = (Dense, Quantized, Masked, Sum, Product, Clustered, Hashed,
                                               Tucker, CP, TensorTrain)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self._extent()
        if self.dtype not in FLOATS:
            raise RecipeError(f"dtype={self.dtype!r}: factors are stored in one of {', '.join(FLOATS)}")

    def _extent(self) -> Extent:
        return Extent(self.rank, self.energy, self.ratio, self.multiple, default=0.25)

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        residual = wanted(leaf) - leaf.node.dense()
        if not bool(residual.any()):
            return Edited(leaf.node, "nothing is left over: not repaired")
        C, notes = whitened(leaf, self.damping)
        found, dtype = spectrum(residual, factor=C), FLOATS[self.dtype]
        unit = sum(residual.shape) * dtype.itemsize * 8
        rank = self._extent().rank_for(leaf, min(residual.shape), unit, found.energies)
        right = stored(leaf.site, found.cut(rank)[1], dtype)
        left = stored(leaf.site, refit(residual, right.dense(), C), dtype)
        terms = leaf.node.terms if isinstance(leaf.node, Sum) else (leaf.node,)
        return Edited(Sum((*terms, Product(left, right))), "; ".join(notes))
