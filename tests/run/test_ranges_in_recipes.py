"""Recipes that round activations in training: their ranges stand in the files, or a line says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from rarefy.core.errors import ModelError
from rarefy.core.nouns import Recipe, Step
from rarefy.export.networks import export_network, load, opened
from rarefy.export.onnx import GRIDS
from rarefy.models.network import Network
from rarefy.models.opening import open_any
from rarefy.numerics.ranges import Range
from rarefy.run.job import Job, Result, compress
from rarefy.run.progress import Silent
from rarefy.run.resolve import subject_of
from small_networks import rounded
from tiny_networks import Digits, TinyCNN

FEW: dict[str, Any] = {"steps": 40, "batch": 64, "rate": 1e-3, "precision": "float32"}


@pytest.fixture
def images(tiny_cnn: Digits, tmp_path: Path) -> Path:
    place = tmp_path / "train.npz"
    np.savez(place, x=tiny_cnn.train[0].numpy(), y=tiny_cnn.train[1].numpy())
    return place


def rounding(bits: int) -> Step:
    return Step("qat", format="int8", training={**FEW, "objectives": ["soft_labels", "hard_labels"],
                                                "activations": {"bits": bits, "memory": 0.9}})


def done(tiny_cnn: Digits, images: Path, out: Path, *steps: Step, target: str) -> Result:
    unseen = tuple(values[:200] for values in tiny_cnn.test)
    recipe = Recipe("cnn", steps, target, "quick", data=(str(images),))
    return compress(Job(Network.from_module(tiny_cnn.module), out, target=target, effort="quick",
                        data=(str(images),), eval_data=(unseen,), recipe=recipe), Silent())


def test_integers_alone(tiny_cnn: Digits, images: Path, tmp_path: Path) -> None:
    """Inputs of 4 bits: the file has 16 codes for each, and reads digits as the trained network does."""
    import onnx

    result = done(tiny_cnn, images, tmp_path / "out", rounding(4), target="integer")
    runtime = result.receipt["measured"]["runtime"]
    assert runtime["ranges"] == {"trained": 5, "calibrated": 0}
    assert runtime["activations"].startswith("integers of 8 bits, ranges of training in 5 places")
    assert runtime["bits_differing"] == 0 and runtime["task"]["accuracy"] > 0.93
    assert "ranges of training in 5 places" in (result.out / "report.html").read_text()
    graph = onnx.load(result.exported / "model.onnx").graph
    held = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    clips = [node for node in graph.node if node.op_type == "Clip" and len(node.input) == 3]
    assert [held[clip.input[2]].item() for clip in clips].count(15) == 5


def test_a_graph_for_onnxruntime(tiny_cnn: Digits, images: Path, tmp_path: Path) -> None:
    result = done(tiny_cnn, images, tmp_path / "out", rounding(5), target="onnxruntime")
    runtime = result.receipt["measured"]["runtime"]
    assert runtime["ranges"] == {"trained": 5, "calibrated": 0}
    assert runtime["activations"].startswith("8 bits, ranges of training in 5 places")
    assert runtime["task"]["accuracy"] > 0.93 and not result.receipt["warnings"]


@pytest.mark.slow
def test_an_encoder_keeps_its_ranges_in_integers(tiny_encoder: Path, tmp_path: Path) -> None:
    """Those of its layers; what attention multiplies was not rounded in training."""
    data = {"data": (str(tiny_encoder / "train.tsv"),), "eval_data": (str(tiny_encoder / "dev.tsv"),)}
    recipe = Recipe(str(tiny_encoder), (rounding(8),), "integer", "quick", **data)
    result = compress(Job(str(tiny_encoder), tmp_path / "out", target="integer", effort="quick",
                          recipe=recipe, **data), Silent())
    runtime = result.receipt["measured"]["runtime"]
    # four values in each of two blocks, pooler and head; q, k, v in each block
    assert runtime["ranges"] == {"trained": 10, "calibrated": 6}
    assert abs(runtime["task"]["accuracy"] - runtime["task"]["accuracy_original"]) < 0.02


def test_a_native_folder_hands_them_on(tiny_cnn: Digits, images: Path, tmp_path: Path) -> None:
    """Trained into a folder, and from there into integers."""
    result = done(tiny_cnn, images, tmp_path / "out", rounding(4), target="torch")
    assert "not rounded in the 5 ranges" in result.receipt["measured"]["runtime"]["activations"]
    network = opened(result.exported, TinyCNN())
    assert isinstance(network, Network) and set(network.ranges) == {site.layer for site in network.map.sites}
    assert {span.bits for span in network.ranges.values()} == {4}
    again = compress(Job(network, tmp_path / "integers", to="100%", target="integer", effort="quick",
                         data=(str(images),), eval_data=(tuple(v[:200] for v in tiny_cnn.test),)), Silent())
    assert again.receipt["measured"]["runtime"]["ranges"] == {"trained": 5, "calibrated": 0}


def test_jobs_begin_with_a_native_folder(tiny_encoder: Path, tmp_path: Path) -> None:
    """With its ranges; where its weights are codes, only if asked."""
    network = open_any(tiny_encoder)
    assert isinstance(network, Network)
    site = next(site for site in network.map.sites if site.role == "up")
    trained = network.with_ranges({site.layer: Range(-1.0, 2.0, 4)})
    export_network(trained, {}, tmp_path / "plain")
    back = subject_of(tmp_path / "plain").opened
    assert isinstance(back, Network) and back.ranges == trained.ranges
    tree = rounded(network.weight(site.path), GRIDS["int8"])
    export_network(trained, {site.path: tree}, tmp_path / "codes")
    with pytest.raises(ModelError, match=r"already compressed \(1 weights, .*intermediate"):
        subject_of(tmp_path / "codes")
    assert subject_of(tmp_path / "codes", dequantize=True).opened.ranges == trained.ranges
    with pytest.warns(UserWarning, match="inputs of 1 layers in ranges that PyTorch does not use"):
        load(tmp_path / "plain")


@pytest.mark.filterwarnings("default")
def test_what_holds_no_longer_is_said(tiny_cnn: Digits, images: Path, tmp_path: Path) -> None:
    result = done(tiny_cnn, images, tmp_path / "out", rounding(8),
                  Step("tune", training={**FEW, "steps": 2, "moves": ["biases"],
                                         "objectives": ["soft_labels"]}), target="integer")
    warning, = result.receipt["warnings"]
    assert warning.startswith("tune: changes what layers read, so the ranges of 5 inputs that training found")
    assert result.receipt["measured"]["runtime"]["ranges"] == {"trained": 0, "calibrated": 5}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_what_a_graph_multiplies_in_floats_is_said(tiny_cnn: Digits, images: Path, tmp_path: Path) -> None:
    """A weight of 4 bits is smaller there than it is fast."""
    result = done(tiny_cnn, images, tmp_path / "out", rounding(8),
                  Step("rtn", ("fc.*",), format="int4-g32"), target="onnxruntime")
    warning, = result.receipt["warnings"]
    assert warning.startswith("onnxruntime: 1 of 5 inputs that training rounded are floats here, fc first")
    assert result.receipt["measured"]["runtime"]["ranges"]["trained"] == 4
