"""Operators put together and kept apart compute what they did before."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from rarefy.export.fusing import fuse  # noqa: E402
from rarefy.formats.onnx import OPSET, Graph  # noqa: E402

WIDTH = 8


def draw(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def built() -> Graph:
    """Gelu(x + b), and LayerNorm((y + b) + x)."""
    graph = Graph()
    bias, gain, shift = (graph.constant(name, draw(WIDTH) + k) for k, name in enumerate("bgs"))
    hidden = graph.add("Gelu", graph.add("Add", "x", bias))
    total = graph.add("Add", graph.add("Add", "y", bias), "x")
    normed = graph.add("LayerNormalization", total, gain, shift, epsilon=1e-6)
    graph.add("Add", hidden, normed, name="out")
    return graph


def run(graph: Graph) -> NDArray[np.float32]:
    declared = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 3, WIDTH])
                for name in "xy"]
    made = onnx.helper.make_graph(
        graph.nodes, "g", declared, [onnx.helper.make_tensor_value_info("out", 1, None)],
        list(graph.constants.values()))
    model = onnx.helper.make_model(made, ir_version=10, opset_imports=[
        onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("com.microsoft", 1)])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(None, {"x": draw(2, 3, WIDTH), "y": draw(2, 3, WIDTH) + 1})[0]
    return found


def test_computes_the_same() -> None:
    plain, fused = built(), built()
    fuse(fused, {}, {"out"})
    kinds = [node.op_type for node in fused.nodes]
    assert "SkipLayerNormalization" in kinds and "LayerNormalization" not in kinds
    rows = [each for each in fused.constants.values() if each.name.endswith(".row")]
    assert [list(each.dims) for each in rows] == [[1, WIDTH]]
    assert np.allclose(run(fused), run(plain), atol=1e-5)


def test_what_others_read_stays() -> None:
    """The sum before the norm is asked for elsewhere: it must still be there."""
    graph = built()
    total = next(node for node in graph.nodes if node.op_type == "LayerNormalization").input[0]
    fuse(graph, {}, {"out", total})
    assert "LayerNormalization" in [node.op_type for node in graph.nodes]
