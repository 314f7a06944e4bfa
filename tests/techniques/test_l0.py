"""Hard concrete gates against the paper's formulas, written out, and against magnitude at equal sparsity."""

from __future__ import annotations

import math

import pytest
import torch

from digits import LAYERS, softened, train, trained
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nodes import Dense, Masked
from rarefy.techniques.prune.l0 import L0
from rarefy.techniques.prune.magnitude import Magnitude

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def louizos(u: float, log_alpha: float) -> float:
    """Louizos et al. 2018, eq. 10 and 11."""
    s = sigmoid((math.log(u) - math.log(1 - u) + log_alpha) / BETA)
    return min(1.0, max(0.0, s * (ZETA - GAMMA) + GAMMA))


def gated(pattern: str = "unstructured", shape: tuple[int, int] = (4, 6)):
    soft = softened(Dense(torch.ones(shape)), L0(2.0, pattern))
    with torch.no_grad():
        soft.odds.copy_(torch.linspace(-4, 4, soft.odds.numel()).view(soft.odds.shape))
    return soft


def test_gates_are_drawn_as_in_the_paper() -> None:
    soft = gated()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        drawn = soft().detach()
        torch.manual_seed(3)
        u = torch.rand(4, 6)
    odds = soft.odds.detach().flatten().tolist()
    wanted = torch.tensor([louizos(a, b) for a, b in zip(u.flatten().tolist(), odds, strict=True)])
    torch.testing.assert_close(drawn.flatten(), wanted, atol=1e-5, rtol=1e-4)


def test_the_penalty_is_the_chance_of_being_open() -> None:
    soft = gated()
    odds = soft.odds.detach().flatten().tolist()
    formula = sum(sigmoid(a - BETA * math.log(-GAMMA / ZETA)) for a in odds) / len(odds)  # eq. 12
    assert float(soft.penalty().detach()) == pytest.approx(2.0 * formula, rel=1e-5)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        counted = sum(float((soft() > 0).float().mean()) for _ in range(2000)) / 2000
    assert counted == pytest.approx(formula, abs=0.01)


def test_trained_gates_stand_still() -> None:
    """Eq. 13; and what hardens is what is computed."""
    soft = gated().eval()
    wanted = [min(1.0, max(0.0, sigmoid(a) * 1.2 - 0.1)) for a in soft.odds.detach().flatten().tolist()]
    node = soft.harden()
    torch.testing.assert_close(soft().detach().flatten(), torch.tensor(wanted))
    assert isinstance(node, Masked) and torch.equal(node.dense(), soft().detach())
    assert torch.equal(node.keep, node.dense() > 0) and 0 < int(node.keep.sum()) < 24


def test_the_network_begins_as_it_is() -> None:
    w = torch.randn(4, 6)
    assert torch.equal(softened(Dense(w), L0()).eval()().detach(), w)


@pytest.mark.parametrize(("pattern", "gates"), [("row", (4, 1)), ("column", (1, 6)), ("row 2", (2, 1)),
                                                ("block 2x3", (2, 2))])
def test_groups_have_one_gate(pattern: str, gates: tuple[int, int]) -> None:
    soft = gated(pattern)
    assert tuple(soft.odds.shape) == gates
    keep = soft.eval().harden().keep
    height, width = 4 // gates[0], 6 // gates[1]
    tiles = keep.view(gates[0], height, gates[1], width).sum((1, 3))
    assert bool(((tiles == 0) | (tiles == height * width)).all())
    assert 0 < int(keep.sum()) < 24


def test_gates_close_and_beat_magnitude() -> None:
    start = trained()
    light, heavy = train(start, L0(0.1)), train(start, L0(20.0))
    assert light.sparsity() + 0.2 < heavy.sparsity()
    assert heavy.correct() > start.edited(Magnitude(heavy.sparsity())).correct() + 0.02
    pair = [train(start, L0(20.0), steps=20) for _ in range(2)]
    assert all(torch.equal(tree.dense(), pair[1].trees[path].dense()) for path, tree in pair[0].trees.items())


def test_whole_neurons_close() -> None:
    done = train(trained(), L0(4.0, "row"), where=LAYERS[:2])
    gone = [int((~done.trees[path].keep).all(1).sum()) for path in LAYERS[:2]]
    assert sum(gone) > 40 and done.correct() > 0.9


def test_masks_above_stay() -> None:
    first = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    node = softened(Masked(first, Dense(torch.ones(4, 6))), L0()).eval().harden()
    assert isinstance(node, Masked) and torch.equal(node.keep, first)


@pytest.mark.parametrize(("settings", "match"), [
    ({"strength": 0.0}, "must be positive"), ({"dropout": 1.0}, "dropout between 0 and 1"),
    ({"pattern": "2:4"}, "keep no n:m; use gradual"), ({"pattern": "rows"}, "did you mean 'row'")])
def test_settings_that_mean_nothing_are_refused(settings: dict, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        L0(**settings)


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(EditError, match=r"layers\.0\.up: pattern block 4x4: 10 rows do not divide"):
        softened(Dense(torch.randn(10, 8)), L0(pattern="block 4x4"))
