"""Look at the nearest tokens only, and at the first few: work and cache grow with the window, not the text.

A query at position i sees the keys j with

    |i - j| < window      or      j < sinks,

later ones only in encoders. Stacked blocks still hand on what is further away, window by window. The first
tokens of a text take a large share of every softmax, whatever they say; ``sinks`` of them stay visible, or a
model that was trained without a window falls apart. Runs of queries meet the keys that one of them
can see; nothing else is computed.

Paper: Beltagy et al. 2020, "Longformer", section 3.1; Xiao et al. 2024, "Efficient Streaming Language Models
with Attention Sinks", section 3.2.
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
from rarefy.numerics.attention import joined, runs, softmax_attention

LEAST = 64  # queries that are worth being computed together


@dataclass(frozen=True)
class Window:
    """Sliding-window attention. Shapes: queries [batch, heads, n, width] to the same.

    window: tokens that a query sees on one side, itself included. sinks: first tokens that all see. blocks:
    which blocks (empty: all that see everything now).
    """

    window: int = 512
    sinks: int = 4
    blocks: tuple[int, ...] = ()

    scope: ClassVar[str] = "attention"
    edits: ClassVar[tuple[type[Attention], ...]] = (Attention,)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""
    both: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.window < 1 or self.sinks < 0:
            raise RecipeError(f"window={self.window}, sinks={self.sinks}: must be at least 1 and 0")

    def learned(self, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def attend(self, call: Attention, learned: Mapping[str, Tensor]) -> Float[Tensor, "batch heads n width"]:
        near = runs(call.query, call.key, call.value, self.window, max(LEAST, self.window // 4),
                    offset=call.offset, causal=call.causal, real=call.real)
        key, value, seen = near.key, near.value, near.seen
        if self.sinks:
            first, count = min(self.sinks, call.key.shape[2]), key.shape[1]
            places = torch.arange(first)
            told = (places <= near.at[..., None]) if call.causal else places.ge(0).expand(*near.at.shape, -1)
            told = told[None, :, None]
            if call.real is not None:
                told = told & call.real[:, None, None, None, :first]
            seen = seen & (near.to >= first)[None, :, None, None]
            seen = torch.cat([told.expand(len(seen), -1, -1, -1, -1), seen], -1)
            key, value = (torch.cat([whole[:, None, :, :first].expand(-1, count, -1, -1, -1), part], 3)
                          for whole, part in ((call.key, key), (call.value, value)))
        many = len(call.query) // len(seen)
        out = softmax_attention(near.query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1),
                                seen.repeat(many, 1, 1, 1, 1).flatten(0, 1), call.scale)
        return joined(out.unflatten(0, key.shape[:2]), call.query.shape[2])

    def keys(self, length: int, causal: bool) -> float:
        sides = self.window if causal else 2 * self.window - 1
        return float(min(length, sides + self.sinks))
