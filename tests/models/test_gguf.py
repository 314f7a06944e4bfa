"""GGUF files as models: names, row order, norms, configuration and tokenizer, and what is refused.

The files are written here from facts of the format, with the gguf package's own table of tensor names, so
that reader and writer cannot agree on a mistake.
"""

import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from rarefy.core.errors import ModelError
from rarefy.core.nodes import Dense
from rarefy.formats.ggml import CODECS
from rarefy.formats.gguf import ValueType, read_gguf, write_gguf
from rarefy.models.model import open_model
from rarefy.models.runner import Runner

KEYS = {  # key of the file: field of the configuration
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers", "attention.head_count": "num_attention_heads",
    "feed_forward_length": "intermediate_size", "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "attention.key_length": "head_dim", "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}


def keys_of(config: Any) -> dict[str, Any]:
    """The metadata that llama.cpp's converter would write."""
    keys = {key: getattr(config, field, None) for key, field in KEYS.items()}
    if config.model_type == "gpt2":
        keys["feed_forward_length"] = 4 * config.hidden_size
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    keys["rope.freq_base"] = rope.get("rope_theta")
    if rope.get("rope_type") == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    if rope.get("rope_type") == "longrope":
        scale = config.max_position_embeddings / rope["original_max_position_embeddings"]
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        keys["rope.scaling.attn_factor"] = float(np.sqrt(1 + np.log(scale) / np.log(8)))
    return {key: value for key, value in keys.items() if value is not None}


def tensors_of(network: Any, architecture: str) -> dict[str, torch.Tensor]:
    """The tensors as the file has them: other names, rows of q and k interleaved, norms with their 1."""
    config, found = network.config, {}
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for path, value in network.state_dict().items():
        if path == "lm_head.weight" and value.data_ptr() == network.get_input_embeddings().weight.data_ptr():
            continue
        if architecture in ("llama", "smollm3") and path.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if "q_proj" in path else config.num_key_value_heads
            value = value.view(heads, 2, len(value) // heads // 2, -1).transpose(1, 2).reshape(value.shape)
        if architecture.startswith("gemma") and path.endswith("norm.weight"):
            value = value + 1
        if ".c_" in path and path.endswith("weight"):
            value = value.T
        module, _, end = path.rpartition(".")
        found[f"{names.get_name(module)}.{end}"] = value.contiguous()
    return found


def typed(key: str, value: Any) -> tuple[Any, ...]:
    match value:
        case bool():
            return (key, value, ValueType.BOOL)
        case int():
            return (key, value, ValueType.UINT32)
        case float():
            return (key, value, ValueType.FLOAT32)
        case str():
            return (key, value, ValueType.STRING)
        case _:
            return (key, value, ValueType.ARRAY, typed("", value[0])[2])


def save(network: Any, path: Path, codec: str = "F32", keys: dict[str, Any] | None = None,
         tensors: dict[str, torch.Tensor] | None = None, **metadata: Any) -> Path:
    """A GGUF file of a network; matrices in ``codec``. keys, tensors: additions (None removes)."""
    architecture = {"gemma3_text": "gemma3", "mistral": "llama"}.get(
        network.config.model_type, network.config.model_type)
    everything = {k: v for k, v in (keys_of(network.config) | (keys or {})).items() if v is not None}
    entries = [typed(f"{architecture}.{key}", value) for key, value in everything.items()]
    entries += [typed("tokenizer." + key.replace("__", "."), value) for key, value in metadata.items()]
    listed = []
    for name, value in (tensors_of(network, architecture) | (tensors or {})).items():
        if value is not None:
            kind = codec if value.ndim == 2 and name != "position_embd.weight" else "F32"
            node = Dense(value.detach())
            if kind not in ("F32", "F16", "BF16"):
                raw = gguf.quantize(value.detach().numpy(), gguf.GGMLQuantizationType[kind])
                node = CODECS[kind].unpack(raw.reshape(value.shape[0], -1), value.shape[1])
            listed.append((name, CODECS[kind], node))
    write_gguf(path, architecture, entries, listed)
    return path


def llama3_divisors(config: Any) -> dict[str, torch.Tensor]:
    """What llama.cpp's converter stores for Llama 3's rotary scaling, transcribed frequency by frequency."""
    rope, found = config.rope_parameters, []
    width = config.hidden_size // config.num_attention_heads
    for index in range(0, width, 2):
        length = 2 * np.pi * rope["rope_theta"] ** (index / width)
        old = rope["original_max_position_embeddings"]
        smooth = (old / length - 1) / 3
        found.append(1.0 if length < old / 4 else rope["factor"] if length > old
                     else 1 / ((1 - smooth) / rope["factor"] + smooth))
    return {"rope_freqs.weight": torch.tensor(found)}


def extras(case: str, network: Any) -> dict[str, torch.Tensor]:
    if case == "llama3":
        return llama3_divisors(network.config)
    if case == "phi3long":
        rope = network.config.rope_parameters
        return {f"rope_factors_{which}.weight": torch.tensor(rope[f"{which}_factor"])
                for which in ("long", "short")}
    return {}


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    runner = Runner(model)
    with torch.no_grad():
        hidden, context = runner.stem(tokens)
        for index in range(runner.blocks):
            hidden = runner.block(index, hidden, context)
        return runner.logits(runner.norm(hidden))


def test_it_computes_what_the_original_computes(case, build, tokens, tmp_path):
    network = build(case, sliding_window=None) if case == "mistral" else build(case)
    path = save(network, tmp_path / "m.gguf", tensors=extras(case, network))
    model = open_model(path)
    with torch.no_grad():
        torch.testing.assert_close(logits(model, tokens), network(tokens).logits, atol=1e-4, rtol=0)
    assert model.source.files() == (path,) and model.name == "m"
    assert model.parameters == sum(value.numel() for value in network.parameters())
    state = network.state_dict()
    for site in model.map.sites:
        want = state[site.path].T if site.transposed else state[site.path]
        assert torch.equal(model.weight(site.path), want)
        assert torch.equal(model.rows(site.path, torch.tensor([5, 1])), want[[5, 1]])
        assert torch.equal(model.rows(site.path, slice(2, 9)), want[2:9])
    for param in model.map.params:
        torch.testing.assert_close(model.param(param.path), state[param.path], atol=1e-6, rtol=0)


def test_linear_rotary_scaling(build, tokens, tmp_path):
    network = build("llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})
    model = open_model(save(network, tmp_path / "m.gguf"))
    with torch.no_grad():
        torch.testing.assert_close(logits(model, tokens), network(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("codec", ["F16", "BF16"])
def test_half_precision_is_no_quantization(codec, build, tmp_path):
    network = build("llama")
    model = open_model(save(network, tmp_path / "m.gguf", codec))
    path = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(model.weight(path), network.get_parameter(path).to(
        torch.float16 if codec == "F16" else torch.bfloat16).float())


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_quantized_files_are_refused_or_dequantized(family, build, tokens, tmp_path):
    network, q8 = build(family), gguf.GGMLQuantizationType.Q8_0
    path = save(network, tmp_path / "m.gguf", "Q8_0")
    with pytest.raises(ModelError, match=r"already quantized \(\d+ tensors in Q8_0\); .*--dequantize"):
        open_model(path)
    with pytest.warns(UserWarning, match=r"already quantized \(\d+ tensors in Q8_0\)"):
        model = open_model(path, dequantize=True)
    with torch.no_grad():
        for site in model.map.sites:
            want = network.get_parameter(site.path).T if site.transposed else network.get_parameter(site.path)
            rounded = gguf.dequantize(gguf.quantize(want.contiguous().numpy(), q8), q8)
            got = model.weight(site.path)
            assert torch.equal(got, torch.from_numpy(rounded)), site.path
            network.get_parameter(site.path).copy_(got.T if site.transposed else got)
        torch.testing.assert_close(logits(model, tokens), network(tokens).logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(logits(model, tokens), network(tokens).logits, atol=1e-4, rtol=0)


def test_a_head_that_repeats_the_embedding_is_tied(build, tokens, tmp_path):
    network = build("gpt2")
    embedding = network.get_input_embeddings().weight
    model = open_model(save(network, tmp_path / "m.gguf", tensors={"output.weight": embedding}))
    assert model.map.tied
    model = open_model(save(network, tmp_path / "n.gguf", tensors={"output.weight": embedding + 1}))
    assert not model.map.tied and model.map.head.role == "head"


def refused(path: Path, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        open_model(path).verify()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(("keys", "words"), [
    ({"block_count": 4}, ["4 blocks", "holds 3"]), ({"block_count": None}, ["llama.block_count is missing"]),
    ({"block_count": 10**9}, ["1000000000 blocks"]), ({"embedding_length": "wide"}, ["'wide'"]),
    ({"embedding_length": 64}, ["shape"]), ({"attention.head_count": 0}, ["head_count"]),
    ({"attention.head_count_kv": [2, 2, 1]}, ["a list of 3", "head_count_kv"]),
    ({"attention.value_length": 16}, ["value_length"]), ({"rope.freq_base": float("nan")}, ["freq_base"]),
    ({"rope.scaling.type": "yarn"}, ["'yarn'"]), ({"rope.dimension_count": 4}, ["dimension_count"]),
    ({"feed_forward_length": 2**31}, ["feed_forward_length"]), ({"context_length": -1}, ["context_length"]),
])
def test_metadata_that_is_wrong(keys, words, build, tmp_path):
    if keys.get("context_length") == -1:
        keys = {"context_length": 0}
    refused(save(build("llama"), tmp_path / "m.gguf", keys=keys), *words)


@pytest.mark.parametrize(("name", "value", "words"), [
    ("blk.1.attn_q.weight", None, ["model.layers.1.self_attn.q_proj.weight is missing"]),
    ("blk.0.ffn_gate_exps.weight", torch.ones(32, 32), ["blk.0.ffn_gate_exps.weight", "llama family"]),
    ("token_embd.weight", None, ["token_embd.weight"]),
    ("output_norm.weight", torch.ones(31), ["model.norm.weight", "shape"]),
    ("rope_freqs.weight", torch.tensor([1.0, 2.0, 3.0, 4.0]), ["rope_freqs.weight", "Llama 3"]),
])
def test_tensors_that_are_missing_or_too_many(name, value, words, build, tmp_path):
    refused(save(build("llama"), tmp_path / "m.gguf", tensors={name: value}), *words)


def test_another_architecture(tmp_path):
    write_gguf(tmp_path / "m.gguf", "gema3", [], [("x", CODECS["F32"], Dense(torch.ones(2)))])
    refused(tmp_path / "m.gguf", "'gema3'", "did you mean 'gemma3'")


@pytest.mark.parametrize("codec", ["F32", "Q8_0"])
@pytest.mark.parametrize("name", ["blk.1.attn_q.weight", "token_embd.weight"])
def test_a_file_with_nan(codec, name, build, tmp_path):
    path = save(build("llama"), tmp_path / "m.gguf", codec)
    at = read_gguf(path).tensors[name].data
    raw = np.memmap(path, np.uint8, "r+")
    start = at.__array_interface__["data"][0] - read_gguf_base(path, at)
    raw[start:start + 4] = [0, 0x7E, 0xC0, 0x7F] if codec == "Q8_0" else [0, 0, 0xC0, 0x7F]
    raw.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = open_model(path, dequantize=True)
    with pytest.raises(ModelError, match=r"(q_proj|embed_tokens).weight: holds NaN"):
        model.verify()


def read_gguf_base(path: Path, view: np.ndarray) -> int:
    """The address at which the file of this view was mapped."""
    while isinstance(view.base, np.ndarray):
        view = view.base
    return int(view.__array_interface__["data"][0])


@pytest.mark.filterwarnings("ignore:.*already quantized")
def test_mutated_files_are_refused_or_opened(build, tmp_path):
    source = save(build("llama"), tmp_path / "m.gguf").read_bytes()
    generator = np.random.default_rng(3)
    refusals = []
    for _ in range(80):
        mutated = bytearray(source)
        mutated[generator.integers(2000)] ^= 1 << generator.integers(8)
        (tmp_path / "m.gguf").write_bytes(mutated)
        try:
            open_model(tmp_path / "m.gguf", dequantize=True).verify()
        except ModelError as error:
            refusals.append(str(error))
    assert 0 < len(refusals) < 80 and not any("\n" in message for message in refusals)


# ---- tokenizers

def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


@pytest.mark.parametrize(("pre", "want"), [
    ("gpt-2", ["1234"]), ("llama-bpe", ["123", "4"]), ("smollm", ["1", "2", "3", "4"]),
    ("qwen2", ["1", "2", "3", "4"]), ("gpt-4o", ["123", "4"]), ("tekken", ["1", "2", "3", "4"])])
def test_text_is_cut_as_the_file_says(pre, want, build, tmp_path):
    tokens = [*byte_alphabet(), "12", "123", "1234", "<|end|>"]
    network = build("llama", vocab_size=len(tokens))
    model = open_model(save(
        network, tmp_path / "m.gguf", ggml__model="gpt2", ggml__pre=pre, ggml__tokens=tokens,
        ggml__token_type=[1] * (len(tokens) - 1) + [3], ggml__merges=["1 2", "12 3", "123 4"],
        ggml__bos_token_id=len(tokens) - 1, ggml__eos_token_id=len(tokens) - 1, ggml__add_bos_token=True,
        chat_template="{{ messages }}"))
    tokenizer = model.tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("1234").input_ids) == ["<|end|>", *want]
    assert tokenizer.decode(tokenizer("x é\n 🙂", add_special_tokens=False).input_ids) == "x é\n 🙂"
    assert tokenizer("<|end|>", add_special_tokens=False).input_ids == [len(tokens) - 1]
    assert tokenizer.chat_template == "{{ messages }}" and model.config.bos_token_id == len(tokens) - 1


def test_a_sentencepiece_vocabulary(build, tmp_path):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)),
              "▁", "a", "b", "▁a", "ab", "▁ab"]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -3.0, -2.0, -1.0]
    kinds = [2, 3, 3] + [6] * 256 + [1] * 6
    model = open_model(save(
        build("llama", vocab_size=len(pieces)), tmp_path / "m.gguf", ggml__model="llama", ggml__tokens=pieces,
        ggml__scores=scores, ggml__token_type=kinds, ggml__bos_token_id=1, ggml__eos_token_id=2,
        ggml__unknown_token_id=0))
    tokenizer = model.tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab a").input_ids) == ["<s>", "▁ab", "▁a"]
    assert tokenizer.decode(tokenizer("ab é", add_special_tokens=False).input_ids) == "ab é"


def test_a_tokenizer_json_beside_the_file_is_not_taken(build, tmp_path):
    tokens = [*byte_alphabet(), "12"]
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{")
    model = open_model(save(build("llama", vocab_size=257), tmp_path / "m.gguf", ggml__model="gpt2",
                            ggml__pre="gpt-2", ggml__tokens=tokens, ggml__merges=["1 2"]))
    assert model.tokenizer("a").input_ids == [tokens.index("a")]


@pytest.mark.parametrize(("metadata", "words"), [
    ({"ggml__model": "gpt2"}, ["tokenizer.ggml.pre is None", "gpt-2"]),
    ({"ggml__model": "gpt2", "ggml__pre": "new-thing"}, ["'new-thing'"]),
    ({"ggml__model": "bert"}, ["'bert'"]), ({}, ["tokenizer.ggml.model is None"]),
    ({"ggml__model": "gpt2", "ggml__pre": "gpt-2"}, ["holds no tokenizer.ggml.tokens"]),
    ({"ggml__model": "gpt2", "ggml__pre": "gpt-2", "ggml__tokens": ["a"], "ggml__merges": ["a b"]},
     ["the metadata makes no tokenizer"]),
    ({"ggml__model": "llama", "ggml__tokens": ["a"]}, ["tokenizer.ggml.scores"]),
    ({"ggml__model": "llama", "ggml__tokens": ["a"], "ggml__scores": [0.0], "ggml__token_type": [1, 1]},
     ["tokenizer.ggml.token_type"]),
    ({"ggml__model": "llama", "ggml__tokens": ["a"], "ggml__scores": [0.0], "ggml__bos_token_id": 7},
     ["tokenizer.ggml.bos_token_id is 7"]),
    ({"ggml__model": "gpt2", "ggml__pre": "gpt-2", "ggml__merges": ["1 2"],
      "ggml__tokens": [*byte_alphabet(), "12"]}, ["wrong tokenizer", "257", "96"]),
])
def test_tokenizers_that_are_refused(metadata, words, build, tmp_path):
    model = open_model(save(build("llama"), tmp_path / "m.gguf", **metadata))
    with pytest.raises(ModelError) as caught:
        _ = model.tokenizer
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
