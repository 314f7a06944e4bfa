"""L0 regularisation: every weight or group has a gate, and open gates cost.

A gate z is drawn anew at every step from a hard concrete distribution: a stretched, smoothed coin that falls
on exactly 0 and exactly 1 with positive probability, and whose odds learn,

    s = sigmoid((log u - log(1 - u) + log a) / b),     u uniform,     z = clip(s (h - l) + l, 0, 1).

The network computes with ``w z``, and the probability that a gate is not closed is added to the loss,

    strength * mean over weights of  P(z != 0) = sigmoid(log a - b log(-l / h)).

Trained, a gate stands at ``clip(sigmoid(log a) (h - l) + l, 0, 1)``: it multiplies its weights, and where it
is 0 they are gone. Gates over rows or columns close whole neurons.

Paper: Louizos et al. 2018, "Learning Sparse Neural Networks through L0 Regularization", eq. 10-13.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from rarefy.core.edit import Leaf
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.latent import ended
from rarefy.core.nodes import Dense, Masked, Node
from rarefy.core.pruning import pattern_named
from rarefy.core.tune import Soft
from rarefy.numerics.patterns import NM, Pattern, Tiles

LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3  # the paper's


@dataclass(frozen=True)
class L0:
    """Pruning by gates that learn to close.

    Shapes: leaf [out, in] -> Masked [out, in]; how much is dropped, the loss decides.

    strength: nats per example that a weight costs while all of its gates are open; the paper's lambda times
    the number of weights. pattern: what has a gate of its own: ``unstructured`` (every weight), ``row``,
    ``column``, ``row 64``, ``block 16x16``. dropout: probability with which gates begin closed; up to 0.08
    the network begins as it is. pace: how much faster than weights the odds learn.
    """

    strength: float = 0.5
    pattern: str = "unstructured"
    dropout: float = 0.05
    pace: float = 50.0

    edits: ClassVar[tuple[type[Node], ...]] = (Dense,)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = "magnitude"
    scope: ClassVar[str] = "training"

    def __post_init__(self) -> None:
        if not self.strength > 0 or not self.pace > 0 or not 0 < self.dropout < 1:
            raise RecipeError(f"strength {self.strength}, pace {self.pace}, dropout {self.dropout}: strength "
                              "and pace must be positive (without a cost no gate closes), dropout between 0 "
                              "and 1")
        if isinstance(self._pattern(), NM):
            raise RecipeError(f"pattern {self.pattern!r}: gates open and close one by one and keep no n:m; "
                              "use gradual or movement")

    def soften(self, leaf: Leaf, generator: torch.Generator) -> Soft:
        assert isinstance(leaf.node, Dense)
        pattern = self._pattern()
        if misfit := pattern.misfit(*leaf.node.shape):
            raise EditError(f"{leaf.site}: pattern {pattern}: {misfit}")
        rows, columns = leaf.node.shape
        tile = (pattern.rows or rows, pattern.columns or columns) if isinstance(pattern, Tiles) else (1, 1)
        return _Gated(leaf, leaf.node, tile, self)

    def _pattern(self) -> Pattern:
        return pattern_named(self.pattern, "layer")


class _Gated(Soft):
    """A weight [out, in] and the log-odds of its gates (one per weight or tile)."""

    def __init__(self, leaf: Leaf, node: Dense, tile: tuple[int, int], settings: L0) -> None:
        super().__init__()
        self.site, self.dtype, self.tile, self.settings = leaf.site, node.values.dtype, tile, settings
        self.done = False
        self.latent = nn.Parameter(node.dense().detach().clone())
        gates = (node.shape[0] // tile[0], node.shape[1] // tile[1])
        odds = math.log((1 - settings.dropout) / settings.dropout)
        self.odds = nn.Parameter(torch.full(gates, odds))
        self.allowed: Tensor | None
        self.register_buffer("allowed", leaf.keep, persistent=False)

    def forward(self) -> Tensor:
        gates = self._drawn() if self.training else self._settled()
        return self.latent * self._spread(gates)

    def penalty(self) -> Tensor:
        open_ = torch.sigmoid(self.odds - TEMPERATURE * math.log(-LOW / HIGH))
        return self.settings.strength * open_.mean()

    def update(self, step: int, total: int) -> None:
        """Gates close until the last step."""
        self.done = step >= total

    def settled(self) -> bool:
        return self.done

    def paces(self) -> dict[str, float]:
        return {"odds": self.settings.pace}

    @torch.no_grad()
    def harden(self) -> Node:
        gates = self._spread(self._settled())
        keep = gates > 0 if self.allowed is None else (gates > 0) & self.allowed
        return Masked(keep, ended(self.site, self.latent * gates, self.dtype))

    def _drawn(self) -> Tensor:
        u = torch.rand_like(self.odds).clamp(1e-6, 1 - 1e-6)
        return _stretched(torch.sigmoid(((u / (1 - u)).log() + self.odds) / TEMPERATURE))

    def _settled(self) -> Tensor:
        return _stretched(torch.sigmoid(self.odds))

    def _spread(self, gates: Tensor) -> Tensor:
        return gates.repeat_interleave(self.tile[0], 0).repeat_interleave(self.tile[1], 1)


def _stretched(s: Tensor) -> Tensor:
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)
