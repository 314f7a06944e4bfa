"""``rarefy exits`` on an image network: places by themselves or told, learnt along, in a graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

import rarefy
from tiny_networks import Digits

SETTINGS = {"num_channels": 1, "num_labels": 10, "embedding_size": 8, "hidden_sizes": [8, 16],
            "depths": [1, 2], "layer_type": "basic"}


@pytest.fixture(scope="module")
def resnet(tiny_cnn: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers with a ResNet that has seen some digits, beside train.npz and test.npz."""
    folder = tmp_path_factory.mktemp("resnet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model("resnet", **SETTINGS)
        module = AutoModelForImageClassification.from_config(config).train()
    images, labels = tiny_cnn.train
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
    for start in range(0, 8 * len(images), 64):
        rows = torch.arange(start, start + 64) % len(images)
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(images[rows]).logits, labels[rows]).backward()
        optimizer.step()
    module.eval().save_pretrained(folder)
    for name, (x, y) in (("train", tiny_cnn.train), ("test", tiny_cnn.test)):
        np.savez(folder / f"{name}.npz", images=x.numpy(), labels=y.numpy())
    return folder


def asked(folder: Path, out: Path, *options: str) -> list[str]:
    return ["exits", str(folder), "--data", str(folder / "train.npz"), "--eval-data",
            str(folder / "test.npz"), "--max-loss", "10%", "--effort", "quick", "-o", str(out), *options]


def test_exits_say_behind_which_modules_they_stand(cli: Any, resnet: Path, tmp_path: Path) -> None:
    done = cli(*asked(resnet, tmp_path / "out"))
    assert done.exit_code == 0, done.stderr
    assert "block 1: resnet.embedder" in done.stdout and "of the work" in done.stdout
    found = json.loads((tmp_path / "out" / "receipt.json").read_text())["exits"]
    assert found["behind"]["1"] == "resnet.embedder" and found["mean_work"] < 0.95 and found["same"] > 0.8
    early = rarefy.load(tmp_path / "out")
    answer = early(pixel_values=torch.from_numpy(np.load(resnet / "test.npz")["images"]))
    blocks = {str(block): int((answer.blocks == int(block)).sum()) for block in found["left"]}
    assert blocks == found["left"]


def test_the_network_learns_along_and_goes_into_a_graph(cli: Any, resnet: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    done = cli(*asked(resnet, tmp_path / "out", "--after", "0,1", "--together", "--epochs", "2"))
    assert done.exit_code == 0, done.stderr
    done = cli("export", str(tmp_path / "out"), "--for", "onnxruntime", "-o", str(tmp_path / "graph"))
    assert done.exit_code == 0, done.stderr
    images = np.load(resnet / "test.npz")["images"]
    session = onnxruntime.InferenceSession(tmp_path / "graph" / "model.onnx")
    logits, blocks = session.run(["logits", "blocks"], {"pixel_values": images})
    early = rarefy.load(tmp_path / "out")
    answer = early(pixel_values=torch.from_numpy(images))
    same = blocks == answer.blocks.numpy()
    assert same.mean() > 0.98 and len(set(blocks.tolist())) > 1
    np.testing.assert_allclose(logits[same], answer.logits.numpy()[same], rtol=1e-3, atol=1e-3)


def test_places_that_are_none_are_told(cli: Any, resnet: Path, tmp_path: Path) -> None:
    done = cli(*asked(resnet, tmp_path / "out", "--after", "1,9"))
    assert done.exit_code == 5 and "from 0 to" in done.stderr and "(0 resnet.embedder, 1 " in done.stderr
    assert not (tmp_path / "out").exists()
