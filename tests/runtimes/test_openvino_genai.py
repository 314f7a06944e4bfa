"""Files for OpenVINO are what its own generator loads: same names, same states, same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("onnxscript")
openvino = pytest.importorskip("openvino")
genai = pytest.importorskip("openvino_genai")
tokenizers = pytest.importorskip("openvino_tokenizers")

from transformers import AutoTokenizer  # noqa: E402

from rarefy.export.decoder import export_decoder, trace_decoder  # noqa: E402
from rarefy.export.networks import live  # noqa: E402
from rarefy.export.onnx import GRIDS  # noqa: E402
from rarefy.models.model import open_model  # noqa: E402
from rarefy.runtimes.session import Session  # noqa: E402
from small_networks import rounded_trees  # noqa: E402


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gemma3"])
def test_it_writes_the_same_tokens(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(kind)
    network = live(open_model(folder)).eval().requires_grad_(False)
    trees = rounded_trees(network, GRIDS["int8"])
    export_decoder(trace_decoder(network), trees, tmp_path / "openvino_model.xml")
    made = tokenizers.convert_tokenizer(AutoTokenizer.from_pretrained(folder), with_detokenizer=True)
    for model, name in zip(made, ("tokenizer", "detokenizer"), strict=True):
        openvino.save_model(model, tmp_path / f"openvino_{name}.xml")
    prompt = torch.arange(20, 31)
    pipeline = genai.LLMPipeline(tmp_path, "CPU")
    settings = genai.GenerationConfig(max_new_tokens=12, ignore_eos=True, do_sample=False)
    found = pipeline.generate(openvino.Tensor(prompt[None].numpy()), settings).tokens[0]
    with Session(tmp_path / "openvino_model.xml", "openvino", exact=False) as session:
        assert list(found) == list(session.write(prompt, 12).tokens)
