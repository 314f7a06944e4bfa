"""The laws of techniques that change coupled axes, over every one that is found in the folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rarefy.core.axes import AxisGroup, Transform
from rarefy.measure.divergence import Reference
from rarefy.models.model import open_model
from rarefy.models.runner import Runner
from rarefy.numerics.grids import integer_grid
from rarefy.run.planning import techniques, transforms
from rarefy.run.rescale import Rescaled, transformed

TRANSFORMS = transforms()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(3, 512, (4, 32), generator=torch.Generator().manual_seed(0))


def run(name: str, folder: Path, tokens: Tensor) -> Rescaled:
    model = open_model(folder)
    grids = {site.path: integer_grid(4, 32) for site in model.map.sites}
    return transformed(model, TRANSFORMS[name](), tokens, name=name, grids=grids)


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_shapes_and_function_stay_and_it_repeats(name: str, tiny_llama: Path, tokens: Tensor) -> None:
    """Laws 1, 4 and 5 for whole models: nothing but numbers changes, and not what they compute."""
    original, one, two = open_model(tiny_llama), run(name, tiny_llama, tokens), run(name, tiny_llama, tokens)
    assert one.receipts and {receipt.technique for receipt in one.receipts} == {name}
    changed = 0
    for site in original.map.sites:
        after = one.model.weight(site.path)
        assert after.shape == site.shape and bool(torch.isfinite(after).all())
        assert torch.equal(after, two.model.weight(site.path))
        changed += not torch.equal(after, original.weight(site.path))
    assert changed
    assert Reference(original, tokens).compare(Runner(one.model)).kl_mean < 1e-6


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_declares_what_a_user_meets(name: str) -> None:
    kind = TRANSFORMS[name]
    assert isinstance(kind(), Transform)
    assert "Paper:" in (sys.modules[kind.__module__].__doc__ or "")
    assert kind.__dataclass_params__.frozen
    assert kind.__doc__ and "Shapes:" in kind.__doc__
    assert kind.edits == (AxisGroup,) and kind.needs <= {"inputs"}
    assert kind.beats in techniques()
