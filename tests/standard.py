"""The standard fixture: a weight with heavy tails, and inputs that are correlated and of uneven scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.core.nouns import Evidence

ROWS, COLUMNS, TOKENS = 96, 256, 2048


@pytest.fixture(scope="session")
def weight() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(ROWS, COLUMNS, generator=generator)
    tail = torch.rand(ROWS, COLUMNS, generator=generator) < 0.01
    return normal * torch.where(tail, 0.08, 0.02)


@pytest.fixture(scope="session")
def evidence() -> Evidence:
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
    scale = torch.logspace(-1, 0.7, COLUMNS)[torch.randperm(COLUMNS, generator=generator)]
    x = (torch.randn(TOKENS, COLUMNS, generator=generator) @ mix + 0.3) * scale
    return Evidence(x.T @ x, TOKENS, torch.rand(ROWS, generator=generator))
