"""From a traced network to integers. Floats find the integers here, once.

What a value is held in follows from who reads it: multiplications want codes of 8 bits, everything else wide
ones. A value that both kinds read is made wide, and rounded to 8 bits for the multiplications; that is also
what training with rounded activations sees (``training.activations``): inputs of layers are rounded, sums on
the residual path are not. Layers whose inputs training rounded get the codes that it found; where several
read one value in different codes, the value is wide, and each rounds it as it was trained to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node as FxNode

from rarefy.core.errors import TargetError
from rarefy.core.nodes import Node
from rarefy.export.program import Program, Values, activation_ranges
from rarefy.formats.integers import Integers, integers
from rarefy.formats.onnx import computable
from rarefy.numerics.fixed_point import ERF_IN, ERF_OUT, MINIMAX, TANH, UNIT, VECTOR, Erf, Fixed
from rarefy.numerics.ranges import Range
from rarefy.runtimes.integer.network import IntegerNetwork
from rarefy.runtimes.integer.steps import (
    LIMIT,
    MIXED,
    SUM,
    Add,
    Attention,
    Call,
    Code,
    Convolution,
    Gelu,
    Largest,
    Linear,
    Lookup,
    Mean,
    Normalize,
    Relu,
    Rescale,
    Step,
    Tanh,
    Window,
)

Op = Any  # of torch.fx, which has no types for the arguments of its nodes
Wish = Range | Literal["calibrated", "wide"]  # the codes in which a reader wants a value
ALIASES = frozenset({"clone", "dropout", "alias", "detach", "contiguous"})
MOVES = frozenset({"view", "reshape", "_unsafe_view", "flatten", "transpose", "permute", "select", "slice",
                   "unsqueeze", "squeeze", "expand"})
FILLED = {"new_ones": 1, "ones": 1, "new_zeros": 0, "zeros": 0}  # which the exporter fills by floats
PASSING = ALIASES | MOVES | {"relu", "max_pool2d"}
LARGEST_BIAS = 2**30
MULTIPLYING = frozenset({"conv2d", "linear", "scaled_dot_product_attention"})


def compiled(program: Program, trees: Mapping[str, Node], calibration: Sequence[Values],
             method: str = "minmax", *, ranges: Mapping[str, Range] | None = None, erf: Erf = MINIMAX
             ) -> IntegerNetwork:
    """The integers of a CNN (BatchNorm folded) or of an encoder.

    trees: 8-bit symmetric codes with one scale a row for every site that ``multiplied`` names. calibration,
    method: as for static 8-bit activations. ranges: of the inputs of layers, by the layer's name, where
    training found them (``Tuned.ranges``). erf: the polynomial of GELU. TargetError names the operator
    or the weight that has no integer form.
    """
    for path in multiplied(program):
        if path not in trees or not computable(trees[path]):
            raise TargetError(f"{path}: integer arithmetic needs codes of at most 8 bits, symmetric, with "
                              "one scale a row; quantize it on int8")
    trained = program.trained(ranges or {})
    ops = program.exported.graph.nodes
    for op in ops:
        if _kind(op) == "softmax":
            raise TargetError(f"{op.name}: attention has an integer form where it is one operator; trace the "
                              "network with fused=True")
    found = activation_ranges(program, calibration, program.tensors(trees), [op.name for op in ops],
                              method, trained)
    return _Compiler(program, trees, found, trained, erf).network()


def multiplied(program: Program) -> frozenset[str]:
    """The sites that lead to the answer: not those of a pooler that nobody reads."""
    needed, reads = {op.name for op in _needed(program)}, program.reads
    return frozenset(path for name, path in reads.items() if name in needed)


class _Compiler:
    """Walks the program once and writes a step or two per operation.

    ranges: of all values, calibrated. trained: of what an operator reads, by the operator.
    """

    def __init__(self, program: Program, trees: Mapping[str, Node], ranges: dict[str, Range],
                 trained: Mapping[str, Range], erf: Erf) -> None:
        self.program, self.trees, self.ranges, self.erf = program, trees, ranges, erf
        self.steps: list[Step] = []
        self.codes: dict[str, Code] = {}
        self.renamed: dict[str, str] = {}  # a value -> the step that makes it
        self.constants: dict[str, Tensor] = {}
        self.own = {**program.exported.state_dict, **program.exported.constants}
        specs = program.exported.graph_signature.input_specs
        self.stored = {spec.arg.name: spec.target for spec in specs if spec.target is not None}
        self.inputs = tuple(spec.arg.name for spec in specs if spec.target is None)
        self.reads, self.trained = program.reads, trained
        self.eight: dict[str, Range | None] = {}  # values in 8 bits alone; the ranges that training found
        self.rescaled: dict[tuple[str, Code], str] = {}
        self.found = set[str]()  # the values, or their codes, that are read as they were trained to be
        self._choose()

    def _choose(self) -> None:
        """Which values nothing but multiplications read, all in the same codes."""
        wanted: dict[str, set[Wish]] = {}
        needed = _needed(self.program)
        for op in reversed(self._ops()):
            here = wanted.setdefault(op.name, {"wide"} if op.name == self.program.answer else set())
            for user in (user for user in op.users if _floats(user) and user in needed):
                match _kind(user):
                    case kind if kind in MULTIPLYING:
                        here.add(self.trained.get(user.name, "calibrated"))
                    case kind if kind in PASSING:
                        here |= wanted[user.name]
                    case _:
                        here.add("wide")
            match list(here):
                case ["calibrated"]:
                    self.eight[op.name] = None
                case [Range() as span]:
                    self.eight[op.name] = span

    def _span(self, name: str) -> Range:
        """What the 8-bit codes of a value span."""
        return self.eight.get(name) or self.ranges[name]

    def _ops(self) -> list[Op]:
        return list(self.program.exported.graph.nodes)

    def network(self) -> IntegerNetwork:
        """All steps."""
        needed = _needed(self.program)
        for op in self._ops():
            if op.op == "placeholder" and _floats(op) and op.name in self.inputs:
                self.codes[op.name] = Code.eight(self._span(op.name))
            if op.op != "call_function" or op not in needed:
                continue
            if _floats(op):
                self._step(op)
            else:
                self._whole(op)
        answer = self._name(self.program.answer)
        return IntegerNetwork(tuple(self.steps), self.inputs, self.codes, self.constants, answer,
                              self.program.key, frozenset(self.found))

    # ---- operations

    def _whole(self, op: Op) -> None:
        """Masks, positions, lengths: what is integers anyway."""
        value = op.meta["val"]
        if (isinstance(value, Tensor) and _kind(op) in FILLED
                and all(isinstance(each, int) for each in value.shape)):
            self.constants[op.name] = torch.full(value.shape, FILLED[_kind(op)], dtype=value.dtype)
            return
        for source in op.all_input_nodes:
            if _floats(source) and _kind(op) != "sym_size":
                raise self._refusal(op)
        self._call(op, op.target, tuple(self._whole_name(each) for each in op.all_input_nodes))

    def _step(self, op: Op) -> None:  # long: one arm for each operator
        match _kind(op):
            case "conv2d" | "linear" as kind:
                self._layer(op, kind)
            case "embedding":
                self._lookup(op)
            case "scaled_dot_product_attention":
                self._attention(op)
            case "layer_norm":
                self._normalize(op)
            case "gelu":
                self._gelu(op)
            case "tanh":
                self._tanh(op)
            case "add":
                self._add(op)
            case "relu":
                self._relu(op)
            case "max_pool2d":
                name, code = self._passed(op)
                self._write(Largest(op.name, (name,), code, _window(op)))
            case "avg_pool2d" | "mean" as kind:
                self._mean(op, kind)
            case kind if kind in MOVES:
                self._move(op)
            case kind if kind in ALIASES:
                self.renamed[op.name] = self._name(op.args[0].name)
            case _:
                raise self._refusal(op)

    def _refusal(self, op: Op) -> TargetError:
        return TargetError(f"{op.name}: {op.target} has no integer form here; convolutions, linear layers, "
                           "look-ups, attention, layer normalization, Gelu, tanh, Relu, sums and pooling "
                           "have one (fold BatchNorm first)")

    def _layer(self, op: Op, kind: str) -> None:
        site = self.program.sites[self.reads[op.name]]
        found = integers(self.trees[site.path])
        assert found is not None
        span = self.trained.get(op.name)
        name, given = self._read(op.args[0], eight=True, span=span)
        if span is not None:
            self.found.add(name)
        made, code = self._made(op)
        added = op.args[2] if len(op.args) > 2 else None
        weight, bias, scale = _sums(found, given, None if added is None else self._param(added))
        factor = Fixed.of(scale / code.scale)
        if kind == "linear":
            self._write(Linear(made, (name,), code, weight, bias, given.zero, factor))
            return
        window = Window((site.kernel[1], site.kernel[2]), _pair(op, 3), _pair(op, 4, (0, 0)), _pair(op, 5))
        groups = int(op.args[6]) if len(op.args) > 6 else 1
        self._write(Convolution(made, (name,), code, weight, bias, given.zero, factor, window, groups))

    def _lookup(self, op: Op) -> None:
        found = integers(self.trees[self.reads[op.name]])
        assert found is not None
        table = (found.widened(8).codes ^ 128).view(torch.int8)
        made, code = self._made(op)
        factor = Fixed.of(found.scale[:, 0].double().numpy() / code.scale)
        self._write(Lookup(made, (self._whole_name(op.args[1]),), code, table, factor))

    def _attention(self, op: Op) -> None:
        settings = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), op.args[3:], strict=False)),
                    **op.kwargs}
        mask = settings.get("attn_mask")
        if settings.get("is_causal") or settings.get("enable_gqa"):
            raise TargetError(f"{op.name}: causal attention and shared heads have no integer form here; "
                              "encoders have one")
        if mask is not None and mask.meta["val"].dtype != torch.bool:
            raise TargetError(f"{op.name}: a mask that is added has no integer form; one of yes and no has")
        (q, a), (k, b), (v, c) = (self._read(each, eight=True) for each in op.args[:3])
        made, code = self._made(op)
        scale = settings.get("scale") or op.args[0].meta["val"].shape[-1] ** -0.5
        reads = (q, k, v) if mask is None else (q, k, v, self._whole_name(mask))
        self._write(Attention(made, reads, code, (a.zero, b.zero, c.zero),
                              Fixed.of(a.scale * b.scale * float(scale) / UNIT),
                              Fixed.of(c.scale / code.scale / 2**MIXED)))

    def _normalize(self, op: Op) -> None:
        source, shape = op.args[0], op.args[1]
        if len(shape) != 1:
            raise TargetError(f"{op.name}: normalizes {len(shape)} axes; one has an integer form")
        name, given = self._read(source, eight=False)
        gamma, beta = (self._param(each).double().numpy() if each is not None else default
                       for each, default in zip((*op.args[2:4], None, None)[:2], (np.ones(1), np.zeros(1)),
                                                strict=True))
        epsilon = float(op.args[4]) if len(op.args) > 4 else 1e-5
        self.eight.pop(op.name, None)  # its bias is on the scale of what it makes
        made, code = self._made(op)
        width = int(shape[0])
        floor = min(round(epsilon * width / given.scale**2), 1 << 36)
        bias = torch.from_numpy(np.clip(np.round(beta / code.scale), -LIMIT, LIMIT).astype(np.int64))
        factor = Fixed.of(gamma * math.sqrt(width) / code.scale / 2**VECTOR)
        self._write(Normalize(made, (name,), code, floor, factor, bias))

    def _gelu(self, op: Op) -> None:
        name, given = self._read(op.args[0], eight=False)
        made, code = self._made(op)
        self._write(Gelu(made, (name,), code, Fixed.of(given.scale / math.sqrt(2) * 2**ERF_IN),
                         Fixed.of(given.scale / 2 ** (ERF_OUT + 1) / code.scale), self.erf))

    def _tanh(self, op: Op) -> None:
        name, given = self._read(op.args[0], eight=False)
        self.eight.pop(op.name, None)
        code = Code(2.0**-TANH, 0, -LIMIT, LIMIT)
        self._write(Tanh(op.name, (name,), code, Fixed.of(2 * given.scale / UNIT)))

    def _add(self, op: Op) -> None:
        if not all(isinstance(each, FxNode) for each in op.args[:2]) or op.kwargs:
            raise self._refusal(op)
        (one, first), (two, second) = (self._read(each) for each in op.args[:2])
        made, code = self._made(op)
        factors = tuple(round(each.scale / code.scale * 2**SUM) for each in (first, second))
        self._write(Add(made, (one, two), code, (first.zero, second.zero), (factors[0], factors[1])))

    def _relu(self, op: Op) -> None:
        if op.name in self.codes:
            return  # what makes its input does it
        name, code = self._passed(op)
        self._write(Relu(op.name, (name,), code))

    def _mean(self, op: Op, kind: str) -> None:
        name, given = self._read(op.args[0])
        shape = op.args[0].meta["val"].shape
        if kind == "mean" and {axis % len(shape) for axis in op.args[1]} != {2, 3}:
            raise TargetError(f"{op.name}: a mean over other axes than height and width has no integer form; "
                              "put the channels second")
        window = _window(op)
        if kind == "mean":
            window = Window((int(shape[2]), int(shape[3])), (1, 1))
        elif window.pad != (0, 0):
            raise TargetError(f"{op.name}: a mean over padding has no integer form; pad before it")
        made, code = self._made(op)
        factor = Fixed.of(given.scale / code.scale / prod(window.kernel))
        flat = len(op.meta["val"].shape) == 2
        self._write(Mean(made, (name,), code, given.zero, factor, window, flat))

    def _move(self, op: Op) -> None:
        """Codes change places, not values."""
        name, code = self._passed(op)
        target = torch.ops.aten.reshape.default if _kind(op) in ("view", "_unsafe_view") else op.target
        rest = tuple(self._whole_name(each) for each in op.all_input_nodes if each is not op.args[0])
        self._call(op, target, (name, *rest))
        self.codes[op.name] = code

    def _call(self, op: Op, target: Any, reads: tuple[str, ...]) -> None:
        nodes = tuple(each.name for each in op.all_input_nodes)
        self.steps.append(Call(op.name, reads, target, op.args, op.kwargs, nodes))

    # ---- values

    def _write(self, step: Any) -> None:
        self.steps.append(step)
        self.codes[step.name] = step.code

    def _made(self, op: Op) -> tuple[str, Code]:
        """The value that an operation makes, and its codes: of its Relu, where that is all that reads it
        and codes of 8 bits begin at zero anyway."""
        if op.name not in self.eight:
            return op.name, Code.wide(self.ranges[op.name])
        users = list(op.users)
        if len(users) == 1 and _kind(users[0]) == "relu" and self._span(users[0].name).zero == 0:
            self.renamed[op.name] = users[0].name
            return users[0].name, Code.eight(self._span(users[0].name))
        return op.name, Code.eight(self._span(op.name))

    def _passed(self, op: Op) -> tuple[str, Code]:
        """What an operation reads that leaves codes as they are."""
        return self._read(op.args[0], eight=op.name in self.eight, span=self.eight.get(op.name))

    def _read(self, source: Any, *, eight: bool | None = None, span: Range | None = None) -> tuple[str, Code]:
        """The name and the codes under which an operation reads a value; None: any codes. span: of 8-bit
        codes, where they are to be no others."""
        name = self._name(source.name)
        code = self.codes[name]
        made = Code.eight(span or self.ranges[source.name])
        if not eight or code == made or (span is None and code.dtype == torch.uint8):
            return name, code
        if (name, made) not in self.rescaled:
            others = sum(1 for each, _ in self.rescaled if each == name)
            rounded = f"{name}.codes{others or ''}"
            self._write(Rescale(rounded, (name,), made, code.zero, Fixed.of(code.scale / made.scale)))
            self.rescaled[name, made] = rounded
        return self.rescaled[name, made], made

    def _whole_name(self, op: Any) -> str:
        """The name of a whole number or tensor; constants are kept once something reads them."""
        if op.name in self.stored:
            self.constants[op.name] = self.own[self.stored[op.name]].detach()
        return self._name(op.name)

    def _name(self, name: str) -> str:
        return self.renamed.get(name, name)

    def _param(self, op: Any) -> Tensor:
        values: Tensor = self.own[self.stored[op.name]]
        return values.detach()


def _sums(found: Integers, given: Code, bias: Tensor | None) -> tuple[Tensor, Tensor, NDArray[np.float64]]:
    """A layer's weight, its bias on the scale of its sums, and that scale.

    Where a bias is too large for it, dead rows above all, the scale grows and the weights shrink.
    """
    weight = (found.widened(8).codes ^ 128).view(torch.int8)
    scale = given.scale * found.scale[:, 0].double().numpy()
    if bias is None:
        return weight, torch.zeros(len(weight), dtype=torch.int32), scale
    values = bias.double().numpy()
    least = np.abs(values) / LARGEST_BIAS
    small = np.abs(scale) < least
    if small.any():
        weight = (weight * torch.from_numpy(np.where(small, scale / np.where(small, least, 1), 1))[:, None]
                  ).round().to(torch.int8)
        scale = np.where(small, least, scale)
    sums = np.round(values / np.where(scale != 0, scale, 1))
    return weight, torch.from_numpy(sums.astype(np.int32)), scale


def _needed(program: Program) -> set[Op]:
    """What leads to the answer: assertions about lengths do not."""
    (last,) = (op for op in program.exported.graph.nodes if op.name == program.answer)
    found, waiting = set[Op](), [last]
    while waiting:
        op = waiting.pop()
        if op not in found:
            found.add(op)
            waiting += op.all_input_nodes
    return found


def _kind(op: Op) -> str:
    return str(op.target).removeprefix("aten.").partition(".")[0]


def _floats(op: Op) -> bool:
    """Whether a value is activations, not a length, a mask or an assertion."""
    value = op.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _pair(op: Op, place: int, otherwise: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    found = op.args[place] if len(op.args) > place else None
    if found is None or found == []:
        return otherwise
    both = [found] if isinstance(found, int) else list(found)
    return int(both[0]), int(both[-1])


def _window(op: Op) -> Window:
    """Of a pooling."""
    kernel = _pair(op, 1)
    return Window(kernel, _pair(op, 2, kernel), _pair(op, 3, (0, 0)))
