"""Random weights on any grid, for the tests of packers and containers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from rarefy.core.nodes import Dense, Node, Quantized, steps_grid
from rarefy.numerics.grids import Grid, Stored

OnGrid = Callable[..., Quantized]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def plain(shape: tuple[int, ...], dtype: torch.dtype, random: np.random.Generator) -> Dense:
    """Finite numbers of many magnitudes, subnormal ones and both zeros among them."""
    if dtype in (torch.float8_e8m0fnu, torch.int8):
        return Dense(torch.from_numpy(random.integers(0, 120, shape, dtype=np.uint8)).view(dtype))
    values = random.standard_normal(shape) * np.exp2(random.integers(-22, 6, shape))
    values *= random.random(shape) > 0.1
    return Dense(torch.from_numpy(values).to(dtype))


def number(shape: tuple[int, int], stored: Stored, random: np.random.Generator) -> Node:
    if not stored.bits:
        return plain(shape, stored.dtype, random)
    steps = torch.from_numpy(random.integers(0, 1 << stored.bits, shape).astype(np.uint8))
    coarse = plain((shape[0], shape[1] // stored.over), stored.dtype, random)
    return Quantized(steps, coarse, None, steps_grid(stored))


def random_node(grid: Grid, rows: int, columns: int, seed: int = 0) -> Quantized:
    random = np.random.default_rng(seed)
    codes = torch.from_numpy(random.integers(0, len(grid.levels), (rows, columns)).astype(np.uint8))
    shape = (rows, columns // (grid.group or columns))
    zero = None if grid.zero is None else number(shape, grid.zero, random)
    return Quantized(codes, number(shape, grid.scale, random), zero, grid)


@pytest.fixture(scope="session")
def on_grid() -> OnGrid:
    """``on_grid(grid, rows, columns, seed)``: a random weight on that grid."""
    return random_node
