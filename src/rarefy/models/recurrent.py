"""Recurrent layers built out of ``Linear``s, so that all that works on a ``Linear`` works on them.

torch's LSTM, GRU and RNN hold their weights as bare parameters and compute with them out of sight: no input
of a weight can be watched, and no weight computed in another way. Here a layer is

    a_t = W_ih x_t + b_ih                     one product for the whole sequence
    b_t = W_hh h_(t-1) + b_hh                 step by step
    LSTM   i, f, g, o = a_t + b_t,            c_t = sigmoid(f) c_(t-1) + sigmoid(i) tanh(g),
           h_t = W_hr (sigmoid(o) tanh(c_t))  W_hr only where there is a projection
    GRU    r, z = sigmoid(a_t + b_t),         h_t = (1 - z) tanh(a_t + r b_t) + z h_(t-1)
    RNN    h_t = tanh(a_t + b_t)              or relu

with ``weight_ih_l0`` under the name ``layers.0.ih.weight``, called like torch's own and answering the same.
``unrolled`` puts such layers in the place of torch's, ``rolled`` torch's in the place of such layers; both
keep the parameters themselves, so what was shared stays shared.

Papers: Hochreiter & Schmidhuber 1997, "Long Short-Term Memory", with the forget gate of Gers et al. 2000;
Sak et al. 2014, "Long Short-Term Memory Based Recurrent Neural Network Architectures for Large Scale Acoustic
Modeling" (the projection); Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder", in
the form of cuDNN, where r multiplies the product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rarefy.core.errors import ModelError

State = tuple[Tensor, ...]  # h, and c of an LSTM; each [batch, width]
Advance = Callable[[Tensor, Tensor, State], State]
Split = Callable[[Tensor], Sequence[Tensor]]  # a sequence into its steps, [rows, gates] each
Join = Callable[[list[Tensor]], Tensor]  # and back
LAYERS: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN_TANH": nn.RNN, "RNN_RELU": nn.RNN}
CELLS: dict[type[nn.RNNCellBase], str] = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU", nn.RNNCell: "RNN"}
KINDS, GATES = ("ih", "hh", "hr"), {"LSTM": 4, "GRU": 3}


def unrolled(module: nn.Module) -> nn.Module:
    """``module`` with layers of ``Linear``s in the place of torch's recurrent ones, its parameters the same.

    It is changed in place, unless it is such a layer itself. Subclasses of torch's layers, and those with
    hooks or parametrizations, compute what we cannot know: they stay as they are.
    """
    return _replaced(module, _unrolled)


def rolled(module: nn.Module) -> nn.Module:
    """``module`` with torch's recurrent layers in the place of ours that consist of plain ``Linear``s."""
    return _replaced(module, _rolled)


def is_recurrent(module: nn.Module) -> bool:
    """Whether any part of a network goes step by step."""
    return any(isinstance(part, Recurrent | Cell) for part in module.modules())


def class_name(module: nn.Module) -> str:
    """The class of a module as its user knows it."""
    match module:
        case Recurrent():
            return str(LAYERS[module.mode].__name__)
        case Cell():
            return module.kind.__name__
        case _:
            return type(module).__name__


def _replaced(module: nn.Module, other: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    root = other(module)
    if root is not None:
        return root
    made: dict[int, nn.Module | None] = {}
    for name, part in list(module.named_modules(remove_duplicate=False)):
        if id(part) not in made:
            made[id(part)] = other(part)
        fresh = made[id(part)]
        if fresh is not None:
            module.set_submodule(name, fresh)
    return module


# ---- layers --------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """One layer: the ``Linear``s ih, hh and, with a projection, hr; for the way back ``..._reverse``."""

    def __init__(self, part: nn.RNNBase, index: int) -> None:
        super().__init__()
        self.mode, self.suffixes = part.mode, ("", "_reverse") if part.bidirectional else ("",)
        for suffix in self.suffixes:
            for kind in KINDS:
                weight = part._parameters.get(f"weight_{kind}_l{index}{suffix}")
                if weight is not None:
                    self.add_module(f"{kind}{suffix}", _linear(
                        weight, part._parameters.get(f"bias_{kind}_l{index}{suffix}")))

    def linears(self, suffix: str) -> tuple[Any, Any, Any]:
        """Input, hidden and projection (None: there is none) of one direction."""
        ih, hh, hr = (self._modules.get(f"{kind}{suffix}") for kind in KINDS)
        return ih, hh, hr

    def widths(self) -> list[tuple[int, ...]]:
        """How wide the state of each direction is."""
        hidden = [self.linears(suffix)[1] for suffix in self.suffixes]
        return [(hh.in_features, hh.out_features // 4) if self.mode == "LSTM" else (hh.in_features,)
                for hh in hidden]

    def forward(self, x: Tensor, starts: Sequence[State], split: Split, joined: Join
                ) -> tuple[Tensor, list[State]]:
        """The outputs of a sequence, directions beside each other, and the state that each ends in."""
        found, lasts = [], []
        for suffix, start in zip(self.suffixes, starts, strict=True):
            ih, hh, hr = self.linears(suffix)
            steps, last = walked(split(ih(x)), start, hh, advance(self.mode, hr), backwards=bool(suffix))
            found.append(joined(steps))
            lasts.append(last)
        return found[0] if len(found) == 1 else torch.cat(found, -1), lasts


class Recurrent(nn.Module):
    """In the place of a ``torch.nn.LSTM``, ``GRU`` or ``RNN``: the same arguments, the same answers.

    Every attribute that says how torch's layer was made is here as well. computed: steps of a sequence that
    are, the last for all behind it (0: all): for who only asks what depends on what.
    """

    computed = 0

    def __init__(self, part: nn.RNNBase) -> None:
        super().__init__()
        self.mode, self.num_layers, self.bias = part.mode, part.num_layers, part.bias
        self.batch_first = part.batch_first
        self.dropout, self.bidirectional, self.proj_size = part.dropout, part.bidirectional, part.proj_size
        self.layers = nn.ModuleList(Layer(part, index) for index in range(part.num_layers))
        self.train(part.training)

    @property
    def input_size(self) -> int:
        """Channels that come in; fewer than at first where some were taken out."""
        first: Any = self.layers[0]
        return int(first.linears("")[0].in_features)

    @property
    def hidden_size(self) -> int:
        """States of the first layer, likewise."""
        first: Any = self.layers[0]
        return int(first.linears("")[1].out_features) // GATES.get(self.mode, 1)

    def flatten_parameters(self) -> None:
        """Nothing: kept because networks call it."""

    def forward(self, x: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """x: [steps, batch, in], [batch, steps, in] with ``batch_first``, [steps, in], or packed. hx, and the
        second answer: h [layers * directions, batch, width], for an LSTM with c; zeros where None."""
        match x:
            case PackedSequence():
                return self._packed(x, hx)
            case _ if x.ndim == 2:
                axis = 0 if self.batch_first else 1
                y, last = self(x.unsqueeze(axis), _each(hx, lambda state: state.unsqueeze(1)))
                return y.squeeze(axis), _each(last, lambda state: state.squeeze(1))
            case _ if x.ndim == 3:
                axis = 1 if self.batch_first else 0
                count, few = x.shape[axis], self.computed or None
                return self._run(x, hx, x.shape[1 - axis], lambda gates: gates.unbind(axis)[:few],
                                 lambda steps: torch.stack(steps + steps[-1:] * (count - len(steps)), axis))
            case _:
                raise ModelError(f"{class_name(self)}: an input of {x.ndim} axes; it takes 2 or 3")

    def _packed(self, x: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        """Sequences of several lengths, longest first: later steps have fewer rows."""
        sizes = x.batch_sizes.tolist()
        there, back = x.sorted_indices, x.unsorted_indices
        if there is not None:
            hx = _each(hx, lambda state: state.index_select(1, there))
        y, last = self._run(x.data, hx, sizes[0], lambda gates: gates.split(sizes), torch.cat)
        if back is not None:
            last = _each(last, lambda state: state.index_select(1, back))
        return PackedSequence(y, x.batch_sizes, there, back), last

    def _run(self, x: Tensor, hx: Any, batch: int | torch.SymInt, split: Split, joined: Join
             ) -> tuple[Tensor, Any]:
        layers: Any = self.layers
        lasts = list[State]()
        starts = iter(self._starts(x, hx, batch, [each for layer in layers for each in layer.widths()]))
        for index, layer in enumerate(layers):
            if index and self.dropout:
                x = nn.functional.dropout(x, self.dropout, self.training)
            x, found = layer(x, list(islice(starts, 1 + self.bidirectional)), split, joined)
            lasts += found
        last = tuple(torch.stack(each) for each in zip(*lasts, strict=True))
        return x, last if self.mode == "LSTM" else last[0]

    def _starts(self, x: Tensor, hx: Any, batch: int | torch.SymInt, widths: list[tuple[int, ...]]
                ) -> list[State]:
        """The state before the first step, of every layer and direction."""
        if hx is None:
            return [tuple(x.new_zeros(batch, width) for width in each) for each in widths]
        states = tuple(hx) if self.mode == "LSTM" else (hx,)
        for state, width in zip(states, widths[0], strict=True):
            if tuple(state.shape) != (len(widths), batch, width):
                raise ModelError(f"{class_name(self)}: a state of shape {list(state.shape)}; it takes "
                                 f"{[len(widths), batch, width]}")
        return list(zip(*(state.unbind(0) for state in states), strict=True))


class Cell(nn.Module):
    """In the place of a ``torch.nn.LSTMCell``, ``GRUCell`` or ``RNNCell``."""

    def __init__(self, part: nn.RNNCellBase) -> None:
        super().__init__()
        self.kind, self.mode = type(part), _cell_mode(part)
        self.hidden_size, self.bias = part.hidden_size, part.bias
        self.nonlinearity = getattr(part, "nonlinearity", "")
        own = part._parameters
        assert own["weight_ih"] is not None
        assert own["weight_hh"] is not None
        self.ih = _linear(own["weight_ih"], own.get("bias_ih"))
        self.hh = _linear(own["weight_hh"], own.get("bias_hh"))
        self.train(part.training)

    @property
    def input_size(self) -> int:
        """As for layers."""
        return self.ih.in_features

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        """x: [batch, in] or [in]. hx and the answer: h, for an LSTM with c, [batch, width] or [width]."""
        if hx is None:
            zeros = x.new_zeros(*x.shape[:-1], self.hidden_size)
            hx = (zeros, zeros) if self.mode == "LSTM" else zeros
        state = tuple(hx) if self.mode == "LSTM" else (hx,)
        done = advance(self.mode, None)(self.ih(x), self.hh(state[0]), state)
        return done if self.mode == "LSTM" else done[0]


# ---- steps ---------------------------------------------------------------------------------------------


def walked(steps: Sequence[Tensor], start: State, hh: Callable[[Tensor], Tensor], ahead: Advance, *,
           backwards: bool) -> tuple[list[Tensor], State]:
    """The outputs of all steps, in their order, and the state that each sequence ends in.

    steps: [rows, gates] each; rows may become fewer, as in packed sequences: those that are missing ended,
    or, backwards, have yet to begin.
    """
    found, ended, state = list[Tensor](), list[State](), start
    if backwards:
        state = tuple(each[:steps[-1].shape[0]] for each in start)
    for gates in reversed(steps) if backwards else steps:
        rows, there = gates.shape[0], state[0].shape[0]
        if rows > there:
            state = tuple(torch.cat([each, fresh[there:rows]]) for each, fresh in
                          zip(state, start, strict=True))
        elif rows < there:
            ended.append(tuple(each[rows:] for each in state))
            state = tuple(each[:rows] for each in state)
        state = ahead(gates, hh(state[0]), state)
        found.append(state[0])
    if ended:
        state = tuple(torch.cat(each) for each in zip(state, *reversed(ended), strict=True))
    return found[::-1] if backwards else found, state


def advance(mode: str, hr: Callable[[Tensor], Tensor] | None) -> Advance:
    """One step of a layer: products of input and of state, [rows, gates], and the state before."""
    match mode:
        case "LSTM":
            return lambda a, b, state: _lstm(a, b, state, hr)
        case "GRU":
            return _gru
        case "RNN_RELU":
            return lambda a, b, state: ((a + b).relu(),)
        case _:
            return lambda a, b, state: ((a + b).tanh(),)


def _lstm(a: Tensor, b: Tensor, state: State, hr: Callable[[Tensor], Tensor] | None) -> State:
    i, f, g, o = (a + b).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if hr is None else hr(h)), c


def _gru(a: Tensor, b: Tensor, state: State) -> State:
    (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3, -1), b.chunk(3, -1)
    r, z = (a_r + b_r).sigmoid(), (a_z + b_z).sigmoid()
    n = (a_n + r * b_n).tanh()
    return (n + z * (state[0] - n),)


# ---- there and back ------------------------------------------------------------------------------------


def _unrolled(part: nn.Module) -> nn.Module | None:
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks:
        return None
    if type(part) in LAYERS.values():
        assert isinstance(part, nn.RNNBase)
        own = all(name in part._parameters for name in part._flat_weights_names)
        return Recurrent(part) if own else None
    if type(part) in CELLS:
        assert isinstance(part, nn.RNNCellBase)
        return Cell(part) if part._parameters.get("weight_ih") is not None \
            and part._parameters.get("weight_hh") is not None else None
    return None


def _rolled(part: nn.Module) -> nn.Module | None:
    if not isinstance(part, Recurrent | Cell) or not all(
            type(each) is nn.Linear or isinstance(each, Recurrent | Cell | Layer | nn.ModuleList)
            for each in part.modules()):
        return None
    named = _torch_parameters(part)
    made: nn.Module
    match part:
        case Recurrent():
            settings: dict[str, Any] = {"proj_size": part.proj_size} if part.mode == "LSTM" else {}
            if part.mode.startswith("RNN"):
                settings["nonlinearity"] = part.mode.removeprefix("RNN_").lower()
            made = LAYERS[part.mode](part.input_size, part.hidden_size, part.num_layers, bias=part.bias,
                                     batch_first=part.batch_first, dropout=part.dropout,
                                     bidirectional=part.bidirectional, device="meta", **settings)
        case Cell():
            settings = {"nonlinearity": part.nonlinearity} if part.nonlinearity else {}
            made = part.kind(part.input_size, part.hidden_size, bias=part.bias, device="meta", **settings)
    shapes = {name: tuple(value.shape) for name, value in made.named_parameters()}
    if shapes != {name: tuple(value.shape) for name, value in named.items()}:
        return None  # parts of it were taken out: torch has no layer with these widths
    for name, value in named.items():
        setattr(made, name, value)
    return made.train(part.training)


def _torch_parameters(part: Recurrent | Cell) -> dict[str, nn.Parameter]:
    """The parameters by torch's names: ``layers.0.ih_reverse.bias`` is ``bias_ih_l0_reverse``."""
    found = {}
    for path, value in part.named_parameters(remove_duplicate=False):
        *place, kind, what = path.split(".")
        side, _, reverse = kind.partition("_")
        behind = f"_l{place[-1]}" if place else ""
        found[f"{what}_{side}{behind}{'_' + reverse if reverse else ''}"] = value
    return found


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = weight
    if bias is not None:
        made.bias = bias
    return made


def _cell_mode(part: nn.RNNCellBase) -> str:
    mode = CELLS[type(part)]
    return f"RNN_{getattr(part, 'nonlinearity', '').upper()}" if mode == "RNN" else mode


def _each(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A state, one tensor or two, with a change to each; None stays None."""
    match state:
        case None:
            return None
        case Tensor():
            return change(state)
        case _:
            return tuple(change(each) for each in state)
