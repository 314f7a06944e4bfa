"""Files reloaded in a fresh process: intact ones agree, damaged ones are refused, and it is said why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from rarefy.core.errors import TargetError  # noqa: E402
from rarefy.export.onnx import GRIDS, Exported, OnnxSettings, export_onnx  # noqa: E402
from rarefy.runtimes.session import Latency, Session  # noqa: E402
from rarefy.runtimes.verify import verify  # noqa: E402
from small_networks import bert, rounded_trees, tokens  # noqa: E402

BATCHES = [tokens(3, 17, 1), tokens(1, 6, 2)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Exported:
    network = bert()
    path = tmp_path_factory.mktemp("v") / "m.onnx"
    return export_onnx(network, rounded_trees(network, GRIDS["int4"]), path, inputs=tokens(2, 9),
                       dynamic=(0, 1))


def test_an_intact_file_agrees(exported: Exported) -> None:
    found = verify(exported, BATCHES, module=bert())
    assert found.samples == 4 and found.error < 1e-5 and found.cosine > 0.9999
    assert found.runtime.startswith("onnxruntime 1")


def damaged(exported: Exported, tmp_path: Path, damage) -> Exported:
    proto = onnx.load(exported.path)
    damage(proto.graph)
    path = tmp_path / "damaged.onnx"
    onnx.save(proto, path)
    return replace(exported, path=path)


def _values(graph, name: str):
    return next(each for each in graph.initializer if each.name == name)


def flip_a_scale(graph) -> None:
    found = _values(graph, "encoder.layer.1.intermediate.dense.weight.scale")
    values = onnx.numpy_helper.to_array(found).copy()
    values[3] *= -1
    found.CopyFrom(onnx.numpy_helper.from_array(values, found.name))


def drop_a_layer(graph) -> None:
    """The second layer's attention is skipped: its result is what came in."""
    node = next(node for node in graph.node if "encoder.layer.1.output.dense.weight.codes" in node.input)
    scale = onnx.numpy_helper.to_array(_values(graph, node.input[2]))
    zero = onnx.numpy_helper.from_array(np.zeros_like(scale), node.input[2])
    _values(graph, node.input[2]).CopyFrom(zero)


def swap_rows(graph) -> None:
    for part in ("codes", "scale"):
        found = _values(graph, f"encoder.layer.0.attention.self.value.weight.{part}")
        values = onnx.numpy_helper.to_array(found).copy()
        values[[0, 9]] = values[[9, 0]]
        found.CopyFrom(onnx.numpy_helper.from_array(values, found.name))


@pytest.mark.parametrize("damage", [flip_a_scale, drop_a_layer, swap_rows])
def test_damage_is_caught(exported: Exported, tmp_path: Path, damage) -> None:
    with pytest.raises(TargetError, match="answers otherwise than its own weights say"):
        verify(damaged(exported, tmp_path, damage), BATCHES[:1])


@pytest.mark.parametrize("compute", ["dynamic", "static"])
def test_damage_is_caught_where_activations_are_rounded(tmp_path: Path, compute: str) -> None:
    network = bert()
    done = export_onnx(network, rounded_trees(network, GRIDS["int8"]), tmp_path / "m.onnx",
                       inputs=tokens(2, 9), dynamic=(0, 1), settings=OnnxSettings(compute),
                       calibration=[tokens(8, 20, 4)])
    assert verify(done, BATCHES).error < 0.02

    def flip(graph) -> None:
        found = _values(graph, "encoder.layer.1.intermediate.dense.weight.scale")
        values = onnx.numpy_helper.to_array(found).copy()
        values[:8] *= -1
        found.CopyFrom(onnx.numpy_helper.from_array(values, found.name))

    with pytest.raises(TargetError, match="not to be used"):
        verify(damaged(done, tmp_path, flip), BATCHES[:1])


def test_a_session(exported: Exported, tmp_path: Path) -> None:
    with Session(exported.path, "onnxruntime", threads=1) as session:
        assert session.inputs == ("input_ids", "attention_mask")
        assert set(session.run(BATCHES[0])) == {"last_hidden_state"}
        latency = Latency.of(session.latency(BATCHES[0], 5))
        assert 0 < latency.median <= latency.p95 and latency.calls == 5
        assert session.memory().peak > 20_000_000
        with pytest.raises(TargetError, match="onnxruntime refuses it"):
            session.run({"input_ids": torch.zeros(2, 3)})
        assert session.answer(BATCHES[1]).shape == (1, 6, 32)  # it lives on
    with pytest.raises(TargetError, match="session is closed"):
        session.run(BATCHES[0])
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"nothing")
    with pytest.raises(TargetError, match="refuses it"):
        Session(broken, "onnxruntime")
    with pytest.raises(TargetError, match="no such file"):
        Session(tmp_path / "none.onnx", "onnxruntime")


def test_a_missing_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"openvino is not installed; pip install 'rarefy\[openvino\]'"):
        Session(tmp_path / "m.onnx", "openvino")
