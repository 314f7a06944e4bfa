"""Tiny random networks whose rows every block of 32 fits, with a tokenizer trained on the spot."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rarefy.core.nodes import Node, Quantized
from rarefy.formats.ggml import CODECS
from rarefy.models.model import Model
from rarefy.numerics.rounding import encode, fit

TEXT = "\n".join(pydoc_data.topics.topics.values())
SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
         "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 512,
            "factor": 2.0, "short_factor": [1.0 + k / 10 for k in range(8)],
            "long_factor": [2.0 + k / 3 for k in range(8)]}
WINDOW = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "rms_norm_eps": 1e-3}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "head_dim": 32, "tie_word_embeddings": False,
              "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    "llama-biased": {"model_type": "llama", "attention_bias": True, "tie_word_embeddings": True},
    "llama-3": {"model_type": "llama", "head_dim": 32, "rope_parameters": LLAMA3},
    "llama-linear": {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0,
                                                                "factor": 4.0}},
    "mistral": {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-yarn": {"model_type": "qwen2", "rope_parameters": YARN},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "gemma2": {"model_type": "gemma2", **WINDOW, "attn_logit_softcapping": 20.0,
               "final_logit_softcapping": 10.0},
    "gemma3": {"model_type": "gemma3_text", **WINDOW, "num_hidden_layers": 7},
    "gemma3-other-windows": {"model_type": "gemma3_text", **WINDOW,
                             "layer_types": ["full_attention", "sliding_attention"] * 2},
    "phi3": {"model_type": "phi3", "sliding_window": None},
    "phi3-long": {"model_type": "phi3", "original_max_position_embeddings": 512,
                  "rope_parameters": LONGROPE},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2"},
}


def config_of(case: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    fields = {**SIZES, **CASES[case], **changes}
    if fields["model_type"] == "gpt2":
        for other in ("intermediate_size", "num_key_value_heads"):
            del fields[other]
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def network_of(case: str, **changes: Any) -> Any:
    """Weights large enough for every part to matter, norms and biases random too."""
    from transformers import AutoModelForCausalLM

    config = config_of(case, **changes)
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    network = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager" if capped else "sdpa").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in network.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            gain = (0.32 if "embed" in name or "wte" in name else 0.16) * (64 / value.shape[-1]) ** 0.5
            value.copy_(noise * gain if value.ndim > 1 else value + noise * 0.3)
    return network


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def byte_level() -> Any:
    """A byte-level BPE tokenizer of 300 tokens that cuts words as GPT-2 does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator([TEXT[:100_000]], trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>",
                                   bos_token="<|endoftext|>")


Build = Callable[..., Model]


@pytest.fixture(scope="session")
def build(byte_level: Any) -> Build:
    """``build(case, **changes)``: a random model in memory."""
    return lambda case, **changes: Model.from_module(network_of(case, **changes), byte_level, name=case)


@pytest.fixture(scope="session")
def tokens(byte_level: Any) -> NDArray[np.int64]:
    """Two windows of text, longer than the sliding windows."""
    ids = byte_level(TEXT[1000:3000])["input_ids"]
    return np.array([ids[:40], ids[40:80]])


def log_probabilities(model: Model, trees: dict[str, Node], tokens: NDArray[np.int64],
                      **changes: Any) -> NDArray[np.float32]:
    """What transformers computes with the weights that ``trees`` stand for."""
    network = network_of(model.name, **changes)
    state = {}
    for site in model.map.sites:
        values = trees[site.path].dense() if site.path in trees else model.weight(site.path)
        state[site.path] = values.T if site.transposed else values
    network.load_state_dict(state, strict=False)
    with torch.no_grad():
        logits = network(torch.from_numpy(tokens)).logits.float()
    return torch.log_softmax(logits, -1).numpy()


@pytest.fixture(scope="session")
def reference() -> Callable[..., NDArray[np.float32]]:
    """``reference(model, trees, tokens)``: transformers' log-probabilities."""
    return log_probabilities


@pytest.fixture(scope="session")
def rounded() -> Callable[[Model, str], dict[str, Node]]:
    """``rounded(model, format)``: every site of the model, rounded to a format."""

    def round_all(model: Model, name: str) -> dict[str, Node]:
        grid = CODECS[name].grid
        assert grid is not None
        trees: dict[str, Node] = {}
        for site in model.map.sites:
            weight = model.weight(site.path).contiguous()
            found = fit(weight, torch.ones(site.shape[1]), grid)
            trees[site.path] = Quantized.of(encode(weight, found), found)
        return trees

    return round_all
