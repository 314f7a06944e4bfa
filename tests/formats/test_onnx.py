"""Each node as a piece of a graph, run by ONNX Runtime: what it computes, and that the codes are ours."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from rarefy.core.codebooks import Clustered, Hashed  # noqa: E402
from rarefy.core.edit import edit  # noqa: E402
from rarefy.core.nodes import Dense, Masked, Node, Product, Quantized, Shared, Sum  # noqa: E402
from rarefy.core.tensors import CP, Tucker  # noqa: E402
from rarefy.formats.ggml import CODECS  # noqa: E402
from rarefy.formats.integers import integers, unpacked  # noqa: E402
from rarefy.formats.onnx import (  # noqa: E402
    OPSET,
    Graph,
    Window,
    computable,
    convolution,
    embedding,
    linear,
    weight,
)
from rarefy.numerics.grids import Grid, Stored, integer_grid  # noqa: E402
from rarefy.numerics.ranges import Rows  # noqa: E402
from rarefy.techniques.quantize.rtn import RTN  # noqa: E402

OUT, IN = 10, 64


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def rounded(values: Tensor, grid: Grid) -> Node:
    return edit("w", Dense(values), values, RTN(grid), "rtn", None, torch.Generator())[0]


def index(values: int, *shape: int) -> Tensor:
    return torch.randint(0, values, shape, generator=torch.Generator().manual_seed(values))


W = draw(OUT, IN)
FLOAT_ZERO = Grid("float zero", tuple(map(float, range(16))), 32, Stored(torch.float32),
                  Stored(torch.float32))
NODES: dict[str, Node] = {
    "float32": Dense(W), "float16": Dense(W.half()), "bfloat16": Dense(W.bfloat16()),
    "float8": Dense(W.to(torch.float8_e4m3fn)),
    "int8": rounded(W, integer_grid(8, 0)), "int8 in groups": rounded(W, integer_grid(8, 32)),
    "int4": rounded(W, integer_grid(4, 32)),
    "int4 with zero": rounded(W, integer_grid(4, 32, symmetric=False)),
    "int4 by row": rounded(W, integer_grid(4, 0)), "int2": rounded(W, integer_grid(2, 16, symmetric=False)),
    "int4 in eights": rounded(W, integer_grid(4, 8)), "float zero": rounded(W, FLOAT_ZERO),
    "IQ4_NL": rounded(W, CODECS["IQ4_NL"].grid or integer_grid(4, 32)),
    "ternary": rounded(W, Grid("ternary", (-1.0, 0.0, 1.0), 0)),
    "masked codes": Masked(W.abs() > 0.5, rounded(W, integer_grid(4, 32))),
    "masked floats": Masked(W.abs() > 0.5, Dense(W)),
    "product": Product(Dense(draw(OUT, 3)), rounded(draw(3, IN), integer_grid(8, 0))),
    "full product": Product(Dense(draw(OUT, OUT)), Dense(draw(OUT, IN))),
    "sum": Sum((rounded(W, integer_grid(4, 32)), Product(Dense(draw(OUT, 2)), Dense(draw(2, IN))))),
    "clustered": Clustered(draw(1, 16, 1), index(16, OUT, IN).to(torch.uint8)),
    "vectors": Clustered(draw(1, 40, 2), index(40, OUT, IN // 2).to(torch.uint8)),
    "product quantized": Clustered(draw(IN // 4, 5, 4), index(5, OUT, IN // 4).to(torch.uint8)),
    "hashed": Hashed(draw(20), 7, (OUT, IN)),
    "shared": Shared("elsewhere", rounded(W, integer_grid(4, 32))),
}


def ran(graph: Graph, result: str, x: Tensor) -> Tensor:
    kind = onnx.TensorProto.INT64 if x.dtype == torch.int64 else onnx.TensorProto.FLOAT
    made = onnx.helper.make_graph(
        graph.nodes, "g", [onnx.helper.make_tensor_value_info("x", kind, [None] * x.ndim)],
        [onnx.helper.make_tensor_value_info(result, onnx.TensorProto.FLOAT, None)],
        list(graph.constants.values()))
    model = onnx.helper.make_model(made, ir_version=10, opset_imports=[
        onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("com.microsoft", 1)])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([result], {"x": x.numpy()})[0])


@pytest.mark.parametrize("name", NODES)
@pytest.mark.parametrize("contrib", [True, False], ids=["own operators", "standard"])
def test_a_linear_layer(name: str, contrib: bool) -> None:
    graph, x = Graph(contrib=contrib), draw(2, 3, IN)
    found = ran(graph, linear(graph, "x", NODES[name], "w"), x)
    assert torch.allclose(found, x @ NODES[name].dense().T, atol=2e-4)


@pytest.mark.parametrize("name", NODES)
def test_the_weight_itself(name: str) -> None:
    graph = Graph()
    value = graph.add("Add", weight(graph, NODES[name], "w"), "x")
    assert torch.allclose(ran(graph, value, torch.zeros(OUT, IN)), NODES[name].dense(), atol=1e-5)


@pytest.mark.parametrize("name", NODES)
def test_rows_of_an_embedding(name: str) -> None:
    graph, tokens = Graph(), torch.tensor([[0, 3, 3], [9, 1, 0]])
    found = ran(graph, embedding(graph, "x", NODES[name], "w"), tokens)
    assert torch.allclose(found, NODES[name].dense()[tokens], atol=1e-5)


KERNEL = (4, 4, 4)
CONVOLUTIONS: dict[str, Node] = {
    **{name: NODES[name] for name in ("float32", "int8", "int4", "masked codes", "product", "sum",
                                      "clustered")},
    "tucker": Tucker(Dense(draw(OUT, 3)), Dense(draw(3, 2 * 16)), Dense(draw(4, 2)), (4, 4)),
    "cp": CP((Dense(draw(OUT, 3)), Dense(draw(4, 3)), Dense(draw(4, 3)), Dense(draw(4, 3)))),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution(name: str) -> None:
    node, x, graph = CONVOLUTIONS[name], draw(2, 4, 9, 8), Graph()
    window = Window((4, 4), (2, 1), (1, 2, 1, 2), (1, 1))
    bias = graph.constant("b", draw(OUT))
    found = ran(graph, convolution(graph, "x", node, window, "w", [bias]), x)
    expected = torch.nn.functional.conv2d(x, node.dense().view(OUT, *KERNEL), draw(OUT), (2, 1), (1, 2))
    assert torch.allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("name", ["int8", "int4", "int4 with zero", "int4 by row", "int2", "ternary",
                                  "masked codes"])
def test_codes_and_scales_go_over_bit_for_bit(name: str) -> None:
    graph, found = Graph(), integers(NODES[name])
    assert found is not None
    linear(graph, "x", NODES[name], "w")
    *_, node = graph.nodes
    fields = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    codes = onnx.numpy_helper.to_array(graph.constants["w.codes"])
    assert node.op_type == "MatMulNBits" and fields["bits"] == found.bits
    assert torch.equal(unpacked(codes.reshape(OUT, -1), found.bits, IN), found.codes)
    assert np.array_equal(onnx.numpy_helper.to_array(graph.constants["w.scale"]),
                          found.regrouped(min(fields["block_size"], found.group)).scale.numpy())


@pytest.mark.parametrize("compute", ["dynamic", "static"])
def test_integer_multiplication_holds_the_same_codes(compute: str) -> None:
    graph, node = Graph(), NODES["int8"]
    assert isinstance(node, Quantized)
    linear(graph, "x", node, "w", compute)
    codes = onnx.numpy_helper.to_array(graph.constants["w.codes"])
    assert codes.dtype == np.int8
    assert np.array_equal(codes.T.astype(int), node.codes.numpy().astype(int) - 128)
    assert np.array_equal(onnx.numpy_helper.to_array(graph.constants["w.scale"]),
                          node.scale.dense()[:, 0].numpy())
    if compute == "dynamic":
        x = draw(5, IN)
        found = ran(graph, graph.nodes[-1].output[0], x)
        assert torch.allclose(found, Rows().rounded(x) @ node.dense().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["int8", "int4", "int4 by row", "clustered"])
@pytest.mark.parametrize("rows", [Rows(), Rows(20), Rows(128, torch.linspace(0.5, 2, IN))],
                         ids=["middle", "skewed", "factors"])
def test_any_coarse_weight_is_multiplied_in_eight_bits(name: str, rows: Rows) -> None:
    """What the runtime rounds when it loads the file, and every row of the input, are what we say."""
    graph, node, x = Graph(), NODES[name], draw(3, 5, IN)
    x[..., 2] *= 30
    linear(graph, "x", node, "w", "dynamic", rows)
    assert [each.op_type for each in graph.nodes].count("MatMulIntegerToFloat") == 1
    kept = rows.factors is None and computable(node)
    expected = rows.rounded(x) @ (node.dense() if kept else rows.weight(node.dense())).T
    assert torch.allclose(ran(graph, graph.nodes[-1].output[0], x), expected, rtol=1e-4, atol=1e-4)


def test_small_codebooks_stay_small() -> None:
    graph = Graph()
    weight(graph, NODES["clustered"], "w")
    assert sum(each.ByteSize() for each in graph.constants.values()) < OUT * IN // 2 + 200


def test_a_weight_without_a_form_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, node = Graph(), Tucker(Dense(draw(OUT, 3)), Dense(draw(3, 2 * 16)), Dense(draw(4, 2)), (4, 4))
    weight(graph, node, "layers.0")
    assert graph.notes == ["layers.0: a Tucker has no smaller form here; stored as float32"]


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    from rarefy.core.errors import TargetError

    call: Callable[[], str] = lambda: weight(Graph(), NODES["int4"], "w")  # noqa: E731
    with pytest.raises(TargetError, match=r"pip install 'rarefy\[onnx\]'"):
        call()
