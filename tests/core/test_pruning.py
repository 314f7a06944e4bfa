"""Rules as users write them, and the way from costs to a masked leaf."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rarefy.core.edit import Leaf
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nodes import Dense, Masked, Quantized
from rarefy.core.pruning import Rule, lost, masked, pattern_named
from rarefy.numerics.grids import integer_grid
from rarefy.numerics.patterns import NM, Pattern, Tiles, Unstructured
from rarefy.numerics.rounding import encode, fit


def rounded(weight: Tensor, bits: int = 3) -> Quantized:
    found = fit(weight, torch.ones(weight.shape[1]), integer_grid(bits, 32))
    return Quantized.of(encode(weight, found), found)


@pytest.mark.parametrize(("text", "pattern"), [
    ("unstructured", Unstructured("row")), ("Unstructured  per layer", Unstructured("layer")),
    ("unstructured per row", Unstructured("row")), ("2:4", NM(2, 4)), ("13:16", NM(13, 16)),
    ("block 16x32", Tiles(16, 32)), ("row", Tiles(1, 0)), ("row 8", Tiles(8, 0)), ("column", Tiles(0, 1)),
    ("column 64", Tiles(0, 64))])
def test_patterns_are_read(text: str, pattern: Pattern) -> None:
    assert pattern_named(text, "row") == pattern
    assert pattern_named(str(pattern), "row") == pattern


@pytest.mark.parametrize(("text", "message"), [
    ("unstrctured", r"pattern 'unstrctured'.*did you mean 'unstructured'"), ("rows", "did you mean 'row'"),
    ("16x16", "there is unstructured"), ("block 16", "did you mean 'block 16x16'"),
    ("block 0x4", "there is"), ("row 0", "there is"), ("4:2", "0 < n < m"), ("4:4", "0 < n < m"),
    ("0:4", "0 < n < m"), ("2:4 ish", "did you mean '2:4'"), ("", "there is"),
    (124, r'YAML reads 2:4 without quotes as a number; write "2:4"'), (None, "pattern None")])
def test_what_is_no_pattern_is_refused(text: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        pattern_named(text, "layer")


@pytest.mark.parametrize(("sparsity", "message"), [
    (0.0, "sparsity 0.0: must be a share above 0"), (1.0, "below 1"), (0, "above 0"), (1, "below 1"),
    (-0.5, "above 0"), (50, r"sparsity 50: .* did you mean 0.5\?"), (float("nan"), "share"),
    ("half", "sparsity 'half'"), (True, "share")])
def test_what_is_no_sparsity_is_refused(sparsity: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Rule.of("unstructured", sparsity, "layer")


def test_nm_decides_the_sparsity() -> None:
    assert Rule.of("1:4", None, "layer").sparsity == Rule.of("1:4", 0.75, "layer").sparsity == 0.75
    assert Rule.of("unstructured", None, "layer").sparsity == 0.5
    with pytest.raises(RecipeError, match=r"the pattern 2:4 drops 0\.5; leave sparsity out"):
        Rule.of("2:4", 0.6, "layer")


def test_lost_is_what_the_squared_error_gains(weight: Tensor) -> None:
    node = rounded(weight)
    leaf = Leaf("w", node, weight, None, None)
    without = weight.square() - (weight - node.dense()).square()
    torch.testing.assert_close(lost(leaf), without, rtol=1e-4, atol=1e-9)
    assert float(lost(leaf)[node.dense() == 0].abs().max()) == 0
    torch.testing.assert_close(lost(replace(leaf, node=Dense(weight))), weight.square())


def test_storage_stays_as_it_was(weight: Tensor) -> None:
    rule = Rule.of("unstructured", 0.5, "layer")
    for node in (Dense(weight.half()), rounded(weight)):
        done = masked(Leaf("w", node, weight, None, None), rule).node
        assert isinstance(done, Masked) and done.inner is node


def test_repairs_made_before_are_not_undone(weight: Tensor) -> None:
    """Values that differ from the target do so for a reason: they stand in for what is gone."""
    repaired = weight * 1.5
    done = masked(Leaf("w", Dense(repaired), weight, None, None), Rule.of("unstructured", 0.5, "layer"))
    assert isinstance(done.node, Masked)
    assert torch.equal(done.node.dense(), torch.where(done.node.keep, repaired, 0.0))


def test_rows_too_short_for_the_share_are_chosen_over_the_whole(weight: Tensor) -> None:
    column = weight[:, :1].contiguous()
    done = masked(Leaf("w", Dense(column), column, None, None), Rule.of("unstructured", 0.5, "row"))
    assert "rows of 1: chosen over the whole weight" in done.note
    assert isinstance(done.node, Masked) and int(done.node.keep.sum()) == column.numel() // 2


def test_nothing_left_and_nothing_dropped_are_told(weight: Tensor) -> None:
    one = weight[:1, :1].contiguous()
    leaf = Leaf("blocks.2.up", Dense(one), one, None, None)
    with pytest.raises(EditError, match=r"blocks\.2\.up: sparsity 0\.9, .* leaves none of 1 weights"):
        masked(leaf, Rule.of("unstructured", 0.9, "layer"))
    assert "nothing to drop at sparsity 0.3" in masked(leaf, Rule.of("unstructured", 0.3, "layer")).note
    keep = weight.abs() > weight.abs().quantile(0.6)
    done = masked(Leaf("w", Dense(weight), weight, keep, None), Rule.of("unstructured", 0.5, "layer"))
    assert "(60.0% were dropped before)" in done.note
    assert isinstance(done.node, Masked) and torch.equal(done.node.keep, keep)


def test_what_does_not_divide_names_site_value_and_remedy(weight: Tensor) -> None:
    odd = weight[:, :30].contiguous()
    with pytest.raises(EditError, match=r"blocks\.2\.up: pattern 2:4: rows of 30 .* use groups of 2"):
        masked(Leaf("blocks.2.up", Dense(odd), odd, None, None), Rule.of("2:4", None, "layer"))


def test_numbers_that_cannot_be_compared_are_refused(weight: Tensor) -> None:
    rule, broken = Rule.of("unstructured", 0.5, "layer"), weight.clone()
    broken[3, 3] = torch.nan
    with pytest.raises(EditError, match=r"blocks\.2\.up: cannot tell what to drop"):
        masked(Leaf("blocks.2.up", Dense(broken), broken, None, None), rule)
    stakes = torch.ones(1, weight.shape[1])
    stakes[0, 0] = torch.inf
    with pytest.raises(EditError, match="calibration evidence holds infinities"):
        masked(Leaf("w", Dense(weight), weight, None, None), rule, stakes)
