"""Magnitude: drop the smallest weights.

What goes are the weights with the smallest

    |w_ij|,

over the whole weight or within every row; in tiles, rows or columns, those with the smallest sum of squares.
No data is used. What a weight's input looks like, and what others could do in its place, is not asked: this
is the baseline that every other pruning has to beat.

One threshold for a whole network is not a matter of one weight: a recipe that says ``allocate: global``
finds it, and gives every weight the sparsity that follows.

Paper: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", section 3;
Li et al. 2017, "Pruning Filters for Efficient ConvNets", section 3.1 (rows).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rarefy.core.codebooks import Clustered
from rarefy.core.edit import Edited, Leaf
from rarefy.core.nodes import Dense, Node, Quantized
from rarefy.core.pruning import Rule, masked


@dataclass(frozen=True)
class Magnitude:
    """Magnitude pruning.

    Shapes: leaf [out, in] -> Masked [out, in]. What stays is stored as it was.

    sparsity: share of the weights that is dropped, what masks above dropped included; 0.5, or what n:m says.
    pattern: ``unstructured`` (per layer, or ``unstructured per row``), ``2:4`` or any n:m (n of m neighbours
    in a row stay), ``block 16x16``, ``row``, ``column``, ``row 8`` (eight at a time).
    """

    sparsity: float | None = None
    pattern: str = "unstructured"

    edits: ClassVar[tuple[type[Node], ...]] = (Dense, Quantized, Clustered)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self._rule()

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        return masked(leaf, self._rule())

    def _rule(self) -> Rule:
        return Rule.of(self.pattern, self.sparsity, "layer")
