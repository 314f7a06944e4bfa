"""Pass through the same states: blocks imitate blocks of the teacher through learned projections.

    loss = mean_m |H_m W_m - H'_g(m)|^2 / width

where H_m are the student's states behind block m (behind the embedding for m = 0), H' the teacher's, and g
spreads the student's blocks evenly over the teacher's, last on last. W_m is learned and thrown away; with
equal widths it starts as the identity.

Paper: Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language Understanding", eq. 8 and 9.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rarefy.core.nodes import Node
from rarefy.core.signals import Signals, matched_layers
from rarefy.numerics.divergences import mean_square


@dataclass(frozen=True)
class HiddenStates:
    """Matched states. Shapes: hidden [batch, length, width] per block of both -> [units]."""

    edits: ClassVar[tuple[type[Node], ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    beats: ClassVar[str] = ""
    scope: ClassVar[str] = "objective"

    def learned(self, student: tuple[int, int], teacher: tuple[int, int]) -> nn.Module:
        """One projection for each matched state."""
        maps = [nn.Linear(student[1], teacher[1], bias=False) for _ in range(student[0] + 1)]
        if student[1] == teacher[1]:
            for each in maps:
                nn.init.eye_(each.weight)
        return nn.ModuleList(maps)

    def loss(self, student: Signals, teacher: Signals, learned: nn.Module | None) -> Float[Tensor, " units"]:
        assert isinstance(learned, nn.ModuleList)
        goals = (0, *matched_layers(len(student.hidden) - 1, len(teacher.hidden) - 1))
        losses = [mean_square(project(own).float(), teacher.hidden[goal].float())
                  for own, goal, project in zip(student.hidden, goals, learned, strict=True)]
        return student.per_unit(torch.stack(losses).mean(0))
