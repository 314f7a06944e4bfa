"""Attention as a block computes it, for techniques that compute it otherwise.

    y_i = sum_j softmax_j(s q_i k_j^T) v_j

Queries, keys and values are what the block's own matrices gave, behind rotary embeddings; heads share keys
and values in groups. With a cache there are more keys than queries: the last query stands at the last key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Attention:
    """One call. scale: s. causal: queries see no later keys. real: which keys are no padding (None: all)."""

    query: Float[Tensor, "batch heads queries width"]
    key: Float[Tensor, "batch groups keys width"]
    value: Float[Tensor, "batch groups keys width"]
    scale: float
    causal: bool
    real: Bool[Tensor, "batch keys"] | None = None

    @property
    def offset(self) -> int:
        """The position of the first query among the keys."""
        return self.key.shape[2] - self.query.shape[2] if self.causal else 0


@runtime_checkable
class Attending(Protocol):
    """A technique that computes attention otherwise: a frozen dataclass whose fields are its settings.

    both: whether it works for causal attention, too, or for encoders only. blocks: which (empty: all that
    look at everything). ``learned``: tensors of a block's own by name, for heads of that width, as they are
    before any training. ``attend``: with these, what the heads give, shaped as the queries. ``keys``: how
    many keys a query is compared with, on average over a text of some length.
    """

    scope: ClassVar[str]
    edits: ClassVar[tuple[type[Attention], ...]]
    needs: ClassVar[frozenset[str]]
    both: ClassVar[bool]

    @property
    def blocks(self) -> tuple[int, ...]: ...

    def learned(self, width: int, generator: torch.Generator) -> dict[str, Tensor]: ...

    def attend(self, call: Attention, learned: Mapping[str, Tensor]) -> Tensor: ...

    def keys(self, length: int, causal: bool) -> float: ...
