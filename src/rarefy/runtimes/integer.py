"""Inference in integers alone: what a processor without floating point computes.

Activations are codes of 8 bits, ``x = s (q - z)``; weights int8 with one scale a row; a layer accumulates in
32 bits and brings the sum back to codes by one fixed-point multiplication,

    q_out = z_out + (m * sum_j w_j (q_j - z) + 2^(k-1)) >> k,        m / 2^k = s_in s_w / s_out,

m of 32 bits. Biases lie on the accumulator's scale; residual sums and means are multiplied and shifted the
same way; maxima and reshaping need no arithmetic. A Relu behind a layer is the lower end of the codes.
``compiled`` uses floats, once, to find the integers; ``IntegerNetwork.run`` has none.

Paper: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 2 and appendix A.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rarefy.core.errors import TargetError
from rarefy.core.nodes import Node
from rarefy.export.onnx import stored_tensors
from rarefy.export.program import Program, Values, activation_ranges
from rarefy.formats.integers import integers
from rarefy.formats.onnx import computable
from rarefy.numerics.ranges import Range

Integers = NDArray[Any]
WORD = np.int64(2**31 - 1)
SHIFT = 24  # of sums: their operands have 8 bits


@dataclass(frozen=True, eq=False)
class Fixed:
    """A positive or negative number as ``mantissa / 2^shift``, the mantissa of 32 bits."""

    mantissa: Integers
    shift: Integers

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Fixed:
        """The nearest ones."""
        fraction, exponent = np.frexp(values)
        mantissa, shift = np.round(fraction * 2**31).astype(np.int64), 31 - exponent.astype(np.int64)
        full = np.abs(mantissa) > WORD  # rounding reached the next power of two
        mantissa, shift = np.where(full, mantissa // 2, mantissa), np.where(full, shift - 1, shift)
        far = np.maximum(shift - 62, 0)
        return cls(mantissa >> far, shift - far)

    def times(self, values: Integers) -> Integers:
        """The product with 32-bit integers [.., out], rounded to the nearest."""
        half = np.int64(1) << (self.shift - 1)
        return (values.astype(np.int64) * self.mantissa + half) >> self.shift


@dataclass(frozen=True, eq=False)
class Step:
    """One operation: the value it makes, those it reads, and how."""

    name: str
    reads: tuple[str, ...]
    compute: Callable[..., Integers]


@dataclass(frozen=True, eq=False)
class IntegerNetwork:
    """A network in integers. ranges: what the codes of every value stand for."""

    steps: tuple[Step, ...]
    ranges: Mapping[str, Range]
    input: str
    answer: str

    def codes(self, images: Tensor) -> Integers:
        """What a camera or microphone would deliver: inputs as codes. The last floats."""
        return self.ranges[self.input].codes(images).numpy().astype(np.uint8)

    def run(self, codes: Integers) -> Integers:
        """The codes of the answer, [samples, ...] uint8."""
        return self.values(codes)[self.answer]

    def values(self, codes: Integers) -> dict[str, Integers]:
        """Every value on the way, by name."""
        held = {self.input: codes}
        for step in self.steps:
            held[step.name] = step.compute(*(held[name] for name in step.reads))
        return held

    def answers(self, images: Tensor) -> Tensor:
        """What the answer's codes stand for."""
        found = torch.from_numpy(self.run(self.codes(images)).astype(np.float32))
        meant = self.ranges[self.answer]
        return (found - meant.zero) * meant.scale


def compiled(program: Program, trees: Mapping[str, Node], calibration: Sequence[Values],
             method: str = "minmax") -> IntegerNetwork:
    """The integers of a network of convolutions, linear layers, Relu, sums and pooling, BatchNorm folded.

    trees: 8-bit symmetric codes with one scale a row for every site. calibration, method: as for static 8-bit
    activations. TargetError names the operator or the weight that has no integer form.
    """
    for path in program.sites:
        if path not in trees or not computable(trees[path]):
            raise TargetError(f"{path}: integer arithmetic needs codes of at most 8 bits, symmetric, with "
                              "one scale a row; quantize it on int8")
    tensors = stored_tensors(program, trees)
    names = [node.name for node in program.exported.graph.nodes]
    ranges = activation_ranges(program, calibration, tensors, names, method)
    return _Compiler(program, trees, ranges).network()


class _Compiler:
    """Walks the program once and writes a step per operation."""

    def __init__(self, program: Program, trees: Mapping[str, Node], ranges: dict[str, Range]) -> None:
        self.program, self.trees, self.ranges = program, trees, ranges
        self.steps: list[Step] = []
        self.renamed: dict[str, str] = {}  # a value -> the step that makes it
        self.state = program.exported.state_dict

    def network(self) -> IntegerNetwork:
        """All steps."""
        specs = self.program.exported.graph_signature.input_specs
        (source,) = [spec.arg.name for spec in specs if spec.target is None]
        for node in self.program.exported.graph.nodes:
            if node.op == "call_function" and self._computes(node):
                self._step(node)
        answer = self.renamed.get(self.program.answer, self.program.answer)
        return IntegerNetwork(tuple(self.steps), self.ranges, source, answer)

    def _computes(self, node: Any) -> bool:
        """Whether the result is an activation, not a length or an assertion about one."""
        return isinstance(node.meta.get("val"), Tensor)

    def _step(self, node: Any) -> None:
        kind = str(node.target).removeprefix("aten.").partition(".")[0]
        match kind:
            case "conv2d" | "linear":
                self._layer(node, kind)
            case "relu":
                self._relu(node)
            case "add":
                self._add(node)
            case "max_pool2d":
                self.ranges[node.name] = self._range(node.args[0])
                kernel, pad = _pair(node, 1), _pair(node, 3, (0, 0))
                stride = _pair(node, 2, kernel)
                self._write(node, (node.args[0],), lambda x: _windows(x, kernel, stride, pad).max((-2, -1)))
            case "avg_pool2d" | "mean":
                self._mean(node, kind)
            case "view" | "reshape" | "flatten":
                self.ranges[node.name] = self._range(node.args[0])
                self._write(node, (node.args[0],), lambda x: x.reshape(len(x), -1))
            case "clone" | "dropout" | "alias":
                self.renamed[node.name] = self._name(node.args[0])
            case _:
                raise TargetError(f"{node.name}: {node.target} has no integer form here; networks of "
                                  "convolutions, linear layers, Relu, sums and pooling have one (fold "
                                  "BatchNorm first)")

    def _layer(self, node: Any, kind: str) -> None:
        path = self.program.reads[node.name]
        found, site, name = integers(self.trees[path]), self.program.sites[path], self._fused(node)
        assert found is not None
        given, made = self._range(node.args[0]), self.ranges[name]
        weight = found.widened(8).codes.numpy().astype(np.int32) - 128
        scale = given.scale * found.scale[:, 0].double().numpy()
        bias = np.zeros(len(weight), np.int32)
        if len(node.args) > 2 and node.args[2] is not None:
            values = self._bias(node.args[2]).double().numpy()
            sums = np.round(values / np.where(scale != 0, scale, 1))
            bias = np.clip(sums, -(2**31), 2**31 - 1).astype(np.int32)
        factor, zero = Fixed.of(scale / made.scale), np.int32(given.zero)
        if kind == "linear":
            def multiply(x: Integers) -> Integers:
                return (x.astype(np.int32) - zero) @ weight.T + bias
            self._write(node, (node.args[0],), lambda x: _codes(factor.times(multiply(x)), made), name)
            return
        move = (site.kernel[1:], _pair(node, 3, (1, 1)), _pair(node, 4, (0, 0)), _pair(node, 5, (1, 1)),
                int(node.args[6]) if len(node.args) > 6 else 1)

        def convolve(x: Integers) -> Integers:
            sums = _convolved(x.astype(np.int32) - zero, weight, *move) + bias
            return np.moveaxis(_codes(factor.times(sums), made), -1, 1)

        self._write(node, (node.args[0],), convolve, name)

    def _relu(self, node: Any) -> None:
        given = self._name(node.args[0])
        if given == node.name:
            return  # the layer before it did it
        before, after = self._range(node.args[0]), self.ranges[node.name]
        factor, zero = Fixed.of(np.array(before.scale / after.scale)), np.int32(before.zero)
        self._write(node, (node.args[0],), lambda x: _codes(
            factor.times(np.maximum(x.astype(np.int32) - zero, 0)), after))

    def _add(self, node: Any) -> None:
        name = self._fused(node)
        made, given = self.ranges[name], [self._range(each) for each in node.args[:2]]
        one, two = (np.int64(round(each.scale / made.scale * 2**SHIFT)) for each in given)
        first, second = (np.int64(each.zero) for each in given)
        half = np.int64(1 << (SHIFT - 1))

        def add(x: Integers, y: Integers) -> Integers:
            total = (x.astype(np.int64) - first) * one + (y.astype(np.int64) - second) * two
            return _codes((total + half) >> np.int64(SHIFT), made)

        self._write(node, tuple(node.args[:2]), add, name)

    def _mean(self, node: Any, kind: str) -> None:
        given, made = self._range(node.args[0]), self.ranges[node.name]
        shape = node.args[0].meta["val"].shape
        kernel = (int(shape[2]), int(shape[3])) if kind == "mean" else _pair(node, 1)
        if kind == "mean" and {axis % len(shape) for axis in node.args[1]} != {2, 3}:
            raise TargetError(f"{node.name}: a mean over other axes than height and width has no integer "
                              "form; put the channels second")
        stride = kernel if kind == "mean" else _pair(node, 2, kernel)
        flat = len(node.meta["val"].shape) == 2
        factor, zero = Fixed.of(np.array(given.scale / made.scale / prod(kernel))), np.int32(given.zero)

        def average(x: Integers) -> Integers:
            seen = _windows(x, kernel, stride, (0, 0)).astype(np.int32) - zero
            sums = seen.sum((-2, -1), dtype=np.int32)
            codes = _codes(factor.times(sums), made)
            return codes.reshape(codes.shape[:2]) if flat else codes

        self._write(node, (node.args[0],), average)

    def _fused(self, node: Any) -> str:
        """The value that a layer makes: what its Relu gives, where one is all that reads it."""
        users = list(node.users)
        if len(users) == 1 and "relu" in str(users[0].target) and self.ranges[users[0].name].zero == 0:
            self.renamed[node.name] = users[0].name
            return str(users[0].name)
        return str(node.name)

    def _write(self, node: Any, reads: tuple[Any, ...], compute: Callable[..., Integers],
               name: str = "") -> None:
        self.steps.append(Step(name or node.name, tuple(self._name(each) for each in reads), compute))

    def _name(self, node: Any) -> str:
        return self.renamed.get(node.name, node.name)

    def _range(self, node: Any) -> Range:
        return self.ranges[self._name(node)]

    def _bias(self, node: Any) -> Tensor:
        specs = self.program.exported.graph_signature.input_specs
        path = next(spec.target for spec in specs if spec.arg.name == node.name)
        values: Tensor = self.state[path]
        return values.detach()


def _codes(values: Integers, meant: Range) -> Integers:
    """Multiples of the output's step as codes of 8 bits."""
    return np.clip(values + np.int64(meant.zero), 0, 255).astype(np.uint8)


def _pair(node: Any, place: int, otherwise: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    found = node.args[place] if len(node.args) > place else None
    if found is None or found == []:
        return otherwise
    both = [found] if isinstance(found, int) else list(found)
    return int(both[0]), int(both[-1])


def _windows(x: Integers, kernel: Sequence[int], stride: Sequence[int], pad: Sequence[int],
             dilation: Sequence[int] = (1, 1)) -> Integers:
    """[samples, channels, height, width] -> [.., rows, columns, kernel, kernel], zeros around."""
    around = np.pad(x, ((0, 0), (0, 0), (pad[0], pad[0]), (pad[1], pad[1])))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    seen = np.lib.stride_tricks.sliding_window_view(around, reach, (2, 3))
    return seen[:, :, ::stride[0], ::stride[1], ::dilation[0], ::dilation[1]]


def _convolved(x: Integers, weight: Integers, kernel: Sequence[int], stride: Sequence[int],
               pad: Sequence[int], dilation: Sequence[int], groups: int) -> Integers:
    """32-bit sums, [samples, rows, columns, out]."""
    seen = _windows(x, kernel, stride, pad, dilation)
    samples, channels, rows, columns = seen.shape[:4]
    parts = seen.reshape(samples, groups, channels // groups, rows, columns, -1).transpose(1, 0, 3, 4, 2, 5)
    parts = parts.reshape(groups, samples * rows * columns, -1)
    sums = parts @ weight.reshape(groups, len(weight) // groups, -1).transpose(0, 2, 1)
    return sums.transpose(1, 0, 2).reshape(samples, rows, columns, -1)
