"""A network as an ONNX file that multiplies with the codes of its trees.

The graph is that of ``torch.export``; every operator that reads a weight is replaced by the smallest piece
that reads the weight's tree (``formats.onnx``), and BatchNorm is folded into the convolution before it, which
scales the scales of its rows and leaves the codes alone. How 8-bit weights are multiplied is a setting:

    float     they are decoded, by MatMulNBits or when the runtime loads the file
    dynamic   linear layers round their input to 8 bits as it comes, a scale for every token; weights of fewer
              bits, and those behind factors of channels (``numerics.ranges``), are rounded to 8 bits when
              the file is loaded, because that is what is fast
    static    linear layers and convolutions between QuantizeLinear and DequantizeLinear with ranges that
              training found for their inputs, or else calibration; residual sums and pooling between
              convolutions stay in 8 bits

Papers: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference"; Migacz 2017, "8-bit Inference with TensorRT" (entropy ranges).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.core.errors import TargetError, did_you_mean
from rarefy.core.nodes import Dense, Node
from rarefy.core.nouns import Target
from rarefy.export.fusing import keep_apart
from rarefy.export.program import Program, Values, activation_ranges, activation_samples, trace
from rarefy.export.reading import Quantization, Reading, Use, agreed, attribute, quantization
from rarefy.formats.integers import integers
from rarefy.formats.onnx import (
    MICROSOFT,
    OPSET,
    ROWS,
    Compute,
    Graph,
    Window,
    computable,
    convolution,
    embedding,
    linear,
    onnx_package,
    weight,
)
from rarefy.models.folding import folded_rows
from rarefy.models.map import Site
from rarefy.numerics.grids import Grid, integer_grid
from rarefy.numerics.ranges import Range, Rows, rows_for

GRIDS: dict[str, Grid] = {
    "int8": integer_grid(8, 0, dtype=torch.float32),
    "int4": integer_grid(4, 32, dtype=torch.float32),
    "int4z": integer_grid(4, 32, symmetric=False, dtype=torch.float32),
    "int4g128": integer_grid(4, 128, dtype=torch.float32),
    "int2": integer_grid(2, 32, symmetric=False, dtype=torch.float32),
}
ONNXRUNTIME = Target("onnxruntime", (*GRIDS, "F16", "F32", "tree"), ".onnx",
                     description="ONNX files for ONNX Runtime: 8-bit integer kernels, 2 to 8 bits for "
                                 "weights alone, low rank as two products")
LARGEST = 2_000_000_000  # bytes of one protobuf message


@dataclass(frozen=True)
class OnnxSettings:
    """How the file computes.

    compute: see above. ranges: how static ranges are found: minmax, percentile or entropy. accuracy: of
    MatMulNBits, 0 (float32) or 4 (it may round activations to 8 bits, which is faster). contrib: may use
    operators that only ONNX Runtime has.
    """

    compute: Compute = "float"
    ranges: str = "minmax"
    accuracy: int = 0
    contrib: bool = True


@dataclass(frozen=True, eq=False)
class Exported:
    """A file that was written, and all that is needed to say what it should answer.

    ranges: of values. trained: of what operators read, where training found it. notes: which weights went
    over larger than they are stored.
    """

    path: Path
    bytes: int
    program: Program
    trees: Mapping[str, Node]
    settings: OnnxSettings
    ranges: Mapping[str, Range]
    plan: Quantization
    notes: tuple[str, ...] = ()
    params: Mapping[str, Tensor] | None = None
    rows: Mapping[str, Rows] = field(default_factory=dict)
    trained: Mapping[str, Range] = field(default_factory=dict)

    @property
    def places(self) -> tuple[int, int]:
        """How many values multiplications read in codes that training found, and how many in calibrated
        ones."""
        read = {(source, self.trained.get(name)) for name, source in self.plan.operators.items()}
        found = sum(span is not None for _, span in read)
        return found, len(read) - found

    def expected(self, inputs: Values) -> Tensor:
        """Our own evaluation of the same trees, activations rounded where the file rounds them."""
        return self.program.run(inputs, self._tensors, argument=self._argument, value=self._value)

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        tensors = {**self.program.tensors(self.trees), **dict(self.params or {})}
        if self.settings.compute == "dynamic":
            for name, source in self.plan.operators.items():
                path, rows = self.program.reads[name], self.rows.get(source, ROWS)
                if rows.factors is not None or not computable(self.trees[path]):
                    site = self.program.sites[path]
                    tensors[path] = site.stored(rows.weight(self.trees[path].dense()))
        return tensors

    def _argument(self, name: str, values: Tensor) -> Tensor:
        if name not in self.plan.operators or self.settings.compute == "float":
            return values
        source = self.plan.operators[name]
        if self.settings.compute == "dynamic":
            return self.rows.get(source, ROWS).rounded(values)
        own, span = self.ranges[source], self.trained.get(name)
        if source in self.plan.chained and span in (None, own):
            return values
        return (span or own).rounded(values)

    def _value(self, name: str, values: Tensor) -> Tensor:
        if self.settings.compute == "static" and name in self.plan.chained:
            return self.ranges[name].rounded(values)
        return values


def export_onnx(module: nn.Module, trees: Mapping[str, Node], path: Path | str, *, inputs: Values,
                settings: OnnxSettings | None = None, calibration: Sequence[Values] = (),
                dynamic: tuple[int, ...] = (0,), params: Mapping[str, Tensor] | None = None,
                program: Program | None = None, ranges: Mapping[str, Range] | None = None) -> Exported:
    """Write a network as one ONNX file.

    trees: what to store for each site; a site without one is stored as the module has it. inputs: an
    example of what the network is called with. calibration: batches of inputs, for ranges of activations
    (static), or for how rows of them are rounded (dynamic; without, all alike). dynamic:
    axes of the inputs that may have any length (texts: 0 and 1). params: norms or biases in place of the
    module's. program: of ``trace``, when there is one already. ranges: of the inputs of layers, by the
    layer's name, where training found them (static).
    """
    settings = settings or OnnxSettings()
    program = program or trace(module.eval(), inputs, dynamic)
    changed = dict(params or {})
    for key in (*trees, *changed):
        known = list(program.sites) if key in trees else list(program.exported.state_dict)
        if key not in known:
            raise TargetError(f"{key}: no such weight{did_you_mean(key, known)}")
    own = program.exported.state_dict
    whole = {name: trees.get(name) or Dense(site.matrix(own[name].detach()).contiguous())
             for name, site in program.sites.items()}
    plan = quantization(program, whole, settings.compute)
    spans, rows, trained = dict[str, Range](), dict[str, Rows](), dict[str, Range]()
    tensors = {} if settings.compute == "float" else {**program.tensors(whole), **changed}
    if settings.compute == "dynamic" and calibration:
        rows = _rows(program, calibration, tensors, whole, plan)
    if settings.compute == "static":
        trained = {name: span for name, span in program.trained(ranges or {}).items()
                   if name in plan.operators}
        spans = activation_ranges(program, calibration, tensors, plan.values, settings.ranges, trained)
        spans |= agreed(program, plan, trained)
        spans |= {name: spans[source] for name, source in plan.passing.items()}
    writer = _Writer(program, whole, settings, spans, plan, changed, rows, trained)
    proto = writer.model()
    size = _save(proto, Path(path))
    return Exported(Path(path), size, program, whole, settings, spans, plan, tuple(writer.graph.notes),
                    changed, rows, trained)


def _rows(program: Program, batches: Sequence[Values], tensors: Values, trees: Mapping[str, Node],
          plan: Quantization) -> dict[str, Rows]:
    """How each value that is multiplied in integers is rounded, decided on samples."""
    readers: dict[str, list[str]] = defaultdict(list)
    for name, source in plan.operators.items():
        readers[source].append(program.reads[name])
    samples = activation_samples(program, batches, tensors, readers)
    return {source: rows_for(*samples[source], torch.cat([trees[path].dense() for path in paths]))
            for source, paths in readers.items()}


class _Writer:
    """Copies the graph operator by operator, with those that read weights replaced."""

    def __init__(self, program: Program, trees: Mapping[str, Node], settings: OnnxSettings,
                 ranges: Mapping[str, Range], plan: Quantization, params: Mapping[str, Tensor],
                 rows: Mapping[str, Rows], trained: Mapping[str, Range]) -> None:
        self.program, self.trees, self.settings = program, trees, settings
        self.ranges, self.plan, self.params, self.rows = ranges, plan, params, rows
        self.trained = trained
        self.reading = Reading(program)
        self.graph = Graph(contrib=settings.contrib, accuracy=settings.accuracy)
        self._last = ""  # what the convolution just written gives
        self.before: dict[str, str] = {}  # a value -> what it is before its Relu, which rounding does
        self.rounded: dict[tuple[str, Range], str] = {}  # a value -> itself out of a DequantizeLinear

    def model(self) -> Any:
        """The whole file."""
        onnx, source = onnx_package(), self.program.proto.graph
        absorbed: set[str] = set()
        for name, given in self.program.inputs.items():
            self.graph.add("Identity", given, name=name)
        for node in source.node:
            if node.name in absorbed or node.output[0] in self.reading.turned:
                continue
            absorbed |= self._place(node)
        answers = {self.program.key: self.program.answer, **self.program.others}
        for name, value in answers.items():
            self.graph.add("Identity", self._read(value, chained=True), name=name)
        if self.graph.contrib:
            keep_apart(self.graph, self.reading.initial)
        self._keep_needed(source, set(answers))
        inputs = [_called(each, self.program.inputs.get(each.name, each.name)) for each in source.input]
        outputs = [_called(each, name) for each, name in zip(source.output, answers, strict=False)]
        made = onnx.helper.make_graph(self.graph.nodes, "rarefy", inputs, outputs,
                                      list(self.graph.constants.values()))
        domains = [onnx.helper.make_opsetid("", OPSET)]
        if any(node.domain == MICROSOFT for node in self.graph.nodes):
            domains.append(onnx.helper.make_opsetid(MICROSOFT, 1))
        return onnx.helper.make_model(made, opset_imports=domains, producer_name="rarefy",
                                      ir_version=min(10, self.program.proto.ir_version))

    def _place(self, node: Any) -> set[str]:
        """Copy or replace one operator; the names of others that went into it."""
        used, taken = self.reading.use(node), set[str]()
        match used:
            case None if self._clamps(node):
                self.before[node.output[0]] = node.input[0]
            case None:
                self._copy(node, [self._read(name, chained=True) for name in node.input])
            case Use(kind="linear"):
                self._linear(node, used)
            case Use(kind="Conv"):
                taken = self._convolution(node, used)
                node = self.reading.makers[self._last]
            case Use(kind="Gather"):
                index = self._read(used.reads, chained=True)
                self._name(embedding(self.graph, index, self.trees[used.path], used.path), node.output[0])
            case Use(path=path):
                self._other(node, path, used.reads)
        for name in node.output:
            if name in self.plan.chained and self.settings.compute == "static":
                self._round(name, self.ranges[name])
        return taken

    def _linear(self, node: Any, used: Use) -> None:
        name = self.reading.result(node)
        integer = name in self.plan.operators
        x = self._read(used.reads, chained=not integer)
        if integer and self.settings.compute == "static":
            x = self._round(used.reads, self._span(name))
        compute: Compute = self.settings.compute if integer else "float"
        self.graph.alike[x] = self.reading.rows(used.reads)
        done = linear(self.graph, x, self.trees[used.path], used.path, compute,
                      self.rows.get(used.reads, ROWS))
        if used.bias:
            done = self.graph.add("Add", done, used.bias)
        self._name(done, node.output[0])

    def _convolution(self, node: Any, used: Use) -> set[str]:
        """The convolution, and a BatchNorm behind it folded in."""
        tree, bias = self.trees[used.path], [used.bias] if used.bias else []
        readers = self.reading.readers[node.output[0]]
        self._last, taken = node.output[0], set[str]()
        if len(readers) == 1 and readers[0].op_type == "BatchNormalization":
            tree, bias = self._folded(readers[0], tree, used)
            self._last, taken = readers[0].output[0], {readers[0].name}
        integer = node.output[0] in self.plan.operators
        span = self._span(node.output[0]) if integer else None
        x = self._read(used.reads, chained=True) if span is None else self._round(used.reads, span)
        scale = None if span is None else span.scale
        if scale is not None and bias:
            bias = [self._integer_bias(bias[0], tree, scale, used.path)]
        window = _window(node, self.program.sites[used.path])
        self._name(convolution(self.graph, x, tree, window, used.path, bias, scale), self._last)
        return taken

    def _folded(self, norm: Any, tree: Node, used: Use) -> tuple[Node, list[str]]:
        gamma, beta, mean, variance = (self._stored(name) for name in norm.input[1:5])
        factor = gamma / (variance + attribute(norm, "epsilon", 1e-5)).sqrt()
        before = self._stored(used.bias) if used.bias else torch.zeros_like(mean)
        bias = self.graph.constant(f"{used.path}.bias", (before - mean) * factor + beta)
        return folded_rows(tree, factor), [bias]

    def _integer_bias(self, bias: str, tree: Node, scale: float, path: str) -> str:
        """A bias as 32-bit codes on the scale of the accumulator."""
        found = integers(tree)
        assert found is not None
        product = (np.float32(scale) * found.scale[:, 0].numpy()).astype(np.float32)
        values = self._stored(bias).numpy() / np.where(product != 0, product, 1)
        codes = np.clip(np.round(values.astype(np.float64)), -(2**31), 2**31 - 1).astype(np.int32)
        stored = self.graph.constant(f"{path}.bias.codes", codes)
        scales = self.graph.constant(f"{path}.bias.scale", product)
        return self.graph.add("DequantizeLinear", stored, scales, axis=0)

    def _other(self, node: Any, path: str, name: str) -> None:
        """An operator that reads a weight in a way of its own: it gets the weight, in the file's order."""
        values = weight(self.graph, self.trees[path], path)
        site = self.program.sites[path]
        if site.transposed != (name in self.reading.turned):
            values = self.graph.add("Transpose", values, perm=[1, 0])
        elif site.kernel:
            values = self.graph.add("Reshape", values,
                                    self.graph.constant(f"{path}.kernel", [site.shape[0], *site.kernel]))
        self._copy(node, [values if each == name else self._read(each, chained=True) for each in node.input])

    def _copy(self, node: Any, inputs: Sequence[str]) -> None:
        """The same operator on other inputs, without the stack traces that the exporter leaves on it."""
        copy = type(node)()
        copy.CopyFrom(node)
        del copy.input[:], copy.metadata_props[:]
        copy.input.extend(inputs)
        self.graph.nodes.append(copy)

    def _read(self, name: str, *, chained: bool) -> str:
        """What an operator that does not multiply integers reads for ``name``."""
        if not (chained and name in self.plan.chained):
            return name
        return self.rounded.get((name, self.ranges[name]), name)

    def _clamps(self, node: Any) -> bool:
        """Whether an activation function is what 8-bit codes that begin at zero do anyway."""
        name = node.output[0]
        return (node.op_type == "Relu" and name in self.plan.chained and self.reading.swallowed(node.input[0])
                and name in self.ranges and self.ranges[name].zero == 0)

    def _span(self, name: str) -> Range:
        """The range in which a multiplication in integers reads what it reads."""
        return self.trained.get(name, self.ranges[self.plan.operators[name]])

    def _round(self, name: str, span: Range) -> str:
        """``name`` out of its codes in a range; made once. What exists in 8 bits alone has a range of its
        own, and is rounded from there."""
        if (name, span) not in self.rounded:
            own = name not in self.plan.chained or span == self.ranges[name]
            given = self.before.get(name, name) if own else self._round(name, self.ranges[name])
            scale = self.graph.constant(f"{name}.scale", np.array(span.scale, np.float32))
            zero = self.graph.constant(f"{name}.zero", np.array(span.zero, np.uint8))
            codes = self.graph.add("QuantizeLinear", given, scale, zero)
            if span.bits < 8:
                top = self.graph.constant(f"{name}.top", np.array(span.top, np.uint8))
                codes = self.graph.add("Clip", codes, "", top)
            self.rounded[name, span] = self.graph.add("DequantizeLinear", codes, scale, zero)
        return self.rounded[name, span]

    def _name(self, made: str, name: str) -> None:
        """Give the last operator's result the name that the graph knows it by."""
        assert self.graph.nodes[-1].output[0] == made
        self.graph.nodes[-1].output[0] = name

    def _stored(self, name: str) -> Tensor:
        if name in self.params:
            return self.params[name].float()
        held = self.graph.constants.get(name, self.reading.initial.get(name))
        return torch.from_numpy(np.array(onnx_package().numpy_helper.to_array(held)))

    def _keep_needed(self, source: Any, needed: set[str]) -> None:
        """Drop what nothing reads any more, and bring the stored numbers that something still reads."""
        kept = []
        for node in reversed(self.graph.nodes):
            if needed & set(node.output):
                needed |= set(node.input)
                kept.append(node)
        self.graph.nodes = kept[::-1]
        self.graph.constants = {name: each for name, each in self.graph.constants.items() if name in needed}
        for each in source.initializer:
            if each.name in needed and each.name not in self.graph.constants:
                if each.name in self.params:
                    self.graph.constant(each.name, self.params[each.name].float())
                else:
                    self.graph.constants[each.name] = each


def _called(value: Any, name: str) -> Any:
    """The declaration of an input or output under another name."""
    copy = type(value)()
    copy.CopyFrom(value)
    copy.name = name
    return copy


def _window(node: Any, site: Site) -> Window:
    kernel = tuple(site.kernel[1:])
    ones = (1,) * len(kernel)
    pads = attribute(node, "pads", (0,) * 2 * len(kernel))
    return Window(kernel, tuple(attribute(node, "strides", ones)), tuple(pads),
                  tuple(attribute(node, "dilations", ones)), attribute(node, "group", 1))


def _save(proto: Any, path: Path) -> int:
    """One file, checked; numbers go beside it when they are more than a message may hold."""
    onnx = onnx_package()
    if proto.ByteSize() < LARGEST:
        onnx.checker.check_model(proto)
        path.write_bytes(proto.SerializeToString())
        return path.stat().st_size
    beside = path.with_name(path.name + ".data")
    beside.unlink(missing_ok=True)
    onnx.save_model(proto, path, save_as_external_data=True, location=beside.name)
    return path.stat().st_size + beside.stat().st_size
