"""LoRA and LoftQ: the papers' equations, PEFT as the judge of the format, sums as what comes out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rarefy.core.edit import Leaf, edit
from rarefy.core.errors import EditError, ModelError, RecipeError, TargetError
from rarefy.core.nodes import Dense, Node, Product, Quantized, Sum
from rarefy.export.peft import adapter_of, export_adapter, read_adapter
from rarefy.models.model import open_model
from rarefy.numerics.grids import integer_grid, nf4_grid
from rarefy.numerics.rounding import encode, fit
from rarefy.techniques.adapt.loftq import LoftQ
from rarefy.techniques.adapt.lora import LoRA

BITSANDBYTES = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803,
                0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0)


# PEFT asks transformers for an attribute under its old name
PEFT_WARNS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def softened(node: Node, technique: LoRA | None = None, seed: int = 0) -> torch.nn.Module:
    leaf = Leaf("up", node, node.dense(), None, None)
    return (technique or LoRA()).soften(leaf, torch.Generator().manual_seed(seed))


def rounded(weight: Tensor, bits: int = 4) -> Quantized:
    found = fit(weight, torch.ones(weight.shape[1]), integer_grid(bits, 32))
    return Quantized.of(encode(weight, found), found)


def test_what_it_goes_on_from_learns_as_a_fresh_one_does(weight: Tensor) -> None:
    """The same product, its rows as long as those that training begins with elsewhere; zeros stay."""
    up, down = weight[:, :4].clone(), 1000 * weight[:4]
    up[:, 3], down[3] = 0, 0
    node = Sum((rounded(weight), Product(Dense(up), Dense(down))))
    soft, fresh = softened(node, LoRA(4)), softened(rounded(weight), LoRA(4))
    torch.testing.assert_close(soft(), node.dense(), rtol=1e-4, atol=1e-3)
    lengths = [part.get_parameter("down").norm(dim=1) for part in (soft, fresh)]
    assert torch.allclose(lengths[0][:3], lengths[1][:3], rtol=0.2) and not bool(lengths[0][3])


def test_it_starts_from_nothing_and_ends_as_a_sum(weight: Tensor) -> None:
    base = rounded(weight)
    soft = softened(base)
    assert torch.equal(soft(), base.dense())
    assert {name for name, _ in soft.named_parameters()} == {"up", "down"}
    with torch.no_grad():
        soft.up.normal_()
        found = soft.harden()
    assert isinstance(found, Sum) and found.terms[0] is base
    expected = base.dense() + 16 / 8 * soft.up.detach() @ soft.down.detach()
    torch.testing.assert_close(found.dense(), expected)
    torch.testing.assert_close(soft().detach(), expected)


def test_scales_of_the_base_learn_and_codes_stay(weight: Tensor) -> None:
    """W' = s(1 + d) codes + B A: a step changes every scale, no code, and the sum is what was trained."""
    base = rounded(weight)
    soft = softened(base, LoRA(4, scales=True))
    assert torch.equal(soft(), base.dense())
    assert {name for name, _ in soft.named_parameters()} == {"up", "down", "base.moving_scale"}
    (soft() - weight - 0.1).square().sum().backward()
    with torch.no_grad():
        for _, values in soft.named_parameters():
            values -= 0.01 * values.grad.sign()
    found = soft.harden()
    assert isinstance(found, Sum) and isinstance(found.terms[0], Quantized)
    assert torch.equal(found.terms[0].codes, base.codes)
    assert bool((found.terms[0].scale.dense() != base.scale.dense()).float().mean() > 0.9)
    torch.testing.assert_close(found.dense(), soft().detach(), rtol=1e-3, atol=1e-3)
    assert soft.base.paces() == {"moving_scale": 3.0}
    plain = softened(Dense(weight), LoRA(4, scales=True))
    assert {name for name, _ in plain.named_parameters()} == {"up", "down"}, "floats have no scales"


def test_stabilised_scale_and_going_on(weight: Tensor) -> None:
    product = Product(Dense(weight[:, :4].contiguous()), Dense(weight[:4].contiguous()))
    tree = Sum((rounded(weight), product))
    soft = softened(tree, LoRA(rank=4, alpha=6.0, stabilised=True))
    assert soft.scale == 3.0
    torch.testing.assert_close(soft().detach(), tree.dense())
    after = soft.harden()
    assert isinstance(after, Sum) and len(after.terms) == 2
    torch.testing.assert_close(after.dense(), tree.dense())


def test_nf4_is_bitsandbytes() -> None:
    grid = nf4_grid(64)
    torch.testing.assert_close(torch.tensor(grid.levels) / grid.levels[-1], torch.tensor(BITSANDBYTES),
                               rtol=0, atol=2e-5)
    assert grid.code_bits == 4 and nf4_grid(64, over=4).bits_per_weight(256) == 4 + 8 / 64 + 32 / 256


@pytest.mark.parametrize("over", [0, 4])
def test_nf4_rounds_normal_weights_better_than_int4(over: int) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    errors = []
    for grid in (nf4_grid(64, over=over), integer_grid(4, 64)):
        found = fit(weight, torch.ones(256), grid)
        errors.append(float((Quantized.of(encode(weight, found), found).dense() - weight).square().mean()))
    assert errors[0] < errors[1]


def test_loftq_is_algorithm_1(weight: Tensor) -> None:
    technique = LoftQ(rank=4, grid=integer_grid(2, 32), rounds=3)
    after, _ = edit("up", Dense(weight), weight, technique, "loftq", None, torch.Generator())
    A, errors = torch.zeros_like(weight), []
    for _ in range(3):
        found = fit(weight - A, torch.ones(weight.shape[1]), integer_grid(2, 32))
        Q = Quantized.of(encode(weight - A, found), found).dense()
        U, S, V = torch.linalg.svd(weight - Q)
        A = U[:, :4] @ torch.diag(S[:4]) @ V[:4]
        errors.append(float((weight - Q - A).square().sum()))
    assert float((weight - after.dense()).square().sum()) == pytest.approx(min(errors), rel=1e-3)
    plain = float((weight - rounded(weight, 2).dense()).square().sum())
    assert min(errors) < plain
    soft = softened(after, LoRA(rank=4))
    torch.testing.assert_close(soft().detach(), after.dense(), rtol=1e-4, atol=1e-6)


def test_bad_ranks_are_named(weight: Tensor) -> None:
    with pytest.raises(EditError, match="up: rank 97 is above the full rank 96"):
        softened(Dense(weight), LoRA(rank=97))
    with pytest.raises(EditError, match="above the full rank"):
        edit("up", Dense(weight), weight, LoftQ(rank=97), "loftq", None, torch.Generator())
    with pytest.raises(ValueError, match="up: 100 columns not divisible"):
        edit("up", Dense(weight[:, :100]), weight[:, :100], LoftQ(), "loftq", None, torch.Generator())
    for wrong in (lambda: LoRA(rank=0), lambda: LoRA(alpha=-1.0), lambda: LoftQ(rounds=0)):
        with pytest.raises(RecipeError, match="positive"):
            wrong()


@PEFT_WARNS
def test_peft_reads_what_we_write(tiny_llama: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, generator = open_model(tiny_llama), torch.Generator().manual_seed(0)
    trees: dict[str, Node] = {}
    for site in model.map.sites:
        if site.role in ("q", "v", "down"):
            rank = 3 if site.role == "q" else 5
            up = torch.randn(site.shape[0], rank, generator=generator) * 0.05
            down = torch.randn(rank, site.shape[1], generator=generator) * 0.05
            trees[site.path] = Sum((Dense(model.weight(site.path)), Product(Dense(up), Dense(down))))
    export_adapter(trees, model.map, tmp_path, base=str(tiny_llama), task="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokens = torch.randint(3, 500, (2, 9), generator=generator)
    with torch.no_grad():
        plain = base(tokens).logits
        expected = AutoModelForCausalLM.from_pretrained(tiny_llama)
        for path, tree in trees.items():
            expected.get_parameter(path).copy_(tree.dense())
        adapted = PeftModel.from_pretrained(base, tmp_path)(tokens).logits
        torch.testing.assert_close(adapted, expected(tokens).logits, rtol=1e-4, atol=1e-4)
    assert float((adapted - plain).abs().max()) > 0.01
    read = read_adapter(tmp_path, model.map)
    assert read.keys() == trees.keys()
    for path, product in read.items():
        own = adapter_of(trees[path])
        assert own is not None
        torch.testing.assert_close(product.dense(), own.dense())


@PEFT_WARNS
def test_we_read_what_peft_writes(tiny_llama: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "up_proj"],
                        init_lora_weights=False)
    wrapped = get_peft_model(base, config)
    wrapped.save_pretrained(tmp_path)
    model = open_model(tiny_llama)
    found = read_adapter(tmp_path, model.map)
    merged = wrapped.merge_and_unload()
    assert len(found) == 2 * model.map.blocks
    for path, product in found.items():
        torch.testing.assert_close(model.weight(path) + product.dense(), merged.get_parameter(path).detach(),
                                   rtol=1e-4, atol=1e-5)


def test_what_is_no_adapter_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    model = open_model(tiny_llama)
    with pytest.raises(TargetError, match="no weight has an adapter"):
        export_adapter({}, model.map, tmp_path, base="x")
    with pytest.raises(ModelError, match="no adapter of PEFT"):
        read_adapter(tmp_path / "nowhere", model.map)
