"""Gradual pruning against the paper's schedule and masks, written out, and against pruning at once."""

from __future__ import annotations

import pytest
import torch

from digits import LAYERS, softened, train, trained, weight_of
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.growing import Growth
from rarefy.core.nodes import Dense, Masked
from rarefy.techniques.prune.gradual import Gradual
from rarefy.techniques.prune.magnitude import Magnitude


def zhu(t: int, t0: int, n: int, dt: int, si: float, sf: float) -> float:
    """Zhu & Gupta 2017, eq. 1."""
    return sf + (si - sf) * (1 - (t - t0) / (n * dt)) ** 3


@pytest.mark.parametrize("before", [0.0, 0.25])
def test_the_schedule_is_the_papers(before: float) -> None:
    growth = Growth.of("unstructured", 0.9, "layer", 0.1, 0.7, 10)
    for step in range(20, 141, 10):
        assert growth.share(step, 200, before) == pytest.approx(zhu(step, 20, 12, 10, before, 0.9))
    assert [step for step in range(1, 201) if growth.due(step, 200)] == list(range(30, 141, 10))
    assert growth.share(1, 200, before) == before and growth.share(200, 200, before) == 0.9
    odd = Growth.of("unstructured", 0.9, "layer", 0.0, 0.5, 7)  # the last mask is made whatever `every` is
    assert [step for step in range(1, 41) if odd.due(step, 40)] == [7, 14, 20]
    assert Growth.of("unstructured", 0.9, "layer", 0.0, 0.5, 7).due(1, 1)  # even in a training of one step


def test_masks_are_those_of_the_smallest_magnitudes_of_the_moment() -> None:
    w = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    soft = softened(Dense(w), Gradual(0.75, every=1, end=1.0))
    for step in range(1, 21):
        with torch.no_grad():
            soft.latent.mul_(torch.rand(8, 16) + 0.5)
        soft.update(step, 20)
        count = round(zhu(step, 0, 20, 1, 0.0, 0.75) * 128)
        smallest = soft.latent.detach().abs().flatten().argsort(stable=True)[:count]
        wanted = soft.latent.detach().flatten().index_fill(0, smallest, 0.0).view(8, 16)
        assert torch.equal(soft().detach(), wanted)
    (soft() ** 2).sum().backward()
    assert not bool(soft.latent.grad[~soft.kept].any())  # dropped weights do not learn
    node = soft.eval().harden()
    assert isinstance(node, Masked) and torch.equal(node.dense(), soft().detach())
    assert int(node.keep.sum()) == 32


@pytest.mark.parametrize(("pattern", "sparsity"), [
    ("2:4", 0.5), ("1:8", 0.875), ("block 4x4", None), ("row 2", 0.5), ("column", 0.75),
    ("unstructured per row", 0.75)])
def test_patterns_hold_at_every_step(pattern: str, sparsity: float | None) -> None:
    w = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    soft = softened(Dense(w), Gradual(sparsity, pattern, every=1))
    shares = []
    for step in range(1, 17):
        soft.update(step, 16)
        keep, share = soft.kept, float((~soft.kept).float().mean())
        shares.append(share)
        match pattern.split()[0]:
            case "2:4" | "1:8":
                m = int(pattern[-1])
                assert len({*keep.view(-1, m).sum(1).tolist()}) == 1  # as many in every group
            case "block":
                tiles = keep.view(4, 4, 8, 4).sum((1, 3))
                assert bool(((tiles == 0) | (tiles == 16)).all())
            case "row":
                assert bool((keep.view(8, -1).all(1) | ~keep.view(8, -1).any(1)).all())
            case "column":
                assert bool((keep.all(0) | ~keep.any(0)).all())
    assert shares == sorted(shares) and shares[0] < shares[-1] == pytest.approx(sparsity or 0.5)


def test_what_was_dropped_stays_dropped_and_counts() -> None:
    w = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    first = torch.rand(8, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    soft = softened(Masked(first, Dense(torch.where(first, w, 50.0))), Gradual(0.75, every=1))
    for step in range(1, 11):
        soft.update(step, 10)
    node = soft.harden()
    assert isinstance(node, Masked) and isinstance(node.inner, Dense)  # two masks in a row are one
    assert not bool((node.keep & ~first).any())
    assert int(node.keep.sum()) == 32
    again = softened(Masked(first, Dense(w)), Gradual(0.3, every=1))  # less than what is gone already
    again.update(8, 10)
    assert torch.equal(again.harden().keep, first)


def test_state_is_all_there_is() -> None:
    """A checkpoint in the middle goes on to the same mask."""
    w = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    soft, other = (softened(Dense(w), Gradual(0.75, every=3)) for _ in range(2))
    for step in range(1, 8):
        soft.update(step, 20)
    other.load_state_dict(soft.state_dict())
    assert torch.equal(other().detach(), soft().detach()) and not bool(soft.kept.all())


def test_gradual_beats_at_once() -> None:
    """Nine of ten weights dropped, the same number of steps after or during."""
    start = trained()
    at_once = train(start.edited(Magnitude(0.9)), moves=frozenset({"weights"}))
    gradual = train(start, Gradual(0.9))
    assert gradual.correct() > at_once.correct() > start.edited(Magnitude(0.9)).correct()
    assert gradual.sparsity() == pytest.approx(0.9, abs=0.002)
    pair = [train(start, Gradual(0.9), steps=20) for _ in range(2)]
    for path in LAYERS:
        assert torch.equal(pair[0].trees[path].keep, pair[1].trees[path].keep)
        assert torch.equal(weight_of(pair[0].trees[path]), weight_of(pair[1].trees[path]))


@pytest.mark.parametrize(("settings", "match"), [
    ({"sparsity": 1.0}, r"sparsity 1\.0: must be a share"), ({"begin": 0.8}, r"begin 0\.8, end 0\.75: must"),
    ({"sparsity": 0.0}, r"sparsity 0\.0: must be a share"), ({"end": 1.5}, "must be shares"),
    ({"every": 0}, "every 0: must be at least one"),
    ({"pattern": "3:4", "sparsity": 0.5}, "leave sparsity out")])
def test_settings_that_mean_nothing_are_refused(settings: dict, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        Gradual(**settings)


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(EditError, match=r"layers\.0\.up: pattern 2:4: rows of 10 weights do not divide"):
        softened(Dense(torch.randn(4, 10)), Gradual(pattern="2:4"))
    with pytest.raises(EditError, match=r"layers\.0\.up: sparsity 0\.9, .* leaves none of 2 weights"):
        softened(Dense(torch.randn(1, 2)), Gradual(0.9))
    soft = softened(Dense(torch.ones(2, 4, dtype=torch.float16)), Gradual())
    with torch.no_grad():
        soft.latent.fill_(1e6)
    with pytest.raises(EditError, match=r"layers\.0\.up: 1e\+06 does not fit float16"):
        soft.harden()
