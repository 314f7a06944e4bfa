"""Cover everything that the teacher finds possible: KL from teacher to student.

    loss = sum_v p(v) (log p(v) - log q(v))

where p is the teacher's distribution and q the student's. Where p is large q must not be small, so the
student spreads over all of the teacher's modes. This is the KL that this package reports of every compressed
model, so it is the default of recovery.

Paper: Kullback & Leibler 1951, "On Information and Sufficiency", eq. 2.4; as a loss for language models Gu
et al. 2024, "MiniLLM", section 2.1.
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
class ForwardKL:
    """KL from teacher to student. Shapes: logits [units, classes] of both -> [units]."""

    edits: ClassVar[tuple[type[Node], ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    beats: ClassVar[str] = ""
    scope: ClassVar[str] = "objective"

    def loss(self, student: Signals, teacher: Signals, learned: nn.Module | None) -> Float[Tensor, " units"]:
        return kl(*distributions(student, teacher))
