"""How training went: the loss of every step, its moving average, and where it was judged, as a drawing.

The axis of losses is logarithmic, as falling losses are. The average remembers a fiftieth of the run: single
batches differ too much to be read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rarefy.report import words

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1132.0, 210.0, 64.0, 24.0, 12.0, 30.0
DRAWN = 600  # points of a line at most


@dataclass(frozen=True)
class Curve:
    """One training as drawn. dots: judgements; kept: the one whose state remains, if any."""

    title: str
    text: str
    width: float
    height: float
    left: float
    loss: str
    average: str
    dots: tuple[tuple[float, float, str], ...]
    kept: tuple[float, float] | None
    levels: tuple[tuple[float, str], ...]
    steps: tuple[tuple[float, str], ...]


def curves(trainings: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Every training that has a loss to show."""
    found = (_curve(each) for each in trainings)
    return [curve for curve in found if curve is not None]


def _curve(training: Mapping[str, Any]) -> Curve | None:
    points = [point for point in training.get("points") or () if _positive(point.get("loss"))]
    if not points:
        return None
    losses = [float(point["loss"]) for point in points]
    judged = [(int(point["step"]), float(point["gate"])) for point in points if _positive(point.get("gate"))]
    low, high = (extreme([*losses, *(value for _, value in judged)]) for extreme in (min, max))
    low, high = low / 1.05, high * 1.05
    last = max(int(point["step"]) for point in points)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * math.log(high / value) / math.log(high / low)

    steps = [int(point["step"]) for point in points]
    best: Any = training.get("best")
    kept = (x(float(training["best_step"])), y(float(best))) if _positive(best) else None
    return Curve(str(training.get("technique", "")), _said(training), WIDTH, HEIGHT, LEFT,
                 _line([(x(s), y(v)) for s, v in zip(steps, losses, strict=True)]),
                 _line([(x(s), y(v)) for s, v in zip(steps, _smoothed(losses), strict=True)]),
                 tuple((x(s), y(v), f"step {s}: {words.three(v)}") for s, v in judged), kept,
                 tuple((y(level), f"{level:g}") for level in _levels(low, high)),
                 tuple((x(last * k / 4), f"{round(last * k / 4):,}") for k in range(5)))


def _said(training: Mapping[str, Any]) -> str:
    """The curve in words."""
    best: Any = training.get("best")
    judged = f"; best judged {words.three(float(best))} at step {training['best_step']:,}" \
        if _positive(best) else ""
    return (f"{len(training['points']):,} steps on {training.get('examples', 0):,} examples in "
            f"{words.duration(float(training.get('seconds') or 0.0))}, {training.get('stopped', '')}{judged}")


def _smoothed(losses: Sequence[float]) -> list[float]:
    memory, found = 1 - 1 / max(2.0, len(losses) / 50), list[float]()
    for loss in losses:
        found.append(loss if not found else memory * found[-1] + (1 - memory) * loss)
    return found


def _line(places: Sequence[tuple[float, float]]) -> str:
    """Points of a polyline, thinned out evenly."""
    every = max(1, len(places) // DRAWN)
    chosen = [*places[::every], places[-1]]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in chosen)


def _levels(low: float, high: float) -> list[float]:
    """Round losses inside the drawing, few of them."""
    levels = [m * 10.0**d for d in range(-8, 9) for m in (1, 2, 5)]
    inside = [level for level in levels if low <= level <= high]
    return inside[::max(1, len(inside) // 5)]


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf
