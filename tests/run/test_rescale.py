"""Rescaled models: the same function, less damage by rounding, and files that a runtime agrees with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rarefy.calibration.examples import read_examples
from rarefy.core.axes import Change, Transform
from rarefy.core.edit import edit
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nodes import Dense, Node
from rarefy.core.nouns import Recipe, Step
from rarefy.export.gguf import export_gguf
from rarefy.formats.ggml import CODECS
from rarefy.measure.divergence import Reference
from rarefy.measure.task import Judge
from rarefy.models.axes import changes, couplings
from rarefy.models.model import Model, open_model
from rarefy.models.network import Network
from rarefy.models.opening import open_any
from rarefy.models.rewritten import rewritten
from rarefy.models.runner import Runner
from rarefy.numerics.grids import Grid, integer_grid
from rarefy.run.effort import effort_named
from rarefy.run.job import Job, compress
from rarefy.run.progress import Silent
from rarefy.run.recipe import split
from rarefy.run.rescale import rescaled, transformed, transformed_network
from rarefy.run.sweep import Work, sweep
from rarefy.runtimes.llamacpp import Session
from rarefy.techniques.quantize.awq import AWQ
from rarefy.techniques.quantize.gptq import GPTQ
from rarefy.techniques.quantize.rotate import Rotate
from rarefy.techniques.quantize.rtn import RTN
from rarefy.techniques.quantize.smoothquant import SmoothQuant

GRID = integer_grid(4, 32)


@pytest.fixture(scope="module")
def windows(tiny_tokenizer) -> Tensor:
    from pydoc_data.topics import topics

    text = "\n\n".join(text for _, text in sorted(topics.items()))[:30_000]
    return torch.tensor(tiny_tokenizer(text, verbose=False)["input_ids"][:24 * 64]).view(24, 64)


def planted(model: Model, size: float = 32.0) -> Model:
    """The same function, with four channels of every group much larger and their weights much smaller."""
    generator = torch.Generator().manual_seed(0)
    done = []
    for coupling in couplings(model):
        if coupling.scales:
            factors = torch.ones(coupling.size)
            factors[torch.randperm(coupling.size, generator=generator)[:4]] = 1 / size
            done += list(changes(model, coupling, Change(factors)))
    return rewritten(model, done)


def inner(model: Model) -> list[str]:
    return [site.path for site in model.map.sites if site.block is not None]


def rounded(model: Model, grid: Grid = GRID) -> dict[str, Node]:
    """Round to nearest, without data."""
    trees = {}
    for path in inner(model):
        weight = model.weight(path).contiguous()
        trees[path], _ = edit(path, Dense(weight), weight, RTN(grid), "rtn", None, torch.Generator())
    return trees


def swept(model: Model, technique: object, tokens: Tensor) -> dict[str, Node]:
    store: dict = {}
    sweep(model, {path: Work((("t", technique),)) for path in inner(model)}, tokens, {}, store, 0,
          sequential=False)
    return {path: tree for path, (tree, _) in store.items()}


@pytest.mark.parametrize("technique", [AWQ(grid=GRID), SmoothQuant(), Rotate()])
def test_the_function_stays(technique: Transform, tiny_llama: Path, windows: Tensor) -> None:
    model = planted(open_model(tiny_llama))
    done = transformed(model, technique, windows[:8])
    assert Reference(model, windows[16:]).compare(Runner(done.model)).kl_mean < 1e-6
    assert done.receipts and all(receipt.bits_after == receipt.bits_before for receipt in done.receipts)
    assert not all(torch.equal(done.model.weight(path), model.weight(path)) for path in inner(model))


@pytest.mark.parametrize("technique", [AWQ(), SmoothQuant()])
def test_outlier_channels_no_longer_hurt(technique: Transform, tiny_llama: Path, windows: Tensor) -> None:
    """Behind them rounding to nearest and GPTQ lose less than half, against the same original."""
    original = open_model(tiny_llama)
    model = planted(original)
    reference = Reference(original, windows[16:])
    view = transformed(model, technique, windows[:8], grids=dict.fromkeys(inner(model), GRID)).model

    def kl(model: Model, trees: dict[str, Node]) -> float:
        return reference.compare(Runner(model, trees.get)).kl_mean

    assert kl(view, rounded(view)) < 0.5 * kl(model, rounded(model))
    for rounding in (RTN(GRID), GPTQ(GRID)):
        plain, behind = (kl(each, swept(each, rounding, windows[:8])) for each in (model, view))
        assert behind < 0.5 * plain


def test_rotation_helps_where_single_weights_stand_out(tiny_llama: Path, windows: Tensor) -> None:
    network = open_model(tiny_llama)
    heavy = {}
    for path in inner(network):
        weight = network.weight(path).clone()
        generator = torch.Generator().manual_seed(len(heavy))
        weight[torch.rand(weight.shape, generator=generator) < 0.005] *= 6
        heavy[path] = weight
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    module.load_state_dict(heavy, strict=False)
    model = Model.from_module(module, None)
    reference = Reference(model, windows[16:])
    view = transformed(model, Rotate()).model
    plain, turned = (reference.compare(Runner(each, rounded(each, integer_grid(4, 0)).get)).kl_mean
                     for each in (model, view))
    assert turned < 0.6 * plain


@pytest.mark.parametrize("technique", [AWQ(), SmoothQuant(), Rotate(), Rotate(untie=True)])
def test_exported_files_agree_with_the_runtime(technique: Transform, tiny_llama: Path, tiny_random,
                                               windows: Tensor, tmp_path: Path) -> None:
    """Permuted rows, grouped heads, changed norms, a head that was tied: llama.cpp computes what we do."""
    model = open_model(tiny_random("qwen2") if technique == Rotate(untie=True) else tiny_llama)
    grid = CODECS["Q8_0"].grid
    assert grid is not None
    view = transformed(model, technique, windows[:4], grids=dict.fromkeys(inner(model), grid)).model
    trees = rounded(view, grid)
    file = tmp_path / "model.gguf"
    export_gguf(view, trees, {site.path: "Q8_0" if site.path in trees else "F32" for site in view.map.sites},
                file)
    tokens = windows[:1, :48]
    runner = Runner(view, trees.get)
    with torch.no_grad():
        hidden, context = runner.stem(tokens)
        for index in range(runner.blocks):
            hidden = runner.block(index, hidden, context)
        ours = runner.logits(runner.norm(hidden)).log_softmax(-1)[0]
    with Session(file) as session:
        window = next(iter(session.distributions(tokens.numpy(), list(range(48)))))
        theirs = torch.from_numpy(np.array(window))
    assert float((ours.exp() * (ours - theirs)).sum(-1).mean()) < 2e-3


def test_the_seed_decides(tiny_llama: Path) -> None:
    model = open_model(tiny_llama)
    path = inner(model)[0]
    one, same, other = (transformed(model, Rotate(), seed=seed).model.weight(path) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_patterns_take_whole_groups(tiny_llama: Path, windows: Tensor) -> None:
    model = open_model(tiny_llama)
    done = transformed(model, SmoothQuant(), windows[:4], where=("role:gate", "role:up"))
    assert {receipt.site for receipt in done.receipts} == {
        f"model.layers.{k}.post_attention_layernorm" for k in range(3)}
    with pytest.raises(RecipeError, match="role:q match no group of channels whole"):
        transformed(model, SmoothQuant(), windows[:4], where=("role:q",))


def test_refusals(tiny_gemma3: Path, tiny_random, tiny_llama: Path, windows: Tensor) -> None:
    gemma = open_model(tiny_gemma3)
    with pytest.raises(EditError, match=r"cannot be rotated: its norms behind attention .* residual: false"):
        transformed(gemma, Rotate())
    assert transformed(gemma, Rotate(residual=False)).receipts
    with pytest.raises(EditError, match=r"its head is tied .* pass untie: true"):
        transformed(open_model(tiny_random("qwen2")), Rotate())
    with pytest.raises(EditError, match="its norms subtract the mean"):
        transformed(open_model(tiny_random("gpt2")), Rotate())
    with pytest.raises(EditError, match="smoothquant needs calibration text"):
        transformed(open_model(tiny_llama), SmoothQuant())
    with pytest.raises(EditError, match=r"awq found no channels to change; .* give later steps a format"):
        transformed(open_model(tiny_llama), AWQ(), windows[:4])


def test_steps_of_a_recipe(tiny_llama: Path, windows: Tensor) -> None:
    steps = (Step("rotate"), Step("awq", settings={"steps": 5}), Step("gptq", format="Q4_0"))
    first, rest = split(steps)
    assert [step.technique for step in first] == ["rotate", "awq"] and rest == steps[2:]
    with pytest.raises(RecipeError, match=r"awq: .* channels of the whole model and must come before"):
        split((Step("rotate"), Step("gptq"), Step("awq")))
    model = open_model(tiny_llama)
    done = rescaled(model, Recipe("x", steps), effort_named("quick"), windows[:4])
    assert {receipt.technique for receipt in done.receipts} == {"rotate", "awq"}
    assert Reference(model, windows[16:]).compare(Runner(done.model)).kl_mean < 1e-6


def test_a_recipe_from_start_to_end(tiny_random, tmp_path: Path) -> None:
    """A tied model: its head gets a matrix of its own, and the file is measured against the original."""
    steps = (Step("rotate", settings={"untie": True}), Step("awq", settings={"steps": 4}),
             Step("rtn", ("*.layers.*",), format="Q8_0"))
    folder = tiny_random("qwen2")
    recipe = Recipe(str(folder), steps, effort="quick", data=("python-docs",))
    job = Job(str(folder), tmp_path / "out", effort="quick", data=("python-docs",), recipe=recipe)
    result = compress(job, Silent())
    assert 0 < result.receipt["measured"]["float"]["kl_mean"] < 1e-3
    assert result.receipt["measured"]["runtime"]["logit_error_vs_float"]["kl_mean"] < 0.01
    assert {row["technique"] for row in result.receipt["axes"]} == {"rotate", "awq"}
    assert "lm_head.weight" in {row["site"] for row in result.receipt["plan"]}


# ---- networks that are no language models

def test_an_encoder_is_scaled_where_its_norms_allow(tiny_encoder: Path) -> None:
    """BERT's norms feed the residual stream as well: its values change, its norms say why not."""
    network = open_any(tiny_encoder)
    assert isinstance(network, Network)
    examples = read_examples(network, str(tiny_encoder / "train.tsv"), count=64)
    judge = Judge(network, examples)
    for technique in (SmoothQuant(), AWQ(grid=GRID), Rotate(residual=False)):
        done = transformed_network(network, technique, examples)
        assert judge.compare(done.model).mean < 1e-8
        changed = {path for path in network.map.by_path
                   if not torch.equal(done.model.weight(path), network.weight(path))}
        assert {network.map.by_path[path].role for path in changed} == {"v", "o"}
        left = [receipt for receipt in done.receipts if receipt.note.startswith("left as it is")]
        assert len(left) == (0 if isinstance(technique, Rotate) else 4)
        assert all("residual connection" in receipt.note for receipt in left)
    with pytest.raises(EditError, match=r"cannot be rotated: .* causal language models alone; pass residual"):
        transformed_network(network, Rotate(), examples)
    with pytest.raises(EditError, match="needs calibration samples"):
        transformed_network(network, SmoothQuant(), None)
    with pytest.raises(EditError, match=r"can change none of its channels: .*Norm: .* leave the step out"):
        transformed_network(network, SmoothQuant(), examples, where=("role:q", "role:k", "role:v", "role:up"))


def test_a_recipe_rescales_an_encoder(tiny_encoder: Path, tmp_path: Path) -> None:
    """The file is measured against the original, and says what was changed before it was rounded."""
    steps = (Step("awq", settings={"steps": 4}), Step("rtn", ("role:v", "role:o"), format="int4-g32"))
    data, judged = (str(tiny_encoder / "train.tsv"),), (str(tiny_encoder / "dev.tsv"),)
    recipe = Recipe(str(tiny_encoder), steps, effort="quick", data=data, eval_data=judged)
    result = compress(Job(str(tiny_encoder), tmp_path / "out", effort="quick", data=data, eval_data=judged,
                          recipe=recipe), Silent())
    assert 0 < result.receipt["measured"]["float"]["kl_mean"] < 0.1
    assert {row["technique"] for row in result.receipt["axes"]} == {"awq"}
