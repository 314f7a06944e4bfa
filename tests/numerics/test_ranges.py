"""Ranges of activations: zero is exact, outliers are clipped where that pays."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from rarefy.numerics.ranges import BINS, LEVELS, Range, _divergence, entropy, percentile, range_of


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_zero_is_a_code(a: float, b: float) -> None:
    found = Range(min(a, b), max(a, b))
    assert float(found.rounded(torch.zeros(()))) == 0
    values = torch.linspace(min(a, b, 0), max(a, b, 0), 50)
    error = (found.rounded(values) - values).abs()
    assert bool((error <= 0.5001 * found.scale + 1e-6).all()) or found.scale == 1


def histogram(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return torch.histc(values, BINS, low, high)


def test_outliers_are_clipped() -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    values[0] = 60.0
    seen = range_of(values)
    by_share = percentile(histogram(values, seen.low, seen.high), seen, 0.999)
    by_entropy = entropy(histogram(values.abs(), 0, 60), seen)
    for found in (by_share, by_entropy):
        assert found.high < 10
        narrow, wide = found.rounded(values) - values, seen.rounded(values) - values
        assert narrow[1:].square().mean() < wide[1:].square().mean()


def test_entropy_is_the_literal_one() -> None:
    """A bin at a time, as the slides write it."""
    counts = torch.rand(300, generator=torch.Generator().manual_seed(1)).mul(20).floor()
    for bins in (128, 160, 300):
        p = [float(c) for c in counts[:bins]]
        q = [0.0] * bins
        for level in range(LEVELS):
            members = [k for k in range(bins) if k * LEVELS // bins == level]
            mass, filled = sum(p[k] for k in members), [k for k in members if p[k] > 0]
            for k in filled:
                q[k] = mass / len(filled)
        p[-1] += float(counts[bins:].sum())
        total_p, total_q = sum(p), sum(q)
        expected = sum(a / total_p * math.log(a / total_p / max(b / total_q, 1e-12))
                       for a, b in zip(p, q, strict=True) if a > 0)
        assert abs(_divergence(counts, bins) - expected) < 1e-9
