"""The keys and values that attention remembers, as they are or rounded, block by block.

    memory = Memory(blocks)                     float
    memory = Memory(blocks, bits=8)             or 4: what is older than a run of tokens is rounded

Rounded as their statistics ask for: keys per channel over a run of ``run`` tokens, because a few channels of
keys are large everywhere, values per token. The newest tokens, up to a run of them, stay as they are. With
m the smallest and M the largest of a group, x becomes m + (M - m) / (2^bits - 1) * code, codes of 4 bits two
to a byte. What is asked for is decoded at every step: less memory, not less time.

Every block has a length of its own, and the end of it can be taken back (``crop``): tokens that left early
or were only guessed need both.

Paper: Liu et al. 2024, "KIVI", section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import RecipeError

RUN = 32


@dataclass(frozen=True, eq=False)
class _Rounded:
    """A run of tokens, [batch, heads, run, width], as codes; low and step have 1 along ``axis``."""

    codes: Tensor
    low: Tensor
    step: Tensor
    bits: int

    @classmethod
    def of(cls, values: Tensor, bits: int, axis: int) -> _Rounded:
        low = values.amin(axis, keepdim=True)
        step = ((values.amax(axis, keepdim=True) - low) / (2**bits - 1)).clamp_min(1e-8)
        codes = ((values - low) / step).round_().to(torch.uint8)
        if bits == 4:
            codes = codes[..., ::2] | codes[..., 1::2] << 4
        return cls(codes, low.half(), step.half(), bits)

    def dense(self) -> Tensor:
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        return self.low.float() + self.step.float() * codes

    @property
    def bytes(self) -> int:
        return sum(each.numel() * each.element_size() for each in (self.codes, self.low, self.step))


@dataclass(eq=False)
class _Side:
    """Keys, or values, of one block: rounded runs, then the newest tokens as they are."""

    bits: int
    axis: int
    runs: list[_Rounded] = field(default_factory=list)
    newest: Tensor | None = None

    @property
    def length(self) -> int:
        return RUN * len(self.runs) + (0 if self.newest is None else self.newest.shape[2])

    def add(self, values: Tensor) -> Tensor:
        """Remember some more, and give all of it."""
        self.newest = values if self.newest is None else torch.cat([self.newest, values], 2)
        whole = self.newest if not self.runs else torch.cat(
            [*(run.dense() for run in self.runs), self.newest], 2)
        while self.bits < 32 and self.newest.shape[2] > RUN:
            self.runs.append(_Rounded.of(self.newest[:, :, :RUN], self.bits, self.axis))
            self.newest = self.newest[:, :, RUN:]
        return whole

    def crop(self, length: int) -> None:
        while self.runs and RUN * len(self.runs) > length:  # a run that is cut is no run any more
            run = self.runs.pop().dense()
            self.newest = run if self.newest is None else torch.cat([run, self.newest], 2)
        if self.newest is not None:
            self.newest = self.newest[:, :, :length - RUN * len(self.runs)]

    @property
    def bytes(self) -> int:
        newest = 0 if self.newest is None else self.newest.numel() * self.newest.element_size()
        return newest + sum(run.bytes for run in self.runs)


class Memory:
    """Keys and values of all blocks, as transformers' attention asks for them. bits: 32 (float), 8 or 4."""

    def __init__(self, blocks: int, bits: int = 32) -> None:
        if bits not in (4, 8, 32):
            raise RecipeError(f"bits {bits}: keys and values are kept in 32, 8 or 4")
        self._sides = [(_Side(bits, 2), _Side(bits, 3)) for _ in range(blocks)]

    def update(self, key: Tensor, value: Tensor, block: int, *rest: Any) -> tuple[Tensor, Tensor]:
        """What a block has seen so far with what it sees now."""
        if key.shape[-1] % 2 and self._sides[block][0].bits == 4:
            raise RecipeError(f"heads of {key.shape[-1]} channels: two codes of 4 bits go into a byte; use 8")
        keys, values = self._sides[block]
        return keys.add(key), values.add(value)

    def length(self, block: int) -> int:
        """Tokens that a block remembers."""
        return self._sides[block][0].length

    def crop(self, length: int) -> None:
        """Forget in every block what is behind ``length`` tokens."""
        for keys, values in self._sides:
            keys.crop(length)
            values.crop(length)

    @property
    def bytes(self) -> int:
        """What is held now."""
        return sum(side.bytes for pair in self._sides for side in pair)
