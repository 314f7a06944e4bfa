"""SparseGPT against a literal transcription, against its rivals, and on every kind of leaf."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rarefy.core.edit import Leaf, edit
from rarefy.core.errors import EditError
from rarefy.core.nodes import Dense, Masked, Node, Quantized
from rarefy.core.nouns import Choice, Evidence, Option
from rarefy.formats.ggml import CODECS
from rarefy.numerics.grids import Grid, integer_grid
from rarefy.numerics.linear import damped
from rarefy.numerics.rounding import level_of, nearest
from rarefy.techniques.prune.magnitude import Magnitude
from rarefy.techniques.prune.sparsegpt import SparseGPT
from rarefy.techniques.prune.wanda import Wanda
from rarefy.techniques.quantize.cast import Cast
from rarefy.techniques.quantize.gptq import GPTQ
from rarefy.techniques.quantize.rtn import RTN


def run(technique: object, weight: Tensor, evidence: Evidence, tree: Node | None = None):
    return edit("w", tree or Dense(weight), weight, technique, "t", evidence, torch.Generator())


def literal(weight: Tensor, gram: Tensor, ridge: float, sparsity: float, block: int, m: int | None = None,
            node: Quantized | None = None) -> tuple[Tensor, Tensor]:
    """Column by column, the inverse of the remaining Hessian computed anew for each, O(n^4).

    Frantar & Alistarh 2023, algorithm 1: masks are chosen every ``m or block`` columns by the smallest
    w_c^2 / [H_c^-1]_cc, H_c the Hessian of columns c and later (less the damping in it, which is ours).
    With ``node``, what stays is rounded to that node's levels in the same pass (section 3.5).
    """
    work, keep = weight.double().clone(), torch.ones_like(weight, dtype=torch.bool)
    result = torch.zeros_like(work)
    columns, width = weight.shape[1], m or block
    inverses = [torch.linalg.inv(gram[c:, c:]) for c in range(columns)]
    for j in range(columns):
        if j % width == 0:
            chosen = range(j, min(j + width, columns))
            cost = torch.stack([work[:, c].square() * (1 / inverses[c][0, 0] - ridge) for c in chosen], 1)
            sets = cost if m else cost.reshape(1, -1)
            mask = torch.ones_like(sets, dtype=torch.bool)
            mask.scatter_(1, sets.argsort(1)[:, :round(sparsity * sets.shape[1])], False)
            keep[:, j:j + width] = mask.view_as(cost)
        wanted = work[:, j] if node is None else on_levels(work[:, j], node, j)
        stored = torch.where(keep[:, j], wanted, 0.0)
        result[:, j] = stored
        error = (work[:, j] - stored) / inverses[j][0, 0]
        work[:, j:] -= error[:, None] * inverses[j][0][None, :]
    return result.float(), keep


def on_levels(column: Tensor, node: Quantized, j: int) -> Tensor:
    scale = node.scale.dense()[:, j // node.grid.group]
    return (level_of(nearest(column.float() / scale, node.grid), node.grid) * scale).double()


def hessian(evidence: Evidence, columns: int, damping: float) -> tuple[Tensor, float, Evidence]:
    gram = evidence.gram[:columns, :columns].contiguous()
    mean = gram / evidence.tokens
    return damped(mean, damping), damping * float(mean.diagonal().mean()), Evidence(gram, evidence.tokens)


@pytest.mark.parametrize(("sparsity", "pattern", "m"), [
    (0.5, "unstructured", None), (0.7, "unstructured", None), (0.5, "2:4", 4), (0.5, "4:8", 8),
    (0.75, "1:4", 4)])
@pytest.mark.parametrize("columns", [64, 192])
def test_equals_the_literal_algorithm(weight: Tensor, evidence: Evidence, sparsity: float, pattern: str,
                                      m: int | None, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rarefy.techniques.prune.sparsegpt.BLOCK", 64)  # more than one block
    small = weight[:10, :columns].contiguous()
    gram, ridge, seen = hessian(evidence, columns, SparseGPT.damping)
    values, keep = literal(small, gram, ridge, sparsity, 64, m)
    tree, receipt = run(SparseGPT(sparsity, pattern), small, seen)
    assert isinstance(tree, Masked) and receipt.note == ""
    # float32 may settle a near tie otherwise
    assert (tree.keep != keep).float().mean() < 0.005
    assert ((tree.dense() - values).abs() > 1e-5).float().mean() < 0.01


def test_prunes_and_rounds_codes_in_one_sweep(weight: Tensor, evidence: Evidence) -> None:
    small = weight[:10, :64].contiguous()
    gram, ridge, seen = hessian(evidence, 64, SparseGPT.damping)
    codes, _ = run(RTN(integer_grid(4, 32)), small, seen)
    assert isinstance(codes, Quantized)
    values, keep = literal(small, gram, ridge, 0.5, 128, None, codes)
    tree, _ = run(SparseGPT(0.5), small, seen, codes)
    assert isinstance(tree, Masked) and isinstance(tree.inner, Quantized)
    assert tree.inner.scale is codes.scale and tree.inner.grid == codes.grid
    assert (tree.keep != keep).float().mean() < 0.01
    assert ((tree.dense() - values).abs() > 1e-5).float().mean() < 0.02


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_sparsegpt_before_wanda_before_magnitude(weight: Tensor, evidence: Evidence, pattern: str) -> None:
    errors = [run(technique(pattern=pattern), weight, evidence)[1].error
              for technique in (SparseGPT, Wanda, Magnitude)]
    assert errors[0] < 0.75 * errors[1] < 0.75 * 0.75 * errors[2]


@pytest.mark.parametrize("grid", [integer_grid(4, 32), integer_grid(4, 64, symmetric=False),
                                  *(CODECS[name].grid for name in ("IQ4_NL", "Q4_1", "Q4_K"))])
def test_on_codes_beats_masking_them(weight: Tensor, evidence: Evidence, grid: Grid) -> None:
    codes, _ = run(GPTQ(grid), weight, evidence)
    tree, receipt = run(SparseGPT(), weight, evidence, codes)
    _, masked = run(Wanda(), weight, evidence, codes)
    assert receipt.error < masked.error
    assert isinstance(tree, Masked) and isinstance(tree.inner, Quantized) and tree.inner.grid == grid


@pytest.mark.parametrize("pattern", ["unstructured", "unstructured per row", "4:8", "block 16x16", "row",
                                     "row 8", "column", "column 16", "block 4x256"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_every_pattern_reaches_its_sparsity(weight: Tensor, evidence: Evidence, pattern: str,
                                            sparsity: float) -> None:
    if ":" in pattern and sparsity != 0.5:
        return
    tree, _ = run(SparseGPT(sparsity, pattern), weight, evidence)
    naive, _ = run(Magnitude(sparsity, pattern), weight, evidence)
    assert isinstance(tree, Masked) and isinstance(naive, Masked)
    assert abs(int(tree.keep.sum()) - int(naive.keep.sum())) <= weight.shape[0]
    assert evidence.error(tree.dense() - weight) < evidence.error(naive.dense() - weight)


def test_repairs_what_a_mask_above_dropped(weight: Tensor, evidence: Evidence) -> None:
    """Sparsity is of the whole: 30% are gone already, unevenly, 20% more go, and all of it is repaired."""
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.3
    keep[:, :40] = True
    tree, receipt = run(SparseGPT(0.5), weight, evidence, Masked(keep, Dense(weight)))
    assert isinstance(tree, Masked) and not bool((tree.keep & ~keep).any())
    assert float(tree.keep.float().mean()) == pytest.approx(0.5, abs=1e-3)
    unrepaired = evidence.error(torch.where(tree.keep, 0.0, weight)) / evidence.error(weight)
    assert receipt.error < 0.85 * unrepaired
    again, receipt = run(SparseGPT(0.4), weight, evidence, tree)
    assert "nothing to drop" in receipt.note and isinstance(again, Masked)
    assert torch.equal(again.keep, tree.keep)


def test_then_quantized_keeps_the_mask(weight: Tensor, evidence: Evidence) -> None:
    pruned, before = run(SparseGPT(), weight, evidence)
    tree, after = run(GPTQ(integer_grid(8, 32)), weight, evidence, pruned)
    assert isinstance(pruned, Masked) and isinstance(tree, Masked) and torch.equal(tree.keep, pruned.keep)
    assert after.error < 1.2 * before.error and after.bits_after < 0.5 * before.bits_after


def test_foreseen_damage_and_bytes_are_near_the_truth(weight: Tensor, evidence: Evidence) -> None:
    choices = {"tree": Choice(None, 0), "four": Choice(integer_grid(4, 32), 1), "half": Choice(torch.half, 1)}
    found = list(SparseGPT.options(Leaf("w", Dense(weight), weight, None, evidence), choices))
    assert len(found) == 2 * 8 and {option.format for option in found} == {"tree"}
    for option in found:
        tree = followed(option, weight, evidence)
        assert 0.7 < option.damage / evidence.damage(tree.dense() - weight) < 1.4
        assert option.bytes == pytest.approx(tree.bits() / 8, rel=0.01)


def followed(option: Option, weight: Tensor, evidence: Evidence) -> Node:
    tree: Node = Dense(weight)
    for step in option.steps:
        technique = {"sparsegpt": SparseGPT, "cast": Cast, "gptq": lambda: GPTQ(integer_grid(4, 32))}
        tree, _ = run(technique[step.technique](**step.settings), weight, evidence, tree)
    return tree


def sparsity_of(option: Option) -> float | None:
    return next(step.settings.get("sparsity") for step in option.steps if step.technique == "sparsegpt")


def test_plans_only_where_trees_can_be_loaded(weight: Tensor, evidence: Evidence) -> None:
    leaf = Leaf("w", Dense(weight), weight, None, evidence)
    assert not list(SparseGPT.options(leaf, {"Q4_0": Choice(CODECS["Q4_0"].grid, 1)}))
    trees = {"tree": Choice(None, 0)}
    whole = {sparsity_of(option): option.bytes for option in SparseGPT.options(leaf, trees)}
    for option in SparseGPT.options(replace(leaf, sampled_from=10 * weight.shape[0]), trees):
        assert option.bytes == pytest.approx(10 * whole[sparsity_of(option)], rel=1e-3)


def test_singular_grams_are_noted(weight: Tensor) -> None:
    gram = 4 * torch.eye(weight.shape[1])
    gram[0, 1] = gram[1, 0] = 4000.0  # indefinite: no activations give this, a broken sum might
    tree, receipt = run(SparseGPT(damping=1e-9), weight, Evidence(gram, 4))
    assert "not positive definite" in receipt.note and "only its diagonal was used" in receipt.note
    assert "4 calibration tokens for a Gram of rank 256" in receipt.note
    assert bool(torch.isfinite(tree.dense()).all())
    ones = torch.ones(weight.shape[1], weight.shape[1])  # rank one: damping is enough
    tree, receipt = run(SparseGPT(), weight, Evidence(ones * 500, 500))
    assert bool(torch.isfinite(tree.dense()).all()) and receipt.note == ""


def test_dead_columns_go_first_and_dead_layers_by_magnitude(weight: Tensor, evidence: Evidence) -> None:
    gram = evidence.gram.clone()
    gram[128:160], gram[:, 128:160] = 0.0, 0.0
    flat = weight.clone()
    flat[0], flat[1] = 0.0, 0.5
    tree, _ = run(SparseGPT(), flat, Evidence(gram, evidence.tokens))
    assert isinstance(tree, Masked) and not bool(tree.keep[:, 128:160].any())
    assert bool(torch.isfinite(tree.dense()).all()) and not bool(tree.dense()[0].any())
    silent, receipt = run(SparseGPT(), weight, Evidence(torch.zeros_like(gram), 300))
    assert "chosen by magnitude" in receipt.note
    torch.testing.assert_close(silent.dense()[silent.dense() != 0], weight[silent.dense() != 0])


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (3, 130)])
def test_thin_weights(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    thin, x = torch.randn(shape, generator=generator), torch.randn(500, shape[1], generator=generator)
    tree, _ = run(SparseGPT(0.4), thin, Evidence(x.T @ x, 500))
    assert isinstance(tree, Masked)
    assert int(tree.keep.sum()) == pytest.approx(0.6 * thin.numel(), abs=1)
    for pattern, message in (("2:4", "do not divide"), ("block 8x8", "do not divide")):
        if shape != (1, 64) or pattern != "2:4":
            with pytest.raises(EditError, match=rf"w: pattern {pattern}: .*{message}"):
                run(SparseGPT(pattern=pattern), thin, Evidence(x.T @ x, 500))


def test_half_precision_stays_so_and_overflow_is_refused(weight: Tensor, evidence: Evidence) -> None:
    tree, _ = run(SparseGPT(), weight, evidence, Dense(weight.half()))
    assert isinstance(tree, Masked) and isinstance(tree.inner, Dense)
    assert tree.inner.values.dtype == torch.float16
    with pytest.raises(EditError, match="does not fit float16"):
        run(SparseGPT(), weight * 1e6, evidence, Dense(weight.half()))


def test_broken_evidence_is_refused(weight: Tensor, evidence: Evidence) -> None:
    gram = evidence.gram.clone()
    gram[7, 7] = torch.nan
    with pytest.raises(EditError, match="w: cannot tell what to drop"):
        run(SparseGPT(), weight, Evidence(gram, evidence.tokens))


def test_groups_of_rows_change_nothing(weight: Tensor, evidence: Evidence,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    for pattern in ("unstructured", "2:4"):
        whole, _ = run(SparseGPT(pattern=pattern), weight, evidence)
        monkeypatch.setattr("rarefy.techniques.prune.sparsegpt.ROWS", 7)
        parts, _ = run(SparseGPT(pattern=pattern), weight, evidence)
        monkeypatch.undo()
        torch.testing.assert_close(whole.dense(), parts.dense(), rtol=1e-3, atol=1e-5)


def test_the_original_is_not_written_to(weight: Tensor, evidence: Evidence) -> None:
    for shape in ((96, 256), (1, 64), (64, 1)):
        target = weight[:shape[0], :shape[1]].clone()
        before = target.clone()
        gram = evidence.gram[:shape[1], :shape[1]].contiguous()
        run(SparseGPT(), target, Evidence(gram, evidence.tokens))
        assert torch.equal(target, before)
