"""Ternary weights against the rules of the papers, written out, and against naive rounding."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rarefy.core.edit import edit
from rarefy.core.errors import EditError
from rarefy.core.nodes import Dense, Masked, Quantized
from rarefy.core.nouns import Evidence
from rarefy.formats.ggml import CODECS
from rarefy.numerics.grids import Grid, Stored
from rarefy.techniques.quantize.ternary import GRID, Ternary

EXACT = Grid("exact", GRID.levels, 64, Stored(torch.float32))


def run(technique: object, weight: Tensor, evidence: Evidence | None = None, tree: object = None):
    return edit("layers.0.up", tree or Dense(weight), weight, technique, "t", evidence, torch.Generator())


def twn(w: list[float]) -> list[float]:
    """Li et al. 2016, eq. 5 and 6."""
    delta = 0.7 * sum(abs(x) for x in w) / len(w)
    large = [abs(x) for x in w if abs(x) > delta]
    alpha = sum(large) / len(large)
    return [alpha * (1 if x > delta else -1 if x < -delta else 0) for x in w]


def absmean(w: list[float]) -> list[float]:
    """Ma et al. 2024, eq. 1 to 3."""
    gamma = sum(abs(x) for x in w) / len(w)
    return [gamma * max(-1, min(1, round(x / gamma))) for x in w]


LITERAL = {"twn": twn, "absmean": absmean}


def units(weight: Tensor, per: str) -> list[Tensor]:
    return list({"group": weight.reshape(-1, 64), "row": weight, "tensor": weight.reshape(1, -1)}[per])


@pytest.mark.parametrize(("rule", "per"), list(itertools.product(LITERAL, ("group", "row", "tensor"))))
def test_equals_the_paper(rule: str, per: str, weight: Tensor) -> None:
    small = weight[:5].contiguous()
    expected = torch.tensor([LITERAL[rule](unit.double().tolist()) for unit in units(small, per)])
    tree, _ = run(Ternary(EXACT, rule, per), small)
    torch.testing.assert_close(tree.dense(), expected.reshape(small.shape), atol=1e-6, rtol=1e-5)


def brute(w: Tensor, h: Tensor) -> float:
    """The least weighted error over all 3^n codes, each with its best scale."""
    least = float("inf")
    for codes in itertools.product((-1.0, 0.0, 1.0), repeat=len(w)):
        q = torch.tensor(codes)
        scale = float((h * q * w).sum() / (h * q * q).sum().clamp_min(1e-30))
        least = min(least, float((h * (w - scale * q).square()).sum()))
    return least


@pytest.mark.parametrize("seed", range(3))
def test_optimal_is_the_optimum(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w, h = torch.randn(1, 7, generator=generator), torch.rand(7, generator=generator) + 0.1
    grid = Grid("tiny", GRID.levels, 0, Stored(torch.float32))
    tree, _ = run(Ternary(grid), w, Evidence(torch.diag(h), 1))
    assert float((h * (w - tree.dense()).square()).sum()) == pytest.approx(brute(w[0], h), rel=1e-5)


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "Q2_0", "own"])
def test_every_rule_beats_naive_rounding_and_optimal_the_rules(name: str, weight: Tensor) -> None:
    """Naive: the scale is the largest weight."""
    grid = GRID if name == "own" else CODECS[name].grid
    w = weight.reshape(-1, grid.group)
    peak = w.abs().amax(1, keepdim=True)
    naive = float((peak * (w / peak).round() - w).square().sum())
    errors = {}
    for rule in ("optimal", "twn", "absmean"):
        tree, _ = run(Ternary(grid, rule), weight)
        assert isinstance(tree, Quantized) and tree.grid == grid
        errors[rule] = float((tree.dense() - weight).square().sum())
    assert errors["optimal"] < errors["twn"] < naive and errors["absmean"] < naive


def test_optimal_looks_at_the_inputs(weight: Tensor, evidence: Evidence) -> None:
    _, blind = run(Ternary(rule="twn"), weight, evidence)
    _, seeing = run(Ternary(), weight, evidence)
    assert seeing.error < blind.error and seeing.bits_after == blind.bits_after


@pytest.mark.parametrize("rule", ["optimal", "twn", "absmean"])
def test_ternary_weights_stay_what_they_are(rule: str) -> None:
    """A row of a ternary model, its zeros included; absmean needs the model's own scale rule, row by row."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-1, 2, (8, 256), generator=generator).float()
    scale = torch.rand(8, 1, generator=generator).half().float() + 0.5
    tree, _ = run(Ternary(CODECS["TQ2_0"].grid, rule), codes * scale)
    assert torch.equal(tree.dense().sign(), codes)
    if rule != "absmean":
        torch.testing.assert_close(tree.dense(), codes * scale, atol=1e-3, rtol=0)


@pytest.mark.parametrize("rule", ["optimal", "twn", "absmean"])
@pytest.mark.parametrize("per", ["group", "row", "tensor"])
def test_masks_dead_and_constant_rows(rule: str, per: str, weight: Tensor) -> None:
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    keep[2] = False
    wild = torch.where(keep, weight, 50.0)
    wild[0], wild[1] = 0.0, 0.5
    tree, _ = run(Ternary(EXACT, rule, per), wild, None, Masked(keep, Dense(wild)))
    calm = torch.where(keep, wild, 0.0)
    other, _ = run(Ternary(EXACT, rule, per), calm, None, Masked(keep, Dense(calm)))
    torch.testing.assert_close(tree.dense(), other.dense())
    assert bool(torch.isfinite(tree.dense()).all()) and not bool(tree.dense()[0].any())


def test_inputs_that_never_came() -> None:
    w = torch.randn(3, 64)
    tree, _ = run(Ternary(), w, Evidence(torch.zeros(64, 64), 10))
    assert bool(torch.isfinite(tree.dense()).all()) and bool(tree.dense().any())


@pytest.mark.parametrize(("technique", "match"), [
    (Ternary(rule="twm"), r"layers\.0\.up: rule='twm': choose one of .*did you mean 'twn'"),
    (Ternary(per="rows"), "did you mean 'row'"),
    (Ternary(CODECS["Q4_1"].grid), "'Q4_1' does not hold -1, 0 and 1 times a plain scale; use TQ1_0"),
    (Ternary(CODECS["Q3_K"].grid), "'Q3_K' does not hold"),
])
def test_what_means_nothing_is_refused(technique: Ternary, match: str) -> None:
    with pytest.raises(EditError, match=match):
        run(technique, torch.randn(2, 256))


def test_what_does_not_divide_and_single_columns() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.up: 100 columns not divisible by TQ2_0's block 256"):
        run(Ternary(CODECS["TQ2_0"].grid), torch.randn(2, 100))
    tree, _ = run(Ternary(Grid("row", GRID.levels, 0, Stored())), torch.tensor([[0.5], [-0.25]]))
    assert tree.dense().tolist() == [[0.5], [-0.25]]
