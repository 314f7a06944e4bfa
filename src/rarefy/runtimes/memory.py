"""The keys and values that attention remembers: all, rounded, or those that matter.

    memory = Memory(blocks)                             float
    memory = Memory(blocks, bits=8)                     or 4: what is older than a run of tokens is rounded
    memory = Memory(blocks, keep=(Keep(4, 252, 256),) * blocks)     no more than so many tokens of a block

Rounded as their statistics ask for: keys per channel over a run of ``run`` tokens, because a few channels of
keys are large everywhere, values per token. The newest tokens, up to a run of them, stay as they are. With
m the smallest and M the largest of a group, x becomes m + (M - m) / (2^bits - 1) * code, codes of 4 bits two
to a byte. What is asked for is decoded at every step: less memory, not less time.

A block that may keep only so many tokens keeps the first ones, on which every softmax leans, the newest, and
of the others those that got the most attention so far,

    a_j = sum over queries i and heads of softmax_j(s q_i k_j^T).

Keys stay turned for the positions at which they were seen. What is forgotten is forgotten: the text changes.

Every block has a length of its own, and the end of it can be taken back (``crop``): tokens that left early
or were only guessed need both.

Paper: Liu et al. 2024, "KIVI", section 3.2 (rounding); Xiao et al. 2024, "Efficient Streaming Language
Models with Attention Sinks", section 3.2 (first and newest); Zhang et al. 2023, "H2O: Heavy-Hitter Oracle",
section 4.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import RecipeError

RUN = 32


@dataclass(frozen=True)
class Keep:
    """What a block keeps: its first tokens, the newest, and those between that got the most attention."""

    first: int = 4
    newest: int = 252
    heavy: int = 0

    def __post_init__(self) -> None:
        if min(self.first, self.heavy) < 0 or self.newest < 1:
            raise RecipeError(f"keep: first={self.first}, newest={self.newest}, heavy={self.heavy}; newest "
                              "must be 1 or more, the others 0 or more")

    def chosen(self, scores: Tensor) -> Tensor | None:
        """Which of some tokens stay, in their order; scores: attention that each got (None: all stay)."""
        count = len(scores)
        if count <= self.first + self.heavy + self.newest:
            return None
        between = scores[self.first:count - self.newest]
        heavy = between.topk(self.heavy).indices.sort().values + self.first
        return torch.cat([torch.arange(self.first), heavy, torch.arange(count - self.newest, count)])


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

    def select(self, index: Tensor) -> None:
        """Keep some tokens of a side that is not rounded."""
        assert self.newest is not None
        self.newest = self.newest[:, :, index]

    @property
    def bytes(self) -> int:
        newest = 0 if self.newest is None else self.newest.numel() * self.newest.element_size()
        return newest + sum(run.bytes for run in self.runs)


class Memory:
    """Keys and values of all blocks, as transformers' attention asks for them.

    bits: 32 (float), 8 or 4. keep: what each block keeps (empty: everything); only of numbers as they are.
    """

    def __init__(self, blocks: int, bits: int = 32, keep: tuple[Keep, ...] = ()) -> None:
        if bits not in (4, 8, 32):
            raise RecipeError(f"bits {bits}: keys and values are kept in 32, 8 or 4")
        if keep and (bits != 32 or len(keep) != blocks):
            raise RecipeError(f"bits {bits}, keep for {len(keep)} of {blocks} blocks: keep is for all, and "
                              "runs that were rounded together cannot lose tokens; use 32")
        self.keep = keep
        self._sides = [(_Side(bits, 2), _Side(bits, 3)) for _ in range(blocks)]
        self._places = [torch.empty(0, dtype=torch.int64) for _ in range(blocks)]
        self._scores = [torch.empty(0) for _ in range(blocks)]

    def update(self, key: Tensor, value: Tensor, block: int, *rest: Any) -> tuple[Tensor, Tensor]:
        """What a block has seen so far with what it sees now."""
        keys, values = self._sides[block]
        if key.shape[-1] % 2 and keys.bits == 4:
            raise RecipeError(f"heads of {key.shape[-1]} channels: two codes of 4 bits go into a byte; use 8")
        return keys.add(key), values.add(value)

    def length(self, block: int) -> int:
        """Tokens that a block remembers."""
        return self._sides[block][0].length

    def places(self, block: int) -> Tensor:
        """The positions of the tokens that a block remembers."""
        return self._places[block] if self.keep else torch.arange(self.length(block))

    def heeds(self, block: int) -> bool:
        """Whether a block must tell where its attention went."""
        return bool(self.keep) and self.keep[block].heavy > 0

    def forget(self, block: int, start: int, weights: Tensor | None) -> None:
        """Let a block that has just seen tokens from position ``start`` on forget what it need not keep.

        weights: its attention, [1, heads, queries, tokens], where heavy ones are kept.
        """
        if not self.keep:
            return
        keys, values = self._sides[block]
        new = keys.length - len(self._places[block])
        places = torch.cat([self._places[block], torch.arange(start, start + new)])
        scores = torch.cat([self._scores[block], torch.zeros(new)])
        if weights is not None:
            scores = scores + weights[0].float().sum((0, 1))
        index = self.keep[block].chosen(scores)
        if index is not None:
            keys.select(index)
            values.select(index)
            places, scores = places[index], scores[index]
        self._places[block], self._scores[block] = places, scores

    def crop(self, length: int) -> None:
        """Forget in every block what is behind ``length`` tokens."""
        if self.keep:
            raise RecipeError("what was forgotten for tokens that are taken back cannot be remembered again; "
                              "speculate without keep")
        for keys, values in self._sides:
            keys.crop(length)
            values.crop(length)

    @property
    def bytes(self) -> int:
        """What is held now."""
        return sum(side.bytes for pair in self._sides for side in pair)
