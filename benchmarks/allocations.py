"""How much memory techniques take while they rewrite one weight, as a multiple of that weight.

    python benchmarks/allocations.py [--size 2048] [--threads 1]

The weight is [size, size] in float32; second moments of its inputs (as large again) and what errors of its
outputs cost are there before. Every row of ``techniques.py`` that rewrites single weights runs in a process
of its own, which has done the same on a small weight, so that what is loaded once is not counted. The peak is
the kernel's: how far resident memory rose above what it was just before, with what is returned included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from algorithms import problem
from harness import table, write_page
from rarefy.core.edit import edit
from rarefy.core.errors import EditError
from rarefy.core.nodes import Dense
from rarefy.core.nouns import Evidence, Step
from rarefy.run.effort import effort_named
from rarefy.run.planning import chain, techniques
from techniques import ROWS, named

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "allocations.md"
SMALL = 256  # of the weight that is edited first


def main() -> None:
    """Every row; the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    rows, refused = [], []
    for steps in ROWS:
        if not all(step.technique in techniques() for step in steps):
            continue
        found = alone(steps, given.size, given.threads)
        if isinstance(found, str):
            refused.append(f"- {named(steps)}: {found}")
        else:
            rows.append((named(steps), f"{found / 2**20:.0f}", f"{found / (4 * given.size ** 2):.1f}"))
        print(named(steps), found, flush=True)
    most = max(rows, key=lambda row: float(row[2]))
    write_page(PAGE, "Memory of techniques", "python benchmarks/allocations.py", [
        (__doc__ or "").split("\n\n", 2)[2].strip(),
        f"Weights of {given.size} x {given.size}, {4 * given.size ** 2 / 2**20:.0f} MiB; the most is "
        f"{most[2]} times that, by {most[0]}.",
        table(("technique", "peak, MiB", "times the weight"), rows), "Refused:", "\n".join(refused)])


def alone(steps: Sequence[Step], size: int, threads: int) -> int | str:
    """Bytes of the peak, or why the technique refuses."""
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=measured,
                                                           args=(theirs, steps, size, threads))
    process.start()
    theirs.close()
    found: int | str = mine.recv()
    process.join()
    return found


def measured(answer: Connection, steps: Sequence[Step], size: int, threads: int) -> None:
    """In the process of its own."""
    torch.set_num_threads(threads)
    try:
        edited(steps, *_given(SMALL))
        weight, evidence = _given(size)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _kilobytes("VmRSS")
        edited(steps, weight, evidence)
        answer.send(1024 * (_kilobytes("VmHWM") - before))
    except EditError as error:
        answer.send(str(error))


def edited(steps: Sequence[Step], weight: torch.Tensor, evidence: Evidence) -> Any:
    """The tree behind all steps."""
    tree: Any = Dense(weight)
    for name, technique in chain(steps, "", effort_named("balanced")):
        tree, _ = edit("layer", tree, weight, technique, name, evidence, torch.Generator().manual_seed(0))
    return tree


def _given(size: int) -> tuple[torch.Tensor, Evidence]:
    weight, gram, tokens = problem(size)
    return weight, Evidence(gram, tokens, torch.rand(size, generator=torch.Generator().manual_seed(1)))


def _kilobytes(name: str) -> int:
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
