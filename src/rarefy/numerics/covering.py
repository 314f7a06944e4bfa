"""Scales that cover what there is, from the smallest value of a group to its largest.

    symmetric   s = max(low / l_0, high / l_n),         l_0 and l_n the outermost levels
    affine      s = (high - low) / (l_n - l_0),  z = low - s l_0

Nothing is searched and nothing is clipped, so this costs two reductions: cheap enough for every step of a
training. At few bits the searched scales of ``rounding`` lose much less.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rarefy.numerics.grids import Grid
from rarefy.numerics.rounding import Fit, store_affine, store_scale


def extremes(weights: Float[Tensor, "rows width"], keep: Bool[Tensor, "rows width"] | None,
             grid: Grid) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    """Smallest and largest value of every group, of what is kept (nothing kept: 0 and 0)."""
    rows, width = weights.shape
    shape = (rows, width // (grid.group or width), grid.group or width)
    if keep is None:
        grouped = weights.view(shape)
        return grouped.amin(-1), grouped.amax(-1)
    low = weights.masked_fill(~keep, torch.inf).view(shape).amin(-1)
    high = weights.masked_fill(~keep, -torch.inf).view(shape).amax(-1)
    return torch.where(low.isinf(), 0.0, low), torch.where(high.isinf(), 0.0, high)


def covering(weights: Float[Tensor, "rows width"], low: Float[Tensor, "rows groups"],
             high: Float[Tensor, "rows groups"], grid: Grid) -> Fit:
    """The stored scales and zeros whose levels reach from ``low`` to ``high``.

    Scales that are steps of a coarser number are fitted to ``weights`` once they have been rounded.
    """
    grouped = weights.view(*low.shape, -1)
    even = torch.ones_like(grouped)
    bottom, top = grid.levels[0], grid.levels[-1]
    if grid.zero is None:
        ends = [side / end for side, end in ((low, bottom), (high, top)) if end != 0]
        scale = torch.stack(ends).amax(0).clamp_min(0)
        if grid.scale.dtype == torch.float8_e8m0fnu:  # powers of two: the next one that still covers
            scale = torch.exp2(torch.ceil(torch.log2(scale.clamp_min(2.0**-126))))
        return Fit(store_scale(grouped, even, scale, grid), None, grid)
    if grid.zero.bits or grid.zero.relative:  # such a zero has to be one of the levels
        low, high = low.clamp_max(0), high.clamp_min(0)
    scale = (high - low) / (top - bottom)
    flat = scale == 0  # a constant group is its zero alone
    zero = torch.where(flat, low, low - bottom * scale)
    return store_affine(grouped, even, scale, zero, grid)
