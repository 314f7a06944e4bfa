"""Other graphs than BERT's: causal masks, transposed and tied matrices, grouped queries, a pooler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from rarefy.export.onnx import GRIDS, OnnxSettings, export_onnx
from rarefy.export.program import trace
from rarefy.runtimes.verify import verify
from small_networks import rounded_trees, tokens

ENDS = {"bos_token_id": 0, "eos_token_id": 1}
BERT = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 64}
NETWORKS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=2, n_head=4,
                                               use_cache=False, **ENDS)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64,
                                                  num_hidden_layers=2, num_attention_heads=4, use_cache=False,
                                                  num_key_value_heads=2, **ENDS)),
    "masked": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "classifier": lambda: BertForSequenceClassification(BertConfig(**BERT)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_verified_in_the_runtime(name: str, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = NETWORKS[name]().eval().requires_grad_(False)
    program = trace(network, tokens(2, 9), (0, 1))
    for format, compute in (("int4", "float"), ("int8", "static")):
        done = export_onnx(network, rounded_trees(network, GRIDS[format]), tmp_path / "m.onnx",
                           inputs=tokens(2, 9), program=program, settings=OnnxSettings(compute),
                           calibration=[tokens(8, 20, 1)])
        assert verify(done, [tokens(3, 17)], module=network).error < (1e-5 if compute == "float" else 0.01)
        assert (len(done.plan.operators) > 8) == (compute == "static")
