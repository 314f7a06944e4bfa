"""Patterns: what they keep, counted by hand and by brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy.numerics.patterns import NM, Pattern, Tiles, Unstructured, largest

PATTERNS: tuple[Pattern, ...] = (Unstructured("layer"), Unstructured("row"), NM(2, 4), NM(1, 8), Tiles(4, 8),
                                 Tiles(1, 0), Tiles(2, 0), Tiles(0, 1), Tiles(0, 4))


@pytest.fixture
def cost() -> Tensor:
    return torch.rand(24, 32, generator=torch.Generator().manual_seed(0))


@given(st.lists(st.lists(st.integers(0, 5), min_size=6, max_size=6), min_size=1, max_size=4),
       st.integers(-1, 7))
@settings(max_examples=60, deadline=None)
def test_largest_keeps_the_earlier_of_equals(values: list[list[int]], count: int) -> None:
    kept = largest(torch.tensor(values, dtype=torch.float32), count)
    for row, mask in zip(values, kept.tolist(), strict=True):
        order = sorted(range(6), key=lambda k: (-row[k], k))[:max(count, 0)]
        assert mask == [k in order for k in range(6)]


def test_unstructured_counts_over_its_scope(cost: Tensor) -> None:
    whole = Unstructured("layer").keep(cost, 0.3)
    assert int(whole.sum()) == round(0.7 * cost.numel())
    assert cost[whole].min() > cost[~whole].max()
    rows = Unstructured("row").keep(cost, 0.25)
    assert rows.sum(1).tolist() == [24] * 24
    assert all(cost[i][rows[i]].min() > cost[i][~rows[i]].max() for i in range(24))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 2), (3, 16)])
def test_nm_keeps_n_of_every_m(cost: Tensor, n: int, m: int) -> None:
    kept = NM(n, m).keep(cost, 1 - n / m)
    groups, values = kept.view(-1, m), cost.view(-1, m)
    assert bool((groups.sum(1) == n).all())
    assert all(v[g].min() > v[~g].max() for v, g in zip(values, groups, strict=True))


@pytest.mark.parametrize("pattern", [Tiles(4, 8), Tiles(24, 32), Tiles(2, 0), Tiles(0, 4)])
def test_tiles_stay_or_go_as_one(cost: Tensor, pattern: Tiles) -> None:
    height, width = pattern.rows or 24, pattern.columns or 32
    kept = pattern.keep(cost, 0.5).view(24 // height, height, 32 // width, width).transpose(1, 2).flatten(2)
    total = cost.view(24 // height, height, 32 // width, width).sum((1, 3))
    assert bool((kept.all(2) == kept.any(2)).all())
    whole = kept.all(2)
    assert int((~whole).sum()) == (whole.numel() // 2)
    assert whole.all() or total[whole].min() > total[~whole].max()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.75])
def test_earlier_masks_count_and_stay(cost: Tensor, pattern: Pattern, sparsity: float) -> None:
    allowed = torch.rand(24, 32, generator=torch.Generator().manual_seed(1)) < 0.6
    kept = pattern.keep(cost, sparsity, allowed)
    assert not bool((kept & ~allowed).any())
    dropped, before = 1 - float(kept.float().mean()), 1 - float(allowed.float().mean())
    if pattern == Unstructured("layer"):
        assert dropped == pytest.approx(max(sparsity, before), abs=1e-3)
    if pattern == Unstructured("row"):
        assert (~kept).sum(1).tolist() == [max(round(sparsity * 32), n) for n in (~allowed).sum(1).tolist()]
    if isinstance(pattern, NM):
        assert int(kept.view(-1, pattern.m).sum(1).max()) <= pattern.n
    if isinstance(pattern, Tiles):  # to the nearest tile
        tile = (pattern.rows or 24) * (pattern.columns or 32) / cost.numel()
        assert abs(dropped - max(sparsity, before)) <= tile / 2 + 1e-9
    if sparsity < before and not isinstance(pattern, NM):
        assert pattern == Unstructured("row") or torch.equal(kept, allowed)


def test_costs_below_zero_go_first(cost: Tensor) -> None:
    """A weight that a grid holds so badly that the layer is better without it."""
    for pattern in PATTERNS:
        allowed = torch.ones_like(cost, dtype=torch.bool)
        allowed[0] = False
        assert bool(pattern.keep(cost - 2, 0.5, allowed)[1:].any())
        assert not bool(pattern.keep(cost - 2, 0.5, allowed)[0].any())


@pytest.mark.parametrize(("pattern", "message"), [
    (NM(2, 4), "rows of 30 weights do not divide into groups of 4; use groups of 2, or leave"),
    (NM(2, 7), "rows of 30 weights do not divide into groups of 7; leave this weight out"),
    (Tiles(16, 2), "24 rows do not divide into groups of 16; use groups of 8"),
    (Tiles(0, 16), "30 columns do not divide into groups of 16; use groups of 2"),
    (Tiles(8, 0), ""), (Unstructured("row"), "")])
def test_what_does_not_divide_says_so(pattern: Pattern, message: str) -> None:
    assert pattern.misfit(24, 30).startswith(message) and bool(message) == bool(pattern.misfit(24, 30))
