"""A transformers config as the metadata of a GGUF file, and what llama.cpp cannot be told.

llama.cpp knows each architecture's graph by its name; the file adds the sizes, the rotary frequencies
and the windows. What it hard-codes (activation, attention scale, which layers skip the rotary embedding)
is checked against the config here: a model that differs would load and answer wrongly.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import TargetError
from rarefy.formats.gguf import Entry, ValueType
from rarefy.models.attending import said
from rarefy.models.families import Family, block_widths, head_width

SWIGLU = frozenset({"silu", "swish"})
TANH_GELU = frozenset({"gelu_pytorch_tanh", "gelu_new", "gelu_fast"})
ACTIVATIONS = {"gemma2": TANH_GELU, "gemma3": TANH_GELU, "gpt2": TANH_GELU}
WINDOW_PERIODS = {"gemma2": 2, "gemma3": 6}  # every n-th layer looks at the whole context
SCALE_BY_WIDTH = {"gemma2": 46, "gemma3": 62}  # blocks of the size whose attention scale has its own rule
NO_ROPE_PERIOD = 4  # SmolLM3: every fourth layer has no rotary embedding


def architecture_metadata(family: Family, config: Any, rows: int) -> list[Entry]:
    """The keys under the architecture's own name, for an embedding of ``rows`` rows."""
    _check_graph(family, config)
    numbers = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": _inner(family, config),
        "attention.head_count": config.num_attention_heads, "vocab_size": rows,
    }
    if family.gguf != "gpt2":
        numbers |= {"attention.head_count_kv": config.num_key_value_heads,
                    "attention.key_length": head_width(config), "attention.value_length": head_width(config)}
    entries: list[Entry] = [(f"{family.gguf}.{key}", int(value), ValueType.UINT32)
                            for key, value in numbers.items()]
    if (widths := block_widths(config)) is not None:
        key = f"{family.gguf}.feed_forward_length"
        entries = [(key, widths, ValueType.ARRAY, ValueType.UINT32) if entry[0] == key else entry
                   for entry in entries]
    floats = {"attention.layer_norm_epsilon": config.layer_norm_epsilon} if family.gguf == "gpt2" else \
        {"attention.layer_norm_rms_epsilon": config.rms_norm_eps}
    if family.gguf == "gemma2":
        floats["attn_logit_softcapping"] = config.attn_logit_softcapping
    if family.gguf in WINDOW_PERIODS and config.final_logit_softcapping is not None:
        floats["final_logit_softcapping"] = config.final_logit_softcapping
    entries += [(f"{family.gguf}.{key}", float(value), ValueType.FLOAT32) for key, value in floats.items()]
    return entries + _rope(family, config) + _window(family, config)


def extra_tensors(family: Family, config: Any) -> dict[str, Tensor]:
    """Rotary frequencies that do not follow from a base: divisors, one per rotated pair."""
    rope = _rope_of(config)
    match rope.get("rope_type", "default"):
        case "llama3":
            return {"rope_freqs.weight": _plain_frequencies(config, rope) / _frequencies(config, "llama3")}
        case "longrope":
            return {"rope_factors_long.weight": torch.tensor(rope["long_factor"], dtype=torch.float32),
                    "rope_factors_short.weight": torch.tensor(rope["short_factor"], dtype=torch.float32)}
        case _:
            return {}


def _check_graph(family: Family, config: Any) -> None:
    """What llama.cpp's graph of this architecture takes for granted."""
    if said(config):
        raise _refusal(family, f"{said(config)} attention", "llama.cpp computes ordinary attention")
    used = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None) \
        or getattr(config, "activation_function", None)
    known = ACTIVATIONS.get(family.gguf, SWIGLU)
    if used not in known:
        raise _refusal(family, f"the activation {used!r}", f"llama.cpp computes {sorted(known)[0]!r}")
    if family.gguf in SCALE_BY_WIDTH:
        large = config.num_hidden_layers == SCALE_BY_WIDTH[family.gguf]
        width = config.hidden_size // config.num_attention_heads if large else head_width(config)
        if config.query_pre_attn_scalar != width:
            raise _refusal(family, f"query_pre_attn_scalar {config.query_pre_attn_scalar}",
                           f"llama.cpp takes {width}")
    if family.gguf == "gemma2" and not (config.attn_logit_softcapping and config.final_logit_softcapping):
        raise _refusal(family, "no soft cap on its logits", "llama.cpp always caps them")
    if family.gguf == "gpt2" and (config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights):
        raise _refusal(family, "its own attention scale", "llama.cpp has only the ordinary one")
    if family.gguf == "smollm3":
        expected = [int((layer + 1) % NO_ROPE_PERIOD != 0) for layer in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) != expected:
            raise _refusal(family, f"no_rope_layers {config.no_rope_layers}",
                           f"llama.cpp leaves it out in every {NO_ROPE_PERIOD}th layer")


def _refusal(family: Family, what: str, instead: str) -> TargetError:
    return TargetError(f"{family.name}: this model has {what}, and {instead} for {family.gguf}; "
                       "it cannot be exported as GGUF, choose the native format")


def _inner(family: Family, config: Any) -> int:
    if family.gguf == "gpt2":
        return int(config.n_inner or 4 * config.hidden_size)
    return int(config.intermediate_size)


def _rope_of(config: Any) -> Mapping[str, Any]:
    """The rotary parameters of the layers that see the whole context."""
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    whole: Mapping[str, Any] = rope.get("full_attention", rope)
    return whole


def _rope(family: Family, config: Any) -> list[Entry]:
    if family.gguf == "gpt2":
        return []
    rope = _rope_of(config)
    kind = rope.get("rope_type", "default")
    floats = {"rope.freq_base": rope["rope_theta"]}
    if family.gguf in ("llama", "deci", "phi3"):
        width = int(head_width(config) * rope.get("partial_rotary_factor", 1.0))
        integers = {"rope.dimension_count": width}
    else:
        integers = {}
    if family.gguf == "phi3":
        integers["rope.scaling.original_context_length"] = _original_context(config, rope)
    local = (config.rope_parameters or {}).get("sliding_attention")
    if family.gguf == "gemma3" and local is not None and local["rope_theta"] != 10000.0:
        floats["rope.freq_base_swa"] = local["rope_theta"]
    entries: list[Entry] = []
    match kind:
        case "default":
            pass
        case "linear" | "yarn":
            entries.append((f"{family.gguf}.rope.scaling.type", kind, ValueType.STRING))
            floats["rope.scaling.factor"] = rope["factor"]
            if kind == "yarn":
                integers["rope.scaling.original_context_length"] = _yarn_context(family, config, rope)
        case "llama3" if family.gguf in ("llama", "deci"):
            pass  # carried by the tensor rope_freqs
        case "longrope" if family.gguf == "phi3":
            entries.append((f"{family.gguf}.rope.scaling.type", kind, ValueType.STRING))
            floats["rope.scaling.attn_factor"] = _longrope_gain(config, rope)
        case _:
            raise _refusal(family, f"rotary embeddings of type {kind!r}", "llama.cpp has no such type")
    entries += [(f"{family.gguf}.{key}", int(value), ValueType.UINT32) for key, value in integers.items()]
    entries += [(f"{family.gguf}.{key}", float(value), ValueType.FLOAT32) for key, value in floats.items()]
    return entries


def _original_context(config: Any, rope: Mapping[str, Any]) -> int:
    return int(rope.get("original_max_position_embeddings")
               or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings)


def _yarn_context(family: Family, config: Any, rope: Mapping[str, Any]) -> int:
    """The trained context of YaRN; llama.cpp knows the paper's constants only (Peng et al. 2023)."""
    for key, usual in (("attention_factor", None), ("mscale", None), ("mscale_all_dim", None),
                       ("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
        if rope.get(key) not in (None, usual):
            raise _refusal(family, f"YaRN with {key} {rope[key]}", "only the paper's constants are written")
    return _original_context(config, rope)


def _longrope_gain(config: Any, rope: Mapping[str, Any]) -> float:
    """What LongRoPE multiplies queries and keys with (Ding et al. 2024, sec. 3.3)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    context = _original_context(config, rope)
    stretch = rope.get("factor") or config.max_position_embeddings / context
    return math.sqrt(1 + math.log(stretch) / math.log(context)) if stretch > 1 else 1.0


def _plain_frequencies(config: Any, rope: Mapping[str, Any]) -> Tensor:
    width = int(head_width(config) * rope.get("partial_rotary_factor", 1.0))
    return torch.pow(rope["rope_theta"], -torch.arange(0, width, 2, dtype=torch.float32) / width)


def _frequencies(config: Any, kind: str) -> Tensor:
    """transformers' own rotary frequencies of the scaled kinds."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies: Tensor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0]
    return frequencies


def _window(family: Family, config: Any) -> list[Entry]:
    """Sliding windows. Where llama.cpp has none for an architecture, a warning says when answers differ."""
    window = int(getattr(config, "sliding_window", None) or 0)
    kinds: list[str] | None = getattr(config, "layer_types", None)
    slides = [bool(window) if kinds is None else kind == "sliding_attention"
              for kind in kinds or [""] * config.num_hidden_layers]
    period = WINDOW_PERIODS.get(family.gguf)
    key = f"{family.gguf}.attention.sliding_window"
    if period is None:
        if any(slides) and window < config.max_position_embeddings:
            warnings.warn(f"{family.name}: the model looks back {window} tokens, llama.cpp at the whole "
                          f"context; answers differ in contexts longer than {window} tokens", stacklevel=2)
        return [(key, window, ValueType.UINT32)] if family.gguf == "phi3" else []
    if not any(slides) and family.gguf == "gemma3":
        return []
    entries: list[Entry] = [(key, window, ValueType.UINT32)]
    if slides != [(layer + 1) % period != 0 for layer in range(len(slides))]:
        entries.append((f"{key}_pattern", slides, ValueType.ARRAY, ValueType.BOOL))
    return entries
