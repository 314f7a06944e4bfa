"""Ranges of activations: all that was seen, a percentile of it, or the range that loses least.

Eight-bit activations are ``x = scale * (code - zero)`` with 256 codes; training may have used fewer. A wide
range rounds coarsely, a narrow one clips. ``entropy`` searches the clipping threshold T on |x| under which
the clipped and rounded distribution Q is closest to the distribution P that was seen,

    T = argmin KL(P || Q_T).

Paper: Migacz 2017, "8-bit Inference with TensorRT"; affine codes: Jacob et al. 2018, "Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", section 2.1; factors of
channels: Xiao et al. 2023, "SmoothQuant", eq. 4.
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
ALPHAS = (0.5, 0.65, 0.8)  # how much of the difficulty factors move into the weights
GAIN = 0.7    # of the error, where factors cost an operation


@dataclass(frozen=True)
class Range:
    """What the codes of an activation span; always with zero inside, so that padding is exact.

    bits: of the codes, 2 to 8.
    """

    low: float
    high: float
    bits: int = 8

    @property
    def top(self) -> int:
        """The largest code; the smallest is 0."""
        return (1 << self.bits) - 1

    @property
    def scale(self) -> float:
        """The distance of two codes, a float32 number; never zero."""
        span = max(self.high, 0.0) - min(self.low, 0.0)
        step = float(torch.tensor(span / self.top, dtype=torch.float32))
        return step if step > SMALLEST else 1.0

    @property
    def zero(self) -> int:
        """The code of zero, 0 to ``top``."""
        return max(0, min(self.top, round(-min(self.low, 0.0) / self.scale)))

    def joined(self, other: Range) -> Range:
        """Both, in the codes of the finer one."""
        return Range(min(self.low, other.low), max(self.high, other.high), max(self.bits, other.bits))

    def codes(self, values: Tensor) -> Tensor:
        """Values as codes, float32, ties to even."""
        return ((values / self.scale).round() + self.zero).clamp(0, self.top)

    def rounded(self, values: Tensor) -> Tensor:
        """Values as their codes stand for them."""
        return (self.codes(values) - self.zero) * self.scale


@dataclass(frozen=True, eq=False)
class Rows:
    """Eight-bit codes of activations [.., channels] with a scale for every row, found when it arrives.

        code = middle + x / (scale * factors),   scale = max(max x' / (255 - middle), -min x' / middle)

    of x' = x / factors. middle: the code of zero, 1 to 254, in all rows. factors: of the channels (None:
    ones), so that a few large ones do not coarsen the rest (SmoothQuant).
    """

    middle: int = 128
    factors: Float[Tensor, " channels"] | None = None

    def rounded(self, values: Tensor) -> Tensor:
        """Values as their codes stand for them."""
        inner = values if self.factors is None else values / self.factors
        above = inner.amax(-1, keepdim=True) * (1 / (255 - self.middle))
        below = inner.amin(-1, keepdim=True) * (-1 / self.middle)
        scale = torch.maximum(above, below).clamp_min(SMALLEST)
        codes = ((inner / scale).round() + self.middle).clamp(0, 255)
        rounded = (codes - self.middle) * scale
        return rounded if self.factors is None else rounded * self.factors

    def weight(self, values: Float[Tensor, "out channels"]) -> Float[Tensor, "out channels"]:
        """The weight that multiplies them, in 8 bits with a scale for every output, behind the factors."""
        inner = values if self.factors is None else values * self.factors
        scale = (inner.abs().amax(1, keepdim=True) * (1 / 127)).clamp_min(SMALLEST)
        rounded = (inner / scale).round() * scale
        return rounded if self.factors is None else rounded / self.factors


def rows_for(inputs: Float[Tensor, "rows channels"], peaks: Float[Tensor, " channels"],
             weight: Float[Tensor, "out channels"]) -> Rows:
    """The way to round rows that loses least at the outputs: with or without factors, codes in the middle or
    where these rows have their zeros.

    inputs: a sample; peaks: the largest of each channel over all that was seen; weight: of all that read
    them. A way that costs an operation is taken when it has less than ``GAIN`` times the error.
    """
    exact = inputs @ weight.T
    low, high = inputs.amin(1).clamp(max=0), inputs.amax(1).clamp(min=0)
    usual = (255 * -low / (high - low).clamp_min(SMALLEST)).median()
    skewed = min(254, max(1, round(float(usual))))
    tried = [(Rows(), 1.0), (Rows(skewed), 1.0)]
    for alpha in ALPHAS:
        strength = weight.abs().amax(0).clamp_min(SMALLEST)
        factors = peaks.clamp_min(SMALLEST) ** alpha / strength ** (1 - alpha)
        factors = torch.where(peaks > 0, factors, 1.0)
        tried.append((Rows(128, factors / factors.log().mean().exp()), GAIN))
    return min(tried, key=lambda way: float(
        (way[0].rounded(inputs) @ way[0].weight(weight).T - exact).square().sum()) / way[1])[0]


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
