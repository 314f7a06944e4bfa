"""Recurrent layers out of Linears answer as torch's own do, and become torch's own again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from rarefy.core.errors import ModelError
from rarefy.core.nodes import Dense
from rarefy.export.networks import export_network, load, opened
from rarefy.models.form import Form
from rarefy.models.narrowed import channel_groups, without_channels
from rarefy.models.network import TENSOR, Network
from rarefy.models.recurrent import Cell, Recurrent, class_name, rolled, unrolled
from rarefy.training.loop import Settings
from rarefy.training.tune import Tuning, student_of
from tiny_networks import TinyRNN

IN, WIDTH, LENGTHS = 4, 6, (2, 5, 1, 4)
OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"num_layers": 3}, {"bidirectional": True, "num_layers": 2}, {"batch_first": True, "bias": False},
    {"bidirectional": True, "batch_first": True, "dropout": 0.3, "num_layers": 2})
LAYERS = [(kind, options) for kind in (nn.LSTM, nn.GRU, nn.RNN) for options in OPTIONS] + [
    (nn.LSTM, {"proj_size": 3, "num_layers": 2, "bidirectional": True}), (nn.RNN, {"nonlinearity": "relu"})]


def layer(kind: Any, options: dict[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(IN, WIDTH, **options).eval()


def inputs(part: Any) -> Iterator[tuple[Any, ...]]:
    """A batch, one sequence and packed sequences, without and with states to begin with."""
    g = torch.Generator().manual_seed(1)
    batch, steps = len(LENGTHS), max(LENGTHS)
    x = torch.randn(*((batch, steps) if part.batch_first else (steps, batch)), IN, generator=g)
    depth = part.num_layers * (1 + part.bidirectional)
    h, c = (torch.randn(depth, batch, width, generator=g) for width in (part.proj_size or WIDTH, WIDTH))
    state = (h, c) if part.mode == "LSTM" else h
    one = (h[:, 0], c[:, 0]) if part.mode == "LSTM" else h[:, 0]
    packed = pack_padded_sequence(x, list(LENGTHS), part.batch_first, enforce_sorted=False)
    single = x[0] if part.batch_first else x[:, 0]
    yield from ((x,), (x, state), (packed,), (packed, state), (single,), (single, one))


def same(found: Any, wanted: Any) -> None:
    if isinstance(wanted[0], PackedSequence):
        assert torch.equal(found[0].batch_sizes, wanted[0].batch_sizes)
        found, wanted = (found[0].data, found[1]), (wanted[0].data, wanted[1])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_answers_as_torchs_own_and_becomes_it_again(kind: Any, options: dict[str, Any]) -> None:
    own = layer(kind, options)
    ours = unrolled(copy.deepcopy(own))
    again = rolled(copy.deepcopy(ours))
    assert isinstance(ours, Recurrent) and type(again) is kind and not again.training
    assert class_name(ours) == kind.__name__ and repr(again) == repr(own)
    assert {name: value.shape for name, value in again.state_dict().items()} == \
        {name: value.shape for name, value in own.state_dict().items()}
    for arguments in inputs(own):
        same(ours(*arguments), own(*arguments))
        same(again(*arguments), own(*arguments))


@pytest.mark.parametrize(("kind", "options"), [
    (nn.LSTMCell, {}), (nn.GRUCell, {"bias": False}), (nn.RNNCell, {}),
    (nn.RNNCell, {"nonlinearity": "relu"})])
def test_cells(kind: Any, options: dict[str, Any]) -> None:
    own = layer(kind, options)
    ours = unrolled(copy.deepcopy(own))
    assert isinstance(ours, Cell) and type(rolled(copy.deepcopy(ours))) is kind
    x, h = torch.randn(3, IN), torch.randn(3, WIDTH)
    state = (h, h.sin()) if kind is nn.LSTMCell else h
    for arguments in ((x,), (x, state), (x[0],)):
        torch.testing.assert_close(ours(*arguments), own(*arguments))
        torch.testing.assert_close(rolled(copy.deepcopy(ours))(*arguments), own(*arguments))


def test_gradients_and_dropout_are_the_same() -> None:
    own = layer(nn.LSTM, {"num_layers": 2, "dropout": 0.5})
    ours, x = unrolled(copy.deepcopy(own)), torch.randn(5, 3, IN)
    for part in (own, ours):  # without dropout, for which torch draws other masks
        part(x)[0].square().sum().backward()
    found = {tuple(value.shape): [] for value in own.parameters()}
    for value in ours.parameters():
        found[tuple(value.shape)].append(value.grad)
    for value in own.parameters():
        assert value.grad is not None
        assert any(torch.allclose(each, value.grad, rtol=1e-4, atol=1e-5)
                   for each in found[tuple(value.shape)])
    assert not torch.allclose(ours.train()(x)[0], own(x)[0])  # between layers, and only while it trains


class Reader(nn.Module):
    """Reads a sequence both ways with one layer that is used twice, and steps on with a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(IN, WIDTH, 2, batch_first=True, bidirectional=True)
        self.same, self.cell, self.fc = self.rnn, nn.GRUCell(2 * WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.flatten_parameters()
        steps = self.rnn(x)[0] + self.same(x.flip(1))[0]
        return self.fc(self.cell(steps.mean(1)))


def test_a_network_is_mapped_runs_and_comes_back_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Reader().eval(), torch.randn(3, 5, IN)
    before = copy.deepcopy(module.state_dict())
    network = Network.from_module(module)
    assert type(module.rnn) is nn.LSTM  # the user's own is never changed
    roles = {site.path: (site.role, site.block) for site in network.map.sites}
    assert roles["rnn.layers.0.ih.weight"] == ("ih", 0) and roles["cell.hh.weight"] == ("hh", None)
    assert roles["rnn.layers.1.hh_reverse.weight"] == ("hh", 1) and len(roles) == 8 + 2 + 1
    assert network.parameters == sum(value.numel() for value in module.parameters())
    torch.testing.assert_close(network.run({TENSOR: x}), module(x))
    path = "rnn.layers.1.hh.weight"
    export_network(network, {path: Dense(network.weight(path).half())}, tmp_path / "out")
    loaded = load(tmp_path / "out", into=Reader())
    assert loaded.rnn is loaded.same and type(loaded.rnn) is nn.LSTM
    assert torch.equal(loaded.rnn.weight_hh_l1, before["rnn.weight_hh_l1"].half().float())
    loaded.rnn.weight_hh_l1.data = before["rnn.weight_hh_l1"]
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())
    torch.testing.assert_close(loaded.eval()(x), module(x))


def test_a_recurrent_layer_by_itself_is_a_network(tmp_path: Path) -> None:
    own, form = layer(nn.GRU, {"batch_first": True}), Form(gives="embedding")
    network = Network.from_module(own, form=form)
    x = torch.randn(2, 3, IN)
    assert network.name == "GRU" and network.run({TENSOR: x}).shape == (2, 3 * WIDTH)
    export_network(network, {}, tmp_path / "out")
    assert type(load(tmp_path / "out", into=nn.GRU(IN, WIDTH, batch_first=True))) is nn.GRU
    with pytest.raises(ModelError, match=r"holds a GRU, .*into=GRU\(\)"):
        opened(tmp_path / "out")


def test_bfloat16_is_what_the_file_held() -> None:
    network = Network.from_module(layer(nn.LSTM, {}).bfloat16(), form=Form(gives="embedding"))
    assert network.source.dtype("layers.0.hh.weight") == "bfloat16"
    assert next(network.module.parameters()).dtype == torch.float32


class Louder(nn.LSTM):
    """A subclass, whose forward may be anything."""


def test_what_is_not_torchs_own_stays_as_it_is() -> None:
    hooked = nn.LSTM(IN, WIDTH)
    hooked.register_forward_hook(lambda module, args, out: None)
    scaled = nn.utils.parametrizations.weight_norm(nn.GRU(IN, WIDTH), "weight_hh_l0")
    for part in (Louder(IN, WIDTH), hooked, scaled):
        holder = nn.Sequential(part)
        assert unrolled(holder)[0] is part
    with pytest.raises(ModelError, match=r"LSTM: a state of shape \[1, 2, 6\]; it takes \[1, 3, 6\]"):
        unrolled(nn.LSTM(IN, WIDTH))(torch.zeros(5, 3, IN), (torch.zeros(1, 2, WIDTH),) * 2)
    with pytest.raises(ModelError, match="an input of 1 axes"):
        unrolled(nn.LSTM(IN, WIDTH))(torch.zeros(IN))


class Heard(nn.Module):
    """Convolutions that a recurrent layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv1d(2, 8, 3), nn.Linear(WIDTH, 3)
        self.rnn = nn.LSTM(8, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(self.conv(x).relu().transpose(1, 2))[0][:, -1])


def test_channels_in_front_go(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    network, x = Network.from_module(Heard()), {TENSOR: torch.randn(2, 2, 7)}
    small = without_channels(network, x, {"conv": torch.arange(5)}, {})
    export_network(small, {}, tmp_path / "out")
    loaded = load(tmp_path / "out", into=Heard())
    assert type(loaded.rnn) is nn.LSTM and loaded.rnn.input_size == 5
    torch.testing.assert_close(loaded(x[TENSOR]), small.run(x))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_states_that_nobody_reads_go_without_a_trace(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    module, x, kept = TinyRNN(kind), torch.rand(3, 1, 8, 8), torch.arange(0, 32, 2)
    with torch.no_grad():
        for weight in (*(module.rnn.get_parameter(f"weight_hh_l{layer}") for layer in range(3)),
                       module.rnn.weight_ih_l1, module.rnn.weight_ih_l2, module.fc.weight):
            weight[:, 1::2] = 0
    network = Network.from_module(module)
    groups, _ = channel_groups(network, {TENSOR: x})
    roots = [f"rnn.layers.{layer}.ih" for layer in range(3)]
    assert [(group.root, group.count) for group in groups] == [(root, 32) for root in roots]
    assert [place.path for place in groups[2].readers] == ["rnn.layers.2.hh.weight", "fc.weight"]
    small = without_channels(network, {TENSOR: x}, dict.fromkeys(roots, kept), {})
    torch.testing.assert_close(small.run({TENSOR: x}), network.run({TENSOR: x}))
    export_network(small, {}, tmp_path / "out")
    loaded = load(tmp_path / "out", into=TinyRNN(kind))
    assert type(loaded.rnn) is type(module.rnn) and loaded.rnn.hidden_size == 16
    torch.testing.assert_close(loaded(x), module(x))
    with pytest.raises(ModelError, match=r"rnn: its layers would keep 16, 32, 32 states.*spread: uniform"):
        without_channels(network, {TENSOR: x}, {roots[0]: kept}, {})


class Ends(nn.Module):
    """Looks at the states that a sequence ends in, beside the mean of the outputs."""

    def __init__(self, rnn: nn.Module, width: int) -> None:
        super().__init__()
        self.rnn, self.fc = rnn, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, h = self.rnn(x)
        return self.fc(y.mean(1)) + h[-1].sum((0, 2))[:, None] if isinstance(h, tuple) else \
            self.fc(y.mean(1)) + h[-1].sum(1, keepdim=True)


@pytest.mark.parametrize("module", [
    Ends(nn.GRU(IN, WIDTH, 2, batch_first=True), WIDTH),
    Ends(nn.LSTM(IN, WIDTH, 1, batch_first=True, proj_size=2), 2)])
def test_states_that_more_reads_stay(module: nn.Module) -> None:
    pytest.importorskip("torch_pruning")
    groups, refused = channel_groups(Network.from_module(module), {TENSOR: torch.randn(2, 5, IN)})
    assert groups == () and "the states of a recurrent layer are as wide" in refused.values()
    both = Ends(nn.GRU(IN, WIDTH, batch_first=True, bidirectional=True), 2 * WIDTH)
    with pytest.raises(ModelError, match="goes both ways, through which no channels can be traced"):
        channel_groups(Network.from_module(both), {TENSOR: torch.randn(2, 5, IN)})


def test_layers_that_are_computed_again_learn_the_same() -> None:
    torch.manual_seed(0)
    network = Network.from_module(Reader().eval())
    x = torch.randn(3, 5, IN)

    def gradients(checkpointing: bool) -> list[Tensor]:
        student = student_of(network, {}, Tuning(), Settings(checkpointing=checkpointing)).train()
        student({TENSOR: x}).square().sum().backward()
        return [value.grad for value in student.parameters() if value.grad is not None]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(again) == 22
    torch.testing.assert_close(again, plain)
