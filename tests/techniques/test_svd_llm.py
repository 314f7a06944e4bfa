"""SVD-LLM against the paper's steps, weaker factorizations, and what may follow it in a recipe."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy.core.edit import Leaf, edit
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nodes import Dense, Node, Product, Quantized
from rarefy.core.nouns import Choice, Evidence
from rarefy.numerics.grids import integer_grid
from rarefy.planner.options import options_at
from rarefy.techniques.factorize.fwsvd import FWSVD
from rarefy.techniques.factorize.svd import SVD
from rarefy.techniques.factorize.svd_llm import SVDLLM
from rarefy.techniques.quantize.cast import Cast
from rarefy.techniques.quantize.gptq import GPTQ
from rarefy.techniques.quantize.rtn import RTN


def run(technique: object, weight: Tensor, evidence: Evidence | None, tree: Node | None = None):
    return edit("w", tree or Dense(weight), weight, technique, "svd_llm", evidence, torch.Generator())


def literal(weight: Tensor, gram: Tensor, rank: int) -> Tensor:
    """Algorithm 1: S = cholesky(X X^T); U, Sigma, V = SVD(W S); W' = U_r Sigma_r V_r S^-1."""
    S = torch.linalg.cholesky(gram.double())
    U, sigma, V = torch.linalg.svd(weight.double() @ S, full_matrices=False)
    return U[:, :rank] @ torch.diag(sigma[:rank]) @ V[:rank] @ torch.linalg.inv(S)


@pytest.mark.parametrize("rows", [96, 7, 600])
@pytest.mark.parametrize("rank", [1, 5])
def test_equals_the_literal_algorithm(rows: int, rank: int, evidence: Evidence) -> None:
    weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))
    gram = evidence.gram[:64, :64].contiguous()
    tree, _ = run(SVDLLM(rank=rank, damping=1e-12), weight, Evidence(gram, evidence.tokens))
    torch.testing.assert_close(tree.dense(), literal(weight, gram, rank).float(), rtol=1e-3, atol=1e-3)


def asvd(weight: Tensor, evidence: Evidence, rank: int) -> Tensor:
    """Yuan et al. 2023: columns scaled by the square root of their mean input, the SVD between."""
    scale = (evidence.gram.diagonal() / evidence.tokens).double().sqrt() ** 0.5
    U, S, V = torch.linalg.svd(weight.double() * scale, full_matrices=False)
    return (U[:, :rank] @ torch.diag(S[:rank]) @ V[:rank] / scale).float()


def test_order_of_the_field_at_20_percent_removed(weight: Tensor, evidence: Evidence) -> None:
    """Output error at equal bits: SVD-LLM < FWSVD, ASVD < SVD (Wang et al. 2024, table 1)."""
    plain, worst = run(SVD(ratio=0.8), weight, evidence)
    _, fisher = run(FWSVD(ratio=0.8), weight, evidence)
    _, best = run(SVDLLM(ratio=0.8), weight, evidence)
    scaled = evidence.error(weight - asvd(weight, evidence, plain.left.shape[1])) / evidence.error(weight)
    assert best.bits_after == fisher.bits_after == worst.bits_after <= 0.8 * worst.bits_before
    assert best.error < 0.6 * fisher.error
    assert best.error < 0.6 * scaled
    assert fisher.error < 0.5 * worst.error
    assert scaled < 0.5 * worst.error


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 20), st.integers(2, 20), st.integers(0, 2**31))
def test_nothing_of_that_rank_is_nearer_at_the_outputs(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(4 * columns, columns, generator=generator) * torch.logspace(-1, 1, columns)
    seen, rank = Evidence(x.T @ x, 4 * columns), min(rows, columns) // 2
    tree, receipt = run(SVDLLM(rank=rank, damping=1e-10), weight, seen)
    outputs = torch.linalg.svdvals(weight.double() @ x.double().T).square()
    assert receipt.error == pytest.approx(float(outputs[rank:].sum() / outputs.sum()), rel=1e-3, abs=1e-6)
    for _ in range(5):
        nudged = (tree.left.dense() + 0.01 * torch.randn(rows, rank, generator=generator)) @ (
            tree.right.dense() + 0.01 * torch.randn(rank, columns, generator=generator))
        assert seen.error(weight - nudged) >= seen.error(weight - tree.dense()) * (1 - 1e-4)


def test_energy_is_that_of_the_outputs(weight: Tensor, evidence: Evidence) -> None:
    _, receipt = run(SVDLLM(energy=0.9, damping=1e-9), weight, evidence)
    assert receipt.error == pytest.approx(0.1, abs=0.01) and receipt.error <= 0.1


def test_left_factor_is_refitted_to_what_was_stored(weight: Tensor, evidence: Evidence) -> None:
    tree, receipt = run(SVDLLM(rank=40), weight, evidence, Dense(weight.bfloat16()))
    assert tree.left.values.dtype == torch.bfloat16
    exact, _ = run(SVDLLM(rank=40), weight, evidence)
    rounded = exact.left.dense().bfloat16().float() @ exact.right.dense().bfloat16().float()
    assert receipt.error < evidence.error(weight - rounded) / evidence.error(weight)


# ---- grams that are not what they should be ------------------------------------------------------------


def test_singular_gram(weight: Tensor) -> None:
    x = torch.randn(40, weight.shape[1], generator=torch.Generator().manual_seed(0))
    few = Evidence(x.T @ x, 40)
    tree, receipt = run(SVDLLM(rank=40), weight, few)
    assert receipt.error < 1e-2 and bool(torch.isfinite(tree.dense()).all())
    assert "40 calibration tokens for a Gram of rank 256" in receipt.note
    _, receipt = run(SVDLLM(rank=40, damping=0.0), weight, few)
    assert "damping raised to" in receipt.note and receipt.error < 1e-4


def test_indefinite_gram_falls_back_and_says_so(weight: Tensor) -> None:
    gram = 4 * torch.eye(weight.shape[1])
    gram[0, 1] = gram[1, 0] = 400.0
    tree, receipt = run(SVDLLM(rank=20), weight, Evidence(gram, 4096))
    plain, _ = run(SVD(rank=20), weight, None)
    torch.testing.assert_close(tree.dense(), plain.dense(), rtol=1e-3, atol=1e-5)
    assert "not positive definite at damping 1: all inputs count alike" in receipt.note


def test_dead_columns_constant_rows_and_nothing_at_all(weight: Tensor, evidence: Evidence) -> None:
    gram, flat = evidence.gram.clone(), weight.clone()
    gram[5], gram[:, 5], flat[0], flat[1] = 0.0, 0.0, 0.0, 0.5
    tree, _ = run(SVDLLM(), flat, Evidence(gram, evidence.tokens))
    assert bool(torch.isfinite(tree.dense()).all()) and not bool(tree.dense()[0].abs().max() > 1e-6)
    dead = Evidence(torch.zeros_like(gram), evidence.tokens)
    tree, _ = run(SVDLLM(rank=96), weight, dead)
    torch.testing.assert_close(tree.dense(), weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 32), (32, 1)])
def test_one_row_or_column(shape: tuple[int, int]) -> None:
    weight, seen = torch.randn(shape), Evidence(torch.eye(shape[1]) * 100, 100)
    with pytest.raises(EditError, match="no factors are smaller than this weight"):
        run(SVDLLM(), weight, seen)
    tree, receipt = run(SVDLLM(rank=1), weight, seen)
    torch.testing.assert_close(tree.dense(), weight)
    assert "103% of the bits" in receipt.note


def test_refusals_name_site_value_and_remedy(weight: Tensor, evidence: Evidence) -> None:
    with pytest.raises(RecipeError, match=r"rank=3 and energy=0\.5"):
        SVDLLM(rank=3, energy=0.5)
    with pytest.raises(EditError, match="w: rank=97 is above the full rank 96; pass rank=96 or less"):
        run(SVDLLM(rank=97), weight, evidence)
    with pytest.raises(EditError, match=r"w: svd_llm needs calibration evidence \(gram\)"):
        run(SVDLLM(), weight, None)


# ---- with other techniques -----------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", [RTN, GPTQ])
def test_both_factors_can_be_quantized(quantizer: type, weight: Tensor, evidence: Evidence) -> None:
    factored, before = run(SVDLLM(ratio=0.8, multiple=16), weight, evidence)
    tree, after = run(quantizer(integer_grid(8, 16)), weight, evidence, factored)
    assert isinstance(tree, Product) and all(isinstance(each, Quantized) for each in tree.children())
    assert after.bits_after < 0.3 * before.bits_after
    assert after.error < 1.1 * before.error
    with pytest.raises((EditError, ValueError), match=r"w: 48 columns not divisible by int8g32.*; use"):
        run(quantizer(integer_grid(8, 32)), weight, evidence, factored)


def test_an_embedding_with_the_evidence_that_a_survey_gives(weight: Tensor) -> None:
    """Diagonal grams: columns weighed one by one."""
    table = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    importance = torch.logspace(-2, 2, 32)
    seen = Evidence(torch.diag(importance) * 500, 500, torch.rand(300))
    _, blind = run(SVD(rank=12), table, seen)
    tree, receipt = run(SVDLLM(rank=12), table, seen)
    assert receipt.error < 0.1 * blind.error
    index = torch.tensor([0, 299])
    torch.testing.assert_close(tree.rows(index), tree.dense()[index])


def test_a_second_factorization_of_the_factors(weight: Tensor, evidence: Evidence) -> None:
    """Factors are weights like any other: their targets and evidence come from the walk."""
    once, before = run(SVDLLM(ratio=0.8), weight, evidence)
    twice, after = run(SVDLLM(ratio=0.8), weight, evidence, once)
    assert isinstance(twice, Product) and isinstance(twice.left, Product)
    assert after.bits_after < before.bits_after and before.error < after.error < 0.5


# ---- the planner ---------------------------------------------------------------------------------------


def test_foreseen_damage_is_exact(weight: Tensor, evidence: Evidence) -> None:
    choices = {"tree": Choice(None, 0), "Q4": Choice(integer_grid(4, 32), 1)}
    options = list(SVDLLM.options(Leaf("w", Dense(weight), weight, None, evidence), choices))
    assert len(options) > 5 and all(option.format == "tree" for option in options)
    for option in options:
        tree: Node = Dense(weight)
        for step in option.steps:
            technique = {"svd_llm": SVDLLM, "cast": Cast}[step.technique](**step.settings)
            tree, _ = run(technique, weight, replace(evidence, fisher=None), tree)
        assert option.bytes * 8 == tree.bits()
        assert option.damage == pytest.approx(evidence.damage(tree.dense() - weight), rel=0.05)


def test_options_look_at_every_row(evidence: Evidence) -> None:
    """A sample of 192 rows has no rank above 192: the planner hands this technique the whole weight."""
    generator = torch.Generator().manual_seed(0)
    weight, fisher = torch.randn(700, 256, generator=generator), torch.rand(700, generator=generator)
    seen = replace(evidence, fisher=fisher)
    found = options_at("w", weight, seen, {"tree": Choice(None, 0)}, [SVDLLM], generator)
    largest = max(found, key=lambda option: option.bytes)
    assert 0.85 * 2 * weight.numel() < largest.bytes < 2 * weight.numel()
    tree, _ = run(SVDLLM(**largest.steps[0].settings), weight, seen)
    # the deepest tail is where damping costs most
    assert largest.damage == pytest.approx(seen.damage(tree.dense() - weight), rel=0.15)


def test_no_options_without_a_target_that_loads_trees(weight: Tensor, evidence: Evidence) -> None:
    leaf = Leaf("w", Dense(weight), weight, None, evidence)
    assert list(SVDLLM.options(leaf, {"Q4": Choice(integer_grid(4, 32), 1)})) == []
