"""How much work each ``--effort`` buys: data to table, nothing else decides by effort's name.

Time grows with windows x length x weights; see docs/benchmarks/cost.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from rarefy.core.errors import RecipeError, did_you_mean


@dataclass(frozen=True)
class Effort:
    """length: tokens of a window. survey: windows whose gradients are taken. calibration: windows that the
    sweep carries forward. sequential: evidence anew for each group of a block. swaps: windows on which
    predictions are corrected by measuring (0: not at all). sweeps: of QuantEase (0: only where a recipe asks
    for it). evaluation: windows of the proof. second: windows of a second domain. positions: windows x
    positions compared inside the runtime. repeats: turns that each file gets when the two are timed. samples:
    of networks that are no language models, how many are surveyed, calibrated on and judged on."""

    length: int
    survey: int
    calibration: int
    sequential: bool
    swaps: int
    sweeps: int
    evaluation: int
    second: int
    positions: tuple[int, int]
    repeats: int
    samples: tuple[int, int, int]


EFFORTS = {
    "quick": Effort(256, 6, 12, False, 0, 0, 8, 4, (4, 64), 1, (64, 256, 1000)),
    "balanced": Effort(512, 8, 40, True, 1, 2, 8, 4, (8, 64), 3, (256, 512, 2000)),
    "max": Effort(512, 96, 128, True, 4, 6, 16, 8, (16, 64), 3, (1024, 2048, 10_000)),
}


def effort_named(name: str) -> Effort:
    """The row of the table."""
    if name not in EFFORTS:
        raise RecipeError(f"effort {name!r}: choose one of {', '.join(EFFORTS)}"
                          f"{did_you_mean(name, list(EFFORTS))}")
    return EFFORTS[name]
