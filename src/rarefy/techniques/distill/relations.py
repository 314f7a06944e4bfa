"""How tokens relate inside the last block: queries to queries, keys to keys, values to values.

    R = softmax(A A^T / sqrt(d)),    A one of Q, K, V cut into ``heads`` relation heads
    loss = sum over Q, K, V of KL(R_teacher | R_student), mean over heads and tokens

Relations have no width, so no projection is needed, and only the last block is imitated: how the student
gets there is its own business. The teacher's number of heads does not matter either.

Paper: Wang et al. 2021, "MiniLMv2: Multi-Head Self-Attention Relation Distillation", eq. 5 to 7; value
relations are those of Wang et al. 2020, "MiniLM", eq. 9.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rarefy.core.errors import RecipeError
from rarefy.core.nodes import Node
from rarefy.core.signals import Signals
from rarefy.numerics.divergences import scores, scores_kl, split_heads


@dataclass(frozen=True)
class Relations:
    """Self-relations of the last block. Shapes: [batch, length, width] per kind of both -> [units].

    heads: relation heads into which both sides are cut (0: the teacher's attention heads). kinds: which
    vectors are related, of q, k, v.
    """

    heads: int = 0
    kinds: str = "qkv"

    edits: ClassVar[tuple[type[Node], ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset({"relations"})
    beats: ClassVar[str] = ""
    scope: ClassVar[str] = "objective"

    def __post_init__(self) -> None:
        if not self.kinds or set(self.kinds) - set("qkv"):
            raise RecipeError(f"relations: kinds={self.kinds!r}; choose of q, k and v")

    def loss(self, student: Signals, teacher: Signals, learned: nn.Module | None) -> Float[Tensor, " units"]:
        heads, losses = self.heads or teacher.heads, []
        for kind in self.kinds:
            name = {"q": "queries", "k": "keys", "v": "values"}[kind]
            tables = []
            for side in (teacher, student):
                last = getattr(side, name)[-1].float()
                if last.shape[-1] % heads:
                    raise RecipeError(f"relations: {name} of width {last.shape[-1]} do not divide into "
                                      f"{heads} heads; set heads to a divisor of both widths")
                vectors = split_heads(last, heads)
                tables.append(scores(vectors, vectors))
            losses.append(scores_kl(tables[0], tables[1], student.tokens()))
        return student.per_unit(torch.stack(losses).sum(0))
