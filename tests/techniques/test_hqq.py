"""HQQ against a slow literal transcription, and against rounding to nearest on its own objective."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy.core.edit import edit
from rarefy.core.errors import EditError
from rarefy.core.nodes import Dense, Masked, Quantized
from rarefy.formats.ggml import CODECS
from rarefy.numerics.grids import Grid, Stored, integer_grid
from rarefy.techniques.quantize.hqq import GRID, HQQ
from rarefy.techniques.quantize.rtn import RTN

INTEGER_ZERO = integer_grid(4, 64, symmetric=False)
GRIDS = {"own": GRID, "integer zero": INTEGER_ZERO} | {name: CODECS[name].grid
                                                       for name in ("Q4_1", "Q5_1", "Q4_K", "Q2_K")}


def run(technique: object, weight: Tensor, tree: object = None):
    return edit("layers.0.up", tree or Dense(weight), weight, technique, "hqq", None, torch.Generator())


def literal(w: list[float], levels: int, p: float, beta: float, kappa: float, rounds: int) -> float:
    """The zero of one group: equations 4 to 9 of the report, a number at a time, in steps of the grid."""
    low, high = min(w), max(w)
    s = (high - low) / (levels - 1)
    u = [x / s for x in w]

    def quantize(z: float) -> list[float]:
        return [float(min(max(round(x - z), 0), levels - 1)) for x in u]

    def loss(z: float) -> float:
        return sum(abs(x - q - z) ** p for x, q in zip(u, quantize(z), strict=True))

    z = low / s
    best, least = z, loss(z)
    for _ in range(rounds):
        q = quantize(z)
        e = []
        for x, level in zip(u, q, strict=True):
            r = x - level - z
            shrunk = max(abs(r) - abs(r) ** (p - 1) / beta, 0.0) if r != 0 else 0.0
            e.append(shrunk if r > 0 else -shrunk)
        z = sum(x - error - level for x, error, level in zip(u, e, q, strict=True)) / len(u)
        beta *= kappa
        if loss(z) < least:
            best, least = z, loss(z)
    return best * s


def test_equals_the_literal_algorithm(weight: Tensor) -> None:
    small = weight[:6, :128].contiguous()
    exact = Grid("exact", GRID.levels, 64, Stored(torch.float32), Stored(torch.float32))
    tree, _ = run(HQQ(exact), small)
    assert isinstance(tree, Quantized) and tree.zero is not None
    zeros = tree.zero.dense()
    for row in range(6):
        for group in range(2):
            w = small[row, group * 64:(group + 1) * 64].double().tolist()
            expected = literal(w, 16, 0.7, 10.0, 1.01, 20)
            assert float(zeros[row, group]) == pytest.approx(expected, abs=1e-5)


def loss(tree: Quantized, weight: Tensor, p: float = 0.7) -> float:
    """The objective, every group's errors in its own steps."""
    steps = tree.scale.dense().abs().repeat_interleave(tree.grid.group, 1)
    return float(((tree.dense() - weight) / steps).abs().pow(p).sum())


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_lowers_its_objective(name: str, weight: Tensor) -> None:
    """Against the range alone (no rounds): the naive rounding that it starts from."""
    tree, receipt = run(HQQ(GRIDS[name]), weight)
    start, before = run(HQQ(GRIDS[name], rounds=0), weight)
    assert isinstance(tree, Quantized) and isinstance(start, Quantized) and tree.grid == GRIDS[name]
    assert loss(tree, weight) <= loss(start, weight) * 1.001  # formats round the zeros that were found
    assert receipt.bits_after == before.bits_after


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_rounding_to_nearest_on_its_objective(bits: int, weight: Tensor) -> None:
    """RTN without data searches scale and zero for the least squared error; in |error|^p HQQ's are better."""
    grid = Grid("g", tuple(float(level) for level in range(1 << bits)), 64, Stored(), Stored())

    def absolute(technique: object) -> float:
        tree, _ = run(technique, weight)
        return float((tree.dense() - weight).abs().pow(0.7).sum())

    assert absolute(HQQ(grid)) < absolute(HQQ(grid, rounds=0))
    assert absolute(HQQ(grid, clip=True)) < 0.97 * absolute(RTN(grid))


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-3, 1e3), st.integers(0, 1000))
def test_does_not_depend_on_the_unit(unit: float, seed: int) -> None:
    exact = Grid("exact", GRID.levels, 32, Stored(torch.float32), Stored(torch.float32))
    w = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))
    one, _ = run(HQQ(exact), w)
    other, _ = run(HQQ(exact), w * unit)
    different = (one.codes != other.codes).float().mean()
    assert different < 0.03  # a value on the border between two levels may fall either way


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_flat_and_dead_groups_stay_finite(name: str) -> None:
    w = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    w[0], w[1] = 0.0, 0.25
    w[2, :64] = 0.0
    tree, _ = run(HQQ(GRIDS[name]), w)
    dense = tree.dense()
    assert bool(torch.isfinite(dense).all()) and not bool(dense[0].any())
    if GRIDS[name].zero == Stored():
        torch.testing.assert_close(dense[1], w[1], atol=1e-3, rtol=0)


def test_dropped_weights_have_no_say(weight: Tensor) -> None:
    """Huge weights that a mask dropped change no code of the others."""
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.7
    clean = torch.where(keep, weight, 0.0)
    wild = torch.where(keep, weight, 100.0)
    one, _ = run(HQQ(), clean, Masked(keep, Dense(clean)))
    other, _ = run(HQQ(), wild, Masked(keep, Dense(wild)))
    torch.testing.assert_close(one.dense(), other.dense(), atol=0, rtol=0)


def test_one_row_and_one_column_and_what_does_not_divide() -> None:
    row_grid = Grid("row", GRID.levels, 0, Stored(), Stored())
    for shape in ((1, 64), (5, 1)):
        w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        tree, _ = run(HQQ(row_grid), w)
        assert tree.shape == shape and bool(torch.isfinite(tree.dense()).all())
    with pytest.raises(ValueError, match=r"layers\.0\.up: 100 columns not divisible by int4fg64's block 64"):
        run(HQQ(), torch.randn(2, 100))


def test_far_beyond_float16_saturates() -> None:
    tree, _ = run(HQQ(), torch.randn(2, 64) * 1e9)
    assert bool(torch.isfinite(tree.dense()).all())


@pytest.mark.parametrize(("technique", "match"), [
    (HQQ(CODECS["Q4_0"].grid), r"layers\.0\.up: .*'Q4_0' has none; use an affine one"),
    (HQQ(norm=1.0), r"norm=1\.0 must lie between 0 and 1"), (HQQ(norm=0.0), r"norm=0\.0 must lie"),
])
def test_what_means_nothing_is_refused(technique: HQQ, match: str) -> None:
    with pytest.raises(EditError, match=match):
        run(technique, torch.randn(2, 64))
