"""Lottery tickets: train, drop the smallest weights, put the others back to where they were early on; again.

A ticket is a mask m and early weights w_k. Each round trains ``m * w_k`` to the end and drops the share

    p = 1 - (1 - s)^(1 / rounds)

of the weights that are left, those of smallest magnitude *after* training; the survivors go back to w_k.
Weights that a trained network can spare can be spared from early on, and what is left trains as well as the
whole: a sparse network is found, not carved. Small networks may rewind to their initial weights (k = 0);
larger ones need those of some hundred steps later.

Paper: Frankle & Carbin 2019, "The Lottery Ticket Hypothesis", section 2; Frankle et al. 2020, "Linear Mode
Connectivity and the Lottery Ticket Hypothesis", section 4 (rewinding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.core.errors import RecipeError
from rarefy.core.nodes import Dense, Masked, Node
from rarefy.core.pruning import Rule

Trees = Mapping[str, Node]


@dataclass(frozen=True, eq=False)
class Ticket:
    """One round: the share of weights that its masks drop, the trees that training began with, and those with
    which it ended."""

    sparsity: float
    start: dict[str, Node]
    trained: dict[str, Node]


def tickets(early: Mapping[str, Tensor], train: Callable[[Trees], Trees], *, sparsity: float, rounds: int,
            pattern: str = "unstructured") -> Iterator[Ticket]:
    """The tickets of every round, the dense one first, ``rounds`` pruned ones after it.

    early: the weights to rewind to, by site. train: trains trees and gives them back; params that it also
    trains must begin at their early values each time. pattern: what weights are compared with, or dropped
    together with, as pruning techniques say it; n:m is no matter of rounds and is refused.
    """
    if rounds < 1:
        raise RecipeError(f"rounds {rounds}: must be at least 1")
    if not early:
        raise RecipeError("no early weights: nothing to rewind to")
    if ":" in pattern:
        raise RecipeError(f"pattern {pattern!r}: n:m decides the share at once, not in rounds; use gradual")
    Rule.of(pattern, sparsity, "layer")
    keeps = {path: torch.ones(values.shape, dtype=torch.bool) for path, values in early.items()}
    for done in range(rounds + 1):
        start: dict[str, Node] = {path: Dense(values.clone()) for path, values in early.items()}
        if done:
            start = {path: Masked(keeps[path], values) for path, values in start.items()}
        trained = dict(train(start))
        yield Ticket(1 - (1 - sparsity) ** (done / rounds), start, trained)
        if done < rounds:
            share = 1 - (1 - sparsity) ** ((done + 1) / rounds)
            rule = Rule.of(pattern, share, "layer")
            keeps = {path: rule.keep(trained[path].dense().square(), keeps[path]) for path in early}
