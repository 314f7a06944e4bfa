"""The operations of a network in integers: what each reads, what it makes, how it computes.

A value is held as codes, ``x = scale (q - zero)``. Multiplications read codes of 8 bits; their sums have 32,
and what only sums, norms and activation functions read is *wide*: 18 bits with its sign, a quarter of them
spare for values that calibration did not see. One product with a fixed-point factor leads from any of these
to any other:

    Linear, Convolution   q = z + f (sum_j w_j (q_j - z_in) + b),                    f = s_in s_w / s_out
    Attention             e_j = 255 exp(s_q s_k (q k_j - max) / sqrt(d)),  q = z + f sum_j e_j v_j / sum_j e_j
    Normalize             q = f d / |d| + b,  d the distances from the mean,         f = gamma sqrt(n) / s_out

Probabilities are divided by their sum after the product with v, so 8 bits resolve them next to the largest
one of the row, however many there are.

Papers: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 2 and appendix A; Kim et al. 2021, "I-BERT: Integer-only BERT Quantization".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_arg

from rarefy.numerics.fixed_point import (
    ERF_OUT,
    MINIMAX,
    Erf,
    Fixed,
    error_function,
    exponential,
    hyperbolic_tangent,
    shifted,
    unit_vectors,
)
from rarefy.numerics.ranges import Range

WIDE = 1 << 15          # the code of the largest magnitude that calibration saw
LIMIT = (1 << 17) - 1   # the largest code
PROBABILITY = 255       # the code of the most probable
SUM = 24                # fractional bits of the factors of sums
MIXED = 16              # fractional bits of a mixture of values
DIVIDED = 38            # the power of two that sums of probabilities divide
NEVER = -(1 << 40)      # the score of what a mask hides


@dataclass(frozen=True)
class Code:
    """What codes stand for: ``scale * (q - zero)``, low <= q <= high."""

    scale: float
    zero: int
    low: int
    high: int

    @classmethod
    def eight(cls, span: Range) -> Code:
        """Unsigned, in 8 bits; training may have left most of the 256 codes out."""
        return cls(span.scale, span.zero, 0, span.top)

    @classmethod
    def wide(cls, span: Range) -> Code:
        """Signed, 18 bits."""
        largest = max(abs(span.low), abs(span.high))
        return cls(largest / WIDE if largest > 0 else 1.0, 0, -LIMIT, LIMIT)

    @property
    def dtype(self) -> torch.dtype:
        """The smallest type that holds them."""
        return torch.uint8 if self.low >= 0 and self.high < 256 else torch.int32

    def clip(self, multiples: Tensor) -> Tensor:
        """Whole multiples of the scale as codes."""
        return (multiples + self.zero).clamp(self.low, self.high).to(self.dtype)

    def of(self, values: Tensor) -> Tensor:
        """The codes of real numbers. One of two places that know any."""
        return self.clip((values / self.scale).round().long())

    def values(self, codes: Tensor) -> Tensor:
        """The real numbers that codes stand for, float32. The other place."""
        return (codes.long() - self.zero).float() * self.scale


@dataclass(frozen=True, eq=False)
class Step(ABC):
    """One operation. name: of the value it makes; reads: names of those it reads."""

    name: str
    reads: tuple[str, ...]

    @abstractmethod
    def compute(self, *values: Any) -> Any: ...


@dataclass(frozen=True, eq=False)
class Call(Step):
    """An operator that only moves codes, or computes what is whole anyway: masks, positions, lengths.

    nodes: what ``args`` call the values that are read.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    nodes: tuple[str, ...]

    def compute(self, *values: Any) -> Any:
        held = dict(zip(self.nodes, values, strict=True))
        return self.target(*map_arg(self.args, lambda node: held[node.name]),
                           **map_arg(dict(self.kwargs), lambda node: held[node.name]))


@dataclass(frozen=True, eq=False)
class Made(Step):
    """An operation whose result is codes."""

    code: Code


@dataclass(frozen=True, eq=False)
class Linear(Made):
    """[.., in] -> [.., out]. weight: int8 [out, in]; bias: on the scale of the sums; zero: of the input."""

    weight: Tensor
    bias: Tensor
    zero: int
    factor: Fixed

    def compute(self, x: Tensor) -> Tensor:
        sums = product(x.reshape(-1, x.shape[-1]), self.zero, self.weight) + self.bias
        return self.code.clip(self.factor.times(sums)).reshape(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Window:
    """How a kernel moves over [samples, channels, height, width]."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def over(self, x: Tensor, around: int) -> Tensor:
        """[samples, channels, rows, columns, *kernel]; around: what the padding holds."""
        high, wide = self.pad
        x = torch.constant_pad_nd(x, (wide, wide, high, high), around)
        for axis, size, step, apart in zip((2, 3), self.kernel, self.stride, self.dilation, strict=True):
            x = x.unfold(axis, (size - 1) * apart + 1, step)
        return x[..., ::self.dilation[0], ::self.dilation[1]]


@dataclass(frozen=True, eq=False)
class Convolution(Made):
    """weight: int8 [out, in / groups * kernel]."""

    weight: Tensor
    bias: Tensor
    zero: int
    factor: Fixed
    window: Window
    groups: int

    def compute(self, x: Tensor) -> Tensor:
        seen = self.window.over(x, self.zero)
        samples, channels, rows, columns = seen.shape[:4]
        parts = seen.reshape(samples, self.groups, channels // self.groups, rows, columns, -1)
        parts = parts.permute(1, 0, 3, 4, 2, 5).reshape(self.groups, samples * rows * columns, -1)
        sums = torch.cat([product(part, self.zero, weight) for part, weight in
                          zip(parts, self.weight.chunk(self.groups), strict=True)], 1) + self.bias
        codes = self.code.clip(self.factor.times(sums))
        return codes.reshape(samples, rows, columns, -1).permute(0, 3, 1, 2)


@dataclass(frozen=True, eq=False)
class Lookup(Made):
    """Rows of a table, int8 [rows, width], each with a factor of its own."""

    table: Tensor
    factor: Fixed

    def compute(self, index: Tensor) -> Tensor:
        factor = Fixed(self.factor.mantissa[index][..., None], self.factor.shift[index][..., None])
        return self.code.clip(factor.times(self.table[index]))


@dataclass(frozen=True, eq=False)
class Add(Made):
    """zeros, factors: of the operands; factors with 24 fractional bits."""

    zeros: tuple[int, int]
    factors: tuple[int, int]

    def compute(self, x: Tensor, y: Tensor) -> Tensor:
        total = sum((each.long() - zero) * factor
                    for each, zero, factor in zip((x, y), self.zeros, self.factors, strict=True))
        assert isinstance(total, Tensor)
        return self.code.clip(shifted(total, SUM))


@dataclass(frozen=True, eq=False)
class Rescale(Made):
    """The same value in other codes."""

    zero: int
    factor: Fixed

    def compute(self, x: Tensor) -> Tensor:
        return self.code.clip(self.factor.times(x.long() - self.zero))


@dataclass(frozen=True, eq=False)
class Relu(Made):
    """Codes stay what they are."""

    def compute(self, x: Tensor) -> Tensor:
        return x.clamp_min(self.code.zero)


@dataclass(frozen=True, eq=False)
class Largest(Made):
    """The largest code under each place of the window; padding is below all."""

    window: Window

    def compute(self, x: Tensor) -> Tensor:
        return self.window.over(x, self.code.low).amax((-2, -1))


@dataclass(frozen=True, eq=False)
class Mean(Made):
    """The mean under each place of the window. flat: the places are one, and their axes go."""

    zero: int
    factor: Fixed
    window: Window
    flat: bool

    def compute(self, x: Tensor) -> Tensor:
        sums = self.window.over(x, 0).sum((-2, -1)) - self.zero * prod(self.window.kernel)
        codes = self.code.clip(self.factor.times(sums))
        return codes.flatten(1) if self.flat else codes


@dataclass(frozen=True, eq=False)
class Normalize(Made):
    """Layer normalization of the last axis. floor: epsilon on the scale of the squares."""

    floor: int
    factor: Fixed
    bias: Tensor

    def compute(self, x: Tensor) -> Tensor:
        return self.code.clip(self.factor.times(unit_vectors(x.long(), self.floor)) + self.bias)


@dataclass(frozen=True, eq=False)
class Gelu(Made):
    """``x (1 + erf(x / sqrt 2)) / 2``. inner: to the error function's argument; factor: of the product."""

    inner: Fixed
    factor: Fixed
    form: Erf = MINIMAX

    def compute(self, x: Tensor) -> Tensor:
        x = x.long()
        return self.code.clip(self.factor.times(
            x * ((1 << ERF_OUT) + error_function(self.inner.times(x), self.form))))


@dataclass(frozen=True, eq=False)
class Tanh(Made):
    """factor: of magnitudes, to the argument of the exponential."""

    factor: Fixed

    def compute(self, x: Tensor) -> Tensor:
        x = x.long()
        return self.code.clip(x.sign() * hyperbolic_tangent(self.factor.times(x.abs())))


@dataclass(frozen=True, eq=False)
class Attention(Made):
    """q, k, v [.., tokens, size] and, where it is given, a mask of what may be seen.

    zeros: of q, k and v. sharpness: from products of codes to the argument of the exponential. factor: from
    mixtures with 16 fractional bits to codes.
    """

    zeros: tuple[int, int, int]
    sharpness: Fixed
    factor: Fixed

    def compute(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (each.int() - zero for each, zero in zip((q, k, v), self.zeros, strict=True))
        scores = self.sharpness.times(q @ k.transpose(-1, -2))
        if mask is not None:
            scores = torch.where(mask, scores, NEVER)
        share = exponential(scores.amax(-1, keepdim=True) - scores, PROBABILITY)
        if mask is not None:
            share = torch.where(mask, share, 0)
        whole = share.sum(-1, keepdim=True).clamp_min(1)
        mixed = (share.int() @ v) * ((1 << DIVIDED) // whole)
        return self.code.clip(self.factor.times(shifted(mixed, DIVIDED - MIXED)))


# ---- products ------------------------------------------------------------------------------------------


def product(x: Tensor, zero: int, weight: Tensor) -> Tensor:
    """``(x - zero) W^T`` with sums of 32 bits, for codes x [rows, in], uint8, and W [out, in], int8."""
    if not fast_products_are_exact():
        return (x.int() - zero) @ weight.int().T
    sums = torch._int_mm((x ^ 128).view(torch.int8), weight.T)
    return sums + (128 - zero) * weight.sum(1, dtype=torch.int32)


@lru_cache(maxsize=1)
def fast_products_are_exact() -> bool:
    """Processors without VNNI may saturate sums of two products at 16 bits."""
    worst = torch.tensor([-128, 127], dtype=torch.int8).repeat_interleave(16)[:, None].repeat(1, 64)
    return torch.equal(torch._int_mm(worst, worst.T), worst.int() @ worst.int().T)
