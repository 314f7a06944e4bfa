"""Wanda against a literal transcription, and against magnitude."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.core.edit import edit
from rarefy.core.errors import EditError
from rarefy.core.nodes import Dense, Masked, Node
from rarefy.core.nouns import Evidence
from rarefy.numerics.grids import integer_grid
from rarefy.techniques.prune.magnitude import Magnitude
from rarefy.techniques.prune.wanda import Wanda
from rarefy.techniques.quantize.gptq import GPTQ


def run(technique: object, weight: Tensor, evidence: Evidence, tree: Node | None = None):
    return edit("w", tree or Dense(weight), weight, technique, "t", evidence, torch.Generator())


def inputs(columns: int, tokens: int = 400) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    scale = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    return torch.randn(tokens, columns, generator=generator) * scale


def literal(weight: Tensor, x: Tensor, sparsity: float, m: int | None = None) -> Tensor:
    """One weight after the other (Sun et al. 2024, eq. 1 and section 3.2)."""
    pruned = weight.clone()
    norm = [float(sum(float(v) ** 2 for v in x[:, j])) ** 0.5 for j in range(weight.shape[1])]
    for i in range(weight.shape[0]):
        score = [abs(float(weight[i, j])) * norm[j] for j in range(weight.shape[1])]
        width = m or weight.shape[1]
        for first in range(0, weight.shape[1], width):
            group = sorted(range(first, first + width), key=score.__getitem__)
            for j in group[:int(width * sparsity)]:
                pruned[i, j] = 0.0
    return pruned


@pytest.mark.parametrize(("sparsity", "pattern", "m"), [
    (0.5, "unstructured", None), (0.25, "unstructured", None), (0.5, "2:4", 4), (0.5, "4:8", 8),
    (0.75, "1:4", 4)])
def test_equals_the_literal_algorithm(weight: Tensor, sparsity: float, pattern: str, m: int | None) -> None:
    small, x = weight[:12, :64].contiguous(), inputs(64)
    tree, receipt = run(Wanda(sparsity, pattern), small, Evidence(x.T @ x, len(x)))
    assert torch.equal(tree.dense(), literal(small, x, sparsity, m))
    assert receipt.note == ""


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8", "block 16x16", "column"])
def test_beats_magnitude(weight: Tensor, evidence: Evidence, pattern: str) -> None:
    _, naive = run(Magnitude(pattern=pattern), weight, evidence)
    _, receipt = run(Wanda(pattern=pattern), weight, evidence)
    assert receipt.error < 0.8 * naive.error


def test_survives_quantization_in_either_order(weight: Tensor, evidence: Evidence) -> None:
    pruned, _ = run(Wanda(), weight, evidence)
    assert isinstance(pruned, Masked)
    after, one = run(GPTQ(integer_grid(4, 32)), weight, evidence, pruned)
    assert isinstance(after, Masked) and torch.equal(after.keep, pruned.keep)
    codes, _ = run(GPTQ(integer_grid(4, 32)), weight, evidence)
    _, other = run(Wanda(), weight, evidence, codes)
    alone = evidence.error(weight - pruned.dense()) / evidence.error(weight)
    assert max(one.error, other.error) < 2.5 * alone


def test_inputs_that_were_never_active_are_dropped_first(weight: Tensor, evidence: Evidence) -> None:
    gram = evidence.gram.clone()
    gram[:64], gram[:, :64] = 0.0, 0.0
    tree, _ = run(Wanda(0.5), weight, Evidence(gram, evidence.tokens))
    assert isinstance(tree, Masked) and not bool(tree.keep[:, :64].any())


def test_no_activity_at_all_is_noted(weight: Tensor) -> None:
    silent = Evidence(torch.zeros(weight.shape[1], weight.shape[1]), 5)
    tree, receipt = run(Wanda(), weight, silent)
    naive, _ = run(Magnitude(pattern="unstructured per row"), weight, silent)
    assert "chosen by magnitude" in receipt.note
    assert torch.equal(tree.dense(), naive.dense())


def test_broken_evidence_is_refused(weight: Tensor, evidence: Evidence) -> None:
    gram = evidence.gram.clone()
    gram[7, 7] = torch.inf
    with pytest.raises(EditError, match="w: cannot tell what to drop"):
        run(Wanda(), weight, Evidence(gram, evidence.tokens))
