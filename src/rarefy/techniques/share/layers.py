"""Let layers share their matrices: ALBERT made of a trained model, with small corrections if wanted.

Of ``group`` consecutive layers all use one matrix W at each place, stored once. Layers are the blocks of a
language model or an encoder, the members of any list of modules, or the layers of a recurrent one; where a
weight has another shape (the first of a recurrent layer's), it stays alone. A trained model's W_1 .. W_n with
second moments G_l of their inputs become

    average    W = 1/n sum_l W_l
    first      W = W_1
    fit        W = argmin sum_l |(W - W_l) X_l|^2 = (sum_l W_l G_l) (sum_l G_l)^-1

and, where ``rank`` is not 0, W + B_l A_l in every layer but the first, which stores W and uses it as it is:
B_l A_l is the best of its rank for what is missing, min |(W_l - W - B_l A_l) X_l|^2, from the SVD of
(W_l - W) G_l^(1/2). Norms and biases stay each layer's own: they are few, and let shared layers differ.

What is left computes as long as before and answers badly; it is a start for distillation from the original.

Paper: Lan et al. 2020, "ALBERT", section 3.1; Bae et al. 2025, "Relaxed Recursive Transformers", sections
2.2 and 2.3 (starts; corrections of low rank from an SVD, there without the inputs' second moment).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nouns import Evidence
from rarefy.core.structure import Stack
from rarefy.numerics.linear import damped

ATTENTION = frozenset({"q", "k", "v", "o", "qkv"})
FFN = frozenset({"gate", "up", "down", "gate_up"})
Correction = tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in_"]]


@dataclass(frozen=True)
class Layers:
    """Share the matrices of consecutive layers.

    Shapes: share gives [out, in] and factors [out, rank], [rank, in]. what: all, attention or ffn. group: how
    many layers share (0: all of them). start: average, first or fit. rank: of each layer's own correction
    (0: none). damping: share of the mean diagonal added to each second moment.
    """

    what: str = "all"
    group: int = 0
    start: str = "fit"
    rank: int = 0
    damping: float = 0.01

    scope: ClassVar[str] = "stack"
    edits: ClassVar[tuple[type[Stack], ...]] = (Stack,)
    beats: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, value, known in (("what", self.what, ("all", "attention", "ffn")),
                                   ("start", self.start, ("average", "first", "fit"))):
            if value not in known:
                raise RecipeError(f"{name} {value!r}: choose one of {', '.join(known)}")
        if self.group < 0 or self.group == 1 or self.rank < 0:
            raise RecipeError(f"group={self.group}, rank={self.rank}: a group is of 2 blocks or more (0: "
                              "all), a rank 0 or more")

    @property
    def needs(self) -> frozenset[str]:
        """The Gram, where anything is fitted to what arrives."""
        return frozenset({"gram"} if self.start == "fit" or self.rank else set())

    def chosen(self, role: str) -> bool:
        """Whether weights of a role are shared."""
        return self.what == "all" or role in (ATTENTION if self.what == "attention" else FFN)

    def groups(self, blocks: int) -> tuple[range, ...]:
        """Which blocks share; a single one that is left over at the end keeps its own."""
        step = self.group or blocks
        if blocks < 2:
            raise EditError(f"there is {blocks} block; sharing takes two")
        found = tuple(range(first, min(first + step, blocks)) for first in range(0, blocks, step))
        return tuple(group for group in found if len(group) > 1)

    def share(self, stack: Stack) -> tuple[Float[Tensor, "out in_"], tuple[Correction | None, ...]]:
        """The matrix that all use, and what each block behind the first adds to it."""
        most = min(stack.weights.shape[1:])
        if self.rank >= most:
            raise EditError(f"{stack.sites[0]}: rank {self.rank} corrects nothing cheaply in a matrix of "
                            f"rank {most}; lower it")
        moments = [self._moment(seen, stack.weights.shape[2]) for seen in stack.evidence]
        match self.start:
            case "average":
                W = stack.weights.double().mean(0)
            case "first":
                W = stack.weights[0].double()
            case _:
                total = sum(W_l.double() @ G for W_l, G in zip(stack.weights, moments, strict=True))
                W = torch.linalg.solve(sum(moments), total.T).T
        if not self.rank:
            return W.float(), (None,) * (len(stack.sites) - 1)
        return W.float(), tuple(self._correction(W_l.double() - W, G)
                                for W_l, G in zip(stack.weights[1:], moments[1:], strict=True))

    def _moment(self, seen: Evidence | None, width: int) -> Float[Tensor, "in_ in_"]:
        if seen is None:
            return torch.eye(width, dtype=torch.float64)
        return damped(seen.gram / max(seen.tokens, 1), self.damping)

    def _correction(self, missing: Tensor, G: Tensor) -> Correction:
        L = torch.linalg.cholesky(G)
        U, S, V = torch.linalg.svd(missing @ L, full_matrices=False)
        right = torch.linalg.solve_triangular(L, V[:self.rank], upper=False, left=False)
        return (U[:, :self.rank] * S[:self.rank]).float(), right.float()
