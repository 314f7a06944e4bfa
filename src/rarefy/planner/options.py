"""Options: every way in which a target could store a site, with exact bytes and foreseen damage.

Techniques make the options (each that has an ``options`` method is asked); the planner never knows
which technique an option came from. Damage is foreseen on a sample of rows drawn in proportion to
their Fisher, so that the few rows of a large vocabulary that matter are the ones looked at; a technique that
says ``whole`` (rank is no property of a sample) sees every row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rarefy.core.edit import Leaf
from rarefy.core.errors import TargetError
from rarefy.core.nodes import Dense
from rarefy.core.nouns import Choice, Evidence, Option

ROWS = 192


def options_at(site: str, weight: Tensor, evidence: Evidence, choices: Mapping[str, Choice],
               techniques: Iterable[type[Any]], generator: torch.Generator,
               kernel: tuple[int, ...] = (), held: Callable[[Option], Option | None] = lambda option: option
               ) -> tuple[Option, ...]:
    """All options of all ``techniques`` for ``weight`` [out, in], the useful ones only; kernel as in Leaf.

    held: an option at the bytes that the target stores it in; None: it has no such form.

    An option is useless when another one costs no more bytes and does no more damage.
    """
    whole = Leaf(site, Dense(weight), weight, None, evidence, kernel)
    leaf = replace(sample(site, weight, evidence, generator), kernel=kernel)
    found = [priced for technique in techniques
             for option in technique.options(whole if getattr(technique, "whole", False) else leaf, choices)
             if (priced := held(option)) is not None]
    if not found:
        raise TargetError(f"{site}: no format of the target can store rows of {weight.shape[1]} weights")
    return tuple(frontier(found))


def sample(site: str, weight: Tensor, evidence: Evidence, generator: torch.Generator) -> Leaf:
    """A leaf of few rows that stands for the whole: fisher-weighted sums keep their expectation."""
    assert evidence.fisher is not None
    fisher = evidence.fisher.clamp_min(0)
    total = float(fisher.sum())
    if weight.shape[0] <= ROWS or not total > 0:
        return Leaf(site, Dense(weight), weight, None, evidence)
    # systematic sampling: one draw decides all rows, and heavy rows may come several times
    edges = fisher.double().cumsum(0)
    ticks = (torch.arange(ROWS, dtype=torch.float64) + torch.rand(1, generator=generator)) / ROWS
    index = torch.searchsorted(edges, ticks * edges[-1]).clamp_max(weight.shape[0] - 1)
    rows = weight[index]
    return Leaf(site, Dense(rows), rows, None,
                replace(evidence, fisher=torch.full((ROWS,), total / ROWS)), sampled_from=weight.shape[0])


def frontier(options: Iterable[Option]) -> list[Option]:
    """Options by rising bytes and falling damage; dominated ones are gone."""
    best: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.damage)):
        if not best or option.damage < best[-1].damage:
            best.append(option)
    return best
