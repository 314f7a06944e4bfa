"""What the one training loop costs: its steps beside those of a bare PyTorch loop.

    python benchmarks/training_loop.py --data DATA [--rounds 5] [--steps 12]

DATA holds ``sst2/train.tsv``. MiniLM-L6 under a new head learns from the same batches of 32 sentences in
both: forward, cross-entropy, backward, clipping, AdamW with all parameters. The bare loop is what everybody
writes; ours computes every weight from its tree, seeds noise, checks for numbers and writes the curve. They
take turns, in the processor's time, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

import sst2
from harness import table, write_page
from rarefy.models.network import Network
from rarefy.models.opening import open_any
from rarefy.techniques.distill.hard_labels import HardLabels
from rarefy.training.examples import LABELS, Rows
from rarefy.training.heads import with_head
from rarefy.training.loop import Settings, fit, order
from rarefy.training.signals import Distillation
from rarefy.training.student import Learning
from rarefy.training.tune import Tuning, student_of

BATCH, RATE, SENTENCES = 32, 1e-4, 4096
SKIPPED = 2  # first steps of a turn, which set things up
ALLOWED = 1.1
PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "training_loop.md"


def main() -> None:
    """Take turns; write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    given = parser.parse_args()
    plain = open_any(sst2.MODEL)
    assert isinstance(plain, Network)
    network, _ = with_head(plain, ("negative", "positive"), 0)
    rows = sst2.rows(network, str(given.data / "sst2" / "train.tsv"))
    some = Rows({name: values[:SENTENCES] for name, values in rows.tensors.items()})
    times: dict[str, list[float]] = {"bare": [], "ours": []}
    for turn in range(given.rounds):
        for name, run in (("bare", bare), ("ours", ours)):
            times[name] += run(network, some, given.steps, turn)[SKIPPED:]
            print(turn, name, f"{statistics.median(times[name]):.3f}", flush=True)
    write_page(PAGE, "The training loop", "python benchmarks/training_loop.py", said(times))


def bare(network: Network, rows: Rows, steps: int, seed: int) -> list[float]:
    """Seconds of the processor for every step of a plain loop."""
    module, found = copy.deepcopy(network.module).requires_grad_(True), []
    optimizer = torch.optim.AdamW(module.parameters(), RATE, betas=(0.9, 0.98), fused=True)
    for index in order(rows, BATCH, seed, 0)[:steps]:
        started = time.process_time()
        batch = rows.batch(index)
        labels = batch.pop(LABELS)
        nn.functional.cross_entropy(module(**batch).logits, labels).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(time.process_time() - started)
    return found


def ours(network: Network, rows: Rows, steps: int, seed: int) -> list[float]:
    """The same by ``fit``."""
    settings = Settings(steps=steps, batch=BATCH, rate=RATE, schedule="constant", precision="float32",
                        seed=seed)
    student = student_of(network, {}, Tuning(), settings)
    task = Learning(student, Distillation(network, None, ((1.0, HardLabels()),)))
    stamps: list[float] = []
    fit(task, rows, settings, advance=lambda done, total: stamps.append(time.process_time()))
    return [after - before for before, after in pairwise(stamps)]


def said(times: dict[str, list[float]]) -> list[str]:
    """The parts of the page."""
    middle = {name: statistics.median(values) for name, values in times.items()}
    ratio = middle["ours"] / middle["bare"]
    lines = [(name, f"{1000 * middle[name]:.0f}", str(len(times[name]))) for name in times]
    return ["MiniLM-L6 on SST-2, batches of 32 sentences of like length, all weights, one thread.",
            table(("loop", "milliseconds of a step (median)", "steps"), lines),
            f"Ours takes {ratio:.2f} times as long; the goal is {ALLOWED:g} at most: "
            f"{'met' if ratio <= ALLOWED else 'missed'}."]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
