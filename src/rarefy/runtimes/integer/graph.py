"""A network in integers as an ONNX file: the same sums, shifts and codes, by ONNX Runtime's integer kernels.

    f q = (m q + 2^(k-1)) >> k        is        BitShift(m q + 2^(k-1) + 2^62, k) - 2^(62-k)

because ONNX shifts unsigned numbers alone. Products are ConvInteger and MatMulInteger: 8 bits in, sums of 32.
Operators that only move codes, masks and positions are those of the traced graph. Floats stand at the two
ends, where images come in as floats and where answers leave as such; between them the file holds none, and it
answers bit for bit as the interpreter does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rarefy.core.errors import TargetError
from rarefy.export.program import Program
from rarefy.formats.onnx import OPSET, Graph, onnx_package
from rarefy.numerics.fixed_point import (
    COEFFICIENT,
    ERF_IN,
    ERF_OUT,
    EXP_EDGE,
    EXP_REST,
    EXP_SQUARE,
    FAR,
    FINE,
    ITERATIONS,
    LOG,
    POWERS,
    RECIPROCAL,
    TANH,
    VECTOR,
    Erf,
    Fixed,
    headroom,
)
from rarefy.runtimes.integer.network import IntegerNetwork
from rarefy.runtimes.integer.steps import (
    DIVIDED,
    LIMIT,
    MIXED,
    NEVER,
    PROBABILITY,
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
    Made,
    Mean,
    Normalize,
    Relu,
    Rescale,
    Tanh,
    Window,
)
from rarefy.runtimes.session import Session

OFFSET = 1 << 62  # what makes a product with a factor positive: it is smaller than that
END = (1 << 63) - 1


@dataclass(frozen=True, eq=False)
class IntegerFile:
    """A file that was written, and the network that it is to answer like."""

    path: Path
    bytes: int
    network: IntegerNetwork

    def verify(self, batches: Iterable[Mapping[str, Tensor]]) -> str:
        """The runtime, in a fresh process, against the interpreter: no bit may differ, or TargetError."""
        with Session(self.path, "onnxruntime") as session:
            for inputs in batches:
                found, expected = session.answer(inputs), self.network.answers(inputs)
                apart = int((found != expected).sum()) if found.shape == expected.shape else found.numel()
                if apart:
                    raise TargetError(f"{self.path}: {session.version} answers otherwise than the integers "
                                      f"say, in {apart} of {found.numel()} numbers; the file is not to be "
                                      "used (processors without VNNI saturate 8-bit products)")
            return session.version


def export_integer(network: IntegerNetwork, program: Program, path: Path | str) -> IntegerFile:
    """Write a network in integers, ``compiled`` from ``program``, as an ONNX file for ONNX Runtime."""
    onnx = onnx_package()
    proto = _Writer(network, program).model()
    onnx.checker.check_model(proto)
    path = Path(path)
    path.write_bytes(proto.SerializeToString())
    return IntegerFile(path, path.stat().st_size, network)


class Words:
    """Arithmetic of 64-bit words in an ONNX graph, as ``numerics.fixed_point`` has it for tensors."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.types = graph, onnx_package().TensorProto

    def constant(self, values: int | Tensor | NDArray[Any], kind: Any = np.int64) -> str:
        """A stored number, or numbers; equal ones are stored once."""
        array = np.asarray(values.numpy() if isinstance(values, Tensor) else values).astype(kind)
        what = str(array) if array.ndim == 0 else sha256(array.tobytes()).hexdigest()[:16]
        return self.graph.constant(f"{array.dtype}.{what}", array)

    def op(self, kind: str, *operands: str | int, **attributes: Any) -> str:
        """An operator; whole numbers among the operands become 64-bit constants."""
        names = [self.constant(each) if isinstance(each, int) else each for each in operands]
        return self.graph.add(kind, *names, **attributes)

    def cast(self, value: str, kind: str) -> str:
        return self.graph.add("Cast", value, to=getattr(self.types, kind))

    def long(self, value: str) -> str:
        return self.cast(value, "INT64")

    def shift(self, value: str, bits: str | int | NDArray[Any]) -> str:
        """Of numbers that are not negative, to the right. bits: known, or the name of a 64-bit value."""
        by = self.cast(bits, "UINT64") if isinstance(bits, str) else self.constant(bits, np.uint64)
        return self.long(self.graph.add("BitShift", self.cast(value, "UINT64"), by, direction="RIGHT"))

    def power(self, exponent: str) -> str:
        """Of two."""
        one = self.graph.add("BitShift", self.constant(1, np.uint64), self.cast(exponent, "UINT64"),
                             direction="LEFT")
        return self.long(one)

    def shifted(self, value: str, bits: int, more: int = 0) -> str:
        """``value / 2^bits`` to the nearest, plus ``more``."""
        moved = self.shift(self.op("Add", value, OFFSET + (1 << (bits - 1))), bits)
        return self.op("Add", moved, more - (OFFSET >> bits))

    def times(self, value: str, factor: Fixed, before: Any = 0, after: Any = 0, shape: Sequence[int] = ()
              ) -> str:
        """``factor (value + before) + after``; shape: of the channels among the axes of ``value``."""
        mantissa, shift, first, last = (
            np.reshape(each, shape) if shape and np.ndim(each) else np.asarray(each)
            for each in (factor.mantissa.numpy(), factor.shift.numpy(), before, after))
        product = self.op("Mul", value, self.constant(mantissa))
        half = np.left_shift(np.int64(1), shift - 1)
        moved = self.shift(self.op("Add", product, self.constant(first * mantissa + half + OFFSET)), shift)
        return self.op("Add", moved, self.constant(last - np.right_shift(np.int64(OFFSET), shift)))

    def exponential(self, below: str, one: int) -> str:
        whole = self.shift(below, LOG)
        rest = self.op("Sub", self.op("Add", self.op("Mul", whole, 1 << LOG), EXP_EDGE), below)
        value = self.times(self.op("Mul", rest, rest), EXP_SQUARE, after=EXP_REST)
        shift = self.op("Add", self.op("Min", whole, FAR), FINE)
        half = self.power(self.op("Sub", shift, 1))
        return self.op("Min", self.shift(self.op("Add", self.op("Mul", value, one), half), shift), one)

    def hyperbolic_tangent(self, twice: str) -> str:
        one = 1 << FINE
        small = self.exponential(twice, one)
        left = self.op("Mul", self.op("Sub", one, small), 1 << TANH)
        return self.op("Div", left, self.op("Add", small, one))

    def error_function(self, u: str, form: Erf) -> str:
        inside = self.op("Max", self.op("Sub", form.start, self.op("Abs", u)), 0)
        total = ""
        for word in form.words:
            total = (self.shifted(self.op("Mul", total, inside), ERF_IN, word) if total
                     else self.constant(word))
        total = self.shifted(self.op("Mul", total, inside), ERF_IN)
        total = self.shifted(self.op("Mul", total, inside), ERF_IN + COEFFICIENT - ERF_OUT)
        return self.op("Mul", self.op("Sign", u), self.op("Sub", 1 << ERF_OUT, total))

    def square_root(self, n: str) -> str:
        """Of values with a last axis of one."""
        above = self.graph.add("GreaterOrEqual", n, self.constant(POWERS))
        x = self.power(self.sum(self.long(above)))
        for _ in range(ITERATIONS):
            better = self.op("Add", x, self.op("Div", n, self.op("Max", x, 1)))
            x = self.op("Min", x, self.shift(better, 1))
        return x

    def unit_vectors(self, x: str, floor: int, width: int) -> str:
        more, base = headroom(width), LIMIT + 1
        total = self.op("Add", self.op("Mul", self.sum(x), 2), width + 2 * width * base)
        mean = self.op("Sub", self.op("Div", total, 2 * width), base)  # never below zero where it is rounded
        apart = self.op("Sub", x, mean)
        squares = self.op("Add", self.sum(self.op("Mul", apart, apart)), floor)
        root = self.op("Max", self.square_root(self.op("Mul", squares, 1 << 2 * more)), 1)
        product = self.op("Mul", apart, self.op("Div", 1 << RECIPROCAL, root))
        return self.shifted(product, RECIPROCAL - more - VECTOR)

    def sum(self, value: str) -> str:
        """Of the last axis, which stays."""
        return self.graph.add("ReduceSum", value, self.constant(np.array([-1])), keepdims=1)

    def codes(self, value: str, code: Code, name: str) -> None:
        """64-bit values, their zero added, as codes under a name."""
        kept = self.op("Clip", value, code.low, code.high)
        kind = self.types.UINT8 if code.dtype == torch.uint8 else self.types.INT32
        self.graph.add("Cast", kept, name=name, to=kind)


class _Writer:
    """Writes the steps in their order."""

    def __init__(self, network: IntegerNetwork, program: Program) -> None:
        self.network, self.program, self.graph = network, program, Graph()
        self.words, source = Words(self.graph), program.proto.graph
        self.inputs = list(source.input)
        self.makers = {name: node for node in source.node for name in node.output}
        self.initial = {each.name: each for each in source.initializer}
        self.shapes = {op.name: op.meta["val"].shape for op in program.exported.graph.nodes
                       if isinstance(op.meta.get("val"), Tensor)}
        self.held: dict[str, str] = {}  # a value of the network -> its name in the file
        self.copied: set[str] = set()

    def model(self) -> Any:
        """The whole file."""
        onnx = onnx_package()
        for name, given in zip(self.network.inputs, self.inputs, strict=True):
            self.held[name] = self._coded(given.name, name)
        paths = {spec.arg.name: spec.target
                 for spec in self.program.exported.graph_signature.input_specs}
        for name, values in self.network.constants.items():
            self.held[name] = (self._copied(paths[name], {}) if name in paths
                               else self.graph.constant(name, values))
        for step in self.network.steps:
            self.held[step.name] = self._step(step)
        self._answer()
        output = onnx.ValueInfoProto()
        output.CopyFrom(self.program.proto.graph.output[0])
        output.name = self.program.key
        made = onnx.helper.make_graph(self.graph.nodes, "rarefy", self.inputs, [output],
                                      list(self.graph.constants.values()))
        return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", OPSET)],
                                      producer_name="rarefy",
                                      ir_version=min(10, self.program.proto.ir_version))

    def _coded(self, given: str, name: str) -> str:
        """An input as codes: of images, what their floats round to."""
        code = self.network.codes_of.get(name)
        if code is None:
            return given
        scale = self.words.constant(np.array(code.scale), np.float32)
        codes = self.graph.add("QuantizeLinear", given, scale, self.words.constant(code.zero, np.uint8))
        if code.high == 255:
            return codes
        return self.graph.add("Clip", codes, "", self.words.constant(code.high, np.uint8))

    def _answer(self) -> None:
        code = self.network.codes_of[self.network.answer]
        scale = self.words.constant(np.array(code.scale), np.float32)
        self.graph.add("DequantizeLinear", self.held[self.network.answer], scale, name=self.program.key)

    def _step(self, step: Any) -> str:
        read = [self.held[name] for name in step.reads]
        match step:
            case Call():
                return self._copied(step.name, dict(zip(step.nodes, read, strict=True)))
            case Linear():
                self._linear(step, *read)
            case Convolution():
                self._convolution(step, *read)
            case Lookup():
                self._lookup(step, *read)
            case Attention():
                self._attention(step, *read)
            case Relu():
                kind = np.uint8 if step.code.dtype == torch.uint8 else np.int32
                self.graph.add("Clip", *read, self.words.constant(step.code.zero, kind), name=step.name)
            case _:
                self.words.codes(self._sixty_four(step, [self.words.long(each) for each in read]), step.code,
                                 step.name)
        return str(step.name)

    def _sixty_four(self, step: Made, read: list[str]) -> str:
        """Steps that compute with words from the start; their zero added."""
        words, zero = self.words, step.code.zero
        match step:
            case Add(zeros=zeros, factors=factors):
                terms = [words.op("Mul", words.op("Sub", each, z) if z else each, factor)
                         for each, z, factor in zip(read, zeros, factors, strict=True)]
                return words.shifted(words.op("Add", *terms), SUM, zero)
            case Rescale(zero=given, factor=factor):
                return words.times(read[0], factor, -given, zero)
            case Normalize(floor=floor, factor=factor, bias=bias):
                width = int(self.shapes[step.name][-1])
                return words.times(words.unit_vectors(read[0], floor, width), factor, 0, bias.numpy() + zero)
            case Gelu(inner=inner, factor=factor, form=form):
                half = words.op("Add", words.error_function(words.times(read[0], inner), form), 1 << ERF_OUT)
                return words.times(words.op("Mul", read[0], half), factor, 0, zero)
            case Tanh(factor=factor):
                size = words.hyperbolic_tangent(words.times(words.op("Abs", read[0]), factor))
                return words.op("Add", words.op("Mul", words.op("Sign", read[0]), size), zero)
            case Largest(window=window):
                return self._under(read[0], window, step.code.low, "Max")
            case Mean():
                return self._mean(step, read[0])
            case _:
                raise TypeError(type(step).__name__)

    def _linear(self, step: Linear, x: str) -> None:
        weight = self.graph.constant(f"{step.name}.weight", step.weight.T.contiguous())
        sums = self.graph.add("MatMulInteger", x, weight, self.words.constant(step.zero, np.uint8))
        self.words.codes(self.words.times(self.words.long(sums), step.factor, step.bias.long().numpy(),
                                          step.code.zero), step.code, step.name)

    def _convolution(self, step: Convolution, x: str) -> None:
        window, rows = step.window, len(step.weight)
        weight = self.graph.constant(f"{step.name}.weight", step.weight.reshape(rows, -1, *window.kernel))
        sums = self.graph.add("ConvInteger", x, weight, self.words.constant(step.zero, np.uint8),
                              kernel_shape=list(window.kernel), strides=list(window.stride),
                              pads=list(window.pad) * 2, dilations=list(window.dilation), group=step.groups)
        self.words.codes(self.words.times(self.words.long(sums), step.factor, step.bias.long().numpy(),
                                          step.code.zero, (1, rows, 1, 1)), step.code, step.name)

    def _lookup(self, step: Lookup, index: str) -> None:
        words, rows = self.words, {}
        for name, values in (("table", step.table), ("mantissa", step.factor.mantissa.int()[:, None]),
                             ("shift", step.factor.shift.to(torch.uint8)[:, None])):
            stored = self.graph.constant(f"{step.name}.{name}", values)
            rows[name] = words.long(self.graph.add("Gather", stored, index, axis=0))
        product = words.op("Mul", rows["table"], rows["mantissa"])
        half = words.power(words.op("Sub", rows["shift"], 1))
        moved = words.shift(words.op("Add", words.op("Add", product, half), OFFSET), rows["shift"])
        back = words.shift(words.constant(OFFSET), rows["shift"])
        found = words.op("Sub", moved, back)
        words.codes(words.op("Add", found, step.code.zero), step.code, step.name)

    def _attention(self, step: Attention, q: str, k: str, v: str, mask: str = "") -> None:
        words, add = self.words, self.graph.add
        one, two, three = (words.constant(zero, np.uint8) for zero in step.zeros)
        axes = list(range(len(self.shapes[step.name])))
        turned = add("Transpose", k, perm=[*axes[:-2], axes[-1], axes[-2]])
        scores = words.times(words.long(add("MatMulInteger", q, turned, one, two)), step.sharpness)
        if mask:
            scores = words.op("Where", mask, scores, NEVER)
        largest = add("ReduceMax", scores, words.constant(np.array([-1])), keepdims=1)
        share = words.exponential(words.op("Sub", largest, scores), PROBABILITY)
        if mask:
            share = words.op("Where", mask, share, 0)
        whole = words.op("Div", 1 << DIVIDED, words.op("Max", words.sum(share), 1))
        zero = words.constant(0, np.uint8)
        mixed = words.long(add("MatMulInteger", words.cast(share, "UINT8"), v, zero, three))
        fine = words.shifted(words.op("Mul", mixed, whole), DIVIDED - MIXED)
        words.codes(words.times(fine, step.factor, 0, step.code.zero), step.code, step.name)

    def _mean(self, step: Mean, x: str) -> str:
        before, shape = -step.zero * prod(step.window.kernel), self.shapes[step.name]
        if step.flat or tuple(shape[2:]) == (1, 1):
            axes = self.words.constant(np.array([2, 3]))
            sums = self.graph.add("ReduceSum", x, axes, keepdims=int(not step.flat))
        else:
            sums = self._under(x, step.window, 0, "Add")
        return self.words.times(sums, step.factor, before, step.code.zero)

    def _under(self, x: str, window: Window, around: int, op: str) -> str:
        """The values under a window, joined by ``op``: one slice for each place of the kernel."""
        words, total = self.words, ""
        if any(window.pad):
            pads = words.constant(np.array([0, 0, *window.pad] * 2))
            x = self.graph.add("Pad", x, pads, words.constant(around))
        axes, steps = words.constant(np.array([2, 3])), words.constant(np.array(window.stride))
        for place in np.ndindex(*window.kernel):
            start = [at * apart for at, apart in zip(place, window.dilation, strict=True)]
            left = [(size - 1) * apart - at for size, apart, at in
                    zip(window.kernel, window.dilation, start, strict=True)]
            stop = words.constant(np.array([-each if each else END for each in left]))
            part = self.graph.add("Slice", x, words.constant(np.array(start)), stop, axes, steps)
            total = words.op(op, total, part) if total else part
        return total

    def _copied(self, name: str, known: Mapping[str, str]) -> str:
        """A value of the traced graph, by the traced graph's own operators. known: how they call values that
        are here."""
        if name in known:
            return known[name]
        if name in self.held or name in self.copied:
            return self.held.get(name, name)
        if name in self.initial:
            self.graph.constants[name] = self.initial[name]
            return name
        maker = self.makers.get(name)
        if maker is None:  # an input of the file
            return name
        copy = type(maker)()
        copy.CopyFrom(maker)
        inputs = [self._copied(each, known) if each else "" for each in maker.input]
        del copy.input[:], copy.metadata_props[:]
        copy.input.extend(inputs)
        self.graph.nodes.append(copy)
        self.copied |= set(maker.output)
        return name
