"""Binary weights against XNOR-Net's closed form, written out, and against naive scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.core.edit import edit
from rarefy.core.nodes import Dense, Masked
from rarefy.core.nouns import Evidence
from rarefy.techniques.quantize.binary import Binary


def run(technique: object, weight: Tensor, evidence: Evidence | None = None, tree: object = None):
    return edit("layers.0.up", tree or Dense(weight), weight, technique, "t", evidence, torch.Generator())


@pytest.mark.parametrize("group", [0, 32])
def test_equals_the_paper(group: int, weight: Tensor) -> None:
    """alpha = ||W||_1 / n and B = sign(W), per filter (or per group of one)."""
    size = group or weight.shape[1]
    expected = []
    for unit in weight.reshape(-1, size).double().tolist():
        alpha = sum(abs(x) for x in unit) / size
        expected.append([alpha if x >= 0 else -alpha for x in unit])
    tree, receipt = run(Binary(group), weight)
    wanted = torch.tensor(expected).reshape(weight.shape)
    torch.testing.assert_close(tree.dense(), wanted, atol=1e-5, rtol=1e-3)
    assert receipt.bits_after == weight.numel() + 16 * weight.numel() // size


def test_no_other_scale_is_better(weight: Tensor, evidence: Evidence) -> None:
    """Weighted by the inputs; naive scales (the largest weight, the root of the mean square) lose."""
    h = evidence.gram.diagonal()
    tree, _ = run(Binary(), weight, evidence)

    def error(values: Tensor) -> float:
        return float((h * (weight - values).square()).sum())

    for factor in (0.95, 1.05):
        assert error(tree.dense()) < error(tree.dense() * factor)
    for scale in (weight.abs().amax(1), weight.square().mean(1).sqrt()):
        assert error(tree.dense()) < error(weight.sign() * scale[:, None])


def test_masked_weights_have_no_say(weight: Tensor) -> None:
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    keep[1] = False
    wild = torch.where(keep, weight, 50.0)
    tree, _ = run(Binary(), wild, None, Masked(keep, Dense(wild)))
    mean = (weight.abs() * keep).sum(1) / keep.sum(1).clamp_min(1)
    torch.testing.assert_close(tree.dense().abs().amax(1), mean * keep.any(1), atol=1e-5, rtol=1e-3)


def test_dead_rows_zeros_single_columns_and_overflow() -> None:
    w = torch.tensor([[0.0, 0.0], [0.0, 2.0], [1e9, -1e9]])
    tree, _ = run(Binary(), w)
    assert tree.dense().tolist() == [[0.0, 0.0], [1.0, 1.0], [65504.0, -65504.0]]
    column, _ = run(Binary(), torch.tensor([[0.5], [-0.25]]))
    assert column.dense().tolist() == [[0.5], [-0.25]]
    unseen, _ = run(Binary(), w, Evidence(torch.zeros(2, 2), 5))
    assert torch.equal(unseen.dense(), tree.dense())


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.up: 100 columns not divisible by binary64's block 64"):
        run(Binary(64), torch.randn(2, 100))
