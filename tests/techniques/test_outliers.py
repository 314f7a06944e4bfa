"""Sparse and quantized: the right places are kept, and a few of them are worth more than their bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.core.edit import Leaf, edit
from rarefy.core.errors import EditError
from rarefy.core.nodes import Dense, Masked, Quantized, Sum
from rarefy.core.nouns import Choice, Evidence
from rarefy.formats.ggml import CODECS
from rarefy.numerics.grids import integer_grid
from rarefy.numerics.rounding import encode, fit
from rarefy.techniques.quantize.outliers import Outliers
from rarefy.techniques.quantize.quantease import QuantEase
from rarefy.techniques.quantize.rtn import RTN

GRID = integer_grid(3, 32)


def run(technique: object, weight: Tensor, evidence: Evidence | None = None, tree: object = None):
    return edit("layers.0.up", tree or Dense(weight), weight, technique, "t", evidence, torch.Generator())


def literal(weight: Tensor, h: Tensor, count: int) -> Tensor:
    """SpQR's steps, one weight at a time: errors of a first rounding, the worst kept, the rest rounded."""
    first = fit(weight, h, GRID)
    rounded = Quantized.of(encode(weight, first), first).dense()
    loss = {(i, j): float(h[j] * (weight[i, j] - rounded[i, j]) ** 2)
            for i in range(weight.shape[0]) for j in range(weight.shape[1])}
    worst = sorted(loss, key=lambda at: -loss[at])[:count]
    rest, counted = weight.clone(), h.expand_as(weight).clone()
    for i, j in worst:
        rest[i, j], counted[i, j] = 0.0, 0.0
    second = fit(rest, counted, GRID)
    result = Quantized.of(encode(rest, second), second).dense()
    for i, j in worst:
        result[i, j] = weight[i, j]
    return result


def test_equals_the_literal_algorithm(weight: Tensor, evidence: Evidence) -> None:
    small = weight[:8, :64].contiguous()
    seen = Evidence(evidence.gram[:64, :64].contiguous(), evidence.tokens)
    tree, _ = run(Outliers(GRID, share=0.02), small, seen)
    expected = literal(small, seen.gram.diagonal() / seen.tokens, round(0.02 * small.numel()))
    torch.testing.assert_close(tree.dense(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["int3", "Q4_0", "Q4_1", "Q4_K", "Q2_K"])
def test_a_few_kept_weights_beat_rounding_all(name: str, weight: Tensor, evidence: Evidence) -> None:
    grid = GRID if name == "int3" else CODECS[name].grid
    _, plain = run(RTN(grid), weight, evidence)
    tree, kept = run(Outliers(grid, share=0.02), weight, evidence)
    assert isinstance(tree, Sum)
    assert isinstance(tree.terms[0], Masked) and isinstance(tree.terms[1], Quantized)
    assert int(tree.terms[0].keep.sum()) == round(0.02 * weight.numel())
    assert kept.error < 0.85 * plain.error
    assert kept.bits_after < plain.bits_after + 0.6 * weight.numel()


def test_three_bits_with_outliers_beat_four_without_where_tails_are_heavy(evidence: Evidence) -> None:
    w = torch.distributions.StudentT(2.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weight = w.sample((96, 256)) * 0.02
    tree, sparse = run(Outliers(integer_grid(3, 128), share=0.02), weight)
    rounded, plain = run(RTN(integer_grid(4, 128)), weight)
    assert sparse.bits_after < plain.bits_after
    assert (tree.dense() - weight).square().sum() < (rounded.dense() - weight).square().sum()


def test_coordinate_descent_follows_and_leaves_the_floats_alone(weight: Tensor, evidence: Evidence) -> None:
    tree, before = run(Outliers(GRID), weight, evidence)
    after, receipt = run(QuantEase(), weight, evidence, tree)
    assert receipt.error < 0.7 * before.error
    assert isinstance(after, Sum) and isinstance(tree, Sum) and after.terms[0] is not None
    assert torch.equal(after.terms[0].dense(), tree.terms[0].dense())


def test_offers_foresee_the_chain(weight: Tensor, evidence: Evidence) -> None:
    leaf = Leaf("w", Dense(weight), weight, None, evidence)
    choices = {"Q4_0": Choice(CODECS["Q4_0"].grid, 1), "tree": Choice(None, 0)}
    offers = list(Outliers.options(leaf, choices))
    assert {offer.format for offer in offers} == {"tree"}
    assert [o.bytes for o in offers] == sorted(o.bytes for o in offers)
    assert [o.damage for o in offers] == sorted((o.damage for o in offers), reverse=True)
    for offer in offers:
        tree, _ = run(Outliers(CODECS["Q4_0"].grid, **offer.steps[0].settings), weight, evidence)
        tree, _ = run(QuantEase(), weight, evidence, tree)
        measured = evidence.damage(tree.dense() - weight)
        assert 0.5 * measured < offer.damage < 2 * measured
        assert offer.bytes == pytest.approx(tree.bits() / 8, rel=0.02)
    assert not list(Outliers.options(leaf, {"Q4_0": choices["Q4_0"]}))


def test_stays_inside_a_mask(weight: Tensor, evidence: Evidence) -> None:
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    tree, receipt = run(Outliers(GRID), weight, evidence, Masked(keep, Dense(weight)))
    _, plain = run(RTN(GRID), weight, evidence, Masked(keep, Dense(weight)))
    assert isinstance(tree, Masked) and not bool(tree.dense()[~keep].any())
    assert receipt.error < plain.error


@pytest.mark.parametrize("share", [0.0, 1.0, 1e-6, -0.5, 1.5])
def test_nothing_and_everything_are_refused(share: float, weight: Tensor) -> None:
    with pytest.raises(EditError, match=r"layers\.0\.up: share=.* keeps (nothing|everything); use a share"):
        run(Outliers(share=share), weight)


def test_constant_and_dead_weights() -> None:
    w = torch.zeros(4, 64)
    w[1] = 0.5
    tree, _ = run(Outliers(share=0.1), w)
    torch.testing.assert_close(tree.dense(), w, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="100 columns not divisible"):
        run(Outliers(), torch.randn(2, 100))
