"""The native folder of a whole model: nothing is lost on the way to it, to llama.cpp, or to a network."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from rarefy import load
from rarefy.core.errors import ModelError, TargetError
from rarefy.core.nodes import Dense, Masked, Product, Quantized, Sum
from rarefy.export.gguf import export_gguf
from rarefy.export.native import (
    export_native,
    formats_of,
    is_native,
    network_of,
    open_native,
    trees_of,
)
from rarefy.formats.gguf import read_gguf
from rarefy.models.model import open_model
from rarefy.models.runner import Runner

FAMILIES = ["llama", "llama-biased", "gemma3", "gpt2", "phi3", "qwen3"]


def logits_of(network, tokens):
    with torch.no_grad():
        return network(torch.from_numpy(tokens)).logits


@pytest.mark.parametrize("case", FAMILIES)
def test_the_network_computes_what_the_trees_stand_for(case, build, rounded, reference, tokens, tmp_path):
    model = build(case)
    trees = rounded(model, "Q4_1")
    size = export_native(model, trees, tmp_path / "out")
    assert is_native(tmp_path / "out") and not is_native(tmp_path)
    assert size == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    found = logits_of(load(tmp_path / "out"), tokens).log_softmax(-1).numpy()
    assert np.abs(found - reference(model, trees, tokens)).max() < 1e-5


def test_every_kind_of_tree_comes_back(build, rounded, tmp_path):
    model = build("llama")
    generator = torch.Generator().manual_seed(0)
    trees = rounded(model, "IQ4_NL")
    up, down = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.down_proj.weight"
    low = Product(Dense(torch.randn(96, 4, generator=generator)),
                  Dense(torch.randn(4, 64, generator=generator)))
    trees[up] = Sum((Masked(torch.rand(96, 64, generator=generator) > 0.5, trees[up]), low))
    del trees[down]
    norm = "model.norm.weight"
    export_native(model, trees, tmp_path / "out", params={norm: torch.full((64,), 2.0)})
    again = open_native(tmp_path / "out")
    for path, tree in trees.items():
        assert type(again.source.trees[path]) is type(tree)
        assert torch.equal(again.weight(path), tree.dense())
    assert torch.equal(again.weight(down), model.weight(down))
    assert torch.equal(again.param(norm), torch.full((64,), 2.0))
    assert again.name == "llama"
    assert again.tokenizer("for")["input_ids"] == model.tokenizer("for")["input_ids"]


@pytest.mark.parametrize("case", ["gemma3", "gpt2"])
def test_a_native_folder_is_a_model_like_any_other(case, build, rounded, tokens, tmp_path):
    """Row look-ups of the embedding included."""
    model = build(case)
    export_native(model, rounded(model, "Q8_0"), tmp_path / "out")
    again = open_native(tmp_path / "out")
    runner = Runner(again)
    hidden, context = runner.stem(torch.from_numpy(tokens))
    for index in range(runner.blocks):
        hidden = runner.block(index, hidden, context)
    expected = logits_of(network_of(again), tokens)
    assert (runner.logits(runner.norm(hidden)) - expected).abs().max() < 1e-4
    assert {path.name for path in again.source.files()} == {"config.json", "tree.json", "rarefy.safetensors"}
    assert again.source.dtype(again.map.head.path) == "Q8_0"


@pytest.mark.parametrize("case", ["llama", "gemma3", "gpt2"])
def test_codes_go_from_one_format_to_the_other_and_back(case, build, rounded, tmp_path):
    model = build(case)
    trees = rounded(model, "Q5_1")
    head = model.map.head.path
    trees[head] = Dense(model.weight(head).to(torch.float16))
    formats = formats_of(trees)
    assert set(formats.values()) == {"Q5_1", "F16"}
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    export_gguf(model, trees, formats, first)
    with pytest.warns(UserWarning, match="quantized"):
        opened = open_model(first, dequantize=True)
    export_native(opened, trees_of(opened), tmp_path / "out")
    again = open_native(tmp_path / "out")
    export_gguf(again, trees_of(again), formats_of(trees_of(again)), second)
    assert all(torch.equal(again.weight(path), tree.dense()) for path, tree in trees.items())
    old, new = read_gguf(first), read_gguf(second)
    assert {k: v for k, v in old.metadata.items() if new.metadata.get(k) != v} == {"general.name": case}
    assert all(np.array_equal(tensor.data, new.tensors[name].data) for name, tensor in old.tensors.items())


def test_formats_of_trees_that_llama_cpp_has_no_word_for(build):
    model = build("llama")
    weight = model.weight("model.layers.0.mlp.up_proj.weight")
    assert formats_of({"a": Product(Dense(weight), Dense(weight.T)), "b": Dense(weight),
                       "c": Dense(weight.bfloat16())}) == {"a": "F16", "b": "F32", "c": "BF16"}


def test_transformers_loads_it_after_one_import(build, rounded, tokens, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import rarefy.hf  # noqa: F401

    model = build("gemma3")
    trees = rounded(model, "Q4_0")
    export_native(model, trees, tmp_path / "out")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(network).__name__ == "Gemma3ForCausalLM"
    assert torch.equal(logits_of(network, tokens), logits_of(load(tmp_path / "out"), tokens))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("for x in", return_tensors="pt")
    longer = network.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert longer.shape[1] == prompt["input_ids"].shape[1] + 4
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="bfloat16", device_map="cpu")
    assert next(half.parameters()).dtype == torch.bfloat16
    with pytest.raises(ModelError, match="knows no quantization_config"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config={"quant_method": "x"})


def test_transformers_refuses_it_without_the_import(build, rounded, tmp_path):
    """Rather than load it with random weights."""
    model = build("llama")
    export_native(model, {}, tmp_path / "out")
    code = ("import sys; from transformers import AutoModelForCausalLM\n"
            "AutoModelForCausalLM.from_pretrained(sys.argv[1])")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode != 0 and "rarefy" in done.stderr


def test_a_loaded_network_can_be_trained_and_saved(build, rounded, tokens, tmp_path):
    model = build("qwen2")
    export_native(model, rounded(model, "Q8_0"), tmp_path / "out")
    network = load(tmp_path / "out")
    ids = torch.from_numpy(tokens)
    network(ids, labels=ids).loss.backward()
    assert all(value.grad is not None for value in network.parameters())
    assert network.get_output_embeddings().weight is network.get_input_embeddings().weight
    network.save_pretrained(tmp_path / "plain")
    assert open_model(tmp_path / "plain").map.tied


def test_a_file_of_llama_cpp_is_loaded_as_well(build, rounded, reference, tokens, tmp_path):
    model = build("llama")
    trees = rounded(model, "Q4_0")
    export_gguf(model, trees, formats_of(trees), tmp_path / "model.gguf")
    with pytest.warns(UserWarning, match="quantized"):
        network = load(tmp_path / "model.gguf")
    found = logits_of(network, tokens).log_softmax(-1).numpy()
    assert np.abs(found - reference(model, trees, tokens)).max() < 1e-4


def test_what_is_wrong_with_a_folder_is_said(build, tmp_path):
    model = build("llama")
    with pytest.raises(TargetError, match=r"mlp\.up\.weight: no such weight; did you mean"):
        export_native(model, {"model.layers.0.mlp.up.weight": Dense(torch.zeros(1))}, tmp_path / "none")
    export_native(model, {}, tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    whole = json.loads(config.read_text())
    config.write_text(json.dumps({**whole, "network": {**whole["network"], "num_hidden_layers": 3}}))
    with pytest.raises(ModelError, match=r"block|layers|unexpected"):
        open_native(tmp_path / "out")
    config.write_text(json.dumps({**whole, "network": {**whole["network"], "hidden_size": "many"}}))
    with pytest.raises(ModelError, match="not a valid configuration"):
        open_native(tmp_path / "out")
    config.write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="not the configuration of a native model"):
        open_native(tmp_path / "out")


def test_codes_are_not_decoded_on_the_way(build, rounded, tmp_path):
    """The folder is as small as its codes say."""
    model = build("llama")
    trees = rounded(model, "Q4_0")
    export_native(model, trees, tmp_path / "out")
    params = sum(model.param(param.path).numel() * 4 for param in model.map.params)
    counted = sum(tree.bits() for tree in trees.values()) // 8 + params
    stored = (tmp_path / "out" / "rarefy.safetensors").stat().st_size
    assert counted < stored < counted + 20_000  # the header
    assert all(isinstance(tree, Quantized) for tree in open_native(tmp_path / "out").source.trees.values())
