"""GPTQ against a literal transcription of Optimal Brain Quantization, and against its naive baselines."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rarefy.core.edit import Leaf, edit
from rarefy.core.nodes import Dense, Masked, Quantized
from rarefy.core.nouns import Choice, Evidence
from rarefy.formats.ggml import CODECS
from rarefy.numerics.grids import Grid, integer_grid
from rarefy.numerics.linear import damped
from rarefy.numerics.rounding import Fit, fit, level_of, nearest
from rarefy.techniques.quantize.gptq import GPTQ
from rarefy.techniques.quantize.rtn import RTN

NAMES = ("Q4_0", "IQ4_NL", "Q4_1", "MXFP4", "Q2_0", "Q4_K", "Q3_K", "Q2_K")
GRIDS = {name: CODECS[name].grid for name in NAMES}
GRIDS |= {"int3 row": integer_grid(3, 0), "int4z g64": integer_grid(4, 64, symmetric=False)}


def run(technique: object, weight: Tensor, evidence: Evidence | None, tree: object = None):
    return edit("w", tree or Dense(weight), weight, technique, "t", evidence, torch.Generator())


def literal(weight: Tensor, gram: Tensor, grid: Grid, order: list[int]) -> Tensor:
    """Column by column, the inverse of the remaining Hessian recomputed from scratch each time, O(n^4).

    w_F <- w_F - (w_q - quant(w_q)) / [H_F^-1]_qq * (H_F^-1)_{:,q}   (Frantar & Alistarh 2022, eq. 3)
    """
    work, result = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    columns, block = weight.shape[1], grid.block or weight.shape[1]
    uncertainty = torch.zeros(columns, dtype=torch.float64)
    for k, j in enumerate(order):
        rest = order[k:]
        uncertainty[j] = torch.linalg.inv(gram[rest][:, rest])[0, 0]
    found: Fit | None = None
    for k, j in enumerate(order):
        first = j // block * block
        inside = slice(first, first + block)
        if k % block == 0:
            found = fit(work[:, inside].float(), (1 / uncertainty[inside]).float(), grid)
        assert found is not None
        scale, zero = found.values()
        s = scale[:, (j - first) // (grid.group or columns)]
        z = 0 if zero is None else zero[:, (j - first) // (grid.group or columns)]
        safe = torch.where(s == 0, 1.0, s)
        q = level_of(nearest((work[:, j].float() - z) / safe, grid), grid) * s + z
        result[:, j] = q.double()
        rest = order[k:]
        inverse = torch.linalg.inv(gram[rest][:, rest])
        error = (work[:, j] - q.double()) / inverse[0, 0]
        work[:, rest] -= error[:, None] * inverse[0][None, :]
    return result.float()


@pytest.mark.parametrize("name", ["Q4_0", "IQ4_NL", "Q4_1", "int3 row", "Q2_0"])
@pytest.mark.parametrize("ordered", [True, False])
def test_equals_the_literal_algorithm(name: str, ordered: bool, weight: Tensor, evidence: Evidence) -> None:
    columns = 64
    small, grid = weight[:8, :columns].contiguous(), GRIDS[name]
    gram = evidence.gram[:columns, :columns].contiguous()
    seen = Evidence(gram, evidence.tokens)
    technique = GPTQ(grid, activation_order=ordered)
    order = technique._order((gram / seen.tokens).diagonal()).tolist()
    expected = literal(small, damped(gram / seen.tokens, technique.damping), grid, order)
    got, _ = run(technique, small, seen)
    # a value that lies on the border between two levels may fall either way in float32: none may elsewhere
    assert ((got.dense() - expected).abs() > 1e-5).float().mean() < 0.01


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_beats_rounding_to_nearest(name: str, weight: Tensor, evidence: Evidence) -> None:
    _, nearest_receipt = run(RTN(GRIDS[name]), weight, evidence)
    _, receipt = run(GPTQ(GRIDS[name]), weight, evidence)
    assert receipt.error < 0.8 * nearest_receipt.error
    assert receipt.bits_after == nearest_receipt.bits_after < receipt.bits_before


def test_repairs_what_a_mask_dropped(weight: Tensor, evidence: Evidence) -> None:
    """With the original as target, rounding under a mask ends below the error of the mask alone."""
    keep = weight.abs() >= weight.abs().quantile(0.3)
    masked = Masked(keep, Dense(weight))
    dropped = evidence.error(weight - masked.dense()) / evidence.error(weight)
    tree, receipt = run(GPTQ(integer_grid(8, 32)), weight, evidence, masked)
    assert receipt.error < 0.75 * dropped
    assert isinstance(tree, Masked) and torch.equal(tree.keep, keep)
    assert not bool(tree.dense()[~keep].any())


def test_foreseen_damage_orders_and_estimates_formats(weight: Tensor, evidence: Evidence) -> None:
    leaf_evidence = replace(evidence, fisher=torch.ones(weight.shape[0]))
    choices = {name: Choice(GRIDS[name], 1) for name in ("Q2_0", "Q4_0", "IQ4_NL", "Q4_K")}
    leaf = Leaf("w", Dense(weight), weight, None, leaf_evidence)
    foreseen = {option.format: option.damage for option in GPTQ.options(leaf, choices)}
    for name, damage in foreseen.items():
        tree, _ = run(GPTQ(GRIDS[name]), weight, leaf_evidence)
        measured = leaf_evidence.damage(tree.dense() - weight)
        assert 0.5 * measured < damage < 2 * measured


def test_singular_gram_climbs_the_ladder_and_says_so(weight: Tensor) -> None:
    gram = 4 * torch.eye(weight.shape[1])
    gram[0, 1] = gram[1, 0] = 400.0  # indefinite: no activations give this, a broken sum might
    tree, receipt = run(GPTQ(integer_grid(4, 32), damping=1e-9), weight, Evidence(gram, 4))
    assert "not positive definite" in receipt.note and "rounded to nearest" in receipt.note
    assert "4 calibration tokens" in receipt.note
    assert bool(torch.isfinite(tree.dense()).all())


def test_dead_columns_and_constant_rows_stay_finite(weight: Tensor, evidence: Evidence) -> None:
    gram = evidence.gram.clone()
    gram[5], gram[:, 5] = 0.0, 0.0
    flat = weight.clone()
    flat[0], flat[1] = 0.0, 0.5
    tree, _ = run(GPTQ(integer_grid(4, 32)), flat, Evidence(gram, evidence.tokens))
    assert bool(torch.isfinite(tree.dense()).all())
    assert not bool(tree.dense()[0].any())


def test_chunks_of_rows_change_nothing(weight: Tensor, evidence: Evidence,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(GPTQ(integer_grid(3, 32)), weight, evidence)
    monkeypatch.setattr("rarefy.techniques.quantize.gptq.CHUNK", 7 * weight.shape[1])
    parts, _ = run(GPTQ(integer_grid(3, 32)), weight, evidence)
    assert isinstance(whole, Quantized) and isinstance(parts, Quantized)
    assert (whole.codes != parts.codes).float().mean() < 1e-3
