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
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.core.errors import TargetError, did_you_mean
from rarefy.core.nodes import Dense, Masked, Node, Product, Quantized, Sum
from rarefy.core.nouns import Target
from rarefy.export.fusing import keep_apart
from rarefy.export.program import Program, Values, activation_ranges, activation_samples, trace
from rarefy.formats.integers import integers
from rarefy.formats.onnx import (
    MICROSOFT,
    OPSET,
    ROWS,
    Compute,
    Graph,
    Window,
    coarse,
    computable,
    convolution,
    embedding,
    linear,
    onnx_package,
    weight,
)
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
PASSING = frozenset({"Relu", "Clip", "MaxPool", "Flatten", "Reshape", "Identity", "Transpose"})
CHAINED = PASSING | {"Add", "AveragePool", "GlobalAveragePool", "Concat"}
FUSED = frozenset({"Relu", "Clip", "BatchNormalization"})  # what a convolution swallows
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
        tensors = {**stored_tensors(self.program, self.trees), **dict(self.params or {})}
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


@dataclass(frozen=True)
class Quantization:
    """Which values are rounded to 8 bits.

    operators: multiplications in integers, and the value that each reads. chained: values that exist in
    8 bits alone, between convolutions. passing: values that have the range of another.
    """

    operators: Mapping[str, str]
    chained: frozenset[str]
    passing: Mapping[str, str]

    @property
    def values(self) -> frozenset[str]:
        """All values that need a range."""
        return self.chained | frozenset(self.operators.values())


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
    tensors = {} if settings.compute == "float" else {**stored_tensors(program, whole), **changed}
    if settings.compute == "dynamic" and calibration:
        rows = _rows(program, calibration, tensors, whole, plan)
    if settings.compute == "static":
        trained = {name: span for name, span in program.trained(ranges or {}).items()
                   if name in plan.operators}
        spans = activation_ranges(program, calibration, tensors, plan.values, settings.ranges, trained)
        spans |= _agreed(program, plan, trained)
        spans |= {name: spans[source] for name, source in plan.passing.items()}
    writer = _Writer(program, whole, settings, spans, plan, changed, rows, trained)
    proto = writer.model()
    size = _save(proto, Path(path))
    return Exported(Path(path), size, program, whole, settings, spans, plan, tuple(writer.graph.notes),
                    changed, rows, trained)


def _agreed(program: Program, plan: Quantization, trained: Mapping[str, Range]) -> dict[str, Range]:
    """Values between convolutions that all who read them want in the same codes, which training found."""
    graph, wanted = _Reading(program), defaultdict[str, set[Range | None]](set)
    wanted[program.answer].add(None)
    for node in reversed(program.proto.graph.node):
        used, result = graph.use(node), graph.result(node)
        if used is not None and result in plan.operators:
            wanted[used.reads].add(trained.get(result))
        elif node.op_type in PASSING:
            wanted[node.input[0]] |= wanted[node.output[0]]
        elif node.op_type != "Shape":
            for name in node.input:
                wanted[name].add(None)
    return {name: span for name in plan.chained for span in wanted[name]
            if span is not None and len(wanted[name]) == 1}


def _rows(program: Program, batches: Sequence[Values], tensors: Values, trees: Mapping[str, Node],
          plan: Quantization) -> dict[str, Rows]:
    """How each value that is multiplied in integers is rounded, decided on samples."""
    readers: dict[str, list[str]] = defaultdict(list)
    for name, source in plan.operators.items():
        readers[source].append(program.reads[name])
    samples = activation_samples(program, batches, tensors, readers)
    return {source: rows_for(*samples[source], torch.cat([trees[path].dense() for path in paths]))
            for source, paths in readers.items()}


def stored_tensors(program: Program, trees: Mapping[str, Node]) -> dict[str, Tensor]:
    """The weights that trees stand for, as the state dict holds them."""
    return {path: program.sites[path].stored(tree.dense()) for path, tree in trees.items()}


def quantization(program: Program, trees: Mapping[str, Node], compute: Compute) -> Quantization:
    """What is rounded to 8 bits when 8-bit weights are multiplied as ``compute`` says."""
    if compute == "float":
        return Quantization({}, frozenset(), {})
    graph = _Reading(program)
    looked_up = {used.path for node in program.proto.graph.node
                 if (used := graph.use(node)) is not None and used.kind != "linear"}
    operators: dict[str, str] = {}
    chain: set[str] = set()
    passing: dict[str, str] = {}
    for node in program.proto.graph.node:
        used = graph.use(node)
        if used is not None and used.reads in graph.values and _in_integers(
                used, trees[used.path], compute, alone=used.path not in looked_up):
            operators[graph.result(node)] = used.reads
            if used.kind == "Conv":
                chain.add(node.output[0])
        elif node.op_type == "BatchNormalization" and node.input[0] in chain:
            chain.add(node.output[0])
        elif node.op_type in CHAINED and graph.activations(node) and graph.activations(node) <= chain:
            chain.add(node.output[0])
            if node.op_type in PASSING - FUSED or node.op_type == "MaxPool":
                passing[node.output[0]] = node.input[0]
    kept = frozenset(name for name in chain if name != program.answer and not graph.swallowed(name)
                     and name in graph.values)
    return Quantization(operators, kept, {name: _source(name, passing, kept) for name in passing
                                          if name in kept and _source(name, passing, kept)})


def _source(name: str, passing: Mapping[str, str], kept: frozenset[str]) -> str:
    while name in passing:
        name = passing[name]
    return name if name in kept else ""


def _in_integers(used: Use, tree: Node, compute: Compute, *, alone: bool) -> bool:
    """alone: whether linear layers alone use the weight, so that it may be rounded for them."""
    if used.kind == "Conv":
        return compute == "static" and computable(tree)
    if compute == "dynamic":
        return used.kind == "linear" and alone and coarse(tree)
    found = integers(tree)
    return used.kind == "linear" and found is not None and found.bits == 8 and computable(tree)


def folded_rows(tree: Node, factor: Tensor) -> Node:
    """``diag(factor) W``: scales of rows change, codes do not."""
    match tree:
        case Quantized(codes=codes, scale=scale, zero=zero, grid=grid):
            wide = replace(grid, scale=replace(grid.scale, bits=0, low=0, over=0, dtype=torch.float32))
            if zero is not None and grid.zero is not None and not grid.zero.relative:
                zero = Dense(zero.dense() * factor[:, None])
                wide = replace(wide, zero=replace(grid.zero, bits=0, low=0, over=0, dtype=torch.float32))
            return Quantized(codes, Dense(scale.dense() * factor[:, None]), zero, wide)
        case Masked(keep=keep, inner=inner):
            return Masked(keep, folded_rows(inner, factor))
        case Product(left=left, right=right):
            return Product(folded_rows(left, factor), right)
        case Sum(terms=terms):
            return Sum(tuple(folded_rows(term, factor) for term in terms))
        case _:
            return Dense(tree.dense() * factor[:, None])


@dataclass(frozen=True)
class Use:
    """How an operator uses a site. kind: linear, Conv, Gather or other; reads: its activation."""

    path: str
    kind: str
    reads: str
    bias: str = ""


class _Reading:
    """Who reads what in the original graph."""

    def __init__(self, program: Program) -> None:
        self.program, graph = program, program.proto.graph
        self.values = {node.name: node.meta.get("val") for node in program.exported.graph.nodes}
        self.initial = {each.name: each for each in graph.initializer}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.turned = {node.output[0]: self._site(node.input[0]) for node in graph.node
                       if node.op_type == "Transpose" and self._site(node.input[0])
                       and len(program.sites[self._site(node.input[0])].kernel) == 0}

    def _site(self, name: str) -> str:
        path = self.program.shared.get(name, name)
        return path if path in self.program.sites else ""

    def use(self, node: Any) -> Use | None:
        """How ``node`` uses a site; None: it uses none, or only its shape."""
        inputs = list(node.input)
        bias = inputs[2] if len(inputs) > 2 else ""
        for name in inputs:
            path = self._site(name) or self.turned.get(name, "")
            if not path or node.op_type == "Shape" or node.output[0] in self.turned:
                continue
            flipped = self.program.sites[path].transposed
            match node.op_type:
                case "Conv" if name == inputs[1]:
                    return Use(path, "Conv", inputs[0], "" if self._no_bias(node) else bias)
                case "MatMul" if name == inputs[1] and (name in self.turned) != flipped:
                    return Use(path, "linear", inputs[0])
                case "Gemm" if name == inputs[1] and _attribute(node, "transB", 0) != flipped:
                    return Use(path, "linear", inputs[0], bias)
                case "Gather" if name == inputs[0] and _attribute(node, "axis", 0) == 0 and not flipped:
                    return Use(path, "Gather", inputs[1])
                case _:
                    return Use(path, "other", name)
        return None

    def result(self, node: Any) -> str:
        """The program's name of what a multiplication gives, its bias added."""
        name = node.output[0]
        if name not in self.values:
            follower = next((each for each in self.readers[name] if each.op_type == "Add"), node)
            name = follower.output[0]
        return str(name)

    def rows(self, name: str) -> str:
        """The shape of a value but for its last axis, as the program knows it."""
        value = self.values.get(name)
        return name if value is None else str(tuple(value.shape[:-1]))

    def activations(self, node: Any) -> set[str]:
        """What flows through ``node``: neither stored numbers nor shapes computed from nothing else."""
        first = list(node.input) if node.op_type in ("Add", "Concat") else list(node.input[:1])
        return {name for name in first if name not in self.initial}

    def swallowed(self, name: str) -> bool:
        """Whether the only reader is computed together with the maker."""
        readers = self.readers[name]
        return len(readers) == 1 and readers[0].op_type in FUSED

    def _no_bias(self, node: Any) -> bool:
        """The exporter gives a convolution without a bias one of zeros, computed from the weight's shape."""
        if len(node.input) < 3 or node.input[2] in self.initial:
            return len(node.input) < 3
        made = self.makers.get(node.input[2])
        return made is not None and made.op_type == "Expand"


def _attribute(node: Any, name: str, default: Any) -> Any:
    found = next((each for each in node.attribute if each.name == name), None)
    return default if found is None else onnx_package().helper.get_attribute_value(found)


class _Writer:
    """Copies the graph operator by operator, with those that read weights replaced."""

    def __init__(self, program: Program, trees: Mapping[str, Node], settings: OnnxSettings,
                 ranges: Mapping[str, Range], plan: Quantization, params: Mapping[str, Tensor],
                 rows: Mapping[str, Rows], trained: Mapping[str, Range]) -> None:
        self.program, self.trees, self.settings = program, trees, settings
        self.ranges, self.plan, self.params, self.rows = ranges, plan, params, rows
        self.trained = trained
        self.reading = _Reading(program)
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
        factor = gamma / (variance + _attribute(norm, "epsilon", 1e-5)).sqrt()
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
    pads = _attribute(node, "pads", (0,) * 2 * len(kernel))
    return Window(kernel, tuple(_attribute(node, "strides", ones)), tuple(pads),
                  tuple(_attribute(node, "dilations", ones)), _attribute(node, "group", 1))


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
