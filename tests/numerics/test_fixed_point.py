"""Arithmetic in integers: exact where it says so, elsewhere within the papers' bounds; no floats."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rarefy.numerics.fixed_point import (
    ERF_IN,
    ERF_OUT,
    FAR,
    IBERT,
    LOG,
    MINIMAX,
    TANH,
    UNIT,
    VECTOR,
    Erf,
    Fixed,
    error_function,
    exponential,
    hyperbolic_tangent,
    shifted,
    square_root,
    unit_vectors,
)


def whole(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


class Whole(TorchDispatchMode):
    """Refuses floats."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        assert not isinstance(out, Tensor) or not out.is_floating_point(), func
        return out


@given(st.floats(1e-12, 2.0**29), st.booleans(), st.integers(-(2**31), 2**31))
def test_products_are_rounded_to_the_nearest(factor: float, negative: bool, value: int) -> None:
    fixed = Fixed.of(-factor if negative else factor)
    mantissa, shift = int(fixed.mantissa), int(fixed.shift)
    assert abs(mantissa) < 2**31 and 1 <= shift <= 62
    exact = Fraction(mantissa, 2**shift)
    assert abs(abs(exact) - Fraction(factor)) <= max(Fraction(factor) / 2**30, Fraction(1, 2**62))
    found = int(fixed.times(whole(value)))
    assert found == math.floor(exact * value + Fraction(1, 2))  # halves upwards


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(OverflowError, match="no form in 31 bits"):
        Fixed.of([1.0, 2.0**30])
    assert int(Fixed.of(0.0).times(whole(12345))) == 0
    assert int(Fixed.of(2**-80).times(whole(2**31))) == 0
    assert int(Fixed.of(math.nextafter(1, 0)).times(whole(2**31))) == 2**31


@given(st.integers(-(2**60), 2**60), st.integers(1, 40))
def test_shifts_round_halves_upwards(value: int, bits: int) -> None:
    assert int(shifted(whole(value), bits)) == math.floor(Fraction(value, 2**bits) + Fraction(1, 2))


@given(st.one_of(st.integers(0, 2**63 - 1), st.integers(0, 2**31 - 1).map(lambda k: k * k),
                 st.integers(1, 2**31 - 1).map(lambda k: k * k - 1), st.integers(0, 10)))
def test_square_roots_are_exact(n: int) -> None:
    assert int(square_root(whole(n))) == math.isqrt(n)


def literal_root(n: int) -> int:
    """I-BERT, algorithm 4."""
    if n == 0:
        return 0
    x = 2 ** math.ceil(n.bit_length() / 2)
    while True:
        following = (x + n // x) // 2
        if following >= x:
            return x
        x = following


@given(st.integers(0, 2**40))
def test_square_roots_are_the_paper_s(n: int) -> None:
    assert int(square_root(whole(n))) == literal_root(n)


def literal_exponential(x: float) -> float:
    """I-BERT, eq. 11 to 13, in real numbers."""
    z = math.floor(-x / math.log(2))
    p = x + z * math.log(2)
    return (0.3585 * (p + 1.353) ** 2 + 0.344) / 2**z


def test_the_exponential_is_the_paper_s_polynomial_within_its_bound() -> None:
    below = torch.arange(0, 20 << LOG, 37)
    one = 1 << 16
    found = exponential(below, one).double() / one
    literal = torch.tensor([literal_exponential(-n * UNIT) for n in below.tolist()])
    assert float((found - literal.clamp_max(1)).abs().max()) < 2e-4
    assert float((found - torch.exp(-below * UNIT)).abs().max()) < 1.9e-3 + 2e-4
    assert exponential(whole(0, FAR + 1 << LOG, 2**60), 255).tolist() == [255, 0, 0]
    codes = exponential(torch.arange(0, 12 << LOG), 255)
    assert int(codes.max()) == 255 and bool((codes[1:] <= codes[:-1]).all())


def literal_gelu(x: Tensor) -> Tensor:
    """I-BERT, eq. 6 to 8, in real numbers."""
    u = x / math.sqrt(2)
    erf = u.sign() * (-0.2888 * (u.abs().clamp_max(1.769) - 1.769) ** 2 + 1)
    return x * (1 + erf) / 2


@pytest.mark.parametrize(("form", "bound"), [(IBERT, 0.0182), (MINIMAX, 0.001)], ids=["paper", "ours"])
def test_gelu_within_the_bound_of_its_polynomial(form: Erf, bound: float) -> None:
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    u = (x / math.sqrt(2) * 2**ERF_IN).round().long()
    found = x * (1 + error_function(u, form).double() / 2**ERF_OUT) / 2
    assert float((found - torch.nn.functional.gelu(x)).abs().max()) < bound + 5e-4
    if form is IBERT:
        assert float((found - literal_gelu(x)).abs().max()) < 1e-3
    assert torch.equal(error_function(-u, form), -error_function(u, form))


def test_the_hyperbolic_tangent() -> None:
    x = torch.linspace(0, 12, 3001, dtype=torch.float64)
    found = hyperbolic_tangent((2 * x / UNIT).round().long()).double() / 2**TANH
    assert float((found - torch.tanh(x)).abs().max()) < 1.5e-3 and float(found[0]) == 0


@given(st.integers(0, 1000), st.integers(2, 600), st.sampled_from([1, 40, 5000, 2**17 - 1]))
def test_unit_vectors(seed: int, width: int, largest: int) -> None:
    x = torch.randint(-largest, largest + 1, (3, width), generator=torch.Generator().manual_seed(seed))
    apart = x.double() - (x.double().mean(1, keepdim=True) + 0.5).floor()  # the mean is rounded to a code
    length = apart.norm(dim=1, keepdim=True)
    found = unit_vectors(x, 0).double() / 2**VECTOR
    error = (found - apart / length.clamp_min(1e-9)).abs() * length
    assert float(error.max()) < 1e-3 + 0.0005 * float(apart.abs().max())
    assert unit_vectors(torch.full((1, width), largest), 0).abs().max() == 0


def test_nothing_here_is_a_float() -> None:
    x = torch.arange(-2000, 2000)
    fixed = Fixed.of([0.37])
    with Whole():
        fixed.times(x)
        exponential(x.abs() << 5, 255)
        error_function(x)
        hyperbolic_tangent(x.abs())
        square_root(x.abs())
        unit_vectors(x.reshape(4, -1), 3)
        with pytest.raises(AssertionError):
            x * 0.5
