"""What a weight takes in an ONNX or OpenVINO file, and how it runs there: its piece of the graph is built
around the tree, and weighed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import nn

from rarefy.core.codebooks import Clustered
from rarefy.core.nodes import Dense, Node, Product, Quantized
from rarefy.export.onnx import Exported
from rarefy.formats.integers import integers
from rarefy.formats.onnx import Graph, Window, convolution, embedding, linear
from rarefy.models.map import Site
from rarefy.numerics.grids import Grid, Stored

FRAME = 5       # bytes around a part of a protobuf message
OPERATOR = 460  # of OpenVINO's XML, for an operator or a constant with its edges


@dataclass(frozen=True)
class Use:
    """How a module uses a weight. kind: linear, Conv or Gather; groups: of a convolution."""

    kind: str
    groups: int = 1

    @classmethod
    def of(cls, module: nn.Module) -> Use:
        """By the kind of layer."""
        match module:
            case nn.Embedding():
                return cls("Gather")
            case nn.Conv1d() | nn.Conv2d():
                return cls("Conv", module.groups)
            case _:
                return cls("linear")


def uses_of(users: Sequence[nn.Module]) -> tuple[Use, ...]:
    """The different uses among the modules that share a weight."""
    return tuple(dict.fromkeys(map(Use.of, users)))


def piece(tree: Node, site: Site, uses: Sequence[Use], *, contrib: bool) -> Graph:
    """The operators and constants of one weight. contrib: for ONNX Runtime, else for OpenVINO."""
    graph = Graph(contrib=contrib)
    for use in uses:
        match use.kind:
            case "Gather":
                embedding(graph, "x", tree, site.path)
            case "Conv":
                axes = len(site.kernel) - 1
                window = Window(site.kernel[1:], (1,) * axes, (0,) * 2 * axes, (1,) * axes, use.groups)
                convolution(graph, "x", tree, window, site.path)
            case _:
                linear(graph, "x", tree, site.path)
    return graph


def weighed(graph: Graph) -> int:
    """Bytes of a piece in the file: of ONNX exactly, of OpenVINO's text about."""
    if graph.contrib:
        return sum(each.ByteSize() + FRAME for each in (*graph.constants.values(), *graph.nodes))
    numbers = sum(len(each.raw_data) for each in graph.constants.values())
    return numbers + OPERATOR * (len(graph.constants) + len(graph.nodes))


@lru_cache(maxsize=8192)
def grid_bytes(site: Site, grid: Grid, uses: tuple[Use, ...], *, contrib: bool) -> int:
    """Bytes of a weight on a grid, whatever its codes."""
    return weighed(piece(codes_like(site, grid), site, uses, contrib=contrib))


@lru_cache(maxsize=8192)
def float_bytes(site: Site, dtype: torch.dtype, uses: tuple[Use, ...], *, contrib: bool) -> int:
    """Bytes of a weight as floats."""
    return weighed(piece(Dense(torch.zeros(site.shape, dtype=dtype)), site, uses, contrib=contrib))


def codes_like(site: Site, grid: Grid, generator: torch.Generator | None = None) -> Quantized:
    """A weight on a grid with any codes: those of ``generator``, or zeros."""
    rows, columns = site.shape
    groups = columns // (grid.group or columns)
    codes = torch.zeros(site.shape, dtype=torch.uint8)
    scale = torch.ones(rows, groups)
    if generator is not None:  # OpenVINO stores equal constants once
        codes = torch.randint(len(grid.levels), site.shape, dtype=torch.uint8, generator=generator)
        scale = torch.rand(rows, groups, generator=generator) + 0.5
    return Quantized(codes, Dense(scale.to(grid.scale.dtype)), _zero(grid.zero, rows, groups), grid)


def _zero(stored: Stored | None, rows: int, groups: int) -> Dense | None:
    return None if stored is None else Dense(torch.zeros(rows, groups, dtype=stored.dtype))


def runs(exported: Exported, site: Site, uses: Sequence[Use], *, contrib: bool) -> str:
    """How a weight is multiplied, in a few words."""
    tree, program = exported.trees[site.path], exported.program
    if any(program.reads.get(name) == site.path for name in exported.plan.operators):
        return "8-bit integers"
    kinds, found = {use.kind for use in uses}, integers(tree)
    match tree:
        case Product(right=right) if "Gather" not in kinds and right.shape[0] * sum(tree.shape) < prod(
                tree.shape):
            return "two thin products"
        case Dense(values=values) if values.dtype == torch.float32:
            return "floats"
        case Clustered() if kinds == {"Gather"}:
            return "rows put together from a codebook"
    if found is None:
        return "decoded when loaded"
    if kinds == {"Gather"} and contrib:
        return f"rows decoded from {found.bits} bits"
    if kinds == {"linear"}:
        return f"decoded from {max(found.bits, 2 if contrib else 4)} bits while multiplied"
    return "decoded when loaded"
