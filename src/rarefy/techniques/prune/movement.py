"""Movement pruning: what goes are the weights that training moves towards zero.

Every weight w has a score S, which learns beside it. The network computes with ``w M``, M the mask of the
highest scores, and the gradient reaches the scores as if M were S (straight through):

    dL/dS = dL/dw' w,      so   S = prior |w_0| / rms(w_0) - sum over steps of  rate * dL/dw' w:

a score falls while its weight moves towards zero and rises while it moves away, dropped weights included,
which may so come back. In fine-tuning, where weights move little, this says more than their magnitude, which
pre-training has decided; but it takes thousands of steps to say it. Before, weights that push one neuron the
same way have fallen together and would go together, which shifts the neuron (2% of an encoder's weights with
the lowest scores cost more after 340 steps than a tenth drawn at random). So magnitude has the first word,
and ``prior`` is how loud: 0 is the paper's method, for training as long as the paper's. With ``strength``
the share is not given but found: M is where ``sigmoid(S)`` is above a threshold, and
``strength * mean sigmoid(S)`` in the loss presses all scores down (soft movement pruning).

Over tiles, rows or columns there is one score for each, which gets the sum of the gradients: tiles go whole,
``column`` where neurons are read drops neurons, ``column 64`` where heads of 64 are read drops heads (block
movement pruning); ``emptied`` then takes them out of the network.

Paper: Sanh et al. 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", section 3-4; Lagunas et al.
2021, "Block Pruning For Faster Transformers", section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from rarefy.core.edit import Leaf
from rarefy.core.errors import RecipeError
from rarefy.core.growing import Growth
from rarefy.core.latent import ended
from rarefy.core.nodes import Dense, Masked, Node
from rarefy.core.tune import Soft
from rarefy.numerics.patterns import NM, Tiles, Unstructured


@dataclass(frozen=True)
class Movement:
    """Pruning by what fine-tuning does to the weights.

    Shapes: leaf [out, in] -> Masked [out, in].

    sparsity: share of the weights that is dropped in the end (0.5, or what n:m says); not with a strength.
    pattern: ``unstructured`` (per layer, or ``unstructured per row``), any n:m, ``block 32x32``, ``row``,
    ``column``, ``row 64``. begin: share of the training after which masks begin to grow. end: after which
    they have grown; until the last step they still follow the scores. every: steps between two masks.
    strength: nats per example that a weight with all its scores high costs; above 0: soft movement pruning.
    threshold: of sigmoid(S), with a strength. pace: how much faster than weights scores learn. prior: the
    score with which a weight of the root mean square of all begins.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    begin: float = 0.1
    end: float = 0.7
    every: int = 1
    strength: float = 0.0
    threshold: float = 0.1
    pace: float = 30.0
    prior: float = 1.0

    edits: ClassVar[tuple[type[Node], ...]] = (Dense,)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = "magnitude"
    scope: ClassVar[str] = "training"

    def __post_init__(self) -> None:
        growth = self._growth()
        if min(self.strength, self.prior) < 0 or not self.pace > 0 or not 0 < self.threshold < 0.5:
            raise RecipeError(f"strength {self.strength}, prior {self.prior}, pace {self.pace}, threshold "
                              f"{self.threshold}: strength and prior must not be negative, pace positive, "
                              "and threshold between 0 and 0.5, the least score at the beginning")
        if self.strength and (self.sparsity is not None or isinstance(growth.rule.pattern, NM)):
            raise RecipeError(f"strength {self.strength}: finds the sparsity itself; leave out "
                              f"{'the pattern' if self.sparsity is None else 'sparsity'}, or strength")

    def soften(self, leaf: Leaf, generator: torch.Generator) -> Soft:
        assert isinstance(leaf.node, Dense)
        return _Moved(leaf, leaf.node, self._growth().fitted(leaf), self)

    def _growth(self) -> Growth:
        return Growth.of(self.pattern, self.sparsity, "layer", self.begin, self.end, self.every)


class _Moved(Soft):
    """A weight [out, in], its scores (one per weight or tile), and the mask that follows them."""

    def __init__(self, leaf: Leaf, node: Dense, growth: Growth, settings: Movement) -> None:
        super().__init__()
        self.site, self.dtype, self.settings = leaf.site, node.values.dtype, settings
        self.tile = (1, 1)
        if isinstance(growth.rule.pattern, Tiles):  # tiles compete as single scores do
            pattern = growth.rule.pattern
            self.tile = (pattern.rows or node.shape[0], pattern.columns or node.shape[1])
            growth = replace(growth, rule=replace(growth.rule, pattern=Unstructured("layer")))
        self.growth, self.note = growth, growth.note
        self.done = False
        self.latent = nn.Parameter(node.dense().detach().clone())
        self.scores = nn.Parameter(settings.prior * self._sizes())
        allowed = torch.ones(node.shape, dtype=torch.bool) if leaf.keep is None else leaf.keep
        self.allowed: Tensor
        self.kept: Tensor
        self.register_buffer("allowed", allowed, persistent=False)
        self.register_buffer("kept", allowed.clone())

    def forward(self) -> Tensor:
        scores = self._spread(self.scores)
        return self.latent * (self.kept.float() + (scores - scores.detach()))

    def penalty(self) -> Tensor:
        if not self.settings.strength:
            return torch.zeros(())
        return self.settings.strength * self.scores.sigmoid().mean()

    def paces(self) -> dict[str, float]:
        return {"scores": self.settings.pace}

    @torch.no_grad()
    def update(self, step: int, total: int) -> None:
        """The mask of the scores of the moment."""
        self.done = step >= total if self.settings.strength else self.growth.over(step, total)
        if self.settings.strength:
            self.kept.copy_(self._spread(self.scores.sigmoid() > self.settings.threshold) & self.allowed)
            return
        follows = self.growth.over(step, total) and step % self.growth.every == 0
        if follows or self.growth.due(step, total):
            self.kept.copy_(self._highest(step, total))

    def settled(self) -> bool:
        return self.done

    def harden(self) -> Node:
        return Masked(self.kept.clone(), ended(self.site, self.latent, self.dtype))

    @torch.no_grad()
    def _sizes(self) -> Tensor:
        """The mean |w| of every tile beside the root mean square of all weights."""
        (height, width), sizes = self.tile, self.latent.abs()
        tiles = sizes.view(sizes.shape[0] // height, height, -1, width).mean((1, 3))
        return tiles / sizes.square().mean().sqrt().clamp_min(torch.finfo(sizes.dtype).tiny)

    def _highest(self, step: int, total: int) -> Tensor:
        (height, width), (rows, columns) = self.tile, self.scores.shape
        allowed = self.allowed.view(rows, height, columns, width).any(3).any(1)
        share = self.growth.share(step, total, 1 - float(allowed.float().mean()))
        return self._spread(self.growth.keep(self.scores.detach(), share, allowed)) & self.allowed

    def _spread(self, tiles: Tensor) -> Tensor:
        """One number per tile as one per weight."""
        return tiles.repeat_interleave(self.tile[0], 0).repeat_interleave(self.tile[1], 1)
