"""Weights as the trees that they are: the format of targets that store more than one grid a weight."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from rarefy.core.errors import RecipeError, did_you_mean
from rarefy.core.nodes import Dense, Masked, Node, Quantized, Shared, Sum
from rarefy.core.nouns import Option, Step
from rarefy.models.map import Site
from rarefy.run.planning import grid_named

TREE = "tree"  # any tree, at the bits that it counts
FLOATS = {"float16": torch.float16, "float32": torch.float32}
NAMES = {"Product": "low rank", "Tucker": "Tucker", "CP": "CP", "TensorTrain": "tensor train",
         "Clustered": "codebook", "Hashed": "hashed"}


def tree_option(site: Site, steps: Sequence[Step], formats: Sequence[str]) -> Option:
    """What a recipe's steps make of a site; bytes are known when it is done.

    RecipeError for a format that is neither one of ``formats`` nor a grid.
    """
    for step in steps:
        if step.format and step.format not in formats and grid_named(step.format) is None:
            meant = did_you_mean(step.format, list(formats))
            raise RecipeError(f"{site.path}: format {step.format!r} is unknown{meant}; "
                              f"choose one of {', '.join(formats)}")
    return Option(site.path, TREE, 0, float("nan"), tuple(steps))


def outline(tree: Node) -> str:
    """A tree in a word or two: ``int4-g32``, ``sparse int4-g32``, ``low rank``, ``codebook + low rank``."""
    match tree:
        case Dense(values=values):
            return str(values.dtype).removeprefix("torch.")
        case Quantized(grid=grid):
            return re.sub(r"^(int\d+z?)g(\d+)$", r"\1-g\2", grid.name.replace("grow", ""))
        case Masked(inner=inner):
            return f"sparse {outline(inner)}"
        case Sum(terms=terms):
            return " + ".join(outline(term) for term in terms)
        case Shared():
            return "shared"
        case _:
            name = NAMES.get(type(tree).__name__, type(tree).__name__.lower())
            inside = {outline(child) for child in tree.children()} - {"float32"}
            return name if not inside else f"{name} ({', '.join(sorted(inside))})"
