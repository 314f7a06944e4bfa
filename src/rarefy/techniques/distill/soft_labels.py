"""Learn the teacher's whole answer, softened: how it is wrong says what it knows.

    loss = T^2 KL(softmax(z_teacher / T) | softmax(z_student / T))

The temperature T raises the probabilities of what the teacher thinks unlikely but not absurd. The gradient
shrinks by 1 / T^2, which the factor undoes, so that T can be changed without changing the weight beside hard
labels.

Paper: Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network", section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from rarefy.core.errors import RecipeError
from rarefy.core.nodes import Node
from rarefy.core.signals import Signals, distributions
from rarefy.numerics.divergences import kl


@dataclass(frozen=True)
class SoftLabels:
    """Soft labels. Shapes: logits [units, classes] of both -> [units].

    temperature: how much the answers are softened.
    """

    temperature: float = 2.0

    edits: ClassVar[tuple[type[Node], ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    beats: ClassVar[str] = ""
    scope: ClassVar[str] = "objective"

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise RecipeError(f"soft_labels: temperature={self.temperature} must be positive")

    def loss(self, student: Signals, teacher: Signals, learned: nn.Module | None) -> Float[Tensor, " units"]:
        p, q = distributions(student, teacher, self.temperature)
        return self.temperature**2 * kl(p, q)
