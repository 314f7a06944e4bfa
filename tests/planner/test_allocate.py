"""The allocation is exact: against brute force, both ways round, to the last byte."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.core.errors import BudgetError
from rarefy.core.nouns import Option
from rarefy.planner.allocate import GAP, least_bytes, least_damage, scaled
from rarefy.planner.options import frontier

option = st.tuples(st.integers(1, 40), st.floats(1e-6, 1.0))
problem = st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=5)


def sites(raw: list[list[tuple[int, float]]]) -> dict[str, tuple[Option, ...]]:
    return {f"s{k}": tuple(Option(f"s{k}", f"f{j}", size, damage) for j, (size, damage) in enumerate(each))
            for k, each in enumerate(raw)}


def totals(plan: Mapping[Any, Option]) -> tuple[int, float]:
    return sum(o.bytes for o in plan.values()), sum(o.damage for o in plan.values())


@settings(max_examples=60, deadline=None)
@given(problem, st.integers(5, 120))
def test_least_damage_is_exact(raw: list[list[tuple[int, float]]], limit: int) -> None:
    every = [totals(dict(enumerate(c))) for c in itertools.product(*sites(raw).values())]
    possible = [damage for size, damage in every if size <= limit]
    if not possible:
        with pytest.raises(BudgetError, match="smallest file"):
            least_damage(sites(raw), limit, 0)
        return
    size, damage = totals(least_damage(sites(raw), limit, 0))
    assert size <= limit
    assert damage <= min(possible) * (1 + 2 * GAP) + 1e-9


@settings(max_examples=60, deadline=None)
@given(problem, st.floats(1e-3, 3.0))
def test_least_bytes_is_exact(raw: list[list[tuple[int, float]]], bound: float) -> None:
    every = [totals(dict(enumerate(c))) for c in itertools.product(*sites(raw).values())]
    possible = [size for size, damage in every if damage <= bound]
    if not possible:
        with pytest.raises(BudgetError, match="not possible"):
            least_bytes(sites(raw), bound)
        return
    size, damage = totals(least_bytes(sites(raw), bound))
    assert damage <= bound
    # HiGHS takes a bound as met within 1e-6: an option that sits on it may be replaced by the next larger one
    assert size <= min(possible) * (1 + 2 * GAP) or any(abs(d - bound) < 1e-5 for _, d in every)


def test_fixed_bytes_count() -> None:
    raw = [[(10, 0.1), (20, 0.01)]]
    assert totals(least_damage(sites(raw), 30, 10)) == (20, 0.01)
    assert totals(least_damage(sites(raw), 29, 10)) == (10, 0.1)
    with pytest.raises(BudgetError, match="20 bytes"):
        least_damage(sites(raw), 19, 10)


def test_frontier_drops_what_is_dominated() -> None:
    options = sites([[(10, 0.1), (12, 0.2), (10, 0.05), (20, 0.05), (30, 0.01)]])["s0"]
    assert [(o.bytes, o.damage) for o in frontier(options)] == [(10, 0.05), (30, 0.01)]


def test_scaled_multiplies_by_site() -> None:
    found = scaled(sites([[(1, 0.5)], [(1, 0.5)]]), {"s1": 2.0})
    assert [found[s][0].damage for s in ("s0", "s1")] == [0.5, 1.0]
