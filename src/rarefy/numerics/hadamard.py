"""Rotations of channels: randomized Hadamard matrices, applied fast, and random orthogonal ones.

A Hadamard matrix of order n has entries +-1 and orthogonal rows; divided by sqrt(n) it spreads every channel
evenly over all others. Orders are built from three facts:

    Sylvester   H_2n = [[H_n, H_n], [H_n, -H_n]], applied in n log n steps
    Paley I     order q + 1 for a prime q = 3 (mod 4):  I + [[0, 1], [-1, R]],  R_ij = (i - j | q)
    Paley II    order 2 (q + 1) for a prime q = 1 (mod 4), from the symmetric [[0, 1], [1, R]]

with the Legendre symbol (. | q). Together they reach 2^k * m for m in 1, 12, 20, 28, 36, 44, 60, 68, 76, 84
and many more, so nearly every width in use: 576 = 16 * 36, 640 = 32 * 20, 896 = 32 * 28, 960 = 16 * 60. Any
other width is cut into the fewest equal blocks of an order that there is; then channels mix within a block.

Source: Sylvester 1867; Paley 1933, "On Orthogonal Matrices".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotation:
    """``x -> x Q``, orthogonal: ``Q = diag(signs) (I (x) S (x) base)`` with S of order ``2^doublings``."""

    signs: Float[Tensor, " width"]
    base: Float[Tensor, "order order"]
    doublings: int = 0

    @property
    def width(self) -> int:
        """How many channels it turns."""
        return self.signs.numel()

    @property
    def mixed(self) -> int:
        """How many channels each channel is spread over."""
        return self.base.shape[0] << self.doublings

    def turned(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """``x Q``, along the last axis."""
        return self._mix(x * self.signs, self.base)

    def back(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """``x Q^T``, which undoes ``turned``."""
        return self._mix(x, self.base.T) * self.signs

    def _mix(self, x: Tensor, base: Tensor) -> Tensor:
        """The Kronecker product, one factor after the other; Sylvester's is symmetric."""
        mixed = x.reshape(*x.shape[:-1], -1, 1 << self.doublings, base.shape[0]) @ base
        for k in range(self.doublings):
            pairs = mixed.view(*x.shape[:-1], -1, 2, 1 << k, base.shape[0])
            first, second = pairs[..., 0, :, :], pairs[..., 1, :, :]
            mixed = torch.stack((first + second, first - second), dim=-3)
        return mixed.reshape(x.shape) / sqrt(1 << self.doublings)


def hadamard_rotation(width: int, generator: torch.Generator) -> Rotation:
    """A randomized Hadamard rotation: random signs, then the matrix of the largest order that divides."""
    base, doublings = _parts(width)
    signs = torch.randint(0, 2, (width,), generator=generator).float() * 2 - 1
    return Rotation(signs, hadamard(base) / base**0.5, doublings)


def orthogonal_rotation(width: int, generator: torch.Generator) -> Rotation:
    """A rotation drawn evenly from all: the Q factor of a Gaussian matrix, R's diagonal made positive."""
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return Rotation(torch.ones(width), (q * r.diagonal().sign()).float())


@lru_cache(maxsize=64)
def hadamard(order: int) -> Float[Tensor, "order order"]:
    """The matrix of +-1 of an order 1 or of Paley's kind; ValueError for others."""
    if order == 1:
        return torch.ones(1, 1)
    if not _paley(order):
        raise ValueError(f"no Hadamard matrix of order {order} is built here")
    q = order - 1 if _prime(order - 1) and order % 4 == 0 else order // 2 - 1
    symbols = torch.full((q,), -1.0)
    symbols[torch.arange(1, q).square() % q] = 1.0
    symbols[0] = 0.0
    places = torch.arange(q)
    core = torch.zeros(q + 1, q + 1)
    core[0, 1:] = 1.0
    core[1:, 1:] = symbols[(places[:, None] - places) % q]
    if q % 4 == 3:
        core[1:, 0] = -1.0
        return torch.eye(order) + core
    core[1:, 0] = 1.0
    return (torch.kron(core, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
            + torch.kron(torch.eye(q + 1), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])))


def _parts(width: int) -> tuple[int, int]:
    """(base, doublings) of the largest order that divides ``width``, with the smallest base."""
    orders = [width // blocks for blocks in range(1, width + 1) if width % blocks == 0]
    for order in orders:
        for base in _halvings(order):
            if base == 1 or _paley(base):
                return base, (order // base).bit_length() - 1
    raise ValueError(f"a width must be positive, got {width}")


def _halvings(order: int) -> list[int]:
    """order, order/2, ... down to its odd part, smallest first."""
    found = [order]
    while found[-1] % 2 == 0:
        found.append(found[-1] // 2)
    return found[::-1]


def _paley(order: int) -> bool:
    """Whether one of Paley's constructions over a prime field gives this order."""
    if order < 4 or order % 4:
        return False
    return _prime(order - 1) or (_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1)


def _prime(number: int) -> bool:
    return number > 1 and all(number % k for k in range(2, int(number**0.5) + 1))
