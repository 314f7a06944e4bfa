"""Sparse variational dropout: every weight learns how much noise it can bear; what bears any amount goes.

A weight is a Gaussian around its value, and is drawn anew at every step,

    w = v + sigma e,      e ~ N(0, 1),      a = sigma^2 / v^2,

while its divergence from a prior that is flat on the log scale is added to the loss, divided by the number
of examples. It has a close approximation in log a alone,

    KL(a) = k_1 - k_1 sigmoid(k_2 + k_3 log a) + 1/2 log(1 + 1/a),      k = (0.63576, 1.87320, 1.48695),

which falls as noise grows. Where ``log a`` exceeds 3 a weight is noise to more than 95%, and is dropped; the
others are used at their value. How much goes, the data decides: no sparsity is asked for.

The paper draws the outputs of a layer, which has less variance; here weights are drawn, because a matrix is
all that a network is given, whatever it does with it.

Paper: Molchanov et al. 2017, "Variational Dropout Sparsifies Deep Neural Networks", eq. 11 and 14, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from rarefy.core.edit import Leaf
from rarefy.core.errors import RecipeError
from rarefy.core.latent import ended
from rarefy.core.nodes import Dense, Masked, Node
from rarefy.core.tune import Soft

K = (0.63576, 1.87320, 1.48695)
BOUND = 8.0  # of |log a|: beyond, the approximation is flat


@dataclass(frozen=True)
class Variational:
    """Pruning by learned noise.

    Shapes: leaf [out, in] -> Masked [out, in]; how much is dropped, the loss decides.

    examples: that the
    training set has (what the loss is a mean over: rows or tokens); fewer drop more. warmup: share of the
    training in which the divergence grows to its full weight. threshold: of log a. start: log a of a weight
    of mean size when training begins. pace: how much faster than weights log sigma^2 learns.
    """

    examples: int = 10_000
    warmup: float = 0.3
    threshold: float = 3.0
    start: float = -6.0
    pace: float = 50.0

    edits: ClassVar[tuple[type[Node], ...]] = (Dense,)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = "magnitude"
    scope: ClassVar[str] = "training"

    def __post_init__(self) -> None:
        if self.examples < 1 or not self.pace > 0 or not 0 <= self.warmup <= 1:
            raise RecipeError(f"examples {self.examples}, pace {self.pace}, warmup {self.warmup}: examples "
                              "and pace must be positive, warmup a share of the training")
        if not -BOUND < self.start < self.threshold < BOUND:
            raise RecipeError(f"start {self.start}, threshold {self.threshold}: log a must start below the "
                              f"threshold, both within {BOUND:g} of 0")

    def soften(self, leaf: Leaf, generator: torch.Generator) -> Soft:
        assert isinstance(leaf.node, Dense)
        return _Noisy(leaf, leaf.node, self)


class _Noisy(Soft):
    """A weight [out, in] and the logarithms of its variances [out, in]."""

    def __init__(self, leaf: Leaf, node: Dense, settings: Variational) -> None:
        super().__init__()
        self.site, self.dtype, self.settings = leaf.site, node.values.dtype, settings
        values = node.dense().detach().clone()
        self.done = False
        self.latent = nn.Parameter(values)
        size = values.square().mean().clamp_min(1e-8).log()
        self.spread = nn.Parameter(torch.full_like(values, float(settings.start + size)))
        self.allowed: Tensor
        self.weight: Tensor
        allowed = torch.ones(node.shape, dtype=torch.bool) if leaf.keep is None else leaf.keep
        self.register_buffer("allowed", allowed, persistent=False)
        self.register_buffer("weight", torch.tensor(0.0 if settings.warmup else 1.0))

    def forward(self) -> Tensor:
        if self.training:
            return self.latent + (0.5 * self.spread).exp() * torch.randn_like(self.latent)
        return torch.where(self._alive(), self.latent, 0.0)

    def penalty(self) -> Tensor:
        """The divergence of all weights, per example."""
        divergence = torch.where(self.allowed, kl(self._log_a()), 0.0).sum()
        return self.weight * divergence / self.settings.examples

    def paces(self) -> dict[str, float]:
        return {"spread": self.settings.pace}

    @torch.no_grad()
    def update(self, step: int, total: int) -> None:
        """The divergence's weight grows to 1; weights are lost to noise until the last step."""
        self.done = step >= total
        self.weight.fill_(min(1.0, step / max(1.0, self.settings.warmup * total)))

    def settled(self) -> bool:
        return self.done

    @torch.no_grad()
    def harden(self) -> Node:
        return Masked(self._alive() & self.allowed, ended(self.site, self.latent, self.dtype))

    def _log_a(self) -> Tensor:
        return (self.spread - (self.latent.square() + 1e-8).log()).clamp(-BOUND, BOUND)

    def _alive(self) -> Tensor:
        return self._log_a() < self.settings.threshold


def kl(log_a: Tensor) -> Tensor:
    """The divergence of one weight from the log-uniform prior, up to a constant; 0 for nothing but noise."""
    return K[0] - K[0] * torch.sigmoid(K[1] + K[2] * log_a) + 0.5 * torch.log1p((-log_a).exp())
