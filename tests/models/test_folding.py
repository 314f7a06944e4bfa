"""Folding keeps every answer, and refuses where it would not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rarefy.core.errors import ModelError
from rarefy.models.folding import fold, merged


def lived(module: nn.Module) -> nn.Module:
    """Statistics, gains and offsets that are not those of a new network."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            for values in (part.weight, part.bias, part.running_mean, part.running_var):
                if values is not None:
                    values.data.copy_(torch.rand(values.shape, generator=generator) + 0.1)
    return module.eval()


class Residual(nn.Module):
    """A block whose shortcut takes the convolution's output before or after its normalisation."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.early = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), early

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv(x)
        normed = self.norm(inner)
        return torch.relu(normed) + (inner if self.early else normed)


@pytest.mark.parametrize("network", [
    nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4),
                  nn.BatchNorm2d(8, affine=False), nn.Flatten(), nn.Linear(8 * 16, 5), nn.BatchNorm1d(5)),
    Residual(early=False)], ids=["sequence", "residual"])
def test_every_answer_stays(network: nn.Module) -> None:
    x = torch.randn(4, 3, 8, 8)
    wanted = lived(network)(x)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    done = fold(network, x)
    torch.testing.assert_close(done.module(x), wanted, atol=1e-5, rtol=1e-5)
    assert not done.left
    assert not any(isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) for part in done.module.modules())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())  # a copy


def test_the_formula() -> None:
    """Jacob et al. 2018, eq. 14: w gamma / sqrt(var + eps), one channel at a time."""
    conv, norm = nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3, eps=0.01)
    lived(nn.Sequential(conv, norm))
    done = merged(conv, norm)
    for channel in range(3):
        factor = float(norm.weight[channel].detach() / (norm.running_var[channel] + 0.01) ** 0.5)
        torch.testing.assert_close(done.weight[channel], conv.weight[channel].detach() * factor)
        bias = (conv.bias[channel] - norm.running_mean[channel]) * factor + norm.bias[channel]
        torch.testing.assert_close(done.bias[channel], bias.detach())


def test_what_cannot_be_folded_is_left_and_listed() -> None:
    x = torch.randn(4, 3, 8, 8)
    early = lived(Residual(early=True))
    done = fold(early, x)
    assert done.left == {"norm": "something else uses what conv computes"}
    torch.testing.assert_close(done.module(x), early(x))
    alone = fold(lived(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))), x)
    assert "not the output of one" in alone.left["1"]
    twice = nn.Conv2d(3, 3, 1)
    both = fold(lived(nn.Sequential(twice, nn.BatchNorm2d(3), twice, nn.BatchNorm2d(3))), x)
    assert set(both.left) == {"1", "3"}
    blind = fold(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)), x)
    assert "keeps no statistics" in blind.left["1"]


def test_answers_that_cannot_be_compared_are_refused() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(ModelError, match="returns a tuple; wrap it"):
        fold(Two(), torch.randn(2, 3))
