"""Exported files in llama.cpp itself: the same distributions as transformers, for every family and format.

Leaving out the permutation, the offset of the norms or a rotary setting moves the mean KL of these models by
0.0001 to 6 nats; the rounding that llama.cpp does itself stays below the tolerances.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rarefy.core.edit import edit
from rarefy.core.errors import TargetError
from rarefy.core.nodes import Dense, Masked, Product, Quantized
from rarefy.export.gguf import (
    LLAMA_CPP,
    export_gguf,
    fixed_bytes,
    gguf_bytes,
    loadable,
    metadata,
    plan_tensors,
    site_bytes,
)
from rarefy.formats.ggml import CODECS
from rarefy.formats.gguf import read_gguf
from rarefy.models.model import open_model
from rarefy.runtimes.llamacpp import Session
from rarefy.techniques.quantize.rtn import RTN

FLOAT_TOLERANCE = 5e-5  # nats: llama.cpp keeps keys and values in 16 bits
ROUNDED_TOLERANCE = 1e-2  # nats: and multiplies with activations of 8 bits

CASES = ["llama", "llama-biased", "llama-3", "llama-linear", "mistral", "qwen2", "qwen2-yarn", "qwen3",
         "gemma2", "gemma3", "gemma3-other-windows", "phi3", "phi3-long", "smollm3", "gpt2"]


def divergence(reference, path, tokens):
    with Session(path, threads=1) as session:
        found = np.stack(list(session.distributions(tokens)))
    return float((np.exp(reference) * (reference - found)).sum(-1).mean())


@pytest.mark.parametrize("case", CASES)
def test_floats_of_every_family(case, build, reference, tokens, tmp_path):
    model = build(case)
    formats = {site.path: "F32" for site in model.map.sites}
    path = tmp_path / "model.gguf"
    written = export_gguf(model, {}, formats, path)
    assert written == path.stat().st_size == gguf_bytes(model, formats)
    assert written == fixed_bytes(model) + sum(site_bytes(site, "F32") for site in model.map.sites)
    assert divergence(reference(model, {}, tokens), path, tokens) < FLOAT_TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_codes_of_every_family(case, build, rounded, reference, tokens, tmp_path):
    """Codes, scales and zeros follow the rows of q and k."""
    model = build(case)
    formats = {site.path: "Q4_1" for site in model.map.sites}
    trees, path = rounded(model, "Q4_1"), tmp_path / "model.gguf"
    assert export_gguf(model, trees, formats, path) == path.stat().st_size == gguf_bytes(model, formats)
    assert divergence(reference(model, trees, tokens), path, tokens) < ROUNDED_TOLERANCE


@pytest.mark.parametrize("name", LLAMA_CPP.formats)
def test_every_format_loads_for_every_weight(name, build, rounded, reference, tokens, tmp_path):
    """The embedding that is looked up and multiplied with included."""
    wide = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    model = build("llama-biased", **wide)
    assert all(loadable(model, site) == LLAMA_CPP.formats for site in model.map.sites)
    formats = {site.path: name for site in model.map.sites}
    trees = {} if CODECS[name].grid is None else rounded(model, name)
    path = tmp_path / "model.gguf"
    assert export_gguf(model, trees, formats, path) == path.stat().st_size == gguf_bytes(model, formats)
    assert {t.type for t in read_gguf(path).tensors.values()} == {name, "F32"}
    stored = {p: tree.dense() for p, tree in trees.items()}
    network_reference = reference(model, {p: Dense(v) for p, v in stored.items()}, tokens, **wide)
    assert divergence(network_reference, path, tokens) < ROUNDED_TOLERANCE


def test_formats_may_be_mixed(build, rounded, reference, tokens, tmp_path):
    model = build("llama")
    names = ["Q8_0", "Q4_0", "IQ4_NL", "Q5_1", "F16"]
    formats = {site.path: names[k % len(names)] for k, site in enumerate(model.map.sites)}
    trees = {}
    for name in names[:-1]:
        made = rounded(model, name)
        trees |= {path: tree for path, tree in made.items() if formats[path] == name}
    path = tmp_path / "model.gguf"
    assert export_gguf(model, trees, formats, path) == path.stat().st_size == gguf_bytes(model, formats)
    assert divergence(reference(model, trees, tokens), path, tokens) < ROUNDED_TOLERANCE
    fixed = fixed_bytes(model)
    assert path.stat().st_size == fixed + sum(site_bytes(s, formats[s.path]) for s in model.map.sites)


@pytest.mark.parametrize("case", ["llama", "llama-3", "gemma3", "gpt2", "phi3-long"])
def test_a_file_exported_from_a_file_is_the_same(case, build, tmp_path):
    model = build(case)
    formats = {site.path: "F16" for site in model.map.sites}
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    export_gguf(model, {}, formats, first)
    again = open_model(first)
    assert gguf_bytes(again, formats) == export_gguf(again, {}, formats, second)
    assert first.read_bytes() == second.read_bytes()


def test_tuned_norms_replace_the_model_s(build, tmp_path):
    model = build("gemma3")
    path, changed = tmp_path / "model.gguf", "model.layers.2.input_layernorm.weight"
    values = torch.linspace(-0.5, 0.5, 64)
    export_gguf(model, {}, {site.path: "F32" for site in model.map.sites}, path, params={changed: values})
    stored = read_gguf(path).tensor("blk.2.attn_norm.weight").dense()
    assert torch.equal(stored, values + 1)


def test_trees_of_other_kinds_are_written_as_floats(build, tmp_path):
    """A low-rank product has no form of its own in the file; its values have."""
    model = build("qwen3")
    site = next(s for s in model.map.sites if s.role == "up")
    generator = torch.Generator().manual_seed(0)
    tree = Product(Dense(torch.randn(site.shape[0], 4, generator=generator)),
                   Dense(torch.randn(4, site.shape[1], generator=generator)))
    formats, path = {s.path: "F32" for s in model.map.sites}, tmp_path / "model.gguf"
    export_gguf(model, {site.path: tree}, formats, path)
    name = model.map.family.gguf_name(site.path)
    assert torch.equal(read_gguf(path).tensor(name).dense(), tree.dense())
    with pytest.raises(TargetError, match=r"ffn_up.weight: Q8_0: cannot store a Product"):
        export_gguf(model, {site.path: tree}, {**formats, site.path: "Q8_0"}, tmp_path / "other.gguf")
    assert not (tmp_path / "other.gguf").exists()


def test_norms_and_biases_stay_whole(build):
    model = build("gpt2")
    planned = plan_tensors(model, {site.path: "Q4_0" for site in model.map.sites})
    small = [tensor.codec.name for tensor in planned if tensor.path not in model.map.by_path]
    assert set(small) == {"F32"}
    assert [tensor.name for tensor in planned][:2] == ["token_embd.weight", "position_embd.weight"]
    assert planned[-1].name.startswith("output_norm")


def test_what_does_not_fit_is_refused_by_name(build):
    model = build("llama")
    formats = {site.path: "Q4_0" for site in model.map.sites}
    down = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(TargetError, match=rf"{down}: rows of 96 weights do not fit the blocks of 256"):
        plan_tensors(model, {**formats, down: "Q4_K"})
    with pytest.raises(TargetError, match="has no format 'Q4_k'; did you mean 'Q4_K'"):
        plan_tensors(model, {**formats, down: "Q4_k"})
    with pytest.raises(TargetError, match=r"down_projection\.weight: no such weight; did you mean"):
        plan_tensors(model, {**formats, "model.layers.0.mlp.down_projection.weight": "Q4_0"})
    del formats[down]
    with pytest.raises(TargetError, match=rf"{down}: no format was chosen"):
        plan_tensors(model, formats)
    with pytest.raises(TargetError, match="no such weight"):
        export_gguf(model, {"nothing": Dense(torch.zeros(1))}, formats, "unused.gguf")


def test_a_format_without_codes_needs_a_tree(build, tmp_path):
    model = build("qwen2")
    with pytest.raises(TargetError, match=r"token_embd.weight: Q4_0: cannot store a Dense; expected"):
        export_gguf(model, {}, {site.path: "Q4_0" for site in model.map.sites}, tmp_path / "model.gguf")


@pytest.mark.parametrize(("case", "changes", "message"), [
    ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
    ("gpt2", {"activation_function": "relu"}, "activation 'relu'"),
    ("gemma3", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar 100"),
    ("gemma2", {"final_logit_softcapping": None}, "no soft cap"),
    ("smollm3", {"no_rope_layers": [1, 1, 1, 1, 1]}, "no_rope_layers"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
    ("qwen3", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0,
                                   "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                   "original_max_position_embeddings": 64}}, "'llama3'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "attention scale"),
])
def test_what_llama_cpp_would_compute_otherwise_is_refused(case, changes, message, build):
    with pytest.raises(TargetError, match=message):
        metadata(build(case, **changes))


def test_a_window_that_llama_cpp_ignores_is_said(build):
    with pytest.warns(UserWarning, match="looks back 16 tokens"):
        metadata(build("mistral", sliding_window=16))


def test_a_name_that_llama_cpp_reads_too_much_into(build):
    entries = {entry[0]: entry[1] for entry in metadata(build("phi3"))}
    assert entries["general.name"] == "phi 3"


def test_quantized_rows_move_with_their_scales(build, rounded, tmp_path):
    """Row i of a Llama file is row order[i] of the model, bit for bit."""
    model = build("llama")
    trees, path = rounded(model, "Q5_0"), tmp_path / "model.gguf"
    export_gguf(model, trees, {site.path: "Q5_0" for site in model.map.sites}, path)
    site = next(s for s in model.map.sites if s.role == "k")
    order = model.map.family.row_order(site.path, model.config)
    assert order is not None and order != sorted(order)
    stored = read_gguf(path).tensor(model.map.family.gguf_name(site.path))
    assert isinstance(stored, Quantized)
    assert torch.equal(stored.dense(), trees[site.path].dense()[order])


def test_what_was_pruned_is_the_code_of_zero(tiny_llama_wide: Path, tmp_path: Path) -> None:
    """A mask over codes: zeros in the file where the grid has a zero, a refusal by name where it has none."""
    model = open_model(tiny_llama_wide)
    site = next(site for site in model.map.sites if site.role == "up")
    weight = model.weight(site.path)
    keep = weight.abs() > weight.abs().median()
    formats = {each.path: "F16" for each in model.map.sites}
    for name in ("Q8_0", "IQ4_NL"):
        tree, _ = edit(site.path, Masked(keep, Dense(weight)), weight, RTN(CODECS[name].grid), "rtn", None,
                       torch.Generator())
        if name == "IQ4_NL":
            with pytest.raises(TargetError, match="IQ4_NL has no code for zero"):
                export_gguf(model, {site.path: tree}, formats | {site.path: name}, tmp_path / "no.gguf")
            continue
        export_gguf(model, {site.path: tree}, formats | {site.path: name}, tmp_path / "yes.gguf")
        with pytest.warns(UserWarning, match="already quantized"):
            read = open_model(tmp_path / "yes.gguf", dequantize=True).weight(site.path)
        assert torch.equal(read, tree.dense())
        assert not read[~keep].any()
