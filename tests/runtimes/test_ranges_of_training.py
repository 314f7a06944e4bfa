"""Networks whose activations were clipped in training keep those ranges in files of integers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxscript")

from rarefy.core.errors import ModelError
from rarefy.core.nodes import Node
from rarefy.export.networks import export_network, opened
from rarefy.export.onnx import GRIDS, OnnxSettings, export_onnx
from rarefy.export.openvino import export_openvino
from rarefy.export.program import Program, trace
from rarefy.formats.native import CONFIG
from rarefy.models.folding import fold
from rarefy.models.network import Network, call
from rarefy.numerics.ranges import Range
from rarefy.runtimes.integer import Fake, IntegerNetwork, compiled, export_integer
from rarefy.runtimes.integer.steps import Code
from rarefy.runtimes.session import Session
from rarefy.training.activations import Activations
from small_networks import bert, images, residual, rounded_trees, tokens

INT8 = GRIDS["int8"]


def clipped(module: nn.Module, seen: Mapping[str, Tensor], bits: int, share: float) -> Network:
    """The network as if training had settled on a share of what layers read."""
    network = Network.from_module(module)
    layers = [site.layer for site in network.map.sites
              if not isinstance(network.module.get_submodule(site.layer), nn.Embedding)]
    watching = Activations(layers, bits, memory=0.0)
    with watching.on(network.module), torch.no_grad():
        network.run(dict(seen))
    return network.with_ranges({layer: Range(share * span.low, share * span.high, bits)
                                for layer, span in watching.ranges().items()})


@torch.no_grad()
def answered(network: Network, trees: Mapping[str, Node], inputs: Mapping[str, Tensor]) -> Tensor:
    """What the network answers as it was trained, and the rounded weights in it."""
    with network.as_trained():
        said = call(network.module, inputs, network.tensors(trees.get))
    return said if isinstance(said, Tensor) else said[0]


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def bert_of(bits: int, share: float) -> tuple[Network, list[dict[str, Tensor]], dict[str, Tensor]]:
    seen = [tokens(16, 16, seed) for seed in range(3)]
    return clipped(bert(), seen[0], bits, share), seen, tokens(8, 12, 9)


def residual_of(bits: int, share: float, *, folded: bool = True
                ) -> tuple[Network, list[dict[str, Tensor]], dict[str, Tensor]]:
    module = fold(residual(), images(4)["0"]).module if folded else residual()
    return clipped(module, images(64, 1), bits, share), [images(64, 1)], images(16, 5)


# ---- integers alone ------------------------------------------------------------------------------------


def in_integers(network: Network, calibration: list[dict[str, Tensor]]
                ) -> tuple[IntegerNetwork, Program, dict[str, Node]]:
    dynamic = (0, 1) if "input_ids" in calibration[0] else (0,)
    program, trees = trace(network.module, calibration[0], dynamic, fused=True), rounded_trees(
        network.module, INT8)
    return compiled(program, trees, calibration, ranges=network.ranges), program, trees


@pytest.mark.parametrize(("bits", "share"), [(8, 0.25), (4, 0.4)])
@pytest.mark.parametrize("case", [residual_of, bert_of])
def test_integers_answer_like_the_network_that_was_trained(case, bits: int, share: float) -> None:
    """And ranges of their own would not: what training clipped comes through."""
    network, calibration, inputs = case(bits, share)
    whole, program, trees = in_integers(network, calibration)
    expected = answered(network, trees, inputs)
    calibrated = compiled(program, trees, calibration)
    near, far = apart(whole.answers(inputs), expected), apart(calibrated.answers(inputs), expected)
    assert near < 0.05 and near < far / 3, (near, far)
    assert apart(Fake(whole, program, trees).answers(inputs), expected) < 0.05
    assert whole.places()[0] >= len(set(network.ranges.values())) - 1  # who agrees reads one value
    assert calibrated.places()[0] == 0


def test_sums_are_not_clipped_where_a_layer_reads_them_so() -> None:
    """Training rounded what ``two`` reads, not what the sum does."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.one(x))
            return self.head(x + self.two(x))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Both().eval().requires_grad_(False)
    inputs = {"0": torch.randn(64, 8, generator=torch.Generator().manual_seed(0))}
    network = Network.from_module(module, ranges={"two": Range(0.0, 0.1)})
    whole, _, trees = in_integers(network, [inputs])
    assert apart(whole.answers(inputs), answered(network, trees, inputs)) < 0.03
    assert [name for name in whole.trained if whole.codes_of[name] == Code.eight(Range(0.0, 0.1))]
    assert whole.places() == (1, 2)


def test_an_input_that_two_layers_read_in_their_own_ways() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.two(x)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Two().eval().requires_grad_(False)
    inputs = {"0": torch.randn(64, 8, generator=torch.Generator().manual_seed(0))}
    network = Network.from_module(module, ranges={"one": Range(-1.0, 0.5, 3), "two": Range(-0.2, 2.0)})
    whole, _, trees = in_integers(network, [inputs])
    assert apart(whole.answers(inputs), answered(network, trees, inputs)) < 0.05
    assert whole.places() == (2, 0)


def test_the_file_clips_an_image_too(tmp_path: Path) -> None:
    """The runtime answers bit for bit, inputs of few bits included."""
    pytest.importorskip("onnxruntime")
    network, calibration, inputs = residual_of(3, 0.5)
    whole, program, _ = in_integers(network, calibration)
    assert int(whole.codes(inputs)["x"].max()) == 7
    export_integer(whole, program, tmp_path / "model.onnx").verify([inputs])


# ---- graphs for ONNX Runtime and OpenVINO --------------------------------------------------------------


@pytest.mark.parametrize(("case", "bits", "engine"), [
    ("residual", 8, "onnxruntime"), ("residual", 4, "onnxruntime"), ("residual", 4, "openvino"),
    ("encoder", 8, "onnxruntime"), ("encoder", 8, "openvino")])
def test_graphs_answer_like_the_network_that_was_trained(case: str, bits: int, engine: str, tmp_path: Path
                                                         ) -> None:
    pytest.importorskip(engine)
    network, calibration, inputs = (residual_of(bits, 0.3, folded=False) if case == "residual"
                                    else bert_of(bits, 0.3))
    program = trace(network.module, calibration[0], (0,) if case == "residual" else (0, 1))
    path, trees = tmp_path / "model.onnx", rounded_trees(network.module, INT8)
    settings = {"inputs": calibration[0], "settings": OnnxSettings("static"), "calibration": calibration,
                "program": program}
    calibrated = export_onnx(network.module, trees, path, **settings)
    if engine == "openvino":
        path = tmp_path / "model.xml"
    write = export_openvino if engine == "openvino" else export_onnx
    done = write(network.module, trees, path, **settings, ranges=network.ranges)
    with Session(path, engine) as session:
        found = session.answer(inputs)
    expected = answered(network, trees, inputs)
    close = 0.02 if bits == 8 else 0.08  # codes of 4 bits are wide
    assert apart(found, done.expected(inputs)) < close
    near, far = (apart(each.expected(inputs), expected) for each in (done, calibrated))
    assert near < 2 * close and near < far / 3, (near, far)
    assert done.places == (len(network.ranges), 0) if case == "residual" else done.places[1] == 0


# ---- the native folder ---------------------------------------------------------------------------------


def test_the_native_folder_keeps_them(tmp_path: Path) -> None:
    network, calibration, inputs = residual_of(5, 0.5)
    trees = rounded_trees(network.module, INT8)
    export_network(network, trees, tmp_path / "own")
    back = opened(tmp_path / "own", network.module)
    assert isinstance(back, Network) and back.ranges == network.ranges
    whole, _, _ = in_integers(network, calibration)
    again, _, _ = in_integers(back, calibration)
    assert torch.equal(whole.answers(inputs), again.answers(inputs))
    given = {"head": Range(-1.0, 2.0)}
    export_network(network, trees, tmp_path / "given", ranges=given)
    other = opened(tmp_path / "given", network.module)
    assert isinstance(other, Network) and other.ranges == given


@pytest.mark.parametrize(("said", "match"), [
    ('{"head": {"low": 1.0, "high": 0.5}}', "low <= high"), ('{"head": {"low": 0.0}}', "low <= high"),
    ('{"head": {"low": 0.0, "high": NaN}}', "low <= high"), ('{"head": {"low": "0", "high": 1}}', "low <= h"),
    ('{"head": {"low": 0, "high": 1, "bits": 9}}', "2 to 8 bits"), ("[1]", "low <= high"),
    ('{"haed": {"low": 0.0, "high": 1.0}}', "did you mean 'head'")])
def test_a_folder_with_other_ranges_is_refused(said: str, match: str, tmp_path: Path) -> None:
    network = Network.from_module(residual(), ranges={"head": Range(-1.0, 2.0)})
    export_network(network, {}, tmp_path / "own")
    config = tmp_path / "own" / CONFIG
    text = config.read_text()
    start = text.index('"ranges": ') + len('"ranges": ')
    config.write_text(text[:start] + said + text[text.index("\n }", start) + 3:])
    with pytest.raises(ModelError, match=match):
        opened(tmp_path / "own", network.module)
