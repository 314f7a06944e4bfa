"""Gradual magnitude pruning: while the network trains, the smallest weights go, a few at a time.

Every few steps the mask is made anew from the magnitudes of the moment, and drops the share

    s(t) = s_f + (s_0 - s_f) (1 - (t - t_0) / (t_1 - t_0))^3,

many at first and few at the end. Dropped weights keep their value but get no gradient, so one that others
have sunk below comes back. Against dropping them all at once, the network has time to move what they did to
those that stay. Masks may be unstructured, n:m (one neighbour after the other goes), tiles, rows or columns.

Paper: Zhu & Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for model compression",
eq. 1; Gale et al. 2019, "The State of Sparsity in Deep Neural Networks", section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from rarefy.core.edit import Leaf
from rarefy.core.growing import Growth
from rarefy.core.latent import ended
from rarefy.core.nodes import Dense, Masked, Node
from rarefy.core.tune import Soft


@dataclass(frozen=True)
class Gradual:
    """Magnitude pruning during training.

    Shapes: leaf [out, in] -> Masked [out, in].

    sparsity: share of the weights that is dropped in the end, what masks above dropped included; 0.5, or what
    n:m says. pattern: ``unstructured`` (per layer, or ``unstructured per row``), ``2:4`` or any n:m,
    ``block 16x16``, ``row``, ``column``, ``row 8``. begin: share of the training after which masks begin to
    grow. end: after which they are done. every: steps between two masks.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    begin: float = 0.0
    end: float = 0.75
    every: int = 10

    edits: ClassVar[tuple[type[Node], ...]] = (Dense,)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = "magnitude"
    scope: ClassVar[str] = "training"

    def __post_init__(self) -> None:
        self._growth()

    def soften(self, leaf: Leaf, generator: torch.Generator) -> Soft:
        assert isinstance(leaf.node, Dense)
        return _Growing(leaf, leaf.node, self._growth().fitted(leaf))

    def _growth(self) -> Growth:
        return Growth.of(self.pattern, self.sparsity, "layer", self.begin, self.end, self.every)


class _Growing(Soft):
    """A weight [out, in] and the mask that grows on it."""

    def __init__(self, leaf: Leaf, node: Dense, growth: Growth) -> None:
        super().__init__()
        self.site, self.dtype, self.growth, self.note = leaf.site, node.values.dtype, growth, growth.note
        self.done = False
        self.latent = nn.Parameter(node.dense().detach().clone())
        allowed = torch.ones(node.shape, dtype=torch.bool) if leaf.keep is None else leaf.keep
        self.allowed: Tensor
        self.kept: Tensor
        self.register_buffer("allowed", allowed, persistent=False)
        self.register_buffer("kept", allowed.clone())

    def forward(self) -> Tensor:
        return torch.where(self.kept, self.latent, 0.0)

    @torch.no_grad()
    def update(self, step: int, total: int) -> None:
        """The mask of the moment."""
        self.done = self.growth.over(step, total)
        if self.growth.due(step, total):
            before = 1 - float(self.allowed.float().mean())
            share = self.growth.share(step, total, before)
            self.kept.copy_(self.growth.keep(self.latent.square(), share, self.allowed))

    def settled(self) -> bool:
        return self.done

    def harden(self) -> Node:
        return Masked(self.kept.clone(), ended(self.site, self.latent, self.dtype))
