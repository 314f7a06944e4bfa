"""Real arithmetic by integers alone: products, square roots, exponentials, the error function, unit vectors.

A real factor is a mantissa and a shift, ``r = m / 2^k`` with m of 31 bits, and a product with it

    (m q + 2^(k-1)) >> k,

rounded to the nearest, halves upwards. Curves are polynomials on one interval, and symmetry or shifts beyond:

    exp(-z ln 2 + p) = 2^-z (0.3585 (p + 1.353)^2 + 0.344),          -ln 2 < p <= 0
    erf(u)           = sgn(u) (1 - t^2 (a_0 + a_1 t + ..)),          t = max(b - |u|, 0)
    sqrt(n)          : x <- min(x, (x + n // x) // 2), from the power of two above the root

Everything is exact to a few units of its last bit but for the polynomials, whose errors are stated beside
them. Nothing overflows 64 bits for operands as large as each function says.

Papers: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 2.2; Kim et al. 2021, "I-BERT: Integer-only BERT Quantization", section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

WORD = 2**31 - 1
LOG = 12                     # bits of the interval (-ln 2, 0]
UNIT = math.log(2) / 2**LOG  # what distances below the maximum are counted in
FAR = 40                     # halvings behind which an exponential is zero
FINE = 16                    # fractional bits of an exponential before it is scaled
ERF_IN, ERF_OUT = 12, 12     # fractional bits of the error function's argument and of its value
COEFFICIENT = 28             # fractional bits of its coefficients
TANH = 15                    # fractional bits of a hyperbolic tangent
SQUARE = 36                  # bits of the square of a difference of two 18-bit numbers
RECIPROCAL = 46              # the power of two that roots divide
VECTOR = 24                  # fractional bits of the entries of a unit vector
ITERATIONS = 6               # of Newton's, from a start at most twice the root: its error squares each time


@dataclass(frozen=True, eq=False)
class Fixed:
    """Real numbers as ``mantissa / 2^shift``, int64 tensors of one shape; mantissas have 31 bits."""

    mantissa: Tensor
    shift: Tensor

    @classmethod
    def of(cls, values: Any) -> Fixed:
        """The nearest to float64 numbers below 2^30; what is smaller than 2^-62 becomes zero."""
        values = np.asarray(values, np.float64)
        if not (np.abs(values) < 2.0**30).all():
            raise OverflowError(f"a factor of {np.abs(values).max():g} has no form in 31 bits with a shift")
        fraction, exponent = np.frexp(values)
        mantissa, shift = np.round(fraction * 2**31).astype(np.int64), 31 - exponent.astype(np.int64)
        full = np.abs(mantissa) > WORD  # rounding reached the next power of two
        mantissa, shift = np.where(full, mantissa // 2, mantissa), np.where(full, shift - 1, shift)
        far = np.clip(shift - 62, 0, 62)
        return cls(torch.as_tensor(mantissa >> far), torch.as_tensor(np.minimum(shift, 62)))

    def times(self, values: Tensor) -> Tensor:
        """The products with integers up to 2^31, int64, rounded to the nearest."""
        return (values.long() * self.mantissa + (torch.ones_like(self.shift) << (self.shift - 1))
                ) >> self.shift


def shifted(values: Tensor, bits: int) -> Tensor:
    """``values / 2^bits``, rounded to the nearest."""
    return (values + (1 << (bits - 1))) >> bits


# ---- the exponential -----------------------------------------------------------------------------------

EXP_EDGE = round(1.353 / UNIT)
EXP_SQUARE = Fixed.of(0.3585 * UNIT**2 * 2**FINE)
EXP_REST = round(0.344 * 2**FINE)


def exponential(below: Tensor, one: int) -> Tensor:
    """``one * exp(-below * UNIT)`` for below >= 0 and one <= 2^16, rounded, at most ``one``.

    The polynomial is off by 0.0019 of ``one`` at most.
    """
    halvings = (below >> LOG).clamp_max(FAR)
    rest = EXP_EDGE - (below & ((1 << LOG) - 1))
    value = EXP_SQUARE.times(rest * rest) + EXP_REST
    shift = halvings + FINE
    half = torch.ones_like(shift) << (shift - 1)
    found: Tensor = (value * one + half) >> shift
    return found.clamp_max(one)


def hyperbolic_tangent(twice: Tensor) -> Tensor:
    """``2^15 tanh(x)`` for ``2 |x| = twice * UNIT``: (1 - exp(-2 |x|)) / (1 + exp(-2 |x|)).

    It is off by 0.0015 of one at most.
    """
    one = 1 << FINE
    small = exponential(twice, one)
    return ((one - small) << TANH) // (one + small)


# ---- the error function --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Erf:
    """One minus a polynomial in the distance to ``edge``, from its square on. Real numbers."""

    edge: float
    coefficients: tuple[float, ...]

    @property
    def start(self) -> int:
        """The edge as an argument of ``error_function``."""
        return round(self.edge * (1 << ERF_IN))

    @property
    def words(self) -> tuple[int, ...]:
        """The coefficients as integers, the highest power first."""
        return tuple(round(each * 2**COEFFICIENT) for each in reversed(self.coefficients))


# I-BERT's: x erf(x / sqrt 2) / 2 is off by at most 0.0182, which fine-tuning has to make up for.
IBERT = Erf(1.769, (0.2888,))
# The best of degree five by that measure (a linear program): at most 0.001.
MINIMAX = Erf(2.47, (0.05132, -0.10755, 0.11374, -0.02066))


def error_function(u: Tensor, form: Erf = MINIMAX) -> Tensor:
    """``2^12 erf(u / 2^12)``."""
    inside = (form.start - u.abs()).clamp_min(0)
    total = torch.zeros_like(inside)
    for word in form.words:
        total = shifted(total * inside, ERF_IN) + word
    total = shifted(shifted(total * inside, ERF_IN) * inside, ERF_IN + COEFFICIENT - ERF_OUT)
    return u.sign() * ((1 << ERF_OUT) - total)


# ---- square roots --------------------------------------------------------------------------------------

POWERS = torch.tensor([4**k for k in range(32)], dtype=torch.int64)


def square_root(n: Tensor) -> Tensor:
    """The largest integers whose squares are not above ``n`` (int64, 0 <= n < 2^63)."""
    x = torch.ones_like(n) << (n[..., None] >= POWERS).sum(-1)
    for _ in range(ITERATIONS):
        x = torch.minimum(x, (x + n // x.clamp_min(1)) >> 1)
    return x


def headroom(width: int) -> int:
    """How far the root of a sum of ``width`` squares may be shifted before it is taken."""
    return (62 - SQUARE - width.bit_length()) // 2


def unit_vectors(x: Tensor, floor: int) -> Tensor:
    """``2^24 d / |d|`` for the distances d of the last axis from its mean; |x| < 2^17.

    floor: what is added to |d|^2.
    """
    width, more = x.shape[-1], headroom(x.shape[-1])
    total = x.sum(-1, keepdim=True)
    apart = x - (2 * total + width) // (2 * width)
    root = square_root(((apart * apart).sum(-1, keepdim=True) + floor) << 2 * more).clamp_min(1)
    return shifted(apart * ((1 << RECIPROCAL) // root), RECIPROCAL - more - VECTOR)
