"""QuantEase against a literal transcription, and against GPTQ, from which it starts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rarefy.core.edit import edit
from rarefy.core.nodes import Dense, Masked, Node, Quantized
from rarefy.core.nouns import Evidence
from rarefy.formats.ggml import CODECS
from rarefy.numerics.grids import integer_grid
from rarefy.numerics.linear import damped
from rarefy.numerics.rounding import level_of, nearest
from rarefy.techniques.quantize.gptq import GPTQ
from rarefy.techniques.quantize.quantease import QuantEase
from rarefy.techniques.quantize.rtn import RTN

NAMES = ("Q4_0", "IQ4_NL", "Q4_1", "MXFP4", "Q2_0", "Q4_K", "Q3_K", "Q2_K", "Q6_K", "IQ4_XS")


def run(technique: object, weight: Tensor, evidence: Evidence, tree: Node):
    return edit("w", tree, weight, technique, "t", evidence, torch.Generator())


def literal(node: Quantized, weight: Tensor, gram: Tensor) -> Tensor:
    """One sweep over the columns, the gradient computed anew for each (Behdin et al. 2023, algorithm 1)."""
    scale = node.scale.dense().repeat_interleave(node.grid.group or weight.shape[1], 1).double()
    q = node.dense().double()
    for j in range(weight.shape[1]):
        gradient = (weight.double() - q) @ gram[:, j]
        wanted = q[:, j] + gradient / gram[j, j]
        code = nearest((wanted / scale[:, j]).float(), node.grid)
        q[:, j] = level_of(code, node.grid).double() * scale[:, j]
    return q.float()


@pytest.mark.parametrize("name", ["Q4_0", "IQ4_NL", "Q2_0"])
def test_equals_the_literal_algorithm(name: str, weight: Tensor, evidence: Evidence) -> None:
    start, _ = run(RTN(CODECS[name].grid), weight, evidence, Dense(weight))
    assert isinstance(start, Quantized)
    expected = literal(start, weight, damped(evidence.gram / evidence.tokens, QuantEase.damping))
    got, _ = run(QuantEase(sweeps=1, move_scales=False), weight, evidence, start)
    assert ((got.dense() - expected).abs() > 1e-5).float().mean() < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_improves_on_gptq(name: str, weight: Tensor, evidence: Evidence) -> None:
    tree, before = run(GPTQ(CODECS[name].grid), weight, evidence, Dense(weight))
    after, receipt = run(QuantEase(sweeps=2), weight, evidence, tree)
    assert receipt.error < before.error
    assert receipt.bits_after == before.bits_after
    assert isinstance(after, Quantized) and after.grid == CODECS[name].grid


@pytest.mark.parametrize("name", NAMES)
def test_what_it_stores_is_what_it_descended_on(name: str, weight: Tensor, evidence: Evidence) -> None:
    """Scales that moved are written back exactly: another sweep starts where the last one ended."""
    tree, _ = run(RTN(CODECS[name].grid), weight, evidence, Dense(weight))
    errors = []
    for _ in range(4):
        tree, receipt = run(QuantEase(sweeps=1, damping=1e-6), weight, evidence, tree)
        errors.append(receipt.error)
    assert all(later <= earlier * 1.0001 for earlier, later in itertools.pairwise(errors))


def test_keeps_masks(weight: Tensor, evidence: Evidence) -> None:
    keep = weight.abs() >= weight.abs().quantile(0.5)
    tree, before = run(RTN(integer_grid(4, 32)), weight, evidence, Masked(keep, Dense(weight)))
    after, receipt = run(QuantEase(), weight, evidence, tree)
    assert receipt.error < before.error
    assert not bool(after.dense()[~keep].any())
