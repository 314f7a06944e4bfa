"""Straight-through training against the rules of the paper, and against rounding without training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from digits import softened, train, trained
from rarefy.core.edit import Leaf
from rarefy.core.errors import RecipeError
from rarefy.core.latent import started
from rarefy.core.nodes import Dense, Masked, Quantized
from rarefy.formats.ggml import CODECS
from rarefy.numerics.grids import Grid, Stored, integer_grid
from rarefy.numerics.rounding import encode
from rarefy.techniques.quantize.qat import QAT
from rarefy.techniques.quantize.rtn import RTN

EXACT = Grid("exact4z", tuple(float(v) for v in range(-8, 8)), 32, Stored(torch.float32),
             Stored(torch.int8, relative=True))


def jacob(group: list[float], low: float, high: float) -> list[float]:
    """Jacob et al. 2018, eq. 12, and section 3.1: the zero point is nudged onto a level."""
    a, b = min(low, 0.0), max(high, 0.0)
    s = (b - a) / 15
    zero = round(a / s + 8)
    return [s * (max(-8, min(7, round(r / s - zero))) + zero) for r in group]


def test_the_forward_pass_is_the_papers() -> None:
    w = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * 0.1
    soft = softened(Dense(w), QAT(EXACT))
    wanted = [[v for group in row.view(2, 32).tolist() for v in jacob(group, min(group), max(group))]
              for row in w]
    torch.testing.assert_close(soft(), torch.tensor(wanted))


def test_gradients_pass_where_nothing_is_clipped() -> None:
    w = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    soft = softened(Dense(w), QAT(EXACT, memory=0.9))
    with torch.no_grad():
        soft.latent[0, 3] = 9.0  # beyond the range, which remembers
    pull = torch.randn(2, 32)
    (soft() * pull).sum().backward()
    wanted = pull.clone()
    wanted[0, 3] = 0.0
    assert torch.equal(soft.latent.grad, wanted)


def test_ranges_follow_as_a_moving_average() -> None:
    w = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    soft = softened(Dense(w), QAT(EXACT, memory=0.75))
    with torch.no_grad():
        soft.latent.mul_(2)
    soft.update(1, 10)
    torch.testing.assert_close(soft.high, (0.75 + 0.25 * 2) * w.max().view(1, 1))
    torch.testing.assert_close(soft.low, (0.75 + 0.25 * 2) * w.min().view(1, 1))
    assert {"low", "high", "latent"} == set(soft.state_dict())


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q4_K", "Q3_K", "Q6_K", "IQ4_NL", "int3", "int2z"])
def test_any_grid_hardens_to_what_was_computed(name: str) -> None:
    own = {"int3": integer_grid(3, 0), "int2z": integer_grid(2, 64, symmetric=False)}
    grid = own.get(name) or CODECS[name].grid
    assert grid is not None
    w = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    w[0], w[1] = 0.0, 0.5
    soft = softened(Dense(w), QAT(grid)).eval()
    node = soft.harden()
    assert isinstance(node, Quantized) and node.grid == grid
    assert torch.equal(node.dense(), soft().detach())
    assert bool(torch.isfinite(node.dense()).all()) and not bool(node.dense()[0].any())
    torch.testing.assert_close(node.dense()[1], w[1], atol=0.01, rtol=0)
    assert float((node.dense() - w).abs().max()) <= 1.1 * float(2 * w.abs().max()) / (len(grid.levels) - 1)


def test_codes_are_where_training_starts() -> None:
    """What was rounded before keeps its codes, and its latent values remember the original."""
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    rounded = RTN(EXACT).rewrite(Leaf("w", Dense(w), w, None, None), torch.Generator()).node
    leaf = Leaf("w", rounded, w, None, None)
    latent = started(leaf)
    again = rounded.fit()
    assert torch.equal(encode(latent, again), rounded.codes)
    assert float((latent - w).abs().mean()) < 0.02 * float((rounded.dense() - w).abs().mean())
    elsewhere = started(replace(leaf, target=-w))
    assert torch.equal(encode(elsewhere, again), rounded.codes)


def test_codes_far_from_the_original_survive_a_step() -> None:
    """Codes that make up for the errors of others are not the nearest; noise does not undo them."""
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    rounded = RTN(EXACT).rewrite(Leaf("w", Dense(w), w, None, None), torch.Generator()).node
    assert isinstance(rounded, Quantized)
    chosen = replace(rounded, codes=torch.where(rounded.codes > 0, rounded.codes - 1, rounded.codes))
    latent, again = started(Leaf("w", chosen, w, None, None)), chosen.fit()
    gap = chosen.scale.dense().abs().repeat_interleave(64 // chosen.scale.shape[1], 1)
    for sign in (-1, 1):
        assert torch.equal(encode(latent + sign * 0.04 * gap, again), chosen.codes)
    assert float((latent - w).abs().mean()) < float((chosen.dense() - w).abs().mean())


def test_dropped_weights_stretch_no_range() -> None:
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    keep = torch.ones(4, 64, dtype=torch.bool)
    keep[:, 5], keep[3] = False, False
    wild = torch.where(keep, w, 100.0)
    trees = [softened(Masked(keep, Dense(values)), QAT(EXACT)).harden()
             for values in (wild, torch.where(keep, w, 0.0))]
    assert all(isinstance(tree, Masked) and torch.equal(tree.keep, keep) for tree in trees)
    torch.testing.assert_close(trees[0].dense(), trees[1].dense())


def test_training_beats_rounding() -> None:
    grid = integer_grid(2, 0, symmetric=False)
    start = trained()
    rounded, learned = start.edited(RTN(grid)), train(start, QAT(grid))
    assert learned.correct() > rounded.correct() + 0.03
    assert learned.loss() < 0.6 * rounded.loss()
    again = train(start, QAT(grid), steps=20)
    assert all(torch.equal(tree.dense(), train(start, QAT(grid), steps=20).trees[path].dense())
               for path, tree in again.trees.items())


@pytest.mark.parametrize("memory", [-0.1, 1.0])
def test_memory_that_means_nothing_is_refused(memory: float) -> None:
    with pytest.raises(RecipeError, match=f"memory {memory}: must be a share"):
        QAT(memory=memory)


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.up: 40 columns not divisible by .*block 32"):
        softened(Dense(torch.randn(2, 40)), QAT())


def test_one_column() -> None:
    w = torch.tensor([[0.5], [-0.25]])
    soft = softened(Dense(w), QAT(integer_grid(4, 0)))
    assert isinstance(soft(), Tensor) and soft().shape == (2, 1)
    torch.testing.assert_close(soft().detach(), w, atol=1e-3, rtol=0)
