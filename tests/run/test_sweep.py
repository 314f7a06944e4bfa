"""A sweep that was interrupted continues with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rarefy.models.model import open_model
from rarefy.numerics.grids import integer_grid
from rarefy.run.sweep import Work, sweep
from rarefy.techniques.quantize.gptq import GPTQ


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(5, 200, (4, 48), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sequential", [True, False])
def test_half_a_group_is_not_seen_by_the_rest(tiny_llama: Path, tokens: Tensor, sequential: bool) -> None:
    """A crash may come between two weights of one group, whose evidence is gathered together."""
    model = open_model(tiny_llama)
    inner = [site.path for site in model.map.sites if site.block is not None]
    work = {path: Work((("gptq", GPTQ(grid=integer_grid(3, 32))),)) for path in inner}
    whole: dict = {}
    sweep(model, work, tokens, {}, whole, 0, sequential=sequential)
    for count in (1, 4, len(inner) // 2 + 2):
        store = dict(list(whole.items())[:count])
        sweep(model, work, tokens, {}, store, 0, sequential=sequential)
        assert all(torch.equal(store[path][0].dense(), whole[path][0].dense()) for path in inner)
