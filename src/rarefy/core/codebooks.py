"""Nodes of weight sharing: many weights, few numbers.

``Clustered`` stores which of a few values (or short vectors) each weight takes; ``Hashed`` does not even
store that: a hash function of the position says it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rarefy.core.nodes import Node

PRIMES = (2654435761, 2246822519, 3266489917, 668265263, 374761393)  # those of xxHash32
WORD = 0xFFFFFFFF


@final
@dataclass(frozen=True, eq=False)
class Clustered(Node):
    """``W[o, d*j : d*j+d] = codebook[book of j, index[o, j]]``: k-means sharing, product quantization.

    codebook [books, values, d]: one book for the whole weight (books = 1), or one for each of the
    in / d places in a row. index [out, in / d], uint8 or int32.
    """

    codebook: Float[Tensor, "books values d"]
    index: Int[Tensor, "out places"]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.index.shape[0], self.index.shape[1] * self.codebook.shape[2])

    def dense(self) -> Tensor:
        books, _, d = self.codebook.shape
        book = torch.arange(self.index.shape[1], device=self.index.device) if books > 1 else 0
        values = self.codebook.to(torch.float32)[book, self.index.long()]
        return values.reshape(self.index.shape[0], self.index.shape[1] * d)

    def bits(self) -> int:
        return self._book_bits() + self.index.numel() * self._width()

    def _book_bits(self) -> int:
        return self.codebook.numel() * self.codebook.element_size() * 8

    def _width(self) -> int:
        return max(1, (self.codebook.shape[1] - 1).bit_length())

    def select(self, axis: int, index: Tensor) -> Clustered:
        if axis == 0:
            return replace(self, index=self.index.index_select(0, index))
        d = self.codebook.shape[2]
        whole = index.view(-1, d) if index.numel() % d == 0 else None
        if whole is None or not torch.equal(whole, whole[:, :1] // d * d + torch.arange(d)):
            raise ValueError(f"columns of vectors of {d} can only be kept in whole vectors")
        places = whole[:, 0] // d
        books = self.codebook if self.codebook.shape[0] == 1 else self.codebook.index_select(0, places)
        return Clustered(books, self.index.index_select(1, places))


@final
@dataclass(frozen=True, eq=False)
class Hashed(Node):
    """``W[o, i] = sign(o, i) * buckets[h(o, i)]`` (Chen et al. 2015, "HashedNets", eq. 3 and 7)."""

    buckets: Float[Tensor, " buckets"]
    seed: int
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    def dense(self) -> Tensor:
        return self.rows(torch.arange(self.size[0], device=self.buckets.device))

    def rows(self, index: Tensor) -> Tensor:
        bucket, sign = self.places(index)
        return self.buckets.to(torch.float32)[bucket] * sign

    def places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Bucket (int64) and sign (+-1 float32) of every weight of the given rows, [rows, in]."""
        columns = torch.arange(self.size[1], device=rows.device)
        position = rows[:, None] * self.size[1] + columns
        mixed = xxhash32(position, self.seed)
        return mixed % self.buckets.numel(), 1.0 - 2.0 * (xxhash32(position, self.seed ^ WORD) & 1)

    def bits(self) -> int:
        return self.buckets.numel() * self.buckets.element_size() * 8

    def select(self, axis: int, index: Tensor) -> Node:
        raise ValueError("rows and columns of a hashed weight cannot be kept apart; select before hashing")


def xxhash32(values: Int[Tensor, "*shape"], seed: int) -> Int[Tensor, "*shape"]:
    """xxHash32 of each value as four little-endian bytes: int64 in [0, 2^32)."""
    def rotated(x: Tensor, by: int) -> Tensor:
        return (x << by | x >> (32 - by)) & WORD

    def times(x: Tensor, prime: int) -> Tensor:  # 32-bit product without overflow of int64
        return ((x * (prime & 0xFFFF)) + ((x * (prime >> 16) & 0xFFFF) << 16)) & WORD

    hashed = (times(values & WORD, PRIMES[2]) + (seed + PRIMES[4] + 4)) & WORD
    hashed = times(rotated(hashed, 17), PRIMES[3])
    hashed = times(hashed ^ hashed >> 15, PRIMES[1])
    hashed = times(hashed ^ hashed >> 13, PRIMES[2])
    return hashed ^ hashed >> 16
