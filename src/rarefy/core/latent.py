"""Latent weights: the plain values behind a weight that is stored coarsely, while it trains.

The forward pass uses what will be stored, bit for bit; the gradient passes to the latent value as if nothing
had been rounded (the straight-through estimator of Bengio et al. 2013). ``x - x.detach()`` is exactly zero
and carries a gradient of one, so ``passed(stored, latent)`` *is* ``stored``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.core.edit import Leaf
from rarefy.core.errors import EditError
from rarefy.core.nodes import Dense, Quantized

INSIDE = 0.45  # of the way to the neighbouring level: a value there keeps its code for some steps of training


def passed(stored: Tensor, latent: Tensor, factor: Tensor | float = 1.0) -> Tensor:
    """``stored``, with the gradient ``factor`` (constant) to ``latent``."""
    return stored.detach() + factor * (latent - latent.detach())


def started(leaf: Leaf) -> Float[Tensor, "out in_"]:
    """The values from which the training of a leaf begins.

    Plain values are themselves. Codes begin with what they stand for moved towards the leaf's target as
    far as they stay the same codes: training starts where rounding ended, and remembers the original. Not to
    the very edge: there the first step undoes whatever made up for the errors of other codes (GPTQ).
    """
    match leaf.node:
        case Quantized() as node:
            return _in_cells(node, leaf.target)
        case node:
            return node.dense().detach().clone()


def ended(site: str, values: Float[Tensor, "out in_"], dtype: torch.dtype) -> Dense:
    """Trained values in the dtype that the leaf had; EditError if they have outgrown it."""
    stored = values.detach().to(dtype, copy=True)
    if not bool(torch.isfinite(stored).all()):
        size = float(values.detach().abs().max())
        raise EditError(f"{site}: {size:g} does not fit {str(dtype).removeprefix('torch.')}; train weights "
                        "in bfloat16 or float32, or at a lower rate")
    return Dense(stored)


def _in_cells(node: Quantized, target: Tensor) -> Tensor:
    """``target``, clamped for every weight to the values that round to its code."""
    levels = torch.tensor(node.grid.levels)
    gaps = INSIDE * levels.diff()
    endless = torch.tensor([torch.inf])
    below, above = torch.cat([-endless, levels[1:] - gaps]), torch.cat([levels[:-1] + gaps, endless])
    scale, zero = node.fit().values()
    codes = node.codes.view(*scale.shape, -1).int()
    s = scale.unsqueeze(-1)
    z = 0.0 if zero is None else zero.unsqueeze(-1)
    dead = s == 0  # all codes stand for the same value
    ends = [torch.where(dead, z, levels_of[codes] * s + z) for levels_of in (below, above)]
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    grouped = target.view(codes.shape)
    return torch.where(dead, grouped, grouped.clamp(low, high)).view(target.shape)
