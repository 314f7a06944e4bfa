"""Exits in an ONNX graph: samples leave where PyTorch lets them leave, and the rest is skipped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from rarefy.calibration.examples import Examples  # noqa: E402
from rarefy.core.errors import TargetError  # noqa: E402
from rarefy.core.structure import ExitRule  # noqa: E402
from rarefy.export.branches import Door, nested  # noqa: E402
from rarefy.export.onnx import GRIDS, OnnxSettings  # noqa: E402
from rarefy.models.form import Form  # noqa: E402
from rarefy.models.network import Network  # noqa: E402
from rarefy.runtimes.exit_graph import ExitFile, export_exits  # noqa: E402
from rarefy.runtimes.exits import Exits, Heads, Stepped  # noqa: E402
from rarefy.runtimes.segments import Segments  # noqa: E402
from rarefy.techniques.depth.early_exit import EarlyExit  # noqa: E402
from small_networks import rounded_trees, tokens  # noqa: E402
from tiny_networks import Digits  # noqa: E402


def network(kind: str = "bert", blocks: int = 4) -> Network:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    width = {"hidden_dim": 64} if kind == "distilbert" else {"intermediate_size": 64}
    config = AutoConfig.for_model(kind, hidden_size=32, num_hidden_layers=blocks, num_attention_heads=4,
                                  vocab_size=100, num_labels=3, **width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = AutoModelForSequenceClassification.from_config(config).eval()
        for values in module.parameters():
            values.data.add_(torch.randn(values.shape) * 0.1)
    return Network.from_module(module, form=Form("text", "classes", length=16, loader="AutoModel"))


def exits(kind: str = "bert", rule: str = "confidence", after: tuple[int, ...] = (0, 2)) -> Exits:
    """Untrained heads, and a threshold that parts the samples about evenly."""
    stepped = Stepped(network(kind))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        heads = Heads([64] * len(after), [32] * len(after), 3).eval().requires_grad_(False)
    found = Exits(stepped, after, heads, EarlyExit(rule), ExitRule(float("inf"), 0.0, 0.0))
    logits = found.answers(Examples(tokens(64, 12, 3))).logits
    certain = found.technique.certainty(logits[:1], len(after) + 1)
    threshold = 0.5 if rule == "patience" else float(certain.quantile(0.6))
    return replace(found, rule=ExitRule(threshold, 0.0, 0.0))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Exits, ExitFile]:
    found = exits()
    return found, export_exits(found, {}, tmp_path_factory.mktemp("exits") / "model.onnx",
                               inputs=tokens(4, 12))


def asked(path: Path, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {name: values.numpy() for name, values in inputs.items()}
    logits, blocks = session.run(["logits", "blocks"], given)
    return torch.from_numpy(logits), torch.from_numpy(blocks)


def test_batches_and_single_samples_leave_as_in_torch(made: tuple[Exits, ExitFile]) -> None:
    found, file = made
    inputs = tokens(40, 12, 5)
    wanted, depths = found(inputs)
    logits, blocks = asked(file.path, inputs)
    assert torch.equal(blocks, depths) and set(depths.tolist()) == {1, 3, 4}
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-4)
    for depth in (1, 3, 4):
        one = {name: values[depths == depth][:1] for name, values in inputs.items()}
        logits, blocks = asked(file.path, one)
        assert blocks.tolist() == [depth]
        torch.testing.assert_close(logits, found(one)[0], rtol=1e-3, atol=1e-4)
    assert file.verify([inputs]).error < 1e-3


def flat(names: tuple[str, ...]) -> onnx.ModelProto:
    """x -> a chain of additions with an exit behind the first two; each adds a stored number of its own."""
    helper, types = onnx.helper, onnx.TensorProto
    nodes, constants, last = [], [], "x"
    for place, name in enumerate(names):
        constants.append(onnx.numpy_helper.from_array(np.full((1, 1), 10.0**place, np.float32), f"n{place}"))
        nodes.append(helper.make_node("Add", [last, f"n{place}"], [name]))
        last = name
    constants.append(onnx.numpy_helper.from_array(np.array(0.0, np.float32), "zero"))
    constants.append(onnx.numpy_helper.from_array(np.array([1], np.int64), "axis"))
    for place, name in enumerate(names[:-1]):
        nodes.append(helper.make_node("ReduceMin", [name, "axis"], [f"least{place}"], keepdims=0))
        nodes.append(helper.make_node("Greater", [f"least{place}", "zero"], [f"sure{place}"]))
    ends = [[helper.make_tensor_value_info(name, types.FLOAT, [None, 1])] for name in ("x", names[-1])]
    graph = helper.make_graph(nodes, "g", *ends, constants)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])


def depth_of(graph: onnx.GraphProto, output: str) -> int:
    """In how many branches the operator lies that makes a value; -1: in none of them."""
    for node in graph.node:
        if output in node.output and node.op_type != "If":
            return 0
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH and (inner := depth_of(attribute.g, output)) >= 0:
                return inner + 1
    return -1


def test_operators_lie_in_the_branch_that_needs_them_first(tmp_path: Path) -> None:
    names = ("one", "two", "end")
    proto = nested(flat(names), [Door("one", "sure0", 1), Door("two", "sure1", 2)], "end", 3)
    onnx.checker.check_model(proto, full_check=True)
    assert [depth_of(proto.graph, name) for name in names] == [0, 1, 2]
    outer = {each.name for each in proto.graph.initializer}
    assert "n0" in outer and not outer & {"n1", "n2"}
    onnx.save(proto, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for x, answer, depth in (([[0.5]], [[1.5]], [1]), ([[-5.0]], [[6.0]], [2]), ([[-50.0]], [[61.0]], [3]),
                             ([[-5.0], [-50.0], [9.0]], [[6.0], [61.0], [10.0]], [2, 3, 1])):
        found = session.run(["end", "blocks"], {"x": np.array(x, np.float32)})
        assert found[0].tolist() == answer and found[1].tolist() == depth


@pytest.mark.parametrize(("kind", "rule"), [("albert", "entropy"), ("distilbert", "patience")])
def test_other_families_and_rules(kind: str, rule: str, tmp_path: Path) -> None:
    """Blocks that are one module, answers that look back at earlier exits."""
    found = exits(kind, rule, (0, 1, 2))
    names = set(tokens(1, 4)) if kind != "distilbert" else {"input_ids", "attention_mask"}
    inputs = {name: values for name, values in tokens(32, 12, 5).items() if name in names}
    file = export_exits(found, {}, tmp_path / "m.onnx", inputs={k: v[:4] for k, v in inputs.items()})
    file.verify([inputs])
    logits, blocks = asked(file.path, inputs)
    wanted, depths = found(inputs)
    assert torch.equal(blocks, depths) and len(set(depths.tolist())) > 1
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("grid", ["", "int8"])
def test_a_cnn(tiny_cnn: Digits, grid: str, tmp_path: Path) -> None:
    """Convolutions, normalisation folded or not, and heads that pool."""
    found = Network.from_module(tiny_cnn.module)
    segments = Segments.of(found, {"0": tiny_cnn.test[0][:2]})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        heads = Heads([256, 512], [32, 32], 10).eval().requires_grad_(False)
    exits_ = Exits(segments, (0, 1), heads)
    inputs = {"0": tiny_cnn.test[0][:64]}
    certain = exits_.answers(Examples(inputs)).logits[0].softmax(-1).amax(-1)
    exits_ = replace(exits_, rule=ExitRule(float(certain.quantile(0.6)), 0.0, 0.0))
    trees = rounded_trees(found.module, GRIDS[grid]) if grid else {}
    file = export_exits(exits_, trees, tmp_path / "m.onnx", inputs={"0": inputs["0"][:4]},
                        settings=OnnxSettings("dynamic" if grid else "float"), calibration=[inputs])
    assert file.verify([inputs]).error < (0.05 if grid else 1e-3)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    logits, blocks = session.run(["logits", "blocks"], {name: inputs["0"].numpy()})
    if not grid:
        wanted, depths = exits_(inputs)
        assert blocks.tolist() == depths.tolist() and len(set(blocks.tolist())) > 1
        torch.testing.assert_close(torch.from_numpy(logits), wanted, rtol=1e-3, atol=1e-4)
    one = int((blocks == 1).argmax())
    assert session.run(["blocks"], {name: inputs["0"][one:one + 1].numpy()})[0].tolist() == [1]


def test_rounded_weights_are_multiplied_as_such(tmp_path: Path) -> None:
    found = exits()
    trees = rounded_trees(found.stepped.network.module, GRIDS["int8"])
    file = export_exits(found, trees, tmp_path / "m.onnx", inputs=tokens(4, 12),
                        settings=OnnxSettings("dynamic"), calibration=[tokens(16, 12)])
    assert file.verify([tokens(60, 12, 5)]).error < 0.03
    kinds = [node.op_type for graph in graphs(onnx.load(file.path).graph) for node in graph.node]
    assert kinds.count("MatMulIntegerToFloat") >= 24 and kinds.count("If") == 2


def graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    inner = [attribute.g for node in graph.node for attribute in node.attribute
             if attribute.type == onnx.AttributeProto.GRAPH]
    return [graph, *(each for one in inner for each in graphs(one))]


def test_another_threshold_is_caught(made: tuple[Exits, ExitFile]) -> None:
    found, file = made
    moved = replace(found, rule=ExitRule(found.rule.threshold * 1.1, 0.0, 0.0))
    with pytest.raises(TargetError, match="leave elsewhere than the exits say"):
        replace(file, exits=moved).verify([tokens(40, 12, 5)])


def test_another_head_is_caught(made: tuple[Exits, ExitFile], tmp_path: Path) -> None:
    _, file = made
    proto = onnx.load(file.path)
    held = next(each for graph in graphs(proto.graph) for each in graph.initializer
                if each.name.startswith("heads.last.0.bias"))
    values = onnx.numpy_helper.to_array(held) + np.float32(0.05)
    held.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32) * [1, 1.2, 1], held.name))
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(TargetError):
        replace(file, path=tmp_path / "m.onnx").verify([tokens(40, 12, 5)])
