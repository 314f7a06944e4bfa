"""p-values of "the mean of these losses in [0, 1] is above alpha": small when data says it is not."""

from __future__ import annotations

import math


def binomial_tail(wrong: int, count: int, alpha: float) -> float:
    """P(Bin(count, alpha) <= wrong): exact for losses of 0 and 1."""
    from scipy.stats import binom

    return float(binom.cdf(wrong, count, alpha))


def hoeffding_tail(mean: float, count: int, alpha: float) -> float:
    """exp(-2 n (alpha - mean)^2), 1 where the mean is no smaller."""
    return math.exp(-2 * count * max(0.0, alpha - mean) ** 2)
