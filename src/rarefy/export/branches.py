"""A graph that computes all its exits, as one that stops at the first of which every sample is sure.

    flat:    operators -> logits_1, sure_1, logits_2, sure_2, .., logits
    nested:  what exit 1 needs; If(all sure_1, logits_1,
                 what exit 2 needs besides; If(all sure_2, ..) where not sure_1, else logits_1)

Operators move into the branch in which they are needed first, and the numbers that they read with them. So a
single sample leaves as soon as it is sure; a batch is computed until its last sample is, and each sample has
the answer of its own exit whatever the others need. ``If`` is an operator of every ONNX runtime.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rarefy.formats.onnx import onnx_package


@dataclass(frozen=True)
class Door:
    """One exit. answer, sure: values of the flat graph, [samples, classes] and bool [samples]; depth: how
    many blocks stand before it."""

    answer: str
    sure: str
    depth: int


def nested(proto: Any, doors: Sequence[Door], answer: str, depth: int, blocks: str = "blocks") -> Any:
    """``proto`` (a ModelProto, changed nowhere) with its exits as branches.

    answer: the value at the end, and the name of the result; depth: how many blocks stand before it. The
    result has one output more, ``blocks``: through how many blocks each sample went, int64 [samples].
    """
    onnx = onnx_package()
    building = _Nesting(proto, doors, answer, depth)
    nodes, constants = building.level(0, answer, blocks)
    outputs = [each for each in proto.graph.output if each.name == answer]
    outputs.append(onnx.helper.make_tensor_value_info(blocks, onnx.TensorProto.INT64, [None]))
    graph = onnx.helper.make_graph(nodes, proto.graph.name, list(proto.graph.input), outputs, constants)
    return onnx.helper.make_model(graph, opset_imports=list(proto.opset_import),
                                  producer_name=proto.producer_name, ir_version=proto.ir_version)


class _Nesting:
    """Deals the operators of a flat graph out to the levels."""

    def __init__(self, proto: Any, doors: Sequence[Door], answer: str, depth: int) -> None:
        self.helper, self.types = onnx_package().helper, onnx_package().TensorProto
        self.doors, self.answer, self.depth = tuple(doors), answer, depth
        self.nodes, self.placed = list(proto.graph.node), set[int]()
        self.makers = {name: k for k, node in enumerate(self.nodes) for name in node.output}
        self.constants = {each.name: each for each in proto.graph.initializer}

    def level(self, place: int, answer: str, blocks: str) -> tuple[list[Any], list[Any]]:
        """Operators and numbers from one exit on; they make the values ``answer`` and ``blocks``."""
        if place == len(self.doors):
            nodes = self._needed([self.answer])
            if answer != self.answer:
                nodes.append(self.helper.make_node("Identity", [self.answer], [answer]))
            nodes += self._depth(self.answer, self.depth, blocks)
            return nodes, self._read(nodes)
        door, inside = self.doors[place], f"exit{place}"
        nodes = self._needed([door.answer, door.sure])
        constants = self._read(nodes)
        end = [f"{inside}.leave.answer", f"{inside}.leave.blocks"]
        rest = [f"{inside}.rest.answer", f"{inside}.rest.blocks"]
        leave = [self.helper.make_node("Identity", [door.answer], [end[0]]),
                 self.helper.make_node("Identity", [f"{inside}.depth"], [end[1]])]
        further, stored = self.level(place + 1, f"{inside}.further.answer", f"{inside}.further.blocks")
        stay = [self._op("Where", [f"{inside}.column", door.answer, f"{inside}.further.answer"], rest[0]),
                self._op("Where", [door.sure, f"{inside}.depth", f"{inside}.further.blocks"], rest[1])]
        nodes += self._depth(door.sure, door.depth, f"{inside}.depth")
        nodes += [self._whole(f"{inside}.last", [-1]),
                  self._op("Unsqueeze", [door.sure, f"{inside}.last"], f"{inside}.column"),
                  self._op("Cast", [door.sure], f"{inside}.ones", to=self.types.INT32),
                  self._op("ReduceMin", [f"{inside}.ones"], f"{inside}.least", keepdims=0),
                  self._op("Cast", [f"{inside}.least"], f"{inside}.all", to=self.types.BOOL),
                  self.helper.make_node("If", [f"{inside}.all"], [answer, blocks], name=inside,
                                        then_branch=self._branch(leave, end, []),
                                        else_branch=self._branch([*further, *stay], rest, stored))]
        return nodes, constants

    def _needed(self, values: Iterable[str]) -> list[Any]:
        """The operators behind some values that no level before has, in order."""
        waiting, found = list(values), set[int]()
        while waiting:
            place = self.makers.get(waiting.pop())
            if place is not None and place not in self.placed:
                self.placed.add(place)
                found.add(place)
                waiting += self.nodes[place].input
        return [self.nodes[place] for place in sorted(found)]

    def _read(self, nodes: Iterable[Any]) -> list[Any]:
        """The stored numbers that these operators are the first to read."""
        names = {name for node in nodes for name in node.input if name in self.constants}
        return [self.constants.pop(name) for name in sorted(names)]

    def _depth(self, like: str, depth: int, name: str) -> list[Any]:
        """The number of blocks for every sample of the value ``like``."""
        return [self._op("Shape", [like], f"{name}.shape", start=0, end=1),
                self._whole(f"{name}.value", [depth]),
                self._op("Expand", [f"{name}.value", f"{name}.shape"], name)]

    def _whole(self, name: str, values: list[int]) -> Any:
        return self._op("Constant", [], name, value_ints=values)

    def _op(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> Any:
        return self.helper.make_node(kind, inputs, [output], name=output, **attributes)

    def _branch(self, nodes: list[Any], outputs: list[str], constants: list[Any]) -> Any:
        kinds = (self.types.FLOAT, self.types.INT64)
        declared = [self.helper.make_tensor_value_info(name, kind, None)
                    for name, kind in zip(outputs, kinds, strict=True)]
        return self.helper.make_graph(nodes, outputs[0], [], declared, constants)
