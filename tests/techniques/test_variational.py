"""Variational dropout against the paper's formulas and the exact divergence, and against magnitude."""

from __future__ import annotations

import math

import pytest
import torch

from digits import softened, train, trained
from rarefy.core.errors import RecipeError
from rarefy.core.nodes import Dense, Masked
from rarefy.techniques.prune.magnitude import Magnitude
from rarefy.techniques.prune.variational import Variational, kl


def molchanov(log_a: float) -> float:
    """Molchanov et al. 2017, eq. 14, with its sign turned round."""
    k1, k2, k3 = 0.63576, 1.87320, 1.48695
    return -(k1 / (1 + math.exp(-(k2 + k3 * log_a))) - 0.5 * math.log(1 + math.exp(-log_a)) - k1)


@pytest.mark.parametrize("log_a", [-6.0, -2.0, 0.0, 1.0, 3.0, 6.0])
def test_the_divergence_is_the_papers_and_close_to_the_truth(log_a: float) -> None:
    found = float(kl(torch.tensor(log_a)))
    assert found == pytest.approx(molchanov(log_a), abs=1e-5)
    # the exact one is E log|e| - 1/2 log a, e ~ N(1, a), up to a constant: it vanishes as a grows
    e = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = float((1 + math.exp(log_a / 2) * e).abs().log().mean()) - 0.5 * log_a
    limit = -0.5 * (math.log(2) + 0.5772156649)  # E log|e| of a standard normal
    assert found == pytest.approx(exact - limit, abs=0.02)


def test_noise_of_the_learned_size() -> None:
    w = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    soft = softened(Dense(w), Variational(start=-2.0))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        noise = torch.stack([soft() - w for _ in range(400)])
    sigma = math.sqrt(math.exp(-2.0) * float(w.square().mean()))
    assert float(noise.std()) == pytest.approx(sigma, rel=0.01)
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)


def test_the_penalty_and_its_warmup() -> None:
    w = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    soft = softened(Dense(w), Variational(examples=50, warmup=0.5, start=-1.0))
    assert float(soft.penalty().detach()) == 0.0
    spread = -1.0 + math.log(float(w.square().mean()))
    total = sum(molchanov(spread - math.log(v * v + 1e-8)) for v in w.flatten().tolist()
                if abs(spread - math.log(v * v + 1e-8)) < 8)
    for step, weight in ((5, 0.5), (10, 1.0), (20, 1.0)):
        soft.update(step, 20)
        assert float(soft.penalty().detach()) == pytest.approx(weight * total / 50, rel=1e-3)


def test_hardens_to_what_is_computed() -> None:
    w = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    soft = softened(Dense(w), Variational()).eval()
    assert torch.equal(soft().detach(), w)
    with torch.no_grad():
        soft.spread.copy_((w.square() + 1e-8).log() + torch.linspace(-6, 6, 24).view(4, 6))
    node = soft.harden()
    assert isinstance(node, Masked) and torch.equal(node.dense(), soft().detach())
    assert torch.equal(node.keep, torch.linspace(-6, 6, 24).view(4, 6) < 3)


def test_masks_above_stay() -> None:
    first = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    soft = softened(Masked(first, Dense(torch.ones(4, 6))), Variational(warmup=0.0))
    node = soft.eval().harden()
    assert isinstance(node, Masked) and torch.equal(node.keep, first)
    wanted = molchanov(-6.0) * int(first.sum()) / 10_000
    assert float(soft.penalty().detach()) == pytest.approx(wanted, rel=1e-4)


def test_beats_magnitude() -> None:
    """The share of weights that noise leaves, and as many by magnitude."""
    start = trained()
    done = train(start, Variational(examples=1200), steps=300)
    assert done.sparsity() > 0.5
    assert done.correct() > start.edited(Magnitude(done.sparsity())).correct() + 0.01
    pair = [train(start, Variational(examples=1200), steps=20) for _ in range(2)]
    assert all(torch.equal(tree.dense(), pair[1].trees[path].dense()) for path, tree in pair[0].trees.items())


@pytest.mark.parametrize(("settings", "match"), [
    ({"examples": 0}, "must be positive"), ({"warmup": 1.5}, "warmup a share"),
    ({"start": 4.0}, "start below"), ({"threshold": 9.0}, "within 8 of 0")])
def test_settings_that_mean_nothing_are_refused(settings: dict, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        Variational(**settings)
