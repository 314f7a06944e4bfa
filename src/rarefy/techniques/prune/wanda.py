"""Wanda: drop the weights that are small and whose inputs are small, row by row.

The cost of dropping w_ij is

    |w_ij| * ||x_j||,        ||x_j|| = sqrt(H_jj),   H = sum over tokens of x x^T,

and every row loses its cheapest weights: outputs are compared with themselves only, because a layer whose
outputs are all thinned alike does better than one that loses some of them. Nothing is updated, so a layer
takes no longer than a sort. Its square is the diagonal of the output error ``tr(dW H dW^T)``; what it
leaves out, how inputs stand in for one another, is what ``sparsegpt`` adds.

Paper: Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models", section 3.
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
class Wanda:
    """Pruning by weights and activations.

    Shapes: leaf [out, in] -> Masked [out, in]. What stays is stored as it was.

    sparsity: share of the weights that is dropped, what masks above dropped included; 0.5, or what n:m says.
    pattern: ``unstructured`` (per row, or ``unstructured per layer``), ``2:4`` or any n:m (n of m neighbours
    in a row stay), ``block 16x16``, ``row``, ``column``, ``row 8`` (eight at a time).
    """

    sparsity: float | None = None
    pattern: str = "unstructured"

    edits: ClassVar[tuple[type[Node], ...]] = (Dense, Quantized, Clustered)
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    beats: ClassVar[str] = "magnitude"

    def __post_init__(self) -> None:
        self._rule()

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        assert leaf.evidence is not None
        energy = leaf.evidence.gram.diagonal() / max(leaf.evidence.tokens, 1)
        return masked(leaf, self._rule(), energy[None])

    def _rule(self) -> Rule:
        return Rule.of(self.pattern, self.sparsity, "row")
