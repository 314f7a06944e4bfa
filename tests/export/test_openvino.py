"""OpenVINO: the same codes in its own files, fused by its plugin, verified in a fresh process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript")
openvino = pytest.importorskip("openvino")

from rarefy.core.errors import TargetError  # noqa: E402
from rarefy.export import openvino as exporter  # noqa: E402
from rarefy.export.onnx import GRIDS, OnnxSettings  # noqa: E402
from rarefy.export.openvino import export_openvino  # noqa: E402
from rarefy.export.program import Program, trace  # noqa: E402
from rarefy.numerics.grids import integer_grid  # noqa: E402
from rarefy.runtimes.verify import verify  # noqa: E402
from small_networks import bert, images, residual, rounded_trees, tokens  # noqa: E402


@pytest.fixture(scope="module")
def encoder() -> tuple[nn.Module, Program]:
    network = bert()
    return network, trace(network, tokens(2, 9), (0, 1))


@pytest.mark.parametrize("format", ["int8", "int4", "int4z", "int2"])
def test_codes_are_multiplied_as_they_are(encoder, tmp_path: Path, format: str) -> None:
    network, program = encoder
    done = export_openvino(network, rounded_trees(network, GRIDS[format]), tmp_path / "m.xml",
                           inputs=tokens(2, 9), program=program)
    assert verify(done, [tokens(3, 17), tokens(1, 5, 2)], engine="openvino").error < 1e-4
    compiled = openvino.Core().compile_model(done.path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    layers = [node for node in compiled.get_runtime_model().get_ops()
              if node.get_rt_info()["layerType"].astype(str) == "FullyConnected"]
    kinds = {node.input(1).get_element_type().get_type_name() for node in layers}
    assert len(layers) == 12 and kinds == {{"int8": "i8", "int4": "i4", "int4z": "u4", "int2": "u4"}[format]}


def test_scales_keep_their_sixteen_bits(tmp_path: Path) -> None:
    """Those of 16 bits lie in the file as such, those of 32 bits stay, and neither answers otherwise."""
    network = nn.Sequential(nn.Linear(64, 640), nn.ReLU(), nn.Linear(640, 8)).eval().requires_grad_(False)
    sizes = []
    for dtype in (torch.float32, torch.float16):
        trees = rounded_trees(network, integer_grid(4, 32, dtype=dtype))
        done = export_openvino(network, trees, tmp_path / f"{dtype}.xml", inputs={"0": torch.ones(2, 64)})
        assert verify(done, [{"0": torch.randn(5, 64)}], engine="openvino").error < 1e-5
        sizes.append(done.path.with_suffix(".bin").stat().st_size)
    assert sizes[0] - sizes[1] == 2 * 640 * 64 // 32  # the second layer's are too few to be worth an operator


def test_static_cnn(tmp_path: Path) -> None:
    network = residual()
    done = export_openvino(network, rounded_trees(network, GRIDS["int8"]), tmp_path / "m.xml",
                           inputs=images(2), settings=OnnxSettings("static"), calibration=[images(16, 1)])
    assert verify(done, [images(5, 2)], engine="openvino").error < 0.03


def test_damage_is_caught(encoder, tmp_path: Path) -> None:
    network, program = encoder
    done = export_openvino(network, rounded_trees(network, GRIDS["int8"]), tmp_path / "m.xml",
                           inputs=tokens(2, 9), program=program)
    path = tmp_path / "m.bin"
    data, codes = bytearray(path.read_bytes()), done.trees["encoder.layer.0.output.dense.weight"].codes
    held = (codes.numpy() ^ 128).tobytes()
    place = data.index(held)
    data[place:place + len(held)] = np.roll((codes.numpy() ^ 128), 1, axis=0).tobytes()
    path.write_bytes(data)
    with pytest.raises(TargetError, match="answers otherwise"):
        verify(done, [tokens(3, 17)], engine="openvino")


def test_unfolded_codes_are_noticed(encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, program = encoder
    float_model = export_openvino(network, {}, tmp_path / "float.xml", inputs=tokens(2, 9), program=program)
    unfolded = openvino.Core().read_model(float_model.path)
    monkeypatch.setattr(openvino, "convert_model", lambda path: unfolded)
    with pytest.raises(TargetError, match="conversion changed 15 of 15 weights"):
        export_openvino(network, rounded_trees(network, GRIDS["int8"]), tmp_path / "m.xml",
                        inputs=tokens(2, 9), program=program)


def test_what_is_refused(encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, program = encoder
    with pytest.raises(TargetError, match="choose compute='static'"):
        export_openvino(network, {}, tmp_path / "m.xml", inputs=tokens(2, 9), program=program,
                        settings=OnnxSettings("dynamic"))
    with pytest.raises(TargetError, match=r"is named \.xml"):
        export_openvino(network, {}, tmp_path / "m.onnx", inputs=tokens(2, 9), program=program)
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(TargetError, match=r"pip install 'rarefy\[openvino\]'"):
        exporter.openvino_package()
