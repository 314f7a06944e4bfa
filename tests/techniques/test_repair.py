"""Repair supplies what is left over, whatever left it, and where the inputs will notice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.core.codebooks import Hashed
from rarefy.core.edit import edit
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nodes import Dense, Masked, Node, Product, Quantized, Shared, Sum
from rarefy.core.nouns import Evidence
from rarefy.numerics.grids import integer_grid
from rarefy.techniques.factorize.repair import Repair
from rarefy.techniques.factorize.svd import SVD
from rarefy.techniques.quantize.gptq import GPTQ
from rarefy.techniques.quantize.rtn import RTN


def run(technique: object, weight: Tensor, evidence: Evidence | None, tree: Node):
    return edit("w", tree, weight, technique, "repair", evidence, torch.Generator())


def literal(residual: Tensor, gram: Tensor, rank: int) -> Tensor:
    """EoRA, eq. 3-5: project the residual onto the eigenspace of the inputs, cut, project back."""
    values, Q = torch.linalg.eigh(gram.double())
    project = Q @ torch.diag(values.clamp_min(1e-12).sqrt())
    U, S, V = torch.linalg.svd(residual.double() @ project, full_matrices=False)
    return U[:, :rank] @ torch.diag(S[:rank]) @ V[:rank] @ torch.linalg.inv(project)


@pytest.mark.parametrize("quantizer", [RTN(integer_grid(3, 32)), GPTQ(integer_grid(3, 32))])
def test_equals_the_projection_of_the_residual(quantizer: object, weight: Tensor, evidence: Evidence) -> None:
    rounded, _ = run(quantizer, weight, evidence, Dense(weight))
    tree, receipt = run(Repair(rank=10, damping=1e-9, dtype="float32"), weight, evidence, rounded)
    assert isinstance(tree, Sum) and tree.terms[0] is rounded
    residual = weight - rounded.dense()
    lost = residual - literal(residual, evidence.gram, 10).float()
    expected = evidence.error(lost) / evidence.error(weight)
    assert receipt.error == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_quantization_alone_and_the_plain_svd_of_what_is_left(bits: int, weight: Tensor,
                                                                   evidence: Evidence) -> None:
    rounded, alone = run(RTN(integer_grid(bits, 32)), weight, evidence, Dense(weight))
    tree, repaired = run(Repair(rank=8), weight, evidence, rounded)
    U, S, V = torch.linalg.svd((weight - rounded.dense()).double(), full_matrices=False)
    naive = rounded.dense() + ((U[:, :8] * S[:8]) @ V[:8]).float()
    assert repaired.error < 0.9 * evidence.error(weight - naive) / evidence.error(weight)
    assert repaired.error < 0.7 * alone.error
    assert tree.bits() == rounded.bits() + 16 * 8 * sum(weight.shape)
    assert tree.terms[1].left.values.dtype == torch.float16


def test_supplies_what_a_mask_dropped_from_outside(weight: Tensor, evidence: Evidence) -> None:
    keep = weight.abs() > weight.abs().median()
    masked = Masked(keep, Dense(weight))
    tree, receipt = run(Repair(rank=16), weight, evidence, masked)
    assert isinstance(tree, Sum) and tree.terms[0] is masked
    assert receipt.error < 0.7 * evidence.error(weight - masked.dense()) / evidence.error(weight)
    quantized, _ = run(GPTQ(integer_grid(4, 32)), weight, evidence, masked)
    tree, receipt = run(Repair(rank=16), weight, evidence, quantized)
    assert isinstance(tree, Sum) and isinstance(tree.terms[0], Masked)
    assert receipt.error < evidence.error(weight - quantized.dense()) / evidence.error(weight)


def test_repairs_anything_and_repairs_again(weight: Tensor, evidence: Evidence) -> None:
    product, before = run(SVD(rank=20), weight, evidence, Dense(weight))
    once, first = run(Repair(rank=4), weight, evidence, product)
    twice, second = run(Repair(rank=4), weight, evidence, once)
    assert isinstance(twice, Sum) and len(twice.terms) == 3 and isinstance(twice.terms[0], Product)
    assert second.error < first.error < before.error
    hashed = Hashed(0.02 * torch.randn(64, generator=torch.Generator().manual_seed(0)), 7, (96, 256))
    _, receipt = run(Repair(rank=4), weight, evidence, hashed)
    assert receipt.error < 0.9 * evidence.error(weight - hashed.dense()) / evidence.error(weight)


def test_repaired_weights_can_be_quantized_further(weight: Tensor, evidence: Evidence) -> None:
    rounded, _ = run(RTN(integer_grid(3, 32)), weight, evidence, Dense(weight))
    repaired, _ = run(Repair(rank=16), weight, evidence, rounded)
    tree, receipt = run(RTN(integer_grid(8, 16)), weight, evidence, repaired)
    assert isinstance(tree, Sum) and isinstance(tree.terms[1], Product)
    assert isinstance(tree.terms[1].left, Quantized) and receipt.error < 0.02


def test_sizes(weight: Tensor, evidence: Evidence) -> None:
    rounded, _ = run(RTN(integer_grid(4, 32)), weight, evidence, Dense(weight))
    _, receipt = run(Repair(ratio=0.5), weight, evidence, rounded)
    assert rounded.bits() < receipt.bits_after <= 1.5 * rounded.bits()
    _, receipt = run(Repair(energy=0.5, damping=1e-9), weight, evidence, rounded)
    assert receipt.error <= 0.51 * evidence.error(weight - rounded.dense()) / evidence.error(weight)
    with pytest.raises(EditError, match=r"w: ratio=0\.01 of 110592 bits .* pass ratio=0.051 or more"):
        run(Repair(ratio=0.01), weight, evidence, rounded)


def test_nothing_left_over_is_said(weight: Tensor, evidence: Evidence) -> None:
    tree, receipt = run(Repair(rank=4), weight, evidence, Dense(weight))
    assert isinstance(tree, Dense) and receipt.note == "nothing is left over: not repaired"


def test_without_evidence_the_plain_svd_is_said(weight: Tensor) -> None:
    rounded, _ = run(RTN(integer_grid(4, 32)), weight, None, Dense(weight))
    tree, receipt = run(Repair(rank=5, dtype="float32"), weight, None, rounded)
    U, S, V = torch.linalg.svd((weight - rounded.dense()).double(), full_matrices=False)
    torch.testing.assert_close(tree.dense(), rounded.dense() + ((U[:, :5] * S[:5]) @ V[:5]).float(),
                               rtol=1e-3, atol=1e-6)
    assert receipt.note == "no calibration evidence: all inputs count alike"


def test_refusals(weight: Tensor, evidence: Evidence) -> None:
    with pytest.raises(RecipeError, match="dtype='int8': factors are stored in one of float16, bfloat16"):
        Repair(dtype="int8")
    with pytest.raises(EditError, match=r"repair edits .* found none in Shared"):
        run(Repair(), weight, evidence, Shared("embed", Dense(weight)))
    with pytest.raises(EditError, match="does not fit float16"):
        run(Repair(rank=2), weight * 1e30, evidence, Dense(torch.zeros_like(weight)))
