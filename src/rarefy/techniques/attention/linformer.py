"""Compare queries with a fixed number of mixtures of the keys: attention of low rank, for encoders.

With E [rank, n] of a block's own, one for keys and values of all heads,

    y = softmax(s q (E K)^T) E V,

work and memory are rank x n instead of n x n. E starts as the means of ``rank`` neighbouring stretches of the
longest text and learns from there; texts may be shorter than ``length``, never longer. Padding is zero before
it is mixed.

Paper: Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity", eq. 7 (projections shared by keys
and values and by heads: section 4, "additional efficiency techniques").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.core.attention import Attention
from rarefy.core.errors import EditError, RecipeError
from rarefy.numerics.attention import softmax_attention


@dataclass(frozen=True)
class Linformer:
    """Low-rank attention. Shapes: queries [batch, heads, n, width] to the same; project [rank, length].

    rank: mixtures. length: tokens of the longest text. blocks: which blocks (empty: all).
    """

    rank: int = 32
    length: int = 128
    blocks: tuple[int, ...] = ()

    scope: ClassVar[str] = "attention"
    edits: ClassVar[tuple[type[Attention], ...]] = (Attention,)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""
    both: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.rank <= self.length:
            raise RecipeError(f"rank={self.rank}, length={self.length}: rank must be from 1 to length")

    def learned(self, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        stretch = torch.arange(self.length) * self.rank // self.length
        own = (stretch == torch.arange(self.rank)[:, None]).float()
        return {"project": own / own.sum(1, keepdim=True)}

    def attend(self, call: Attention, learned: Mapping[str, Tensor]) -> Float[Tensor, "batch heads n width"]:
        count = call.key.shape[2]
        if count > self.length:
            raise EditError(f"linformer: a text of {count} tokens, at most length={self.length}; convert "
                            "with a larger length")
        mix = learned["project"][:, :count].to(call.key.dtype)[None]
        if call.real is not None:
            mix = mix * call.real[:, None].to(mix.dtype)
        seen = (mix != 0).any(-1)[:, None, None]
        key, value = mix[:, None] @ call.key, mix[:, None] @ call.value
        return softmax_attention(call.query, key, value, seen, call.scale)

    def keys(self, length: int, causal: bool) -> float:
        return float(self.rank)
