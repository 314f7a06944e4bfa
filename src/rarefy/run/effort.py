"""How much work each ``--effort`` buys: data to table, nothing else decides by effort's name.

Windows are 512 tokens each. Time grows with windows x weights; see docs/benchmarks/cost.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from rarefy.core.errors import RecipeError, did_you_mean

LENGTH = 512


@dataclass(frozen=True)
class Effort:
    """survey: windows whose gradients are taken. calibration: windows that the sweep carries forward.
    sequential: evidence anew for each group of a block. swaps: windows on which predictions are corrected
    by measuring (0: not at all). sweeps: QuantEase sweeps. evaluation: windows of the proof. second:
    windows of a second domain. positions: windows x positions compared inside the runtime."""

    survey: int
    calibration: int
    sequential: bool
    swaps: int
    sweeps: int
    evaluation: int
    second: int
    positions: tuple[int, int]


EFFORTS = {
    "quick": Effort(4, 10, False, 0, 1, 4, 2, (4, 64)),
    "balanced": Effort(8, 40, True, 1, 2, 8, 4, (8, 64)),
    "max": Effort(96, 128, True, 4, 6, 16, 8, (16, 64)),
}


def effort_named(name: str) -> Effort:
    """The row of the table."""
    if name not in EFFORTS:
        raise RecipeError(f"effort {name!r}: choose one of {', '.join(EFFORTS)}"
                          f"{did_you_mean(name, list(EFFORTS))}")
    return EFFORTS[name]
