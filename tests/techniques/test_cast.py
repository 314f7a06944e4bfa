"""Shorter floats: torch's own conversions are the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rarefy.core.edit import Leaf, edit
from rarefy.core.errors import EditError
from rarefy.core.nodes import Dense, Quantized
from rarefy.core.nouns import Choice, Evidence
from rarefy.techniques.prune.sparsegpt import SparseGPT
from rarefy.techniques.quantize.cast import Cast
from rarefy.techniques.quantize.gptq import GPTQ
from rarefy.techniques.quantize.rtn import RTN


def run(technique: object, weight: Tensor, evidence: object = None, tree: object = None):
    return edit("layers.0.up", tree or Dense(weight), weight, technique, "t", evidence, torch.Generator())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_is_torchs_conversion(dtype: str, weight: Tensor) -> None:
    tree, receipt = run(Cast(dtype), weight)
    kind = getattr(torch, dtype)
    assert torch.equal(tree.dense(), weight.to(kind).float())
    assert receipt.bits_after == weight.numel() * kind.itemsize * 8


def test_eight_bits_are_torchs_conversion_under_a_scale_per_row(weight: Tensor) -> None:
    scale = weight.abs().amax(1, keepdim=True) / 448
    tree, receipt = run(Cast("float8_e4m3fn"), weight)
    expected = (weight / scale).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(tree.dense(), expected, atol=0, rtol=1e-6)
    assert receipt.bits_after == 8 * weight.numel() + 32 * weight.shape[0]


def test_eight_bit_floats_keep_small_weights_that_eight_bit_integers_lose() -> None:
    w = torch.logspace(-5, 0, 256)[None] * torch.tensor([1.0, -1.0]).repeat(128)
    tree, _ = run(Cast("float8_e4m3fn"), w)
    relative = (tree.dense() / w - 1).abs()
    assert float(relative[w.abs() > 1e-4].max()) < 1 / 16
    integers = (w * 127).round() / 127
    assert float((integers / w - 1).abs().max()) == 1.0


def test_the_grid_of_eight_bit_floats_serves_other_techniques(weight: Tensor, evidence: object) -> None:
    tree, plain = run(Cast("float8_e4m3fn"), weight, evidence)
    assert isinstance(tree, Quantized)
    for technique in (RTN(tree.grid), GPTQ(tree.grid)):
        _, receipt = run(technique, weight, evidence)
        assert receipt.error < 1.05 * plain.error and receipt.bits_after == plain.bits_after


def test_eight_bits_are_offered_where_any_tree_is_kept(weight: Tensor, evidence: Evidence) -> None:
    leaf = Leaf("w", Dense(weight), weight, None, evidence)
    choices = {"F16": Choice(torch.float16, 2 * weight.numel()), "tree": Choice(None, 0)}
    offers = {option.format: option for option in Cast.options(leaf, choices)}
    tree, _ = run(Cast("float8_e4m3fn"), weight)
    assert offers["tree"].bytes == tree.bits() // 8 and offers["tree"].steps[0].settings == {
        "dtype": "float8_e4m3fn"}
    assert offers["tree"].damage == pytest.approx(evidence.damage(tree.dense() - weight), rel=1e-3)
    assert offers["F16"].damage < offers["tree"].damage
    whole = replace(leaf, sampled_from=2 * weight.shape[0])
    assert next(o for o in Cast.options(whole, choices) if o.format == "tree").bytes == tree.bits() // 4


def test_dead_rows_and_overflow() -> None:
    w = torch.tensor([[0.0, 0.0], [1e9, -1.0]])
    tree, _ = run(Cast("float8_e4m3fn"), w)
    assert tree.dense()[0].tolist() == [0.0, 0.0] and float(tree.dense()[1, 0]) == pytest.approx(1e9)
    with pytest.raises(EditError, match=r"layers\.0\.up: 1e\+09 does not fit float16; use bfloat16"):
        run(Cast("float16"), w)
    with pytest.raises(EditError, match=r"dtype='flaot16': choose one of .*did you mean 'float16'"):
        run(Cast("flaot16"), w)


def test_a_repair_is_kept(weight: Tensor, evidence: Evidence) -> None:
    """What SparseGPT moved into the weights that stay is stored, not undone."""
    generator = torch.Generator().manual_seed(0)
    pruned, before = edit("w", Dense(weight), weight, SparseGPT(), "sparsegpt", evidence, generator)
    _, after = edit("w", pruned, weight, Cast("bfloat16"), "cast", evidence, generator)
    assert after.error < 1.05 * before.error
