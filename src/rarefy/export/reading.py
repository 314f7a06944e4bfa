"""Who reads what in a traced graph, and which of its values are rounded to 8 bits.

A weight is *used*: looked up, convolved with, multiplied with, or read in some other way; what an operator
makes of it goes on to others. Multiplications of 8-bit codes read values in a range; between convolutions a
value may exist in 8 bits alone (``Quantization.chained``), as long as all that touches it keeps it so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rarefy.core.nodes import Node
from rarefy.export.program import Program
from rarefy.formats.integers import integers
from rarefy.formats.onnx import Compute, coarse, computable, onnx_package
from rarefy.numerics.ranges import Range

PASSING = frozenset({"Relu", "Clip", "MaxPool", "Flatten", "Reshape", "Identity", "Transpose"})
CHAINED = PASSING | {"Add", "AveragePool", "GlobalAveragePool", "Concat"}
FUSED = frozenset({"Relu", "Clip", "BatchNormalization"})  # what a convolution swallows


@dataclass(frozen=True)
class Use:
    """How an operator uses a site. kind: linear, Conv, Gather or other; reads: its activation."""

    path: str
    kind: str
    reads: str
    bias: str = ""


class Reading:
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
                case "Gemm" if name == inputs[1] and attribute(node, "transB", 0) != flipped:
                    return Use(path, "linear", inputs[0], bias)
                case "Gather" if name == inputs[0] and attribute(node, "axis", 0) == 0 and not flipped:
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


def quantization(program: Program, trees: Mapping[str, Node], compute: Compute) -> Quantization:
    """What is rounded to 8 bits when 8-bit weights are multiplied as ``compute`` says."""
    if compute == "float":
        return Quantization({}, frozenset(), {})
    graph = Reading(program)
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


def agreed(program: Program, plan: Quantization, trained: Mapping[str, Range]) -> dict[str, Range]:
    """Values between convolutions that all who read them want in the same codes, which training found."""
    graph, wanted = Reading(program), defaultdict[str, set[Range | None]](set)
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


def attribute(node: Any, name: str, default: Any) -> Any:
    found = next((each for each in node.attribute if each.name == name), None)
    return default if found is None else onnx_package().helper.get_attribute_value(found)
