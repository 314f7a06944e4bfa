"""Between covering and picking: the generalised Jensen-Shannon divergence.

    m = beta p + (1 - beta) q,        loss = beta KL(p | m) + (1 - beta) KL(q | m)

where p is the teacher's distribution and q the student's. It is bounded, so that no single token decides a
step. Divided by beta it tends to the forward KL as beta goes to 0, divided by 1 - beta to the reverse KL as
beta goes to 1.

Paper: Agarwal et al. 2024, "On-Policy Distillation of Language Models: Learning from Self-Generated
Mistakes", eq. 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from rarefy.core.errors import RecipeError
from rarefy.core.nodes import Node
from rarefy.core.signals import Signals, distributions
from rarefy.numerics import divergences


@dataclass(frozen=True)
class JensenShannon:
    """Generalised Jensen-Shannon divergence. Shapes: logits [units, classes] of both -> [units].

    beta: the teacher's share of the mixture.
    """

    beta: float = 0.5

    edits: ClassVar[tuple[type[Node], ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    beats: ClassVar[str] = ""
    scope: ClassVar[str] = "objective"

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise RecipeError(f"jensen_shannon: beta={self.beta} must lie between 0 and 1; the ends are "
                              "forward_kl and reverse_kl")

    def loss(self, student: Signals, teacher: Signals, learned: nn.Module | None) -> Float[Tensor, " units"]:
        return divergences.jensen_shannon(*distributions(student, teacher), self.beta)
