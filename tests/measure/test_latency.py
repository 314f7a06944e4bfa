"""Two works timed in turns."""

from __future__ import annotations

import time

from rarefy.measure.latency import compare


def test_turns_and_ratios() -> None:
    said = []

    def slow() -> int:
        said.append("slow")
        time.sleep(0.02)
        return 10

    def fast() -> int:
        said.append("fast")
        time.sleep(0.02)
        return 30

    found = compare(slow, fast, repeats=2)
    assert 2.5 < found.ratio < 3.5 and 300 < found.a < 501
    turns = [word for k, word in enumerate(said) if k == 0 or said[k - 1] != word]
    assert turns == ["slow", "fast"] * 3 + ["slow"]
    assert found.drift >= 0 and found.spread >= 0


def test_a_clock_of_the_processor_does_not_see_waiting() -> None:
    """Of two works that compute alike, one of which also waits, the ratio is one."""
    def computes() -> int:
        sum(range(20_000))
        return 1

    def waits() -> int:
        time.sleep(0.001)
        return computes()

    assert compare(waits, computes, repeats=1, clock=time.process_time).ratio < 2
    assert compare(waits, computes, repeats=1).ratio > 2
