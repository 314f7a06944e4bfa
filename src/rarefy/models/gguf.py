"""A GGUF file as a model of transformers: its configuration, from the metadata.

GGUF keys say what llama.cpp computes, and only that is believed: what llama.cpp knows by heart (the
pattern of Gemma's sliding windows, SmolLM3's layers without rotation) is known by heart here, and what
has no exact counterpart in transformers is refused rather than approximated. Sources: llama.cpp's model
loaders and its conversion script, read for facts.
"""

from __future__ import annotations

from math import pi
from typing import Any, NoReturn

import torch

from rarefy.core.errors import ModelError
from rarefy.formats.gguf import GgufFile
from rarefy.models.families import Family
from rarefy.models.sources import ROPE_TENSORS, in_one_line

FLOAT_TYPES = ("F32", "F16", "BF16", "F64")


class _Keys:
    """Typed access to the metadata of one architecture; what is wrong or missing is named."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file, self.prefix = file, architecture + "."

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
            self.fail(key, value, "one positive integer")
        return int(value)

    def widths(self, key: str, blocks: int) -> list[int]:
        """A positive integer for every block."""
        value = self._get(key, None)
        if not isinstance(value, list):
            return [self.integer(key)] * blocks
        if len(value) != blocks or not all(isinstance(each, int) and 0 < each < 1 << 31 for each in value):
            self.fail(key, value, f"{blocks} positive integers")
        return [int(each) for each in value]

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
            self.fail(key, value, "one number")
        return float(value)

    def optional(self, key: str) -> Any:
        """The value as it is, or None."""
        return self.file.metadata.get(self.prefix + key)

    def _get(self, key: str, default: int | float | None) -> Any:
        value = self.optional(key)
        if value is None and default is None:
            raise ModelError(f"{self.file.path.name}: metadata key {self.prefix + key} is missing; "
                             "convert the model again with a current llama.cpp")
        return default if value is None else value

    def fail(self, key: str, value: Any, expected: str) -> NoReturn:
        """Say what a key holds and what it should."""
        shown = f"a list of {len(value)}" if isinstance(value, list) else repr(value)
        raise ModelError(f"{self.file.path.name}: metadata key {self.prefix + key} is {shown}; "
                         f"supported is {expected}")


def gguf_config(file: GgufFile, family: Family) -> Any:
    """The transformers configuration that describes the network in ``file``."""
    from transformers import AutoConfig

    keys = _Keys(file, family.gguf)
    blocks = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    if keys.integer("block_count") != len(blocks):
        raise ModelError(f"{file.path.name}: metadata promises {keys.integer('block_count')} blocks, the "
                         f"file holds {len(blocks)}; it is incomplete")
    fields = _gpt2(keys) if family.name == "gpt2" else _rotary(keys, family)
    for field, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        fields[field] = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    try:
        return AutoConfig.for_model((family.model_types or ("llama",))[0], **fields)
    except Exception as error:  # noqa: BLE001  transformers raises whatever its field validators raise
        raise ModelError(f"{file.path.name}: the metadata is no valid configuration ({in_one_line(error)}); "
                         "convert the model again with a current llama.cpp") from None


def _sizes(keys: _Keys) -> dict[str, Any]:
    """What every architecture states."""
    embedding = keys.file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{keys.file.path.name}: holds no token_embd.weight, so it is not a language model; "
                         "pass the file with the model's weights")
    return {"vocab_size": embedding.shape[0], "tie_word_embeddings": _tied(keys.file),
            "hidden_size": keys.integer("embedding_length"), "num_hidden_layers": keys.integer("block_count"),
            "num_attention_heads": keys.integer("attention.head_count")}


def _tied(file: GgufFile) -> bool:
    """No head, or one that is the embedding byte for byte."""
    head, embedding = file.tensors.get("output.weight"), file.tensors["token_embd.weight"]
    if head is None:
        return True
    same = head.type == embedding.type and head.shape == embedding.shape
    step = max(1, (1 << 24) // head.data.shape[1])
    return same and all(bool((head.data[i:i + step] == embedding.data[i:i + step]).all())
                        for i in range(0, len(head.data), step))


def _gpt2(keys: _Keys) -> dict[str, Any]:
    return _sizes(keys) | {
        "max_position_embeddings": keys.integer("context_length"),
        "n_inner": keys.integer("feed_forward_length"),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon")}


def _rotary(keys: _Keys, family: Family) -> dict[str, Any]:
    """The families with rotary positions and RMS norms."""
    fields = _sizes(keys)
    heads = fields["num_attention_heads"]
    width = keys.integer("attention.key_length", fields["hidden_size"] // heads)
    if keys.integer("attention.value_length", width) != width:
        keys.fail("attention.value_length", keys.optional("attention.value_length"), f"{width}, as for keys")
    blocks = fields["num_hidden_layers"]
    widths = (keys.widths("feed_forward_length", blocks) if family.name == "deci"
              else [keys.integer("feed_forward_length")] * blocks)
    fields |= {
        "head_dim": width, "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "intermediate_size": max(widths),
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(keys, width, partly=family.name == "phi3")}
    if len(set(widths)) > 1:
        fields["block_neurons"] = widths
    match family.name:
        case "llama" | "deci":
            fields |= {"attention_bias": "blk.0.attn_q.bias" in keys.file.tensors,
                       "mlp_bias": "blk.0.ffn_gate.bias" in keys.file.tensors}
        case "qwen3" | "smollm3":
            fields["attention_bias"] = "blk.0.attn_q.bias" in keys.file.tensors
        case "phi3":
            # llama.cpp ignores the window of Phi-3 files, so they mean full attention
            fields |= {"sliding_window": None, **_longrope(keys, fields)}
        case "gemma2" | "gemma3":
            fields |= _gemma(keys, fields, family)
    if family.name in ("qwen2", "phi3") and width * heads == fields["hidden_size"]:
        del fields["head_dim"]  # as their configurations usually leave it out
    return fields


def _rope(keys: _Keys, width: int, partly: bool) -> dict[str, Any]:
    """Rotary frequencies: plain, linearly scaled, or Llama 3's, which the file gives as a tensor."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", 10000.0)}
    turned = keys.integer("rope.dimension_count", width)
    if turned != width:
        if not partly:
            keys.fail("rope.dimension_count", turned, f"{width}, the width of a head")
        rope["partial_rotary_factor"] = turned / width
    kind = keys.optional("rope.scaling.type")
    factors = keys.file.tensors.get("rope_freqs.weight")
    if factors is not None:
        return rope | _llama3(keys, factors.node().dense().view(-1), rope["rope_theta"])
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
    if kind not in (None, "none", "longrope"):
        keys.fail("rope.scaling.type", kind, "none, linear or longrope; start from the Hugging Face folder")
    return rope


def _llama3(keys: _Keys, found: torch.Tensor, theta: float) -> dict[str, Any]:
    """Llama 3's frequency scaling, recognised by the tensor of divisors that the file holds.

    With wavelength l of a frequency: 1 below 8192/4, ``factor`` above 8192, and between them
    1 / ((1 - s)/factor + s) with s = (8192/l - 1)/3.
    """
    factor, context = round(float(found.max()), 4), 8192
    steps = torch.arange(len(found), dtype=torch.float32) / len(found)
    turns = context / (2 * pi * theta ** steps)
    smooth = ((turns - 1) / 3).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not torch.allclose(found, expected, rtol=1e-4):
        raise ModelError(f"{keys.file.path.name}: rope_freqs.weight is not Llama 3's scaling of a context of "
                         "8192; start from the Hugging Face folder")
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": context}


def _longrope(keys: _Keys, fields: dict[str, Any]) -> dict[str, Any]:
    """Phi-3's two sets of divisors, for contexts up to the original length and beyond it."""
    long, short = (keys.file.tensors.get(f"rope_factors_{which}.weight") for which in ("long", "short"))
    original = keys.integer("rope.scaling.original_context_length", fields["max_position_embeddings"])
    if long is None or short is None:
        return {"original_max_position_embeddings": original}
    rope = fields["rope_parameters"] | {
        "rope_type": "longrope", "long_factor": long.node().dense().view(-1).tolist(),
        "short_factor": short.node().dense().view(-1).tolist(),
        "original_max_position_embeddings": original,
        "attention_factor": keys.number("rope.scaling.attn_factor", 1.0)}
    return {"original_max_position_embeddings": original, "rope_parameters": rope}


def _gemma(keys: _Keys, fields: dict[str, Any], family: Family) -> dict[str, Any]:
    """Gemma's sliding windows, soft caps and attention scale (27B scales by another width)."""
    every, largest = (2, 46) if family.name == "gemma2" else (6, 62)
    blocks, window = fields["num_hidden_layers"], keys.optional("attention.sliding_window")
    pattern = keys.optional("attention.sliding_window_pattern")
    if isinstance(pattern, list) and len(pattern) == blocks:
        sliding = [bool(flag) for flag in pattern]
    else:
        every = keys.integer("attention.sliding_window_pattern", every)
        sliding = [(index + 1) % every != 0 for index in range(blocks)]
    if family.name == "gemma3" and not window:
        sliding = [False] * blocks
    share = fields["hidden_size"] // fields["num_attention_heads"]
    found = {"layer_types": ["sliding_attention" if flag else "full_attention" for flag in sliding],
             "sliding_window": keys.integer("attention.sliding_window", 4096),
             "query_pre_attn_scalar": share if blocks == largest else fields["head_dim"]}
    if family.name == "gemma2":
        return found | {"attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
                        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0)}
    found["final_logit_softcapping"] = keys.number("final_logit_softcapping", 0.0) or None
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    both = {"full_attention": fields["rope_parameters"], "sliding_attention": local}
    return found | {"rope_parameters": both}


def quantized_tensors(file: GgufFile) -> str:
    """What the quantized tensors of ``file`` are, in words; empty when all are floats."""
    counts: dict[str, int] = {}
    for name, tensor in file.tensors.items():
        if tensor.type not in FLOAT_TYPES and name not in ROPE_TENSORS:
            counts[tensor.type] = counts.get(tensor.type, 0) + 1
    return ", ".join(f"{count} tensors in {kind}" for kind, count in sorted(counts.items()))
