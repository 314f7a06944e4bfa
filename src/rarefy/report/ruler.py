"""How far the answers moved, on one logarithmic axis: prediction, measurements, bound, and what they mean.

A row is one measurement: a dot at the mean KL with a bar of one standard error either way, a tick at the
median, and a line out to the value that only one token in a thousand exceeds. The bands behind carry the
plain words for a mean KL of that height.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rarefy.report import words
from rarefy.report.answers import Bands

WIDTH, LEFT, RIGHT = 1132.0, 190.0, 96.0
TOP, ROW = 34.0, 34.0


@dataclass(frozen=True)
class Reading:
    """One row's numbers, in nats per token; what was not measured is None."""

    name: str
    mean: float
    stderr: float | None = None
    median: float | None = None
    p999: float | None = None
    measured: bool = True


@dataclass(frozen=True)
class Mark:
    """A row as drawn: horizontal places of its marks."""

    name: str
    y: float
    mean: float
    low: float | None
    high: float | None
    median: float | None
    p999: float | None
    text: str
    measured: bool


@dataclass(frozen=True)
class Ruler:
    """The whole drawing."""

    width: float
    height: float
    left: float
    right: float
    rows: tuple[Mark, ...]
    ticks: tuple[tuple[float, str], ...]
    bands: tuple[tuple[float, float, str], ...]
    bound: float | None


def ruler(readings: list[Reading], bound: float | None, bands_of: Bands = words.BANDS) -> Ruler | None:
    """Place the readings; None when there is nothing to show. bands_of: what values mean in plain words."""
    values = [v for r in readings for v in (r.mean, r.median, r.p999, bound) if v is not None and v > 0]
    if not readings or not values:
        return None
    steps = [m * 10.0 ** d for d in range(-7, 4) for m in (1, 2, 5)]
    low = max(step for step in steps if step <= max(min(values) / 1.2, steps[0]))
    high = min(step for step in steps if step > low and step >= min(max(values) * 1.2, steps[-1]))
    right = WIDTH - RIGHT

    def place(value: float) -> float:
        share = math.log(min(max(value, low), high) / low) / math.log(high / low)
        return LEFT + (right - LEFT) * share

    def mark(index: int, r: Reading) -> Mark:
        low_end, high_end = (None, None) if r.stderr is None else (r.mean - r.stderr, r.mean + r.stderr)
        low_x, high_x, median, p999 = (None if value is None else place(value)
                                       for value in (low_end, high_end, r.median, r.p999))
        return Mark(r.name, TOP + ROW * (index + 0.5), place(r.mean), low_x, high_x, median, p999,
                    words.nats(r.mean), r.measured)

    shown = [step for step in steps if low <= step <= high]
    if len(shown) > 12:  # decades alone
        shown = shown[-steps.index(shown[0]) % 3::3]
    ticks = tuple((place(step), f"{step:g}") for step in shown)
    bands, start = [], low
    for limit, name, _ in bands_of:
        end = min(limit, high)
        if end > start:
            bands.append((place(start), place(end), name))
            start = end
    return Ruler(WIDTH, TOP + ROW * len(readings) + 26, LEFT, right,
                 tuple(mark(i, r) for i, r in enumerate(readings)), ticks, tuple(bands),
                 None if bound is None else place(bound))
