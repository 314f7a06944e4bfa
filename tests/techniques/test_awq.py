"""AWQ against a literal transcription of its search, on inputs with outlier channels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.core.axes import AxisGroup, Inputs, Reader
from rarefy.core.edit import edit
from rarefy.core.errors import EditError
from rarefy.core.nodes import Dense
from rarefy.core.nouns import Evidence
from rarefy.formats.ggml import CODECS
from rarefy.numerics.grids import Grid, integer_grid
from rarefy.techniques.quantize.awq import AWQ
from rarefy.techniques.quantize.rtn import RTN

GRID = integer_grid(3, 32)


def outlying(width: int, tokens: int = 300, seed: int = 0) -> Tensor:
    """Inputs in which a few channels are 20 times larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.ones(width)
    scale[torch.randperm(width, generator=generator)[:width // 32]] = 20.0
    return torch.randn(tokens, width, generator=generator) * scale


def seen(x: Tensor) -> Inputs:
    return Inputs(Evidence(x.T @ x, len(x)), x.abs().mean(0), x.abs().amax(0))


def group(x: Tensor, *weights: Tensor, channel: Tensor | None = None, grid: Grid | None = GRID,
          scales: bool = True) -> AxisGroup:
    channel = torch.arange(x.shape[1]) if channel is None else channel
    readers = tuple(Reader(f"layers.0.w{k}", w, channel, seen(x), grid) for k, w in enumerate(weights))
    return AxisGroup("layers.0.norm", "norm", int(channel.max()) + 1, scales, 0, readers=readers)


def decide(technique: AWQ, axes: AxisGroup):
    return technique.transform(axes, torch.Generator())


def rounded(weight: Tensor, x: Tensor, grid: Grid = GRID) -> Tensor:
    evidence = Evidence(x.T @ x, len(x))
    return edit("w", Dense(weight), weight, RTN(grid), "rtn", evidence, torch.Generator())[0].dense()


def output_error(x: Tensor, weights: tuple[Tensor, ...], factors: Tensor) -> float:
    """|| Q(W diag(s)) (diag(s)^-1 X) - W X ||^2, computed on the inputs themselves."""
    total = 0.0
    for weight in weights:
        moved = x / factors
        total += float((moved @ rounded(weight * factors, moved).T - x @ weight.T).square().sum())
    return total


def literal(x: Tensor, weights: tuple[Tensor, ...], steps: int) -> tuple[float, Tensor]:
    """Lin et al. 2024, eq. 4 and 5: every alpha tried, a channel at a time."""
    found = []
    for step in range(steps):
        alpha = step / steps
        factors = torch.tensor([float(x[:, j].abs().mean()) ** alpha for j in range(x.shape[1])])
        found.append((output_error(x, weights, factors), alpha, factors))
    best = min(found, key=lambda each: each[0])
    return best[1], best[2]


def test_equals_the_literal_search() -> None:
    x = outlying(64)
    weights = tuple(torch.randn(24, 64, generator=torch.Generator().manual_seed(k)) * 0.02 for k in (1, 2))
    alpha, factors = literal(x, weights, 10)
    change = decide(AWQ(steps=10), group(x, *weights))
    assert alpha > 0 and change.factors is not None and f"alpha {alpha:.2f}" in change.note
    # ours are divided by their geometric mean, which no scale notices
    ratio = change.factors / factors
    torch.testing.assert_close(ratio, ratio[0].expand(64), rtol=1e-4, atol=0)
    assert float(change.factors.log().mean()) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", ["int3", "Q4_0", "IQ4_NL", "Q4_1", "Q4_K", "Q2_K", "TQ2_0"])
def test_beats_rounding_without_it(name: str, weight: Tensor) -> None:
    grid = GRID if name == "int3" else CODECS[name].grid
    x = outlying(256)
    change = decide(AWQ(), group(x, weight, grid=grid))
    assert change.factors is not None

    def error(factors: Tensor) -> float:
        moved = x / factors
        return float((moved @ rounded(weight * factors, moved, grid).T - x @ weight.T).square().sum())

    # an affine grid already bends its scale and zero to the one outlier of a group
    assert error(change.factors) < (0.98 if name == "Q4_1" else 0.9) * error(torch.ones(256))


def test_nothing_is_done_where_nothing_is_gained(weight: Tensor) -> None:
    """Equal channels: no alpha changes anything, and the receipt says so."""
    x = torch.eye(256)
    change = decide(AWQ(), group(x, weight))
    assert change.empty and "alpha 0" in change.note


def test_a_sample_of_the_rows_decides_nearly_alike(monkeypatch: pytest.MonkeyPatch, weight: Tensor) -> None:
    x = outlying(256)
    whole = decide(AWQ(), group(x, weight)).factors
    monkeypatch.setattr("rarefy.techniques.quantize.awq.ROWS", 32)
    part = decide(AWQ(), group(x, weight)).factors
    ones = torch.ones(256)
    errors = [output_error(x, (weight,), factors) for factors in (whole, part, ones)]
    assert errors[1] < errors[0] + 0.2 * (errors[2] - errors[0])


def test_channels_that_feed_several_columns_have_one_factor(weight: Tensor) -> None:
    """Grouped heads: 64 channels, 256 columns; the factor follows the mean over a channel's columns."""
    x = outlying(256)
    channel = torch.arange(64).view(2, 1, 32).expand(2, 4, 32).reshape(-1)
    change = decide(AWQ(), group(x, weight, channel=channel))
    assert change.factors is not None and change.factors.shape == (64,)
    pooled = torch.stack([x.abs().mean(0)[channel == k].mean() for k in range(64)])
    slope = change.factors.log() / (pooled.log() - pooled.log().mean())
    torch.testing.assert_close(slope, slope[0].expand(64), rtol=1e-3, atol=1e-4)


def test_dead_channels_keep_their_size(weight: Tensor) -> None:
    x = outlying(256)
    x[:, 7] = 0.0
    change = decide(AWQ(), group(x, weight))
    assert change.factors is not None and float(change.factors[7]) == 1.0
    assert bool(torch.isfinite(change.factors).all())
    assert decide(AWQ(), group(torch.zeros(10, 256), weight)).empty


def test_leaves_alone_what_it_cannot_judge(weight: Tensor) -> None:
    x = outlying(256)
    assert decide(AWQ(), group(x, weight, grid=None)).empty  # stays in floats
    assert decide(AWQ(), group(x, weight, scales=False)).empty
    own = decide(AWQ(grid=GRID), group(x, weight, grid=None))
    assert own.factors is not None


def test_mistakes_are_named(weight: Tensor) -> None:
    x = outlying(256)
    with pytest.raises(EditError, match=r"layers\.0\.norm: steps=1 tries no alpha but 0"):
        decide(AWQ(steps=1), group(x, weight))
    with pytest.raises(ValueError, match=r"layers\.0\.w0: 256 columns not divisible by int3g96's block 96"):
        decide(AWQ(), group(x, weight, grid=integer_grid(3, 96)))
