"""What the machine could do at best, and what it drew: the speed of its memory, and its energy counter.

A language model that writes reads every weight once per token, so the speed of memory over the bytes of a
token is the limit of its tokens a second.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

ENERGY = Path("/sys/class/powercap/intel-rapl:0")
READ, TURNS = 256_000_000, 5  # bytes that no cache holds, and how often


def bandwidth(threads: int | None = None) -> float:
    """Bytes a second that summing a large table reads; the best of some turns."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        table, best = torch.ones(READ // 4), 0.0
        for _ in range(TURNS):
            started = time.perf_counter()
            table.sum()
            best = max(best, READ / (time.perf_counter() - started))
    finally:
        torch.set_num_threads(before)
    return best


def joules(counter: Path = ENERGY) -> float | None:
    """Energy that the processor has drawn since some time in the past; None where no counter can be read.

    The difference of two readings counts (Intel's RAPL; it wraps around after some hours).
    """
    try:
        return int((counter / "energy_uj").read_text()) / 1e6
    except (OSError, ValueError):
        return None


def drawn(before: float | None, counter: Path = ENERGY) -> float | None:
    """Joules since ``before``, the counter's wrap mended; None: there is no counter."""
    now = joules(counter)
    if before is None or now is None:
        return None
    return now - before if now >= before else now - before + int(
        (counter / "max_energy_range_uj").read_text()) / 1e6
