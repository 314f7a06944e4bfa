"""Look at the nearest tokens, and beyond them at every ``stride``-th: the Sparse Transformer's pattern.

A query at position i sees the keys j with

    |i - j| < stride      or      (i - j) mod stride = 0,

later ones only in encoders: about stride + n / stride of n keys, 2 sqrt(n) at best, and any token reaches any
other within two blocks. Positions that are alike modulo the stride form texts of their own, n / stride long,
in which the second part is ordinary attention; both parts share one softmax.

Paper: Child et al. 2019, "Generating Long Sequences with Sparse Transformers", section 4.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.core.attention import Attention
from rarefy.core.errors import RecipeError
from rarefy.numerics.attention import bands, joined, runs, softmax_attention


@dataclass(frozen=True)
class Strided:
    """Strided block-sparse attention. Shapes: queries [batch, heads, n, width] to the same.

    stride: tokens that a query sees on one side, and the distance of those beyond. blocks: which blocks
    (empty: all that see everything now).
    """

    stride: int = 128
    blocks: tuple[int, ...] = ()

    scope: ClassVar[str] = "attention"
    edits: ClassVar[tuple[type[Attention], ...]] = (Attention,)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""
    both: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.stride < 2:
            raise RecipeError(f"stride={self.stride}: must be 2 or more")

    def learned(self, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def attend(self, call: Attention, learned: Mapping[str, Tensor]) -> Float[Tensor, "batch heads n width"]:
        length = call.query.shape[2]
        if call.offset or length <= self.stride:
            return self._few(call)
        shared = call.query.shape[1] // call.key.shape[1]
        key, value = (each.repeat_interleave(shared, 1) for each in (call.key, call.value))
        near = runs(call.query, key, value, self.stride, self.stride, offset=0, causal=call.causal,
                    real=call.real)
        count, stride = near.query.shape[1], self.stride
        alike = [each.permute(0, 2, 3, 1, 4) for each in (  # [batch, heads, stride, count, width]
            near.query, *(bands(part, 0, count, stride, stride) for part in (key, value)))]
        far = (alike[0] @ alike[1].transpose(-1, -2)).permute(0, 3, 1, 2, 4)  # runs first, as near ones
        scores = torch.cat([(near.query @ near.key.transpose(-1, -2)).masked_fill(~near.seen, -torch.inf),
                            far.masked_fill(~self._beyond(call, count), -torch.inf)], -1) * call.scale
        blind = (scores == -torch.inf).all(-1, keepdim=True)
        shares = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
        size = near.key.shape[3]
        out = shares[..., :size] @ near.value
        out = out + (shares[..., size:].permute(0, 2, 3, 1, 4) @ alike[2]).permute(0, 3, 1, 2, 4)
        return joined(out, length)

    def _beyond(self, call: Attention, count: int) -> Tensor:
        """Which runs' tokens of the same place a query sees, [1 or batch, count, 1, stride, count]."""
        run = torch.arange(count)
        other = run[:, None] > run if call.causal else run[:, None] != run
        places = run * self.stride + torch.arange(self.stride)[:, None]  # [stride, count]
        there = (places < call.key.shape[2])[None, None, None]
        if call.real is not None:
            there = there & bands(call.real[:, None, :, None].float(), 0, count, self.stride, self.stride)[
                ..., 0].bool().permute(0, 2, 3, 1)[:, None]
        return there & other[None, :, None, None]

    def _few(self, call: Attention) -> Tensor:
        """Behind a cache, or in a short text: the columns that any query sees."""
        at, to = call.offset + torch.arange(call.query.shape[2]), torch.arange(call.key.shape[2])
        away = at[:, None] - to
        seen = (away.abs() < self.stride) | (away % self.stride == 0)
        if call.causal:
            seen &= away >= 0
        columns = seen.any(0).nonzero()[:, 0]
        seen = seen[None, None, :, columns]
        if call.real is not None:
            seen = seen & call.real[:, None, None, columns]
        key, value = call.key[:, :, columns], call.value[:, :, columns]
        return softmax_attention(call.query, key, value, seen, call.scale)

    def keys(self, length: int, causal: bool) -> float:
        each = min(length, self.stride) + length / (2 * self.stride)
        return float(min(length, each if causal else 2 * each))
