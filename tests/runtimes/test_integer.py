"""A CNN in integers: no float on the way, every step within one code of fake quantization."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript")

from rarefy.core.errors import TargetError
from rarefy.core.nodes import Dense
from rarefy.export.onnx import GRIDS, stored_tensors
from rarefy.export.program import Program, trace
from rarefy.models.folding import fold
from rarefy.runtimes.integer import Fixed, IntegerNetwork, compiled
from small_networks import images, residual, rounded_trees


class Mean(nn.Module):
    """Pooling by means, a sum without Relu, a Relu by itself, groups, strides and dilation."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 6, 3, padding=1)
        self.two = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=2)
        self.pool, self.head = nn.AvgPool2d(2), nn.Linear(6, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.one(x))
        y = torch.relu(x + self.two(x))
        return self.head((y + torch.relu(x)).mean((2, 3)))


def made(module: nn.Module) -> tuple[Program, Any, IntegerNetwork]:
    program = trace(module.eval().requires_grad_(False), images(2))
    trees = rounded_trees(module, GRIDS["int8"])
    return program, trees, compiled(program, trees, [images(64, 1)])


@pytest.fixture(scope="module", params=["residual", "means"])
def network(request: pytest.FixtureRequest) -> tuple[Program, Any, IntegerNetwork]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return made(fold(residual(), images(4)["0"]).module if request.param == "residual" else Mean())


class Watched(np.ndarray):
    """An array that stays itself through every operation, and is never anything but integers."""

    seen = 0

    def __array_finalize__(self, source: Any) -> None:
        assert self.dtype.kind in "iub", self.dtype

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **settings: Any) -> Any:
        return watched(getattr(ufunc, method)(*map(plain, inputs), **settings))

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return watched(function(*map(plain, args), **kwargs))


def plain(each: Any) -> Any:
    if isinstance(each, np.ndarray | np.generic):
        assert each.dtype.kind in "iub", each.dtype
    assert not isinstance(each, float)
    return each.view(np.ndarray) if isinstance(each, np.ndarray) else each


def watched(found: Any) -> Any:
    Watched.seen += 1
    return np.asarray(found).view(Watched)


def test_no_float_on_the_way(network) -> None:
    _, _, whole = network
    Watched.seen = 0
    codes = whole.codes(images(3)["0"]).view(Watched)
    values = whole.values(codes)
    assert all(each.dtype == np.uint8 and isinstance(each, Watched) for each in values.values())
    assert Watched.seen > 5 * len(whole.steps)
    with pytest.raises(AssertionError):
        codes * 0.5  # the watch itself works


def test_each_step_is_within_one_code_of_fake_quantization(network) -> None:
    program, trees, whole = network
    batch = images(8, 5)
    held = whole.values(whole.codes(batch["0"]))
    worst = {}

    def compare(name: str, values: torch.Tensor) -> torch.Tensor:
        if name not in held:
            return values
        meant, own = whole.ranges[name], torch.from_numpy(np.array(held[name])).float()
        worst[name] = float((meant.codes(values) - own).abs().max())
        return (own - meant.zero) * meant.scale  # go on from the integers, so that errors do not add up

    program.run(batch, stored_tensors(program, trees), value=compare)
    assert len(worst) == len(held) and max(worst.values()) <= 1


def test_the_answers_are_the_network_s(network) -> None:
    program, trees, whole = network
    batch = images(32, 7)
    expected = program.run(batch, stored_tensors(program, trees))
    found = whole.answers(batch["0"])
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_fixed_point() -> None:
    values = np.array([0.75, 1e-9, -0.3, 1.0, 0.9999999999, 3.5])
    fixed = Fixed.of(values)
    assert np.allclose(fixed.mantissa / 2.0**fixed.shift, values, rtol=1e-9)
    assert (np.abs(fixed.mantissa) < 2**31).all()
    sums = np.array([2**31 - 1, -(2**31), 12345, -7, 0, 100], np.int32)
    assert np.abs(fixed.times(sums) - sums * values).max() <= 0.51


def test_what_has_no_integers() -> None:
    module = residual()
    program = trace(module, images(2))
    trees = rounded_trees(module, GRIDS["int8"])
    with pytest.raises(TargetError, match=r"one\.weight: integer arithmetic needs codes"):
        compiled(program, {**trees, "one.weight": Dense(module.one.weight.flatten(1))}, [images(2)])
    with pytest.raises(TargetError, match="fold BatchNorm first"):
        compiled(program, trees, [images(2)])
