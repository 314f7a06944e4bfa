"""Weights as unsigned codes, a scale and a zero point: what most runtimes besides llama.cpp store.

    w[i, j] = scale[i, g] * (code[i, j] - zero[i, g]),      0 <= code < 2^bits,   g = j // group

Every grid of whole levels that span less than 256 is of this form, exactly: a code is its level, counted
from the lowest integer of 2, 4 or 8 bits. Nothing is rounded here; what a mask dropped becomes the code of
zero. Codes are packed low bits first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from rarefy.core.nodes import Masked, Node, Quantized, Shared

WIDTHS = (2, 4, 8)


@dataclass(frozen=True, eq=False)
class Integers:
    """A weight as codes. group: columns that share a scale (the whole row: ``in``). zero: as it acts, whole
    or not."""

    codes: UInt8[Tensor, "out in_"]
    scale: Float[Tensor, "out groups"]
    zero: Float[Tensor, "out groups"]
    bits: int
    group: int

    @property
    def whole(self) -> bool:
        """Whether every zero point is one of the codes, so that it can be stored as one."""
        top = (1 << self.bits) - 1
        return bool(((self.zero == self.zero.round()) & (self.zero >= 0) & (self.zero <= top)).all())

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is the middle everywhere: signed codes need none."""
        return bool((self.zero == 1 << (self.bits - 1)).all())

    @property
    def by_row(self) -> bool:
        """Whether a row has one scale."""
        return self.scale.shape[1] == 1

    def widened(self, bits: int) -> Integers:
        """The same weight in wider codes."""
        if bits == self.bits:
            return self
        shift = (1 << (bits - 1)) - (1 << (self.bits - 1))
        return replace(self, codes=self.codes + shift, zero=self.zero + shift, bits=bits)

    def regrouped(self, group: int) -> Integers:
        """The same weight with each scale repeated for groups of ``group``, which divide the present ones."""
        if group == self.group:
            return self
        places = torch.arange(0, self.codes.shape[1], group) // self.group
        return replace(self, scale=self.scale[:, places], zero=self.zero[:, places], group=group)

    def dense(self) -> Float[Tensor, "out in_"]:
        """The weight, float32."""
        column = torch.arange(self.codes.shape[1]) // self.group
        return self.scale[:, column] * (self.codes.float() - self.zero[:, column])


def integers(node: Node) -> Integers | None:
    """``node`` as integers, or None where it is none: another kind of node, levels too far apart, masked
    weights without a code for zero."""
    match node:
        case Quantized():
            return _of(node)
        case Masked(keep=keep, inner=inner):
            found = integers(inner)
            if found is None or not found.whole:
                return None
            column = torch.arange(found.codes.shape[1]) // found.group
            return replace(found, codes=torch.where(keep, found.codes, found.zero.to(torch.uint8)[:, column]))
        case Shared(of=of):
            return integers(of)
        case _:
            return None


def _of(node: Quantized) -> Integers | None:
    low, high = int(node.grid.levels[0]), int(node.grid.levels[-1])
    bits = next((width for width in WIDTHS if high - low < 1 << width), None)
    if bits is None:
        return None
    half = 1 << (bits - 1)
    if -half <= low and high < half:
        low = -half  # signed levels keep their value, so that a missing zero point is the middle
    table = torch.tensor([int(level) - low for level in node.grid.levels], dtype=torch.uint8)
    scale = node.scale.dense().float()
    zero = torch.full_like(scale, float(-low))
    if node.zero is not None:
        assert node.grid.zero is not None
        offset = node.zero.dense().float()
        if not node.grid.zero.relative:
            offset = torch.where((scale == 0) & (offset == 0), 0.0, offset / scale)
        zero = zero - offset
    if not bool(torch.isfinite(zero).all()):
        return None  # a constant group: its scale is zero, its value is not
    return Integers(table[node.codes.int()], scale, zero, bits, node.grid.group or node.codes.shape[1])


def packed(codes: UInt8[Tensor, "rows columns"], bits: int) -> NDArray[np.uint8]:
    """Rows of codes, each padded with zeros to whole bytes, low bits first."""
    per = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per)).numpy()
    shifts = np.arange(per, dtype=np.uint8) * bits
    parts = padded.reshape(len(padded), padded.shape[1] // per, per) << shifts
    return np.bitwise_or.reduce(parts, axis=2)


def unpacked(data: NDArray[np.uint8], bits: int, columns: int) -> UInt8[Tensor, "rows columns"]:
    """The codes that ``packed`` packed."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = (data[..., None] >> shifts) & ((1 << bits) - 1)
    return torch.from_numpy(parts.reshape(len(data), -1)[:, :columns].astype(np.uint8))
