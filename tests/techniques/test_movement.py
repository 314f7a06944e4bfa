"""Movement pruning against the paper's updates, written out, and against magnitude in fine-tuning."""

from __future__ import annotations

import math

import pytest
import torch

from digits import LAYERS, softened, train, trained
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nodes import Dense, Masked
from rarefy.techniques.prune.gradual import Gradual
from rarefy.techniques.prune.magnitude import Magnitude
from rarefy.techniques.prune.movement import Movement


def test_scores_gather_movement() -> None:
    """Sanh et al. 2020, section 4: S(T) = - rate * sum over t < T of (dL/dW') W, dropped weights included."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 8, generator=generator)
    soft = softened(Dense(w), Movement(0.5, begin=0.0, end=0.5, prior=0.0))
    literal, rate = torch.zeros(6, 8), 0.1
    optimizer = torch.optim.SGD([{"params": [soft.scores], "lr": rate},
                                 {"params": [soft.latent], "lr": 0.01}])
    for step in range(1, 21):
        before, pull = soft.latent.detach().clone(), torch.randn(6, 8, generator=generator)
        kept = soft.kept.clone()
        optimizer.zero_grad()
        (soft() * pull).sum().backward()
        assert torch.equal(soft.latent.grad, pull * kept)
        optimizer.step()
        soft.update(step, 20)
        literal -= rate * pull * before
        torch.testing.assert_close(soft.scores.detach(), literal)
        share = 0.5 - 0.5 * (1 - min(1.0, step / 10)) ** 3
        count = round(share * 48)
        lowest = literal.flatten().argsort(stable=True)[:count]
        assert not bool(soft.kept.flatten()[lowest].any()) and int((~soft.kept).sum()) == count
    node = soft.eval().harden()
    assert isinstance(node, Masked) and torch.equal(node.dense(), soft().detach())


def test_a_tile_has_one_score() -> None:
    """Lagunas et al. 2021: the gradients of a tile are summed, and it goes whole."""
    w = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    soft = softened(Dense(w), Movement(0.5, "block 4x2", begin=0.0, end=0.5, prior=0.0))
    pull = torch.randn(8, 8)
    (soft() * pull).sum().backward()
    torch.testing.assert_close(soft.scores.grad, (pull * w).view(2, 4, 4, 2).sum((1, 3)))
    with torch.no_grad():
        soft.scores.sub_(soft.scores.grad)
    soft.update(10, 20)
    gone = soft.scores.detach().flatten().argsort()[:4]
    wanted = torch.ones(8).index_fill(0, gone, 0.0).view(2, 4).repeat_interleave(4, 0).repeat_interleave(2, 1)
    assert torch.equal(soft.kept.float(), wanted)


def test_whole_rows_go() -> None:
    start = trained()
    done = train(start, Movement(0.5, "row 8"), where=LAYERS[:2])
    for path in LAYERS[:2]:
        heads = done.trees[path].dense().view(8, -1)
        assert int((heads == 0).all(1).sum()) == 4
    assert done.correct() > 0.85


def test_magnitude_has_the_first_word() -> None:
    """Before anything has moved the mask is that of the magnitudes, of tiles too, and a prior of 2 says it
    twice as loud."""
    w = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    for pattern, sizes in (("unstructured", w.abs()),
                           ("block 4x2", w.abs().view(2, 4, 4, 2).mean((1, 3)))):
        soft = softened(Dense(w), Movement(0.5, pattern, begin=0.0, end=0.5))
        loud = softened(Dense(w), Movement(0.5, pattern, begin=0.0, end=0.5, prior=2.0))
        torch.testing.assert_close(soft.scores.detach(), sizes / w.square().mean().sqrt())
        torch.testing.assert_close(loud.scores.detach(), 2 * soft.scores.detach())
        soft.update(10, 20)
        kept = soft.kept if pattern == "unstructured" else soft.kept.view(2, 4, 4, 2)[:, 0, :, 0]
        assert torch.equal(kept, sizes > sizes.flatten().median())


def test_soft_movement_finds_the_share() -> None:
    soft = softened(Dense(torch.randn(6, 8)), Movement(strength=3.0, threshold=0.2))
    with torch.no_grad():
        soft.scores.copy_(torch.linspace(-3, 3, 48).view(6, 8))
    expected = 3.0 * sum(1 / (1 + math.exp(-s)) for s in torch.linspace(-3, 3, 48).tolist()) / 48
    assert float(soft.penalty().detach()) == pytest.approx(expected, rel=1e-5)
    soft.update(1, 10)
    assert torch.equal(soft.kept, soft.scores.detach().sigmoid() > 0.2)
    start = trained()
    shares = [train(start, Movement(strength=strength)).sparsity() for strength in (0.1, 10.0)]
    assert shares[0] + 0.2 < shares[1]


def test_movement_beats_magnitude() -> None:
    """Nineteen of twenty weights dropped while a trained network goes on training."""
    start = trained()
    moved, gradual = train(start, Movement(0.95)), train(start, Gradual(0.95))
    assert moved.correct() > gradual.correct() + 0.05
    assert moved.correct() > start.edited(Magnitude(0.95)).correct() + 0.3
    assert moved.sparsity() == pytest.approx(0.95, abs=0.003)
    pair = [train(start, Movement(0.9), steps=20) for _ in range(2)]
    assert all(torch.equal(tree.dense(), pair[1].trees[path].dense()) for path, tree in pair[0].trees.items())


def test_masks_above_stay_and_count() -> None:
    w = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    first = torch.rand(8, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    soft = softened(Masked(first, Dense(w)), Movement(0.75))
    for step in range(1, 11):
        with torch.no_grad():
            soft.below[0].scores.add_(torch.randn(8, 16))
        soft.update(step, 10)
    node = soft.harden()
    assert isinstance(node, Masked) and not bool((node.keep & ~first).any()) and int(node.keep.sum()) == 32


def test_n_of_m() -> None:
    soft = softened(Dense(torch.randn(4, 16)), Movement(pattern="2:4"))
    for step in range(1, 11):
        with torch.no_grad():
            soft.scores.add_(torch.randn(4, 16))
        soft.update(step, 10)
    assert soft.kept.view(-1, 4).sum(1).tolist() == [2] * 16


@pytest.mark.parametrize(("settings", "match"), [
    ({"strength": 1.0, "sparsity": 0.5}, "finds the sparsity itself; leave out sparsity"),
    ({"strength": 1.0, "pattern": "2:4"}, "leave out the pattern"),
    ({"strength": -1.0}, "must not be negative"),
    ({"prior": -1.0}, "prior must not be negative"),
    ({"threshold": 0.5}, "threshold between 0 and 0.5"), ({"pace": 0.0}, "pace positive"),
    ({"sparsity": 95.0}, r"did you mean 0\.95")])
def test_settings_that_mean_nothing_are_refused(settings: dict, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        Movement(**settings)


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(EditError, match=r"layers\.0\.up: pattern block 4x4: 10 rows do not divide"):
        softened(Dense(torch.randn(10, 8)), Movement(pattern="block 4x4"))
