"""What compressing costs: time and peak memory by effort, and how both grow with the weights.

    python benchmarks/cost.py --work WORK [--model GEMMA_FOLDER]

Gemma-3-270M (the built-in, or a folder) at 160 MB with ``quick`` and ``balanced``; Llamas with random
weights of about 0.1 and 1 billion parameters at 4.5 bits per weight, ``quick``, and the small one
``balanced`` too. Every run is ``rarefy compress`` from the loading of the model to the finished report, in
a process of its own; the peak is what the kernel says. Without ``--data`` calibration text is the
model's own, which is the default and the most expensive. Results are cached in WORK by input and source.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import (
    MEGABYTE,
    Ledger,
    compress,
    fingerprint,
    folder_sha256,
    run_fresh,
    source_sha256,
    table,
    write_page,
)

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "cost.md"
BUILT_IN = "gemma-3-270m"
BOUNDS = {"quick": 3, "balanced": 20}  # minutes, for Gemma-3-270M on two cores
MEMORY_BOUND = 4  # GiB

ABOUT = """\
`rarefy compress MODEL --to BUDGET --for llama.cpp --effort EFFORT` with {threads} threads, from loading to
the report, in a fresh process; peak resident memory as the kernel counts it, of the largest single process.
The Llamas have random weights: their quality means nothing, their cost does. Calibration: {text}.
On a machine with other work to do the minutes are upper bounds."""


@dataclass(frozen=True)
class Job:
    """One compression to be timed."""

    model: str
    to: str
    effort: str


@dataclass(frozen=True)
class Outcome:
    """What a job cost and what came out."""

    job: Job
    seconds: float
    peak_rss: int
    parameters: int
    size: int
    stages: dict[str, float]


def jobs(sizes: Sequence[str]) -> list[Job]:
    """What to run, small models first."""
    every = [Job("llama-0.1b", "4.5bpw", "quick"), Job("llama-0.1b", "4.5bpw", "balanced"),
             Job(BUILT_IN, "160MB", "quick"), Job(BUILT_IN, "160MB", "balanced"),
             Job("llama-1b", "4.5bpw", "quick")]
    return [job for job in every if not sizes or job.model in sizes]


class Bench:
    """One work folder: the random models and the cached outcomes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.work: Path = options.work
        self.gemma: Path | None = options.model
        self.data: Path | None = options.data
        self.threads: int = options.threads
        self.ledger = Ledger(self.work / "cost.json")

    def source(self, job: Job) -> Path | str:
        """What to pass as MODEL; a random Llama is built at its first use."""
        if job.model == BUILT_IN:
            return self.gemma or BUILT_IN
        folder = self.work / job.model
        if not folder.exists():
            print(f"building {job.model}", flush=True)
            script = Path(__file__).with_name("random_llama.py")
            run_fresh([sys.executable, script, folder, "--size", job.model.removeprefix("llama-")],
                      self.work / f"{job.model}.log")
        return folder

    def run(self, job: Job) -> Outcome:
        """The outcome of a job, cached by the model's files, the package's source and the settings."""
        source = self.source(job)
        identity = folder_sha256(source) if isinstance(source, Path) else source
        key = "cost " + fingerprint(identity, source_sha256(), job.to, job.effort, self.threads, self.data)
        found = self.ledger.get(key)
        if found is None:
            self.ledger.put(key, found := self._compress(job, source))
        outcome = Outcome(job, **found)
        print(f"{job.model} {job.effort}: {outcome.seconds:.0f} s, {outcome.peak_rss / 2**30:.2f} GiB",
              flush=True)
        return outcome

    def _compress(self, job: Job, source: Path | str) -> dict[str, Any]:
        out = self.work / f"{job.model}-{job.effort}"
        cost = compress(source, job.to, job.effort, self.data, out, self.threads)
        receipt = json.loads((out / "receipt.json").read_text())
        size = (out / "model.gguf").stat().st_size
        shutil.rmtree(out)
        return asdict(cost) | {"parameters": receipt["model"]["parameters"], "size": size,
                               "stages": receipt["seconds"]}


def growth(outcomes: Sequence[Outcome], effort: str) -> str | None:
    """Between the smallest and the largest model: by which power of the weights time and memory grow."""
    runs = sorted((o for o in outcomes if o.job.effort == effort), key=lambda o: o.parameters)
    if len({o.parameters for o in runs}) < 2:
        return None
    small, large = runs[0], runs[-1]
    span = math.log(large.parameters / small.parameters)
    time, memory = (math.log(large.seconds / small.seconds) / span,
                    math.log(large.peak_rss / small.peak_rss) / span)
    return (f"`{effort}`, from {small.parameters / 1e6:.0f}M to {large.parameters / 1e6:.0f}M parameters: "
            f"time grows as parameters^{time:.2f}, peak memory as parameters^{memory:.2f}.")


def verdict(outcome: Outcome) -> str:
    """Whether Gemma kept its bounds."""
    if outcome.job.model != BUILT_IN:
        return ""
    bound = BOUNDS[outcome.job.effort]
    kept = outcome.seconds <= 60 * bound and outcome.peak_rss <= MEMORY_BOUND * 2**30
    return f"{'within' if kept else '**over**'} {bound} min, {MEMORY_BOUND} GiB"


def cost_table(outcomes: Sequence[Outcome]) -> str:
    """Time and memory of every job."""
    rows = [[f"{o.job.model}, `{o.job.effort}`", f"{o.parameters / 1e6:.0f}M", o.job.to,
             f"{o.size / MEGABYTE:.1f}", f"{o.seconds / 60:.1f}", f"{o.seconds / o.parameters * 1e8:.1f}",
             f"{o.peak_rss / 2**30:.2f}", f"{o.peak_rss / o.parameters:.1f}", verdict(o)] for o in outcomes]
    return table(["model", "parameters", "budget", "MB written", "minutes", "s per 100M", "peak RSS, GiB",
                  "bytes per parameter", "bound"], rows)


def stage_table(outcomes: Sequence[Outcome]) -> str:
    """Seconds by stage, as the receipts list them."""
    names = list(dict.fromkeys(name for o in outcomes for name in o.stages))
    rows = [[name, *(f"{o.stages[name]:.0f}" if name in o.stages else "" for o in outcomes)]
            for name in names]
    return table(["seconds in", *(f"{o.job.model}, {o.job.effort}" for o in outcomes)], rows)


def main() -> None:
    """Run what is not cached, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a folder with Gemma-3-270M instead of the built-in")
    parser.add_argument("--data", type=Path, help="calibration text instead of the model's own samples")
    parser.add_argument("--only", default="", help="model names, separated by commas")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    bench = Bench(options)
    outcomes = [bench.run(job) for job in jobs([name for name in options.only.split(",") if name])]
    about = ABOUT.format(threads=options.threads,
                         text="a text file" if options.data else "the default, samples of the model itself")
    grown = [line for effort in BOUNDS if (line := growth(outcomes, effort))]
    write_page(PAGE, "What compressing costs", "python benchmarks/cost.py --work WORK",
               [about, cost_table(outcomes), *grown, "## Where the time goes", stage_table(outcomes)])


if __name__ == "__main__":
    main()
