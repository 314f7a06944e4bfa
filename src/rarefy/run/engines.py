"""The engines that load a traced graph, ONNX Runtime and OpenVINO: how each stores a weight, in what bytes.

Both load integers of a few bits (ONNX Runtime 2, 4 and 8, OpenVINO 4 and 8), floats, low rank as two
products, and tables of vectors that share codebooks; what else a recipe asks for goes over as larger numbers,
and is said. Bytes are foreseen by building each weight's piece of the graph and weighing it. ``to_onnx`` and
``to_decoder`` make targets of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from rarefy.core.codebooks import Clustered
from rarefy.core.nodes import Dense, Node, Product
from rarefy.core.nouns import Choice, Option, Step, Target
from rarefy.core.tensors import Tucker
from rarefy.export.onnx import ONNXRUNTIME, Exported, export_onnx
from rarefy.export.openvino import OPENVINO, export_openvino
from rarefy.export.pieces import Use, float_bytes, grid_bytes, piece, weighed
from rarefy.models.map import Site
from rarefy.numerics.grids import Grid, integer_grid_named
from rarefy.run.trees import FLOATS, TREE, outline, tree_option
from rarefy.runtimes.session import require

INSIDE = "model"  # the folder of the graph, with whatever prepares its inputs
FOUR = ("int4", "int4z", "int4-g32", "int4z-g32", "int4-g64", "int4-g128")
TWO = ("int2z-g16", "int2z-g32")
Uses = tuple[Use, ...]


@dataclass(frozen=True)
class Engine:
    """What sets the two apart. packages: what must be installed. file: in the folder of the export. contrib:
    may use ONNX Runtime's own operators. grids: what it stores without padding codes."""

    target: Target
    packages: tuple[str, ...]
    write: Callable[..., Exported]
    file: str
    contrib: bool
    grids: tuple[str, ...]

    def ready(self) -> None:
        """TargetError with the line that installs what is missing."""
        for package in self.packages:
            require(package)

    def choices(self, site: Site, uses: Uses) -> dict[str, Choice]:
        """Every format in which a site could be stored, and any tree."""
        found = {TREE: Choice(None, 0)}
        for name in self.grids:
            grid = integer_grid_named(name)
            assert grid is not None
            if _fits(grid, site, uses):
                found[name] = Choice(grid, grid_bytes(site, grid, uses, contrib=self.contrib))
        for dtype in dict.fromkeys((self._factors(uses), torch.float32)):
            name = str(dtype).removeprefix("torch.")
            found[name] = Choice(dtype, float_bytes(site, dtype, uses, contrib=self.contrib))
        return found

    def held(self, site: Site, uses: Uses, option: Option) -> Option | None:
        """Of trees, low rank and tables of vectors: masks are stored as zeros, codebooks without coding."""
        if option.format != TREE:
            return option
        tree = _planned(site, uses, option.steps[0], self._factors(uses))
        return None if tree is None else replace(option, bytes=weighed(
            piece(tree, site, uses, contrib=self.contrib)))

    def untouched(self, site: Site, uses: Uses) -> Option:
        """As float32."""
        size = float_bytes(site, torch.float32, uses, contrib=self.contrib)
        return Option(site.path, "float32", size, 0.0)

    def asked(self, site: Site, uses: Uses, steps: Sequence[Step]) -> Option:
        """What a recipe's steps make of a site; bytes are known when it is done."""
        if not steps:
            return self.untouched(site, uses)
        return tree_option(site, steps, self.target.formats)

    def shown(self, site: Site, uses: Uses, option: Option, tree: Node) -> Option:
        """An option as it came out."""
        made = piece(tree, site, uses, contrib=self.contrib)
        return replace(option, format=outline(tree), bytes=weighed(made))

    def opens(self, file: str) -> str:
        """The command that opens an exported file."""
        made = {"onnxruntime": f"onnxruntime.InferenceSession('{file}')",
                "openvino": f"openvino.Core().compile_model('{file}', 'CPU')"}[self.target.name]
        return f"python -c \"import {self.target.name}; network = {made}\""

    def _factors(self, uses: Uses) -> torch.dtype:
        """The smallest floats that stay as they are: folding BatchNorm into a convolution widens them."""
        convolved = any(use.kind == "Conv" for use in uses)
        return torch.float32 if convolved else torch.float16


ENGINES = (
    Engine(replace(ONNXRUNTIME, formats=(TREE, "int8", *FOUR, *TWO, *FLOATS)),
           ("onnx", "onnxscript", "onnxruntime"), export_onnx, "model.onnx", True, ("int8", *FOUR, *TWO)),
    Engine(replace(OPENVINO, formats=(TREE, "int8", *FOUR, *FLOATS)),
           ("onnx", "onnxscript", "openvino"), export_openvino, "model.xml", False, ("int8", *FOUR)),
)


def _fits(grid: Grid, site: Site, uses: Uses) -> bool:
    """Whether rows divide into groups. Convolutions in integers hold symmetric codes of few bits under one
    scale in 8 bits, so those are not for them."""
    if any(use.kind == "Conv" for use in uses) and grid.name == "int4grow":
        return False
    return site.shape[1] % (grid.block or 1) == 0 and grid.block < site.shape[1]


def _planned(site: Site, uses: Uses, step: Step, dtype: torch.dtype) -> Node | None:
    """A tree of the form that a planned step gives, its factors in ``dtype``; None: it is no smaller."""
    def factor(*shape: int) -> Node:
        return Dense(torch.zeros(shape, dtype=dtype))

    out, columns = site.shape
    match step.technique, step.settings.get("rank"):
        case "svd_llm" | "fwsvd", int(rank):
            return Product(factor(out, rank), factor(rank, columns))
        case "tucker", [int(a), int(b)] if all(use.groups == 1 for use in uses):
            channels, *window = site.kernel
            return Tucker(factor(out, a), factor(a, b * prod(window)), factor(channels, b), tuple(window))
        case "product", _ if isinstance(length := step.settings.get("length"), int):
            index = torch.zeros((out, columns // length), dtype=torch.uint8)
            return Clustered(torch.zeros(1, 256, length), index)
        case _:
            return None
