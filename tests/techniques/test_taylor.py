"""Taylor pruning against sums over tokens, and against magnitude by the damage that it is about."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rarefy.core.edit import edit
from rarefy.core.errors import EditError
from rarefy.core.nodes import Dense, Masked, Product
from rarefy.core.nouns import Evidence
from rarefy.techniques.prune.magnitude import Magnitude
from rarefy.techniques.prune.taylor import Taylor
from rarefy.techniques.prune.wanda import Wanda


def run(technique: object, weight: Tensor, evidence: Evidence):
    return edit("w", Dense(weight), weight, technique, "t", evidence, torch.Generator())


def test_equals_the_mean_of_squared_changes() -> None:
    """Every gradient d_s meets every input x_t: inputs and gradients that are independent."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 8, generator=generator), torch.randn(9, 8, generator=generator)
    d = torch.randn(9, 6, generator=generator) * torch.logspace(-1, 1, 6)
    cost = torch.zeros(6, 8)
    for s in range(9):
        for t in range(9):
            cost += (torch.outer(d[s], x[t]) * weight).square() / 81  # the change of the loss, squared
    border = cost.flatten().sort().values[24]
    tree, _ = run(Taylor(0.5), weight, Evidence(x.T @ x, 9, d.square().mean(0)))
    assert torch.equal(tree.dense(), torch.where(cost >= border, weight, 0.0))


@pytest.mark.parametrize("pattern", ["unstructured", "row", "column", "block 16x16"])
def test_predicts_less_damage_than_its_rivals(weight: Tensor, evidence: Evidence, pattern: str) -> None:
    damage = {}
    for technique in (Magnitude, Wanda, Taylor):
        tree, _ = run(technique(0.5, pattern), weight, evidence)
        damage[technique] = evidence.damage(weight - tree.dense())
    assert damage[Taylor] < damage[Magnitude] and damage[Taylor] < 1.001 * damage[Wanda]


def test_needs_the_fisher(weight: Tensor, evidence: Evidence) -> None:
    with pytest.raises(EditError, match=r"w: t needs calibration evidence \(fisher\)"):
        run(Taylor(), weight, replace(evidence, fisher=None))


def test_factors_get_their_share_of_the_fisher(weight: Tensor, evidence: Evidence) -> None:
    left, right = weight[:, :16].contiguous(), weight[:16].contiguous()
    tree = Product(Dense(left), Dense(right))
    after, receipt = edit("w", tree, left @ right, Taylor(0.3), "t", evidence, torch.Generator())
    assert isinstance(after, Product) and receipt.note == ""
    assert isinstance(after.left, Masked) and isinstance(after.right, Masked)


def test_outputs_that_nobody_reads_go_first(weight: Tensor, evidence: Evidence) -> None:
    assert evidence.fisher is not None
    deaf = evidence.fisher.clone()
    deaf[:40] = 0.0
    tree, _ = run(Taylor(0.5), weight, replace(evidence, fisher=deaf))
    assert isinstance(tree, Masked) and not bool(tree.keep[:40].any())
    tree, receipt = run(Taylor(0.5), weight, replace(evidence, fisher=torch.zeros_like(deaf)))
    assert "chosen by magnitude" in receipt.note
