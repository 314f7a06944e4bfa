"""Look where the teacher looks: match the scores of attention, before the softmax.

    loss = mean over matched blocks, heads and keys of (A - A')^2,        A = Q K^T / sqrt(d)

The scores are matched and not their softmax, which learned faster in the paper. It needs as many heads on
both sides, and is for encoders: rotary embeddings change queries and keys behind the projections that are
looked at.

Paper: Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language Understanding", eq. 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rarefy.core.errors import RecipeError
from rarefy.core.nodes import Node
from rarefy.core.signals import Signals, matched_layers
from rarefy.numerics.divergences import scores, scores_difference, split_heads


@dataclass(frozen=True)
class Attention:
    """Matched attention scores. Shapes: queries, keys [batch, length, width] per block of both -> [units]."""

    edits: ClassVar[tuple[type[Node], ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    beats: ClassVar[str] = ""
    scope: ClassVar[str] = "objective"

    def loss(self, student: Signals, teacher: Signals, learned: nn.Module | None) -> Float[Tensor, " units"]:
        if student.heads != teacher.heads:
            raise RecipeError(f"attention: the student has {student.heads} heads, the teacher "
                              f"{teacher.heads}; use relations, which cuts both alike")
        goals = matched_layers(len(student.queries), len(teacher.queries))
        real = student.tokens()
        losses = [scores_difference(_scores(student, block), _scores(teacher, goal - 1), real)
                  for block, goal in enumerate(goals)]
        return student.per_unit(torch.stack(losses).mean(0))


def _scores(signals: Signals, block: int) -> Tensor:
    return scores(split_heads(signals.queries[block].float(), signals.heads),
                  split_heads(signals.keys[block].float(), signals.heads))
