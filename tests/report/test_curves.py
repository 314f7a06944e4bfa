"""Loss curves: placed where they belong, thinned out, and silent about what is no number."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from rarefy.report import render
from rarefy.report.curves import DRAWN, HEIGHT, LEFT, RIGHT, WIDTH, curves


def training(steps: int, **changes: Any) -> dict[str, Any]:
    points = [{"step": k, "loss": 4.0 / k, "rate": 1e-3, "norm": 1.0, "gate": None}
              for k in range(1, steps + 1)]
    points[-1]["gate"] = 0.5
    return {"technique": "tune", "examples": 1000, "held": 100, "points": points, "best": 0.5,
            "best_step": steps, "stopped": "all steps done", "seconds": 61.0, **changes}


def test_a_falling_loss_falls() -> None:
    curve, = curves([training(40)])
    places = [tuple(map(float, place.split(","))) for place in curve.loss.split()]
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(places[:39]))
    assert places[-1][0] == pytest.approx(WIDTH - RIGHT, abs=0.1) and places[0][0] > LEFT
    assert all(0 < y < HEIGHT for _, y in places)
    assert curve.kept == pytest.approx(curve.dots[0][:2])
    assert curve.dots[0][2].startswith("step 40: 0.5")
    assert "40 steps on 1,000 examples" in curve.text and "best judged" in curve.text
    assert [label for _, label in curve.steps] == ["0", "10", "20", "30", "40"]
    assert {"0.5", "2"} & {label for _, label in curve.levels}


def test_long_runs_are_thinned_out_and_broken_ones_left_out() -> None:
    curve, = curves([training(5000)])
    assert len(curve.loss.split()) <= 2 * DRAWN
    assert curves([]) == [] and curves([{"technique": "tune"}]) == []
    broken = training(3)
    broken["points"][1]["loss"] = None
    broken["best"] = None
    curve, = curves([broken])
    assert len(curve.loss.split()) == 3 and curve.kept is None and "best" not in curve.text
    one, = curves([training(1)])
    assert one.average


def test_the_page_shows_it(receipt: dict[str, Any]) -> None:
    plain = render(receipt)
    shown = render({**receipt, "training": [training(30)]})
    assert "Training: tune" in shown and "polyline" in shown and "polyline" not in plain
