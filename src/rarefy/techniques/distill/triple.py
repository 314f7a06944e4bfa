"""DistilBERT's three losses: the teacher's answer, the right answer, the direction of the states.

    loss = a_soft T^2 KL(teacher | student at temperature T) + a_hard (-log q(label)) + a_cos (1 - cos(h, h'))

The weights are those of the paper's training script; without labels the second term is left out.

Paper: Sanh et al. 2019, "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter",
section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from rarefy.core.errors import RecipeError
from rarefy.core.nodes import Node
from rarefy.core.signals import Signals, distributions
from rarefy.numerics.divergences import cosine, cross_entropy, kl


@dataclass(frozen=True)
class Triple:
    """The triple loss. Shapes: logits [units, classes], hidden [batch, length, width] of both -> [units].

    soft: weight of the soft labels. hard: weight of the labels. angle: weight of the cosine. temperature: of
    the soft labels.
    """

    soft: float = 5.0
    hard: float = 2.0
    angle: float = 1.0
    temperature: float = 2.0

    edits: ClassVar[tuple[type[Node], ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "hidden"})
    beats: ClassVar[str] = ""
    scope: ClassVar[str] = "objective"

    def __post_init__(self) -> None:
        if min(self.soft, self.hard, self.angle) < 0 or not self.temperature > 0:
            raise RecipeError("triple: weights must not be negative and the temperature must be positive")

    def loss(self, student: Signals, teacher: Signals, learned: nn.Module | None) -> Float[Tensor, " units"]:
        assert student.rows is not None
        p, q = distributions(student, teacher, self.temperature)
        own, goal = student.hidden[-1].float(), teacher.hidden[-1].float()
        if own.shape != goal.shape:
            raise RecipeError(f"triple: states of {own.shape[-1]} and {goal.shape[-1]} numbers make no "
                              "angle; use soft_labels with hidden_states")
        total = self.soft * self.temperature**2 * kl(p, q) + self.angle * student.per_unit(cosine(own, goal))
        if student.labels is None:
            return total
        return total + self.hard * cross_entropy(student.rows, student.labels)
