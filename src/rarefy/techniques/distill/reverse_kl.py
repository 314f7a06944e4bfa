"""Say nothing that the teacher finds unlikely: KL from student to teacher.

    loss = sum_v q(v) (log q(v) - log p(v))

where p is the teacher's distribution and q the student's. A student too small for all of the teacher's modes
picks some of them instead of putting mass between them, which is what one wants of generated text.

Paper: Gu et al. 2024, "MiniLLM: Knowledge Distillation of Large Language Models", section 2.1 (here for each
token given the same text, not over sampled sequences).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from rarefy.core.nodes import Node
from rarefy.core.signals import Signals, distributions
from rarefy.numerics.divergences import kl


@dataclass(frozen=True)
class ReverseKL:
    """KL from student to teacher. Shapes: logits [units, classes] of both -> [units]."""

    edits: ClassVar[tuple[type[Node], ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    beats: ClassVar[str] = ""
    scope: ClassVar[str] = "objective"

    def loss(self, student: Signals, teacher: Signals, learned: nn.Module | None) -> Float[Tensor, " units"]:
        p, q = distributions(student, teacher)
        return kl(q, p)
