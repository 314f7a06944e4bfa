"""Progress of long work: bars with the time left on a terminal, plain lines elsewhere.

Both are a ``Progress`` as ``run`` asks for it. Everything goes to stderr, so that stdout is the result alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rarefy.report.words import duration
from rarefy.run.progress import Stage

EVERY = 15.0  # seconds between two lines of one stage


class Lines:
    """A line when a stage begins, one every so often, and one when it ends."""

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Announce, do, tell how long it took."""
        started = time.monotonic()
        self.write(f"{name} ...")
        yield _LineStage(self, name)
        self.write(f"{name}: {duration(time.monotonic() - started)}")

    def write(self, text: str) -> None:
        """A line, at once."""
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


class _LineStage:
    def __init__(self, parent: Lines, name: str) -> None:
        self.parent, self.name = parent, name
        self.started = self.told = time.monotonic()

    def advance(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.told < EVERY or not 0 < done < total:
            return
        self.told = now
        left = (now - self.started) / done * (total - done)
        share = f"{100 * done // total}% ({done}/{total})"
        self.parent.write(f"{self.name}: {share}, about {duration(left)} left")

    def line(self, text: str) -> None:
        self.parent.write(f"  {text}")


class Bars:
    """One live bar per running stage; a finished one leaves a line behind."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.console = Console(stderr=True, highlight=False)
        self.live = Progress(
            SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=32),
            TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("left", style="dim"),
            console=self.console, transient=True)
        self.depth = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """A bar while it runs, ``name  12 s`` when it is done."""
        started = time.monotonic()
        if self.depth == 0:
            self.live.start()
        indent = "  " * self.depth
        self.depth += 1
        task = self.live.add_task(indent + name, total=None)
        try:
            yield _BarStage(self, task, indent)
            self.line(f"{indent}{name}  {duration(time.monotonic() - started)}")
        finally:
            self.depth -= 1
            self.live.remove_task(task)
            if self.depth == 0:
                self.live.stop()

    def line(self, text: str) -> None:
        """A line above the bars."""
        self.live.console.print(text, markup=False)


class _BarStage:
    def __init__(self, parent: Bars, task: Any, indent: str) -> None:
        self.parent, self.task, self.indent = parent, task, indent

    def advance(self, done: int, total: int) -> None:
        self.parent.live.update(self.task, completed=done, total=total)

    def line(self, text: str) -> None:
        self.parent.line(f"{self.indent}  {text}")


def progress() -> Lines | Bars:
    """Bars on a terminal, lines elsewhere."""
    return Bars() if sys.stderr.isatty() else Lines()
