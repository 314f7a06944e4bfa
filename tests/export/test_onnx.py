"""Whole networks as ONNX files: the same codes, folded norms, ranges, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from rarefy.core.errors import TargetError  # noqa: E402
from rarefy.core.nodes import Dense, Masked, Product, Quantized, Sum  # noqa: E402
from rarefy.export.onnx import GRIDS, OnnxSettings, export_onnx  # noqa: E402
from rarefy.export.program import Program, activation_ranges, trace  # noqa: E402
from rarefy.models.folding import folded_rows  # noqa: E402
from rarefy.models.network import call  # noqa: E402
from small_networks import bert, images, residual, rounded, rounded_trees, tokens  # noqa: E402

INT8 = GRIDS["int8"]


@pytest.fixture(scope="module")
def cnn() -> tuple[nn.Module, Program]:
    network = residual()
    return network, trace(network, images(2))


@pytest.fixture(scope="module")
def encoder() -> tuple[nn.Module, Program]:
    network = bert()
    return network, trace(network, tokens(2, 9), (0, 1))


def ran(path: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    values = {names[0] if name == "0" else name: each.numpy() for name, each in inputs.items()}
    return torch.from_numpy(session.run(None, values)[0])


def test_the_program_is_the_network(cnn, encoder) -> None:
    network, program = cnn
    assert torch.allclose(program.run(images(5), {}), network(images(5)["0"]), atol=1e-5)
    network, program = encoder
    batch = tokens(3, 17)
    assert torch.allclose(program.run(batch, {}), network(**batch).last_hidden_state, atol=1e-5)
    assert program.key == "last_hidden_state"
    assert set(program.reads.values()) == set(program.sites)


@pytest.mark.parametrize("compute", ["float", "dynamic", "static"])
def test_a_cnn(cnn, tmp_path: Path, compute: str) -> None:
    network, program = cnn
    trees = rounded_trees(network, INT8)
    done = export_onnx(network, trees, tmp_path / "m.onnx", inputs=images(2), program=program,
                       settings=OnnxSettings(compute), calibration=[images(16, 1)])
    batch = images(5, 2)
    found, expected = ran(done.path, batch), done.expected(batch)
    assert (found - expected).norm() < (1e-5 if compute == "float" else 0.02) * expected.norm()
    direct = call(network, batch, program.tensors(trees))
    assert (expected - direct).norm() < (1e-5 if compute == "float" else 0.1) * direct.norm()
    assert done.notes == ()
    kinds = [node.op_type for node in onnx.load(done.path).graph.node]
    assert "BatchNormalization" not in kinds
    if compute == "static":
        assert "Relu" not in kinds  # codes that begin at zero do it
        assert len(done.plan.operators) == 5


@pytest.mark.parametrize("format", ["int8", "int4", "int4z", "int2"])
@pytest.mark.parametrize("compute", ["float", "dynamic", "static"])
def test_an_encoder_of_padded_batches(encoder, tmp_path: Path, format: str, compute: str) -> None:
    network, program = encoder
    done = export_onnx(network, rounded_trees(network, GRIDS[format]), tmp_path / "m.onnx",
                       inputs=tokens(2, 9), program=program, settings=OnnxSettings(compute),
                       calibration=[tokens(4, 20, 1)])
    for batch in (tokens(1, 5, 3), tokens(3, 17, 2)):
        found, expected = ran(done.path, batch), done.expected(batch)
        assert (found - expected).norm() < (1e-4 if compute == "float" else 0.02) * expected.norm()
    in_integers = compute == "dynamic" or (compute == "static" and format == "int8")
    assert (len(done.plan.operators) == 12) == in_integers


def test_static_codes_are_ours(cnn, tmp_path: Path) -> None:
    """BatchNorm changes the scales of rows and no code."""
    network, program = cnn
    trees = rounded_trees(network, INT8)
    done = export_onnx(network, trees, tmp_path / "m.onnx", inputs=images(2), program=program,
                       settings=OnnxSettings("static"), calibration=[images(8)])
    held = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(done.path).graph.initializer}
    for path, tree in trees.items():
        codes = held[f"{path}.codes"]
        codes = codes.T if codes.ndim == 2 else codes.reshape(len(codes), -1)
        assert np.array_equal(codes.astype(int) + 128, tree.codes.numpy())
    gamma, variance = network.norm_one.weight, network.norm_one.running_var
    scale = trees["one.weight"].scale.dense()[:, 0] * gamma / (variance + network.norm_one.eps).sqrt()
    assert np.allclose(held["one.weight.scale"], scale.numpy(), rtol=1e-6)
    assert held["stem.weight.bias.codes"].dtype == np.int32


def test_smaller_graphs(encoder, tmp_path: Path) -> None:
    """Low rank is two products; floats without trees go over as they are; half floats stay half."""
    network, program = encoder
    plain = export_onnx(network, {}, tmp_path / "plain.onnx", inputs=tokens(2, 9), program=program)
    assert torch.allclose(ran(plain.path, tokens(3, 7)), network(**tokens(3, 7)).last_hidden_state, atol=1e-5)
    trees = {}
    for path, site in program.sites.items():
        values = network.state_dict()[path]
        if site.role == "up":
            u, s, v = torch.linalg.svd(values, full_matrices=False)
            trees[path] = Product(Dense(u[:, :4] * s[:4]), Dense(v[:4].contiguous()))
        else:
            trees[path] = Dense(values.half())
    small = export_onnx(network, trees, tmp_path / "small.onnx", inputs=tokens(2, 9), program=program)
    assert small.bytes < 0.75 * plain.bytes
    batch = tokens(3, 7)
    assert torch.allclose(ran(small.path, batch), small.expected(batch), atol=1e-4)


def test_folding_rows() -> None:
    factor, values = torch.tensor([2.0, -0.5, 3.0]), torch.randn(3, 32)
    keep = values.abs() > 0.3
    for tree in (rounded(values, INT8), rounded(values, GRIDS["int4z"]), Masked(keep, rounded(values, INT8)),
                 Product(Dense(values[:, :2]), Dense(values[:2])),
                 Sum((Dense(values), rounded(values, INT8)))):
        done = folded_rows(tree, factor)
        assert torch.allclose(done.dense(), factor[:, None] * tree.dense(), atol=1e-5)
        if isinstance(tree, Quantized):
            assert isinstance(done, Quantized) and torch.equal(done.codes, tree.codes)


def test_changed_params_go_over(cnn, tmp_path: Path) -> None:
    network, program = cnn
    params = {"head.bias": torch.full((10,), 5.0), "norm_one.bias": torch.ones(8)}
    done = export_onnx(network, {}, tmp_path / "m.onnx", inputs=images(2), program=program, params=params)
    expected = call(network, images(3), params)
    assert torch.allclose(ran(done.path, images(3)), expected, atol=1e-4)


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_ranges(cnn, method: str) -> None:
    _, program = cnn
    seen = activation_ranges(program, [images(4), images(4, 1)], {}, ["x", "relu"], method)
    both = torch.cat([images(4)["0"], images(4, 1)["0"]])
    if method == "minmax":
        assert (seen["x"].low, seen["x"].high) == (float(both.min()), float(both.max()))
    assert seen["relu"].low == 0.0 or method == "percentile"
    assert float(both.min()) <= seen["x"].low < seen["x"].high <= float(both.max()) + 1e-6


def test_what_is_refused(cnn, tmp_path: Path) -> None:
    network, program = cnn
    path = tmp_path / "m.onnx"
    with pytest.raises(TargetError, match=r"stem\.weigth: no such weight; did you mean 'stem\.weight'"):
        export_onnx(network, {"stem.weigth": Dense(torch.ones(8, 9))}, path, inputs=images(2),
                    program=program)
    with pytest.raises(TargetError, match="calibration inputs"):
        export_onnx(network, rounded_trees(network, INT8), path, inputs=images(2), program=program,
                    settings=OnnxSettings("static"))
    with pytest.raises(TargetError, match="choose one of minmax"):
        activation_ranges(program, [images(2)], {}, ["x"], "maxmin")

    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(TargetError, match=r"Branches: torch\.export cannot trace it"):
        trace(Branches(), images(2))
