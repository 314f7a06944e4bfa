"""Ternary training against its rules, written out, and against making a trained network ternary at once."""

from __future__ import annotations

import pytest
import torch

from digits import softened, train, trained
from rarefy.core.edit import edit
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nodes import Dense, Masked, Quantized
from rarefy.formats.ggml import CODECS
from rarefy.numerics.grids import Grid, Stored
from rarefy.techniques.quantize.latent_ternary import TERNARY, LatentTernary
from rarefy.techniques.quantize.ternary import Ternary

EXACT = Grid("exact", TERNARY, 32, Stored(torch.float32))


def absmean(values: list[float]) -> list[float]:
    """Ma et al. 2024, eq. 1 to 3."""
    gamma = sum(map(abs, values)) / len(values)
    return [gamma * max(-1, min(1, round(v / gamma))) for v in values]


def twn(values: list[float]) -> list[float]:
    """Li et al. 2016, eq. 5 and 6."""
    delta = 0.7 * sum(map(abs, values)) / len(values)
    large = [abs(v) for v in values if abs(v) > delta]
    alpha = sum(large) / len(large)
    return [alpha * (1 if v > delta else -1 if v < -delta else 0) for v in values]


@pytest.mark.parametrize("rule", [absmean, twn])
@pytest.mark.parametrize(("per", "unit"), [("group", 32), ("row", 64), ("tensor", 192)])
def test_the_forward_pass_is_the_papers(rule, per: str, unit: int) -> None:
    w = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * 0.05
    soft = softened(Dense(w), LatentTernary(EXACT, rule.__name__, per))
    wanted = torch.tensor([rule(part) for part in w.view(-1, unit).tolist()]).view(3, 64)
    torch.testing.assert_close(soft().detach(), wanted)
    pull = torch.randn(3, 64)
    (soft() * pull).sum().backward()
    assert torch.equal(soft.latent.grad, pull)  # straight through


@pytest.mark.parametrize("rule", ["absmean", "twn"])
@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_ends_where_ternary_rounding_ends(rule: str, name: str) -> None:
    grid = CODECS[name].grid
    assert grid is not None
    w = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    soft = softened(Dense(w), LatentTernary(grid, rule)).eval()
    node = soft.harden()
    assert isinstance(node, Quantized) and torch.equal(node.dense(), soft().detach())
    rounded, _ = edit("w", Dense(w), w, Ternary(grid, rule), "t", None, torch.Generator())
    torch.testing.assert_close(node.dense(), rounded.dense())


def test_dropped_and_dead_weights_do_not_count() -> None:
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    w[0] = 0.0
    keep = torch.rand(4, 64, generator=torch.Generator().manual_seed(1)) < 0.5
    keep[3] = False
    for rule in ("absmean", "twn"):
        trees = [softened(Masked(keep, Dense(values)), LatentTernary(EXACT, rule, "tensor")).harden()
                 for values in (torch.where(keep, w, 100.0), torch.where(keep, w, 0.0))]
        torch.testing.assert_close(trees[0].dense(), trees[1].dense())
        assert not bool(trees[0].dense()[~keep].any()) and bool(torch.isfinite(trees[0].dense()).all())


def test_training_beats_rounding() -> None:
    """A scale per weight, as in BitNet: rounded at once most digits are lost, trained nearly none."""
    grid, start = Grid("ternary", TERNARY, 0, Stored()), trained()
    technique = LatentTernary(grid, per="tensor")
    rounded, learned = start.edited(Ternary(grid, per="tensor")), train(start, technique, rate=5e-3)
    assert learned.correct() > rounded.correct() + 0.02
    assert learned.correct() > start.correct() - 0.03
    for tree in learned.trees.values():
        assert len(tree.dense().unique()) <= 3
    pair = [train(start, technique, steps=20) for _ in range(2)]
    assert all(torch.equal(tree.dense(), pair[1].trees[path].dense()) for path, tree in pair[0].trees.items())


def test_what_means_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"rule 'twm': .*did you mean 'twn'"):
        LatentTernary(rule="twm")
    with pytest.raises(RecipeError, match=r"per 'rows': .*did you mean 'row'"):
        LatentTernary(per="rows")
    with pytest.raises(EditError, match=r"layers\.0\.up: the grid 'Q4_1' does not hold -1, 0 and 1"):
        softened(Dense(torch.randn(2, 64)), LatentTernary(CODECS["Q4_1"].grid))
    with pytest.raises(ValueError, match="100 columns not divisible"):
        softened(Dense(torch.randn(2, 100)), LatentTernary())
