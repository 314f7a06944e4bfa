"""Ranges of activations: all that was seen, a percentile of it, or the range that loses least.

Eight-bit activations are ``x = scale * (code - zero)`` with 256 codes. A wide range rounds coarsely, a narrow
one clips. ``entropy`` searches the clipping threshold T on |x| under which the clipped and rounded
distribution Q is closest to the distribution P that was seen,

    T = argmin KL(P || Q_T).

Paper: Migacz 2017, "8-bit Inference with TensorRT"; affine codes: Jacob et al. 2018, "Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

BINS = 2048
LEVELS = 128  # of |x|: half of the 256 codes
SMALLEST = 1e-30  # of steps: below, everything is zero
STEP = 16     # bins between two thresholds that are tried


@dataclass(frozen=True)
class Range:
    """What eight-bit codes of an activation span; always with zero inside, so that padding is exact."""

    low: float
    high: float

    @property
    def scale(self) -> float:
        """The distance of two codes, a float32 number; never zero."""
        span = max(self.high, 0.0) - min(self.low, 0.0)
        step = float(torch.tensor(span / 255, dtype=torch.float32))
        return step if step > SMALLEST else 1.0

    @property
    def zero(self) -> int:
        """The code of zero, 0 to 255."""
        return max(0, min(255, round(-min(self.low, 0.0) / self.scale)))

    def joined(self, other: Range) -> Range:
        """Both."""
        return Range(min(self.low, other.low), max(self.high, other.high))

    def codes(self, values: Tensor) -> Tensor:
        """Values as codes 0 to 255, float32, ties to even."""
        return ((values / self.scale).round() + self.zero).clamp(0, 255)

    def rounded(self, values: Tensor) -> Tensor:
        """Values as their codes stand for them."""
        return (self.codes(values) - self.zero) * self.scale


def range_of(values: Tensor) -> Range:
    """All of ``values``."""
    low, high = torch.aminmax(values)
    return Range(float(low), float(high))


def percentile(histogram: Float[Tensor, " bins"], seen: Range, share: float = 0.9999) -> Range:
    """The range that leaves (1 - share) / 2 of all values out at either end. The histogram spans ``seen``."""
    total = histogram.sum()
    if not total > 0:
        return seen
    below = histogram.cumsum(0) / total
    width = (seen.high - seen.low) / histogram.numel()
    first = int((below < (1 - share) / 2).sum())
    last = int((below < 1 - (1 - share) / 2).sum())
    return Range(seen.low + first * width, min(seen.low + (last + 1) * width, seen.high))


def entropy(histogram: Float[Tensor, " bins"], seen: Range) -> Range:
    """The range whose clipping loses least. histogram: of |x| between 0 and the largest."""
    top = max(abs(seen.low), abs(seen.high))
    best, least = top, float("inf")
    for bins in range(LEVELS, histogram.numel() + 1, STEP):
        loss = _divergence(histogram, bins)
        if loss < least:
            best, least = top * bins / histogram.numel(), loss
    return Range(max(seen.low, -best), min(seen.high, best))


def _divergence(histogram: Tensor, bins: int) -> float:
    """KL(P || Q): P clips at ``bins``, Q spreads each level's mass over the bins that hold anything."""
    inside = histogram[:bins].double()
    p = inside.clone()
    p[-1] += histogram[bins:].double().sum()
    level = torch.arange(bins) * LEVELS // bins
    filled = (inside > 0).double()
    mass = torch.zeros(LEVELS, dtype=torch.float64).index_add_(0, level, inside)
    count = torch.zeros(LEVELS, dtype=torch.float64).index_add_(0, level, filled)
    q = filled * (mass / count.clamp_min(1))[level]
    if not p.sum() > 0 or not q.sum() > 0:
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    lost = p > 0
    return float((p[lost] * (p[lost] / q[lost].clamp_min(1e-12)).log()).sum())
