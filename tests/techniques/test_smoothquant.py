"""SmoothQuant against its equation, and where it helps: activations rounded to 8 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.core.axes import AxisGroup, Inputs, Reader
from rarefy.core.errors import EditError
from rarefy.core.nouns import Evidence
from rarefy.techniques.quantize.smoothquant import SmoothQuant


def outlying(width: int, tokens: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = torch.ones(width)
    scale[torch.randperm(width, generator=generator)[:width // 64]] = 60.0
    return torch.randn(tokens, width, generator=generator) * scale


def decide(technique: SmoothQuant, x: Tensor, *weights: Tensor, channel: Tensor | None = None,
           scales: bool = True):
    channel = torch.arange(x.shape[1]) if channel is None else channel
    inputs = Inputs(Evidence(x.T @ x, len(x)), x.abs().mean(0), x.abs().amax(0))
    readers = tuple(Reader(f"w{k}", w, channel, inputs) for k, w in enumerate(weights))
    axes = AxisGroup("layers.0.norm", "norm", int(channel.max()) + 1, scales, 0, readers=readers)
    return technique.transform(axes, torch.Generator())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.75, 1.0])
def test_equals_the_paper(alpha: float, weight: Tensor) -> None:
    """Eq. 4, a channel at a time, the maximum over both matrices that share it."""
    x, other = outlying(256), weight.flip(0) * 3
    expected = [float(x[:, j].abs().max()) ** alpha
                / max(float(weight[:, j].abs().max()), float(other[:, j].abs().max())) ** (1 - alpha)
                for j in range(256)]
    change = decide(SmoothQuant(alpha), x, weight, other)
    torch.testing.assert_close(change.factors, torch.tensor(expected), rtol=1e-4, atol=0)


def test_at_one_half_activations_and_weights_are_equally_large(weight: Tensor) -> None:
    x = outlying(256)
    factors = decide(SmoothQuant(), x, weight).factors
    torch.testing.assert_close((x / factors).abs().amax(0), (weight * factors).abs().amax(0))


def eight_bits(values: Tensor) -> Tensor:
    """One scale for the whole tensor: what makes outliers costly."""
    step = values.abs().max() / 127
    return (values / step).round() * step


def test_rounding_activations_and_weights_loses_less(weight: Tensor) -> None:
    x = outlying(256)
    factors = decide(SmoothQuant(), x, weight).factors
    exact = x @ weight.T
    plain = (eight_bits(x) @ eight_bits(weight).T - exact).square().sum()
    smooth = (eight_bits(x / factors) @ eight_bits(weight * factors).T - exact).square().sum()
    assert smooth < 0.5 * plain


def test_channels_that_feed_several_columns(weight: Tensor) -> None:
    channel = torch.arange(128).repeat(2)
    x = outlying(256)
    factors = decide(SmoothQuant(), x, weight, channel=channel).factors
    largest = torch.stack([x.abs().amax(0)[channel == k].max() for k in range(128)])
    heaviest = torch.stack([weight.abs().amax(0)[channel == k].max() for k in range(128)])
    torch.testing.assert_close(factors, (largest / heaviest).sqrt())


def test_dead_channels_stay_and_are_counted(weight: Tensor) -> None:
    x, w = outlying(256), weight.clone()
    x[:, 3], w[:, 5] = 0.0, 0.0
    change = decide(SmoothQuant(), x, w)
    assert change.factors[3] == change.factors[5] == 1.0 and "2 channels carry nothing" in change.note
    assert bool(torch.isfinite(change.factors).all())


def test_mistakes_are_named_and_the_rest_left_alone(weight: Tensor) -> None:
    with pytest.raises(EditError, match=r"layers\.0\.norm: alpha=1\.5 must lie between 0 and 1"):
        decide(SmoothQuant(1.5), outlying(256), weight)
    assert decide(SmoothQuant(), outlying(256), weight, scales=False).empty
