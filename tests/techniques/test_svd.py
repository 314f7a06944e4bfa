"""SVD against a literal truncation, its three ways to say a size, and the inputs that nobody should pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.core.edit import edit
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nodes import Dense, Masked, Node, Product
from rarefy.core.nouns import Evidence
from rarefy.techniques.factorize.svd import SVD


def run(technique: object, weight: Tensor, tree: Node | None = None, evidence: Evidence | None = None):
    tree = tree or Dense(weight)
    return edit("layers.0.mlp.up", tree, weight, technique, "svd", evidence, torch.Generator())


def literal(weight: Tensor, rank: int) -> Tensor:
    U, S, V = torch.linalg.svd(weight.double(), full_matrices=False)
    return (U[:, :rank] @ torch.diag(S[:rank]) @ V[:rank]).float()


@pytest.mark.parametrize("shape", [(40, 40), (30, 70), (500, 24), (1, 9), (9, 1)])
def test_equals_the_truncated_svd(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for rank in {1, (min(shape) + 1) // 2, min(shape)}:
        tree, receipt = run(SVD(rank=rank), weight)
        assert isinstance(tree, Product) and tree.left.shape == (shape[0], rank)
        torch.testing.assert_close(tree.dense(), literal(weight, rank), rtol=1e-4, atol=1e-5)
        assert tree.bits() == 32 * rank * sum(shape)
        dearer = tree.bits() >= Dense(weight).bits()
        assert ("of the bits they replace" in receipt.note) == dearer


def test_three_ways_to_say_how_much(weight: Tensor) -> None:
    S = torch.linalg.svdvals(weight.double()).square()
    tree, _ = run(SVD(energy=0.7), weight)
    rank = tree.left.shape[1]
    assert S[:rank].sum() >= 0.7 * S.sum() > S[:rank - 1].sum()
    tree, _ = run(SVD(ratio=0.5), weight)
    unit = 32 * sum(weight.shape)
    assert tree.bits() <= 0.5 * Dense(weight).bits() < tree.bits() + unit
    default, _ = run(SVD(), weight)
    assert default.bits() <= 0.8 * Dense(weight).bits() < default.bits() + unit
    aligned, _ = run(SVD(ratio=0.5, multiple=16), weight)
    assert aligned.left.shape[1] == tree.left.shape[1] // 16 * 16
    up, _ = run(SVD(energy=0.7, multiple=16), weight)
    assert up.left.shape[1] == -(-rank // 16) * 16
    whole, _ = run(SVD(energy=1.0), weight)
    torch.testing.assert_close(whole.dense(), weight)


def test_factors_are_stored_as_the_leaf_was(weight: Tensor) -> None:
    tree, receipt = run(SVD(ratio=0.5), weight, Dense(weight.bfloat16()))
    assert tree.left.values.dtype == tree.right.values.dtype == torch.bfloat16
    assert receipt.bits_after <= 0.5 * receipt.bits_before


def test_an_embedding_needs_no_evidence() -> None:
    table = torch.randn(400, 3) @ torch.randn(3, 32)
    tree, receipt = run(SVD(rank=3), table)
    torch.testing.assert_close(tree.rows(torch.tensor([7, 399])), table[[7, 399]], rtol=1e-4, atol=1e-4)
    assert receipt.bits_after < 0.11 * receipt.bits_before and receipt.note == ""


def test_what_a_mask_drops_whole_takes_no_rank(weight: Tensor) -> None:
    keep = torch.ones_like(weight, dtype=torch.bool)
    keep[:, 64:] = False
    tree, receipt = run(SVD(rank=64), weight, Masked(keep, Dense(weight)))
    assert isinstance(tree, Masked) and isinstance(tree.inner, Product)
    torch.testing.assert_close(tree.dense(), weight * keep, rtol=1e-4, atol=1e-5)
    assert "under a mask" in receipt.note


@pytest.mark.parametrize(("settings", "message"), [
    ({"rank": 3, "ratio": 0.5}, "rank=3 and ratio=0.5: give one of rank, energy and ratio, not 2"),
    ({"rank": 3, "energy": 0.5, "ratio": 0.5}, "not 3"),
    ({"rank": 0}, "rank=0: a rank must be 1 or more"),
    ({"rank": -2}, "rank=-2"),
    ({"ratio": 0.0}, r"ratio=0.0: a share must lie in \(0, 1\]"),
    ({"ratio": 1.5}, "ratio=1.5"),
    ({"energy": float("nan")}, "energy=nan"),
    ({"multiple": 0}, "multiple=0"),
    ({"rank": 24, "multiple": 16}, "rank=24: a rank must be 1 or more and a multiple of 16"),
])
def test_settings_that_mean_nothing(settings: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SVD(**settings)


@pytest.mark.parametrize(("settings", "shape", "message"), [
    ({"rank": 25}, (24, 64), "layers.0.mlp.up: rank=25 is above the full rank 24; pass rank=24 or less"),
    ({"rank": 32, "multiple": 16}, (24, 64), "pass rank=16 or less"),
    ({"ratio": 0.001}, (24, 64), "layers.0.mlp.up: ratio=0.001 of 49152 bits allows 49, and the smallest "
                                 "factors take 2816; pass ratio=0.058 or more"),
    ({}, (1, 64), "no factors are smaller than this weight, leave it as it is"),
    ({}, (64, 1), "no factors are smaller than this weight"),
    ({"ratio": 0.5, "multiple": 32}, (24, 640), "holds no multiple of 32; pass a smaller multiple"),
    ({"ratio": 0.5, "multiple": 24}, (24, 24), "pass a smaller multiple"),
    ({"ratio": 0.2, "multiple": 16}, (24, 64), "pass ratio=0.917 or more"),
])
def test_sizes_that_do_not_fit(settings: dict[str, float], shape: tuple[int, int], message: str) -> None:
    with pytest.raises(EditError) as refusal:
        run(SVD(**settings), torch.randn(shape))
    assert message in str(refusal.value)


def test_ratio_told_for_an_unfit_multiple_works() -> None:
    tree, _ = run(SVD(ratio=0.917, multiple=16), torch.randn(24, 64))
    assert tree.left.shape == (24, 16)


def test_nan_and_overflow_are_named() -> None:
    weight = torch.randn(16, 32)
    with pytest.raises(EditError, match=r"layers.0.mlp.up: the weight holds NaN or infinity"):
        run(SVD(rank=2), weight.where(weight < 1, float("nan")))
    with pytest.raises(EditError, match=r"a factor reaches .* not fit float16; cast the weight to bfloat16"):
        run(SVD(rank=2), weight * 1e30, Dense(weight.half()))


def test_zero_and_constant_weights() -> None:
    tree, _ = run(SVD(ratio=0.5), torch.zeros(16, 32))
    assert not bool(tree.dense().any())
    flat, _ = run(SVD(energy=0.999), torch.full((16, 32), 0.25))
    assert flat.left.shape[1] == 1
    torch.testing.assert_close(flat.dense(), torch.full((16, 32), 0.25))
