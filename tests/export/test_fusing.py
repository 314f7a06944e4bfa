"""Operators that are kept apart compute what they did before."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from rarefy.export.fusing import keep_apart  # noqa: E402
from rarefy.formats.onnx import OPSET, Graph  # noqa: E402

WIDTH = 8


def draw(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def built() -> Graph:
    """Gelu(x + b) + x."""
    graph = Graph()
    hidden = graph.add("Gelu", graph.add("Add", "x", graph.constant("b", draw(WIDTH))))
    graph.add("Add", hidden, "x", name="out")
    return graph


def session(graph: Graph, optimized: str = "") -> onnxruntime.InferenceSession:
    declared = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 3, WIDTH])
                for name in ("x", "out")]
    made = onnx.helper.make_graph(graph.nodes, "g", declared[:1], declared[1:],
                                  list(graph.constants.values()))
    model = onnx.helper.make_model(made, ir_version=10, opset_imports=[
        onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("com.microsoft", 1)])
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = optimized
    options.log_severity_level = 3  # it warns that what it writes is for this machine
    return onnxruntime.InferenceSession(model.SerializeToString(), options,
                                        providers=["CPUExecutionProvider"])


def test_the_optimizer_leaves_it_apart(tmp_path: object) -> None:
    plain, apart = built(), built()
    keep_apart(apart, {})
    kinds = {}
    for name, graph in (("plain", plain), ("apart", apart)):
        session(graph, f"{tmp_path}/{name}.onnx")
        kinds[name] = {node.op_type for node in onnx.load(f"{tmp_path}/{name}.onnx").graph.node}
    assert "Gelu" in kinds["apart"]
    assert "Gelu" not in kinds["plain"], "the optimizer no longer does it: the rewriting can go"


def test_computes_the_same() -> None:
    plain, apart = built(), built()
    keep_apart(apart, {})
    x = {"x": draw(2, 3, WIDTH)}
    assert np.allclose(session(apart).run(None, x)[0], session(plain).run(None, x)[0], atol=1e-6)
