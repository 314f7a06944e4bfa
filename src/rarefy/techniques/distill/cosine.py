"""Point the same way: the angle between the final states, or between embeddings.

    loss = 1 - cos(h_student, h_teacher)

Sentence embeddings are compared by their angles, so this is what a student of an encoder must keep. Widths
must be equal.

Paper: Sanh et al. 2019, "DistilBERT, a distilled version of BERT", section 3, the cosine embedding loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from rarefy.core.errors import RecipeError
from rarefy.core.nodes import Node
from rarefy.core.signals import Signals
from rarefy.numerics import divergences


@dataclass(frozen=True)
class Cosine:
    """Angles of embeddings or of final states. Shapes: [units, width] of both -> [units].

    of: states (behind the last block) or rows (what the network answers: embeddings).
    """

    of: str = "states"

    edits: ClassVar[tuple[type[Node], ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    beats: ClassVar[str] = ""
    scope: ClassVar[str] = "objective"

    def __post_init__(self) -> None:
        if self.of not in ("states", "rows"):
            raise RecipeError(f"cosine: of={self.of!r}; choose states or rows")

    def loss(self, student: Signals, teacher: Signals, learned: nn.Module | None) -> Float[Tensor, " units"]:
        own, goal = ((side.rows if self.of == "rows" else side.hidden[-1]) for side in (student, teacher))
        assert own is not None and goal is not None
        if own.shape != goal.shape:
            raise RecipeError(f"cosine: the student's vectors have {own.shape[-1]} numbers, the teacher's "
                              f"{goal.shape[-1]}; use relations or hidden_states")
        angles = divergences.cosine(own.float(), goal.float())
        return angles if self.of == "rows" else student.per_unit(angles)
