"""How fast two things run, one beside the other.

Both take turns (a, b, a, b, .., a), so that a slow spell of the machine hits both, and the median of each
counts. A turn repeats the work until it has lasted long enough for the clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

LONG_ENOUGH = 0.1  # seconds of a turn

Work = Callable[[], int]  # does something once, and says how many units that was
Clock = Callable[[], float]


@dataclass(frozen=True)
class Paces:
    """Units per second of two works. ratio: b over a. drift: how far a's own turns lie apart, relatively.

    spread: how far the middle half of the ratios lies apart, relatively, each of a turn of b to the two
    turns of a beside it: how much the ratio can be trusted on a machine that is busy with other things.
    """

    a: float
    b: float
    ratio: float
    drift: float
    spread: float


def compare(a: Work, b: Work, repeats: int = 3, clock: Clock = time.perf_counter) -> Paces:
    """Both warmed up once, then in turns.

    clock: in seconds. ``time.process_time`` leaves out what other processes took; of one thread, it is the
    time on an idle machine but for the caches that are shared.
    """
    for work in (a, b):
        work()
    ours, theirs = [_pace(a, clock)], []
    for _ in range(repeats):
        theirs.append(_pace(b, clock))
        ours.append(_pace(a, clock))
    one, two = statistics.median(ours), statistics.median(theirs)
    ratios = [pace / statistics.mean(beside) for pace, beside in zip(theirs, pairwise(ours), strict=True)]
    low, middle, high = statistics.quantiles(ratios) if len(ratios) > 1 else ratios * 3
    return Paces(one, two, two / one, max(ours) / min(ours) - 1, (high - low) / middle)


def _pace(work: Work, clock: Clock) -> float:
    units, started = 0, clock()
    while (seconds := clock() - started) < LONG_ENOUGH:
        units += work()
    return units / seconds
