"""Jobs for transformers: the checkpoint keeps the budget, and plain transformers answers as we do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("compressed_tensors")
pytest.importorskip("peft")

from rarefy.core.errors import TargetError
from rarefy.core.nouns import Recipe, Step
from rarefy.measure.resources import bytes_on_disk
from rarefy.models.network import Network
from rarefy.run import to_transformers
from rarefy.run.job import Job, compress
from rarefy.run.progress import Silent
from tiny_networks import Digits


def test_a_language_model(tiny_llama: Path, tmp_path: Path) -> None:
    done = compress(Job(str(tiny_llama), tmp_path / "out", to="45%", target="transformers", effort="quick"),
                    Silent())
    size, limit = bytes_on_disk(done.exported), done.receipt["budget"]["limit_bytes"]
    assert 0.9 * limit < size == done.receipt["bytes"] <= limit
    config = json.loads((done.exported / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    runtime = done.receipt["measured"]["runtime"]
    assert runtime["version"].startswith("transformers ")
    assert runtime["logit_error_vs_float"]["kl_mean"] < to_transformers.AGREEMENT
    assert "decoded from its codes" in done.receipt["lowered"].values()


def test_an_encoder_with_a_repair_and_pruned_weights(tiny_encoder: Path, tmp_path: Path) -> None:
    steps = (Step("rtn", ("*.intermediate.dense.weight",), format="int4-g32"),
             Step("repair", ("*.intermediate.dense.weight",), {"rank": 4}),
             Step("magnitude", ("*.attention.*",), {"sparsity": 0.3}))
    done = compress(Job(str(tiny_encoder), tmp_path / "out", target="transformers",
                        data=(str(tiny_encoder / "train.tsv"),), eval_data=(str(tiny_encoder / "dev.tsv"),),
                        recipe=Recipe(str(tiny_encoder), steps, "transformers", "quick")), Silent())
    assert (done.exported / "adapter" / "adapter_config.json").is_file()
    runtime = done.receipt["measured"]["runtime"]
    assert runtime["logit_error_vs_float"]["kl_mean"] < to_transformers.AGREEMENT
    ours = done.receipt["measured"]["float"]
    assert runtime["kl_mean"] == pytest.approx(ours["kl_mean"], rel=0.5, abs=1e-3)


def test_networks_of_ones_own_are_shown_the_way(tiny_cnn: Digits, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="pass --for torch, onnxruntime or openvino"):
        compress(Job(Network.from_module(tiny_cnn.module), tmp_path / "out", to="40%",
                     target="transformers"), Silent())
    assert not (tmp_path / "out").exists()
