"""FWSVD against the weighted problem itself, the paper's row weighting, and the plain SVD."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.core.edit import Leaf, edit
from rarefy.core.errors import EditError
from rarefy.core.nodes import Dense
from rarefy.core.nouns import Choice, Evidence
from rarefy.numerics.grids import integer_grid
from rarefy.techniques.factorize.fwsvd import FWSVD
from rarefy.techniques.factorize.svd import SVD


def run(technique: object, weight: Tensor, evidence: Evidence | None):
    return edit("w", Dense(weight), weight, technique, "fwsvd", evidence, torch.Generator())


def importance(evidence: Evidence) -> Tensor:
    assert evidence.fisher is not None
    return evidence.fisher[:, None].double() * evidence.gram.diagonal().double()


def literal(weight: Tensor, F: Tensor, rank: int, sweeps: int) -> Tensor:
    """min sum_ij F_ij (W - L R)_ij^2 for any F, one row and one column at a time."""
    W, right = weight.double(), torch.linalg.svd(weight.double())[2][:rank]
    for _ in range(sweeps):
        left = torch.stack([torch.linalg.solve((right * f) @ right.T, (right * f) @ w)
                            for w, f in zip(W, F, strict=True)])
        right = torch.stack([torch.linalg.solve((left.T * f) @ left, (left.T * f) @ w)
                             for w, f in zip(W.T, F.T, strict=True)], 1)
    return left @ right


def test_solves_the_weighted_problem(weight: Tensor, evidence: Evidence) -> None:
    assert evidence.fisher is not None
    small = weight[:12, :20].contiguous()
    seen = Evidence(evidence.gram[:20, :20].contiguous(), evidence.tokens, evidence.fisher[:12])
    F = importance(seen)
    tree, _ = run(FWSVD(rank=4), small, seen)
    expected = literal(small, F, 4, 3000)
    ours, theirs = ((F * (small - each).square()).sum() for each in (tree.dense(), expected))
    assert float(ours) == pytest.approx(float(theirs), rel=1e-4)


def test_rows_alone_as_in_the_paper(weight: Tensor, evidence: Evidence) -> None:
    """Section 3: I_hat = diag(sqrt of each row's Fisher); SVD of I_hat W; the left factor without it."""
    assert evidence.fisher is not None
    I_hat = torch.diag(evidence.fisher.double().clamp_min(1e-4 * float(evidence.fisher.mean())).sqrt())
    U, S, V = torch.linalg.svd(I_hat @ weight.double(), full_matrices=False)
    A, B = torch.linalg.inv(I_hat) @ U[:, :30] @ torch.diag(S[:30]), V[:30]
    tree, _ = run(FWSVD(rank=30, inputs=False), weight, evidence)
    torch.testing.assert_close(tree.dense(), (A @ B).float(), rtol=1e-3, atol=1e-5)


def test_lowers_the_damage_of_the_plain_svd(weight: Tensor, evidence: Evidence) -> None:
    damage = {}
    for name, technique in {"svd": SVD(), "rows": FWSVD(inputs=False), "both": FWSVD()}.items():
        tree, _ = run(technique, weight, evidence)
        damage[name] = evidence.damage(tree.dense() - weight)
    assert damage["both"] < 0.5 * damage["rows"] < 0.5 * damage["svd"]


def test_dead_outputs_and_inputs_stay_finite(weight: Tensor, evidence: Evidence) -> None:
    assert evidence.fisher is not None
    fisher, gram = evidence.fisher.clone(), evidence.gram.clone()
    fisher[:5], gram[7], gram[:, 7] = 0.0, 0.0, 0.0
    tree, receipt = run(FWSVD(), weight, Evidence(gram, evidence.tokens, fisher))
    assert bool(torch.isfinite(tree.dense()).all()) and receipt.note == ""
    nothing = Evidence(torch.zeros_like(gram), evidence.tokens, torch.zeros_like(fisher))
    tree, receipt = run(FWSVD(rank=20), weight, nothing)
    plain, _ = run(SVD(rank=20), weight, None)
    torch.testing.assert_close(tree.dense(), plain.dense(), rtol=1e-3, atol=1e-5)
    assert "the Fisher is zero" in receipt.note and "no input was ever active" in receipt.note


def test_needs_a_fisher(weight: Tensor, evidence: Evidence) -> None:
    with pytest.raises(EditError, match=r"needs calibration evidence \(fisher\)"):
        run(FWSVD(), weight, Evidence(evidence.gram, evidence.tokens))


def lookups(rows: int = 300, columns: int = 24) -> tuple[Tensor, Evidence]:
    """A table of which few rows are read often, as words are, with columns that matter differently."""
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(rows, columns, generator=generator) @ torch.diag(torch.logspace(0, -1, columns))
    often = 1 / torch.arange(1, rows + 1).float()
    return table, Evidence(torch.diag(torch.logspace(-2, 0, columns)) * 500, 500, often / often.sum())


def test_the_planner_is_offered_factorized_embeddings() -> None:
    """Bytes are those of the factors, and the predicted damage is what the rank does."""
    table, seen = lookups()
    leaf = Leaf("embed", Dense(table), table, None, seen)
    found = list(FWSVD.options(leaf, {"tree": Choice(None, 0), "int8": Choice(integer_grid(8, 0), 1)}))
    assert {option.format for option in found} == {"tree"} and len(found) >= 2
    for option in found:
        rank = option.steps[0].settings["rank"]
        tree, _ = run(FWSVD(rank=rank), table, seen)
        assert option.damage == pytest.approx(seen.damage(tree.dense() - table), rel=0.02)
        assert option.bytes == rank * sum(table.shape) * 2
        assert [step.technique for step in option.steps] == ["fwsvd", "cast"]
        plain, _ = run(SVD(rank=rank), table, None)
        assert option.damage < seen.damage(plain.dense() - table)


def test_no_options_where_inputs_move_together(weight: Tensor, evidence: Evidence) -> None:
    leaf = Leaf("w", Dense(weight), weight, None, evidence)
    assert list(FWSVD.options(leaf, {"tree": Choice(None, 0)})) == []
    table, seen = lookups()
    table_leaf = Leaf("e", Dense(table), table, None, seen)
    assert list(FWSVD.options(table_leaf, {"Q": Choice(integer_grid(4, 8), 1)})) == []
