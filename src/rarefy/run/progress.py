"""What long work says while it runs. The command line shows it; a library caller may ignore it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Stage(Protocol):
    """One stage of the work."""

    def advance(self, done: int, total: int) -> None: ...

    def line(self, text: str) -> None: ...


class Progress(Protocol):
    """Opens stages, one after the other."""

    def stage(self, name: str) -> AbstractContextManager[Stage]: ...


class Silent:
    """Says nothing."""

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        yield self

    def advance(self, done: int, total: int) -> None:
        pass

    def line(self, text: str) -> None:
        pass
