"""Exported networks against each other: every file in its runtime, in turns, so that a slow spell hits all.

    a, b, c, a, b, c, .., a

Each visit times some calls; a ratio compares a file's median with the mean of the two visits to the first
file around it, and its spread over the visits says what the ratio is worth. Loading is not in it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from rarefy.core.errors import TargetError, did_you_mean
from rarefy.measure.machine import drawn, joules
from rarefy.runtimes.child import Input
from rarefy.runtimes.llamacpp import Memory
from rarefy.runtimes.session import Latency, Session, Written

K = TypeVar("K")

ENGINES = {".onnx": "onnxruntime", ".xml": "openvino", ".pt2": "torch"}
BATCHES = (1, 8)


@dataclass(frozen=True)
class Timed:
    """One file. bytes: on disk; peak: of its process; latency: by batch; ratio, spread: times faster than the
    first file, by batch, and (largest - smallest) / median over the visits; load: seconds until it could
    answer; joules: of a call, by batch, what else the machine does included (none without a counter)."""

    path: Path
    runtime: str
    bytes: int
    peak: int
    load: float
    latency: dict[int, Latency]
    ratio: dict[int, float]
    spread: dict[int, float]
    joules: dict[int, float] = field(default_factory=dict)


def engine_of(path: Path) -> str:
    """The runtime of a file, by its name; a folder is a language model for PyTorch."""
    if path.is_dir():
        return "torch"
    if path.suffix not in ENGINES:
        raise TargetError(f"{path}: no runtime is known for {path.suffix or 'it'}; pass a file that ends "
                          f"with one of {', '.join(ENGINES)}{did_you_mean(path.suffix, list(ENGINES))}")
    return ENGINES[path.suffix]


def probe(inputs: Sequence[Input], batch: int, length: int) -> dict[str, Tensor]:
    """Inputs for timing: ones for tokens and masks (speed does not depend on which), noise for images."""
    generator, found = torch.Generator().manual_seed(0), {}
    for each in inputs:
        shape = [batch if k == 0 else size or length for k, size in enumerate(each.shape)]
        whole = "int" in each.type or each.type in ("i64", "i32")
        kind = torch.int32 if each.type in ("int32", "i32") else torch.int64
        found[each.name] = torch.ones(shape, dtype=kind) if whole else torch.randn(shape, generator=generator)
    return found


def compare(paths: Sequence[Path], *, batches: Sequence[int] = BATCHES, length: int = 64, visits: int = 5,
            calls: int = 10, threads: int | None = None, exact: Collection[Path] = (), own: bool = False
            ) -> list[Timed]:
    """Time files in turns; the first is what the others are compared with.

    length: tokens of a text. exact: files that shall be computed as exactly as they are stored. own: time of
    the processor, for a machine that is busy with other things too; pass one thread.
    """
    with ExitStack() as stack:
        sessions, loads = _opened(stack, paths, threads, exact)
        visited = {batch: _visits(sessions, batch, length, visits, calls, own=own) for batch in batches}
        peaks = [session.memory().peak for session in sessions]
    seconds = {batch: taken for batch, (taken, _) in visited.items()}
    rows = [_timed(k, session, loads[k], peaks[k], seconds) for k, session in enumerate(sessions)]
    energy = {batch: used for batch, (_, used) in visited.items() if used}
    return [replace(row, joules={batch: used[k] / calls for batch, used in energy.items()})
            for k, row in enumerate(rows)]


@dataclass(frozen=True)
class Wrote:
    """One file of a language model. bytes: on disk; memory: of its process; load: seconds until it could
    answer; prefill, decode: tokens a second; ratio, spread: as of ``Timed``, for both."""

    path: Path
    runtime: str
    bytes: int
    memory: Memory
    load: float
    prefill: float
    decode: float
    ratio: dict[str, float]
    spread: dict[str, float]


def compare_writers(paths: Sequence[Path], *, prompt: int = 256, count: int = 32, visits: int = 5,
                    threads: int | None = None) -> list[Wrote]:
    """Time language models in turns: reading ``prompt`` tokens, and writing ``count`` more one by one."""
    tokens = torch.arange(5, 5 + prompt)
    with ExitStack() as stack:
        sessions, loads = _opened(stack, paths, threads)
        for session in sessions:
            session.write(tokens[:8], 2)  # warm
        taken: list[list[Written]] = [[] for _ in sessions]
        for visit in range(visits + 1):
            for k, session in enumerate(sessions):
                if visit < visits or k == 0:
                    taken[k].append(session.write(tokens, count + 1))
        memory = [session.memory() for session in sessions]
    seconds = {"prefill": [[[each.prefill] for each in own] for own in taken],
               "decode": [[list(each.decode) for each in own] for own in taken]}
    rows = []
    for k, session in enumerate(sessions):
        ratio, spread = _ratios(k, seconds)
        middle = {key: statistics.median(second for visit in own[k] for second in visit)
                  for key, own in seconds.items()}
        rows.append(Wrote(session.path, session.version, bytes_of(session.path), memory[k], loads[k],
                          prompt / middle["prefill"], 1 / middle["decode"], ratio, spread))
    return rows


def _opened(stack: ExitStack, paths: Sequence[Path], threads: int | None, exact: Collection[Path] = ()
            ) -> tuple[list[Session], list[float]]:
    """Every file in its runtime, which rounds as it would by itself, and the seconds that took."""
    sessions, loads = [], []
    for path in paths:
        started = time.perf_counter()
        session = Session(path, engine_of(path), threads=threads, exact=path in exact)
        sessions.append(stack.enter_context(session))
        loads.append(time.perf_counter() - started)
    return sessions, loads


def bytes_of(path: Path) -> int:
    """Bytes of a file and of the numbers that lie beside it, or of a folder."""
    if path.is_dir():
        return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    beside = path.with_suffix(".bin") if path.suffix == ".xml" else path.with_name(path.name + ".data")
    return path.stat().st_size + (beside.stat().st_size if beside.exists() else 0)


def _visits(sessions: Sequence[Session], batch: int, length: int, visits: int, calls: int, *, own: bool
            ) -> tuple[list[list[list[float]]], list[float]]:
    """Seconds of each call, by file and visit, and joules of a visit; the first file has one visit more."""
    inputs = [probe(session.declared, batch, length) for session in sessions]
    for session, given in zip(sessions, inputs, strict=True):
        session.latency(given, 2)  # warm
    taken: list[list[list[float]]] = [[] for _ in sessions]
    energy: list[list[float]] = [[] for _ in sessions]
    for visit in range(visits + 1):
        for k, session in enumerate(sessions if visit < visits else sessions[:1]):
            before = joules()
            taken[k].append(session.latency(inputs[k], calls, own=own))
            if (used := drawn(before)) is not None:
                energy[k].append(used)
    return taken, [statistics.median(each) for each in energy if each]


def _timed(k: int, session: Session, load: float, peak: int,
           seconds: dict[int, list[list[list[float]]]]) -> Timed:
    ratio, spread = _ratios(k, seconds)
    latency = {batch: Latency.of([second for visit in taken[k] for second in visit])
               for batch, taken in seconds.items()}
    return Timed(session.path, session.version, bytes_of(session.path), peak, load, latency, ratio, spread)


def _ratios(k: int, seconds: Mapping[K, list[list[list[float]]]]) -> tuple[dict[K, float], dict[K, float]]:
    """How many times faster than the first a file is, and the spread, from its calls by visit."""
    ratio, spread = {}, {}
    for key, taken in seconds.items():
        medians = [[statistics.median(visit) for visit in each] for each in taken]
        around = [(a + b) / 2 for a, b in zip(medians[0], medians[0][1:], strict=False)]
        ratios = [first / own for first, own in zip(around, medians[k], strict=False)]
        ratio[key] = statistics.median(ratios)
        spread[key] = (max(ratios) - min(ratios)) / ratio[key]
    return ratio, spread
