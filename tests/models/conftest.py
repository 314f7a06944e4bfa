"""Tiny random networks of every family, built by transformers itself: the reference for every test here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

COMMON = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0,
          "bos_token_id": 1, "eos_token_id": 2}
LONG = {"rope_type": "longrope", "long_factor": [1.0, 2.0, 3.0, 4.0], "short_factor": [1.0, 1.1, 1.2, 1.3],
        "rope_theta": 10000.0, "original_max_position_embeddings": 8}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "llama3": {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
               "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
                                   "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                   "original_max_position_embeddings": 8192}},
    "mistral": {"model_type": "mistral", "sliding_window": 4, "head_dim": 16},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16,
               "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16,
               "num_hidden_layers": 7},
    "phi3": {"model_type": "phi3", "tie_word_embeddings": False, "sliding_window": None},
    "phi3long": {"model_type": "phi3", "rope_parameters": LONG, "original_max_position_embeddings": 8},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2"},
}


def config_of(case: str, **changes: Any) -> Any:
    """The configuration of a case, with changes."""
    from transformers import AutoConfig

    fields = {**COMMON, **CASES[case], **changes}
    if fields["model_type"] == "gpt2":
        for rotary in ("intermediate_size", "num_key_value_heads"):
            del fields[rotary]
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def network_of(case: str, seed: int = 0, **changes: Any) -> Any:
    """A network with random weights, norms and biases included."""
    from transformers import AutoModelForCausalLM

    config = config_of(case, **changes)
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    network = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager" if capped else "sdpa").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in network.parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(noise * 0.3 if value.ndim > 1 else value + noise * 0.1)
    return network


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """``build(case, seed=0, **changes)``: a random network."""
    return network_of


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> str:
    """Every family, with the variants that are computed differently."""
    return str(request.param)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``folder(case, **save_arguments)``: a saved random network, a new folder each time."""

    def save(case: str = "llama", *, network: Any = None, **arguments: Any) -> Path:
        path: Path = tmp_path_factory.mktemp(case)
        (network_of(case) if network is None else network).save_pretrained(path, **arguments)
        return path

    return save


@pytest.fixture
def tokens() -> torch.Tensor:
    """Three sentences of 13 tokens."""
    return torch.randint(3, 96, (3, 13), generator=torch.Generator().manual_seed(5))
