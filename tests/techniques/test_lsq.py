"""Learned steps against the gradients of the papers, written out, and against ranges and plain rounding."""

from __future__ import annotations

import pytest
import torch

from digits import softened, train, trained
from rarefy.core.edit import Leaf
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nodes import Dense, Masked, Quantized
from rarefy.formats.ggml import CODECS
from rarefy.numerics.grids import Grid, Stored, integer_grid
from rarefy.techniques.quantize.lsq import LSQ
from rarefy.techniques.quantize.qat import QAT
from rarefy.techniques.quantize.rtn import RTN

LEVELS = tuple(float(v) for v in range(-4, 4))
EXACT = Grid("exact3", LEVELS, 32, Stored(torch.float32))
OFFSET = Grid("exact3+", LEVELS, 32, Stored(torch.float32), Stored(torch.float32))


def esser(v: float, s: float) -> float:
    """Esser et al. 2020, eq. 3: the gradient of the rounded value in the step."""
    if v / s <= -4:
        return -4.0
    if v / s >= 3:
        return 3.0
    return -v / s + round(v / s)


def test_the_gradient_of_the_step_is_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    w, pull = torch.randn(2, 64, generator=generator), torch.randn(2, 64, generator=generator)
    soft = softened(Dense(w), LSQ(EXACT))
    with torch.no_grad():
        soft.step.copy_(torch.tensor([[0.3, 0.2], [0.5, 0.25]]))  # some are clipped
    (soft() * pull).sum().backward()
    g = 1 / (32 * 3) ** 0.5
    for row in range(2):
        for group in range(2):
            place, s = slice(32 * group, 32 * group + 32), float(soft.step.detach()[row, group])
            wanted = sum(esser(v, s) * p for v, p in zip(w[row, place].tolist(), pull[row, place].tolist(),
                                                          strict=True))
            assert float(soft.step.grad[row, group]) == pytest.approx(g * wanted, rel=1e-4, abs=1e-5)
    inside = (w / soft.step.detach().repeat_interleave(32, 1)).clamp(-4, 3)
    passes = inside == w / soft.step.detach().repeat_interleave(32, 1)
    torch.testing.assert_close(soft.latent.grad, pull * passes)


def test_the_gradient_of_the_offset_is_the_papers() -> None:
    """Bhalgat et al. 2020, eq. 3: none inside the range, one outside; the step sees v - offset."""
    generator = torch.Generator().manual_seed(1)
    w, pull = torch.randn(1, 32, generator=generator), torch.randn(1, 32, generator=generator)
    soft = softened(Dense(w), LSQ(OFFSET))
    with torch.no_grad():
        soft.step.fill_(0.25)
        soft.offset.fill_(0.1)
    (soft() * pull).sum().backward()
    x = (w - 0.1) / 0.25
    outside = (x < -4) | (x > 3)
    assert bool(outside.any()) and not bool(outside.all())
    g = 1 / (32 * 3) ** 0.5
    assert float(soft.offset.grad) == pytest.approx(g * float(pull[outside].sum()), rel=1e-4)
    wanted = sum(esser(v, 0.25) * p for v, p in zip((w - 0.1)[0].tolist(), pull[0].tolist(), strict=True))
    assert float(soft.step.grad) == pytest.approx(g * wanted, rel=1e-4)


def test_starts() -> None:
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    mean = softened(Dense(w), LSQ(EXACT, "mean"))
    torch.testing.assert_close(mean.step.detach(), 2 * w.view(4, 2, 32).abs().mean(-1) / 3**0.5)
    rounded = RTN(EXACT).rewrite(Leaf("w", Dense(w), w, None, None), torch.Generator()).node
    assert isinstance(rounded, Quantized)
    torch.testing.assert_close(softened(Dense(w), LSQ(EXACT)).harden().dense(), rounded.dense())
    torch.testing.assert_close(softened(rounded, LSQ(EXACT)).harden().dense(), rounded.dense())


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "IQ4_NL", "int3", "int2z"])
def test_hardens_to_what_was_computed(name: str) -> None:
    own = {"int3": integer_grid(3, 0), "int2z": integer_grid(2, 64, symmetric=False)}
    grid = own.get(name) or CODECS[name].grid
    assert grid is not None
    w = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    w[0], w[1] = 0.0, 0.5
    soft = softened(Dense(w), LSQ(grid)).eval()
    optimizer = torch.optim.Adam([{"params": [value], "lr": 0.01 * soft.paces().get(key, 1.0)}
                                  for key, value in soft.named_parameters()])
    for step in range(5):  # steps and offsets away from what the search gave
        optimizer.zero_grad()
        (soft() - 0.5 * w).square().sum().backward()
        optimizer.step()
        soft.update(step + 1, 5)
    node = soft.harden()
    assert isinstance(node, Quantized) and node.grid == grid
    assert torch.equal(node.dense(), soft().detach())
    assert bool(torch.isfinite(node.dense()).all())


def test_steps_keep_their_sign() -> None:
    soft = softened(Dense(torch.randn(2, 64)), LSQ(EXACT))
    before = soft.step.detach().clone()
    with torch.no_grad():
        soft.step.neg_()
    soft.update(1, 10)
    torch.testing.assert_close(soft.step.detach(), before / 100)


def test_dropped_weights_do_not_count() -> None:
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    keep = torch.rand(4, 64, generator=torch.Generator().manual_seed(1)) < 0.5
    keep[3] = False
    for start in ("search", "mean"):
        trees = [softened(Masked(keep, Dense(values)), LSQ(EXACT, start)).harden()
                 for values in (torch.where(keep, w, 100.0), torch.where(keep, w, 0.0))]
        torch.testing.assert_close(trees[0].dense(), trees[1].dense())
        assert not bool(trees[0].dense()[~keep].any())


def test_beats_rounding_and_ranges() -> None:
    """Two bits, one step per row: symmetric grids, where a range wastes most."""
    grid, start = integer_grid(2, 0), trained()
    rounded, ranges, learned = start.edited(RTN(grid)), train(start, QAT(grid)), train(start, LSQ(grid))
    assert learned.correct() > rounded.correct() + 0.03
    assert learned.loss() < ranges.loss() < rounded.loss()
    pair = [train(start, LSQ(grid), steps=20) for _ in range(2)]
    assert all(torch.equal(tree.dense(), pair[1].trees[path].dense()) for path, tree in pair[0].trees.items())


def test_what_means_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"start 'serch': .*did you mean 'search'"):
        LSQ(start="serch")
    with pytest.raises(EditError, match=r"layers\.0\.up: scales of the grid 'Q4_K' are steps.*or qat"):
        softened(Dense(torch.randn(2, 256)), LSQ(CODECS["Q4_K"].grid))
    with pytest.raises(ValueError, match="40 columns not divisible"):
        softened(Dense(torch.randn(2, 40)), LSQ())
