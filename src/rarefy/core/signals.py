"""What a network says about a batch, as objectives of distillation see it.

A *unit* is what a prediction is made for: a row of a classifier, a token of a language model. ``Signals``
holds the answers for units, and, where an objective needs them, the states inside. A teacher may know only
the largest of its probabilities (``Top``); both sides are then compared on these outcomes and "any other".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from rarefy.core.errors import RecipeError
from rarefy.numerics.divergences import with_rest


@dataclass(frozen=True, eq=False)
class Top:
    """The most likely classes of every unit: log-probabilities, and which classes."""

    values: Float[Tensor, "units k"]
    index: Int64[Tensor, "units k"]


@dataclass(frozen=True, eq=False)
class Signals:
    """What one network says about a batch.

    rows: logits (or embeddings) of every unit, None if only ``top`` is known. labels: of every unit. hidden:
    the states behind the embedding and behind every block. queries, keys, values: of every block, [batch,
    length, width]. heads: how many heads these have. real: which tokens are no padding. chosen: which tokens
    are units (None: the units are rows of the batch).
    """

    rows: Float[Tensor, "units classes"] | None
    top: Top | None = None
    labels: Int64[Tensor, " units"] | None = None
    hidden: tuple[Tensor, ...] = ()
    queries: tuple[Tensor, ...] = ()
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    heads: int = 0
    real: Bool[Tensor, "batch length"] | None = None
    chosen: Bool[Tensor, "batch length"] | None = None

    def per_unit(self, values: Float[Tensor, "batch length"]) -> Float[Tensor, " units"]:
        """Numbers per token as numbers per unit: those of the units, or the mean over a row's real tokens."""
        if self.chosen is not None:
            return values[self.chosen]
        if self.real is None:
            return values.mean(1)
        return (values * self.real).sum(1) / self.real.sum(1)

    def tokens(self) -> Bool[Tensor, "batch length"]:
        """Which tokens are real."""
        if self.real is not None:
            return self.real
        states = (self.hidden or self.values or self.queries)[0]
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)


class Objective(Protocol):
    """One file under ``techniques/distill``: a frozen dataclass.

    needs: any of logits, labels, hidden, attention, relations.
    """

    needs: ClassVar[frozenset[str]]
    scope: ClassVar[str]  # "objective"

    def loss(self, student: Signals, teacher: Signals,
             learned: nn.Module | None) -> Float[Tensor, " units"]: ...


class Learning(Protocol):
    """An objective with parameters of its own, which do not outlive training."""

    def learned(self, student: tuple[int, int], teacher: tuple[int, int]) -> nn.Module:
        """For (blocks, width) of both sides."""
        ...


def distributions(student: Signals, teacher: Signals, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of teacher and student over the same outcomes, [units, outcomes]."""
    assert student.rows is not None
    if teacher.top is not None:
        if temperature != 1:
            raise RecipeError(f"temperature {temperature}: the teacher's answers were kept as their largest "
                              "probabilities, which have temperature 1; keep its states instead")
        own = student.rows.log_softmax(-1).gather(1, teacher.top.index)
        return with_rest(teacher.top.values), with_rest(own)
    assert teacher.rows is not None
    if teacher.rows.shape != student.rows.shape:
        raise RecipeError(f"the teacher answers with {teacher.rows.shape[1]} classes, the student with "
                          f"{student.rows.shape[1]}; both need the same labels or the same vocabulary")
    return (teacher.rows / temperature).log_softmax(-1), (student.rows / temperature).log_softmax(-1)


def matched_layers(student: int, teacher: int) -> tuple[int, ...]:
    """For each of the student's blocks, from 1, the teacher's that it imitates: evenly spread."""
    if student > teacher:
        raise RecipeError(f"the student has {student} blocks, the teacher {teacher}; matching states needs a "
                          "student that is no deeper")
    return tuple((block + 1) * teacher // student for block in range(student))
