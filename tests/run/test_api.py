"""``rarefy.compress`` and ``rarefy.load`` as a program uses them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import rarefy
from rarefy.core.errors import ModelError


def test_module_in_memory_goes_in_and_a_network_comes_out(
        tiny_gemma3: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    module = AutoModelForCausalLM.from_pretrained(tiny_gemma3, dtype=torch.float32)
    result = rarefy.compress(module, to="60%", out=tmp_path / "out", tokenizer=tiny_tokenizer,
                             effort="quick", data=("python-docs",))
    with pytest.warns(UserWarning, match="already quantized"):
        network = rarefy.load(result.exported)
    tokens = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        p, q = (net(tokens).logits.log_softmax(-1) for net in (module, network))
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 0.2


def test_not_a_model() -> None:
    with pytest.raises(ModelError, match="int: not a model; pass a name, a folder or a torch module"):
        rarefy.compress(3, to="50%")
