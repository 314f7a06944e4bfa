"""Magnitude pruning against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.core.codebooks import Clustered
from rarefy.core.edit import edit
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nodes import Dense, Masked, Node, Quantized
from rarefy.core.nouns import Evidence
from rarefy.numerics.grids import integer_grid
from rarefy.techniques.prune.magnitude import Magnitude
from rarefy.techniques.quantize.gptq import GPTQ
from rarefy.techniques.quantize.rtn import RTN


def run(technique: object, weight: Tensor, tree: Node | None = None, evidence: Evidence | None = None):
    return edit("w", tree or Dense(weight), weight, technique, "t", evidence, torch.Generator())


def test_drops_the_smallest_of_the_weight(weight: Tensor) -> None:
    tree, receipt = run(Magnitude(0.3), weight)
    border = weight.abs().flatten().sort().values[round(0.3 * weight.numel())]
    torch.testing.assert_close(tree.dense(), torch.where(weight.abs() >= border, weight, 0.0))
    assert receipt.note == "" and receipt.bits_after < 0.75 * receipt.bits_before


def test_drops_the_smallest_of_every_row(weight: Tensor) -> None:
    tree, _ = run(Magnitude(0.25, "unstructured per row"), weight)
    order = weight.abs().argsort(dim=1)[:, :weight.shape[1] // 4]
    torch.testing.assert_close(tree.dense(), weight.scatter(1, order, 0.0))


def test_filters_go_by_their_norm(weight: Tensor) -> None:
    tree, _ = run(Magnitude(0.5, "row"), weight)
    gone = weight.norm(dim=1).argsort()[:weight.shape[0] // 2]
    torch.testing.assert_close(tree.dense(), weight.index_fill(0, gone, 0.0))


def test_sparsity_is_of_the_whole_and_what_was_dropped_stays_so(weight: Tensor) -> None:
    first, _ = run(Magnitude(0.4, "column 4"), weight)
    assert isinstance(first, Masked)
    second, _ = run(Magnitude(0.7), weight, first)
    assert isinstance(second, Masked) and not isinstance(second.inner, Masked)
    assert not bool((second.keep & ~first.keep).any())
    assert float(second.keep.float().mean()) == pytest.approx(0.3, abs=1e-3)


def test_with_quantization_in_either_order(weight: Tensor, evidence: Evidence) -> None:
    pruned, _ = run(Magnitude(0.5), weight, None, evidence)
    one, _ = run(GPTQ(integer_grid(4, 32)), weight, pruned, evidence)
    codes, _ = run(RTN(integer_grid(4, 32)), weight, None, evidence)
    other, _ = run(Magnitude(0.5), weight, codes, evidence)
    assert isinstance(codes, Quantized)
    for tree in (one, other):
        assert isinstance(tree, Masked) and isinstance(tree.inner, Quantized)
        assert float(tree.keep.float().mean()) == pytest.approx(0.5, abs=1e-3)
    assert torch.equal(other.dense(), torch.where(other.keep, codes.dense(), 0.0))
    # what the grid holds as zero already goes first
    assert int((other.dense() != 0).sum()) >= int((one.dense() != 0).sum())


def test_constant_weights_and_single_rows_lose_their_share() -> None:
    flat = torch.full((6, 8), 0.5)
    tree, _ = run(Magnitude(0.5), flat)
    assert isinstance(tree, Masked) and int(tree.keep.sum()) == 24
    for shape in ((1, 40), (40, 1)):
        line = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        tree, _ = run(Magnitude(0.3), line)
        assert isinstance(tree, Masked) and int(tree.keep.sum()) == 28


@pytest.mark.parametrize("sparsity", [0.0, 1.0, 1.5])
def test_sparsities_that_mean_nothing(sparsity: float) -> None:
    with pytest.raises(RecipeError, match=r"sparsity .*: must be a share above 0"):
        Magnitude(sparsity)


def test_patterns_that_do_not_fit(weight: Tensor) -> None:
    with pytest.raises(RecipeError, match="did you mean 'unstructured'"):
        Magnitude(pattern="unstuctured")
    with pytest.raises(EditError, match=r"w: pattern block 16x48: 256 columns do not divide .* groups of 16"):
        run(Magnitude(pattern="block 16x48"), weight)


def test_shared_values_lose_their_indices(weight: Tensor) -> None:
    book = torch.linspace(-0.1, 0.1, 16).half().view(1, 16, 1)
    index = (weight[:, :, None] - book.flatten().float()).abs().argmin(2).to(torch.uint8)
    shared = Clustered(book, index)
    tree, receipt = run(Magnitude(0.75), weight, shared)
    assert isinstance(tree, Masked) and tree.inner is shared
    assert receipt.bits_after < 0.8 * receipt.bits_before
