"""Learn from what the teacher writes: cross-entropy on its own samples.

    loss = -log q(y_t | y_<t),        y drawn from the teacher

Matching the teacher's distribution over whole sequences is impossible to enumerate; its samples stand for
it. No data is needed, and the student sees the texts that the teacher would produce instead of those that
somebody collected.

Paper: Kim & Rush 2016, "Sequence-Level Knowledge Distillation", section 3.2 (samples instead of the beam's
best).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from rarefy.core.errors import DataError
from rarefy.core.nodes import Node
from rarefy.core.signals import Signals
from rarefy.numerics.divergences import cross_entropy


@dataclass(frozen=True)
class Sequence:
    """Cross-entropy on the teacher's samples. Shapes: logits [units, classes], labels [units] -> [units]."""

    edits: ClassVar[tuple[type[Node], ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset({"labels", "samples"})
    beats: ClassVar[str] = ""
    scope: ClassVar[str] = "objective"

    def loss(self, student: Signals, teacher: Signals, learned: nn.Module | None) -> Float[Tensor, " units"]:
        if student.rows is None or student.labels is None:
            raise DataError("sequence: only language models write samples to learn from; use soft_labels")
        return cross_entropy(student.rows, student.labels)
