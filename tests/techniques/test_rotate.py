"""Rotations: which groups they take, which they refuse, and that rounding loses less behind them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.core.axes import AxisGroup
from rarefy.core.edit import edit
from rarefy.core.errors import EditError
from rarefy.core.nodes import Dense
from rarefy.numerics.grids import integer_grid
from rarefy.techniques.quantize.rotate import Rotate
from rarefy.techniques.quantize.rtn import RTN


def axes(role: str, size: int = 256, turns: int | None = None, barrier: str = "") -> AxisGroup:
    return AxisGroup("model", role, size, role != "residual", size if turns is None else turns, barrier)


def decide(technique: Rotate, group: AxisGroup, seed: int = 0):
    return technique.transform(group, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_rounds_heavy_tails_better(kind: str) -> None:
    """QuaRot's claim for weights: rotated ones are nearer to a Gaussian, and a scale serves them all."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weight = torch.distributions.StudentT(2.5).sample((64, 256)) * 0.02
    rotation = decide(Rotate(kind), axes("residual")).rotation
    assert rotation is not None

    def loss(values: Tensor) -> float:
        tree, _ = edit("w", Dense(values), values, RTN(integer_grid(4, 0)), "rtn", None, torch.Generator())
        return float((tree.dense() - values).square().sum() / values.square().sum())

    turned = rotation.turned(weight)
    torch.testing.assert_close(turned.square().sum(), weight.square().sum())
    assert loss(turned) < 0.5 * loss(weight)
    kurtosis = [float(((w - w.mean()) / w.std()).pow(4).mean()) for w in (weight, turned)]
    assert kurtosis[0] > 20 and kurtosis[1] < 6


def test_takes_what_it_is_told_to() -> None:
    both, stream, heads = Rotate(), Rotate(heads=False), Rotate(residual=False)
    taken = [[not decide(each, axes(role)).empty for role in ("residual", "values", "norm", "hidden")]
             for each in (both, stream, heads)]
    assert taken == [[True, True, False, False], [True, False, False, False], [False, True, False, False]]
    assert Rotate(untie=True).unties and not Rotate(untie=True, residual=False).unties and not both.unties


def test_the_seed_decides() -> None:
    one, same, other = (decide(Rotate(), axes("residual"), seed).rotation for seed in (0, 0, 1))
    assert torch.equal(one.signs, same.signs) and not torch.equal(one.signs, other.signs)


def test_what_cannot_be_rotated_is_refused_with_the_reason() -> None:
    with pytest.raises(EditError, match="model: cannot be rotated: its norms subtract; pass residual: false"):
        decide(Rotate(), axes("residual", turns=0, barrier="its norms subtract"))
    assert decide(Rotate(residual=False), axes("residual", turns=0, barrier="x")).empty
    with pytest.raises(EditError, match=r"kind='hadamrd': choose one of hadamard, random; did you mean"):
        decide(Rotate("hadamrd"), axes("residual"))


def test_widths_without_a_hadamard_matrix() -> None:
    change = decide(Rotate(), axes("residual", 1376))
    assert "blocks of 32" in change.note
    with pytest.raises(EditError, match="no Hadamard matrix divides 7 channels; use kind: random"):
        decide(Rotate(), axes("residual", 7))
    assert decide(Rotate("random"), axes("residual", 7)).rotation.width == 7
