"""Learn the right answers: cross-entropy with the labels of the data.

    loss = -log q(label)

Alone it is plain fine-tuning; with a weight beside ``soft_labels`` it is Hinton's mix, which corrects a
teacher where the data knows better. Of a language model the label of a token is the token that follows.

Paper: Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network", section 2, the second
objective.
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
class HardLabels:
    """Cross-entropy. Shapes: logits [units, classes], labels [units] -> [units]."""

    edits: ClassVar[tuple[type[Node], ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset({"labels"})
    beats: ClassVar[str] = ""
    scope: ClassVar[str] = "objective"

    def loss(self, student: Signals, teacher: Signals, learned: nn.Module | None) -> Float[Tensor, " units"]:
        if student.rows is None or student.labels is None:
            raise DataError("hard_labels: the data has no labels; pass labelled data or another objective")
        return cross_entropy(student.rows, student.labels)
