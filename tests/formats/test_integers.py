"""Any grid of whole levels as codes, scale and zero point, exactly; packing and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rarefy.core.edit import edit
from rarefy.core.nodes import Dense, Masked, Node, Product, Quantized
from rarefy.formats.ggml import CODECS
from rarefy.formats.integers import integers, packed, unpacked
from rarefy.numerics.grids import Grid, Stored, integer_grid
from rarefy.techniques.quantize.rtn import RTN

GRIDS = [integer_grid(8, 0), integer_grid(4, 32), integer_grid(4, 32, symmetric=False), integer_grid(2, 16),
         integer_grid(3, 32), integer_grid(5, 0), Grid("ternary", (-1.0, 0.0, 1.0), 0),
         Grid("binary", (-1.0, 1.0), 0), CODECS["Q4_1"].grid, CODECS["IQ4_NL"].grid]


def rounded(values: Tensor, grid: Grid) -> Node:
    return edit("w", Dense(values), values, RTN(grid), "rtn", None, torch.Generator())[0]


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid is not None], ids=lambda grid: grid.name)
def test_every_grid_is_integers(grid: Grid) -> None:
    node = rounded(torch.randn(6, 64, generator=torch.Generator().manual_seed(0)), grid)
    found = integers(node)
    assert found is not None
    assert torch.allclose(found.dense(), node.dense(), rtol=1e-5, atol=1e-6)
    span = grid.levels[-1] - grid.levels[0]
    assert found.bits == (2 if span < 4 else 4 if span < 16 else 8)
    assert torch.allclose(found.widened(8).dense(), found.dense(), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.regrouped(8).dense(), found.dense())


def test_what_a_mask_dropped_is_the_code_of_zero() -> None:
    node, keep = rounded(torch.randn(4, 32), integer_grid(4, 32)), torch.rand(4, 32) < 0.5
    found = integers(Masked(keep, node))
    assert found is not None and torch.equal(found.dense(), Masked(keep, node).dense())


def test_what_is_no_integers() -> None:
    assert integers(Dense(torch.ones(2, 2))) is None
    assert integers(Product(Dense(torch.ones(2, 1)), Dense(torch.ones(1, 2)))) is None
    assert integers(rounded(torch.randn(2, 8), Grid("far", (-300.0, 0.0, 300.0), 0))) is None
    constant = Quantized(torch.zeros(1, 4, dtype=torch.uint8), Dense(torch.zeros(1, 1)),
                         Dense(torch.ones(1, 1)), Grid("constant", (0.0, 1.0), 0, Stored(torch.float32),
                                                       Stored(torch.float32)))
    assert integers(constant) is None  # its value is not zero, though its scale is


@given(st.sampled_from([2, 4, 8]), st.integers(1, 5), st.integers(1, 37))
def test_packing_comes_back(bits: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows * columns)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator).to(torch.uint8)
    data = packed(codes, bits)
    assert data.shape == (rows, -(-columns * bits // 8))
    assert torch.equal(unpacked(data, bits, columns), codes)
