"""Attention over runs of neighbouring positions: what is not looked at is not computed.

Queries are cut into runs, and each run gets the keys that any of its queries can see, so the work is
(window + run) x length, or in encoders (2 window + run) x length, instead of length squared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def bands(values: Float[Tensor, "batch heads length width"], start: int, count: int, step: int, size: int
          ) -> Float[Tensor, "batch count heads size width"]:
    """``count`` runs of ``size`` positions, the first from ``start``, each ``step`` behind the one before it;
    zero where there are no positions."""
    end = start + (count - 1) * step + size
    left = max(0, -start)
    padded = F.pad(values, (0, 0, left, max(0, end - values.shape[2])))[:, :, start + left:end + left]
    return padded.unfold(2, size, step).permute(0, 2, 1, 4, 3)


@dataclass(frozen=True, eq=False)
class Runs:
    """Queries in runs, the keys and values near each run, and which of them each query sees.

    at, to: positions of queries and keys, [count, run] and [count, size].
    """

    query: Float[Tensor, "batch count heads run width"]
    key: Float[Tensor, "batch count groups size width"]
    value: Float[Tensor, "batch count groups size width"]
    seen: Bool[Tensor, "_ count 1 run size"]
    at: Tensor
    to: Tensor


def runs(query: Float[Tensor, "batch heads queries width"], key: Float[Tensor, "batch groups keys width"],
         value: Float[Tensor, "batch groups keys width"], window: int, run: int, *, offset: int,
         causal: bool, real: Bool[Tensor, "batch keys"] | None) -> Runs:
    """Every query sees keys less than ``window`` positions away, later ones only where not ``causal``.

    run: queries that are computed together. offset: the position of the first query among the keys.
    """
    run = min(run, query.shape[2])
    count, start = -(-query.shape[2] // run), offset - window
    size = window + run + (0 if causal else window)
    first = torch.arange(count)[:, None] * run
    at, to = offset + first + torch.arange(run), start + first + torch.arange(size)
    away = at[:, :, None] - to[:, None]
    seen = (away.abs() < window) & ((to >= 0) & (to < key.shape[2]))[:, None]
    if causal:
        seen &= away >= 0
    seen = seen[None, :, None]
    if real is not None:
        told = bands(real[:, None, :, None].float(), start, count, run, size)[..., 0].bool()
        seen = seen & told[..., None, :]
    return Runs(bands(query, 0, count, run, run), bands(key, start, count, run, size),
                bands(value, start, count, run, size), seen, at, to)


def joined(values: Float[Tensor, "batch count heads run width"], length: int
           ) -> Float[Tensor, "batch heads length width"]:
    """Runs of queries as one again."""
    return values.transpose(1, 2).flatten(2, 3)[:, :, :length]


def softmax_attention(query: Float[Tensor, "batch heads queries width"],
                      key: Float[Tensor, "batch groups keys width"],
                      value: Float[Tensor, "batch groups keys width"], seen: Bool[Tensor, "_ 1 _ keys"],
                      scale: float) -> Float[Tensor, "batch heads queries width"]:
    """Attention where ``seen``; heads share keys in groups without copies. Zero for who sees nothing."""
    batch, heads, queries, width = query.shape
    groups = key.shape[1]
    blind = ~seen.any(-1, keepdim=True)
    mask = (seen | blind).expand(batch, -1, queries, -1)
    if groups < heads:  # each set of keys is its own batch, seen by all of its heads
        query = query.reshape(batch * groups, heads // groups, queries, width)
        key, value = (each.flatten(0, 1)[:, None].expand(-1, heads // groups, -1, -1)
                      for each in (key, value))
        mask = mask.repeat_interleave(groups, 0)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.view(batch, heads, queries, width).masked_fill(blind, 0.0)
