"""How fast two things run, one beside the other.

Both take turns (a, b, a, b, .., a), so that a slow spell of the machine hits both, and the median of each
counts. A turn repeats the work until it has lasted long enough for the clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

LONG_ENOUGH = 0.1  # seconds of a turn

Work = Callable[[], int]  # does something once, and says how many units that was


@dataclass(frozen=True)
class Paces:
    """Units per second of two works. ratio: b over a. drift: how far a's own turns lie apart, relatively."""

    a: float
    b: float
    ratio: float
    drift: float


def compare(a: Work, b: Work, repeats: int = 3) -> Paces:
    """Both warmed up once, then in turns."""
    for work in (a, b):
        work()
    ours, theirs = [_pace(a)], []
    for _ in range(repeats):
        theirs.append(_pace(b))
        ours.append(_pace(a))
    one, two = statistics.median(ours), statistics.median(theirs)
    return Paces(one, two, two / one, max(ours) / min(ours) - 1)


def _pace(work: Work) -> float:
    units, started = 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < LONG_ENOUGH:
        units += work()
    return units / seconds
