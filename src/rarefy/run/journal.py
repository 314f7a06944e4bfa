"""The journal: an output in the making, and the way it takes its final name.

    OUT.partial           a folder while the work runs; it survives a crash, and the same command resumes; its
                          ``work`` holds the plan, and a folder for every finished weight, whole or absent
    OUT                   the finished result: moved in place in one step, after everything was checked
    OUT.rejected          instead of OUT, when a bound that the user set was missed

A journal belongs to one job: ``key`` is a digest of everything that decides the result (inputs by their
hashes, settings, seed, versions). With another key the old journal is of no use and is cleared.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rarefy.core.errors import ModelError, OutputError
from rarefy.core.nodes import Node
from rarefy.core.nouns import Receipt
from rarefy.formats.native import load_native, save_native

HELD = 8  # weights of the blocks kept in memory; the embedding and the head always are

Finished = tuple[Node, tuple[Receipt, ...]]


class Journal:
    """The staging folder of one output."""

    def __init__(self, out: Path, *, overwrite: bool) -> None:
        self.out = out
        self.partial = out.with_name(out.name + ".partial")
        self.rejected = out.with_name(out.name + ".rejected")
        self.work = self.partial / "work"
        if out.exists() and not overwrite:
            raise OutputError(f"{out}: exists already; choose another name or pass --overwrite")
        if out.exists() and not (out / "receipt.json").is_file():
            raise OutputError(f"{out}: exists and is no earlier result of rarefy; "
                              "it is not overwritten, choose another name")

    @contextmanager
    def opened(self, key: Mapping[str, Any]) -> Iterator[Journal]:
        """Claim the staging folder for the job that ``key`` describes; what an equal job left is kept."""
        text = json.dumps(key, sort_keys=True, indent=1, default=str)
        with written(self.partial):
            self.work.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.partial.with_name(self.partial.name + ".lock"))
            try:  # the kernel releases the lock when the process dies, however it dies
                lock.acquire(timeout=0)
            except Timeout:
                raise OutputError(f"{self.partial}: another rarefy is writing it; "
                                  "wait, or choose another -o") from None
            try:
                said = self.work / "job.json"
                if not said.is_file() or said.read_text() != text:
                    for old in self.partial.iterdir():
                        if old != self.work:
                            shutil.rmtree(old) if old.is_dir() else old.unlink()
                    for old in self.work.iterdir():
                        shutil.rmtree(old) if old.is_dir() else old.unlink()
                    said.write_text(text)
                yield self
            finally:
                lock.release()
                Path(lock.lock_file).unlink(missing_ok=True)

    def publish(self, *, accepted: bool) -> Path:
        """Move the finished folder to its final name (or ``.rejected``), replacing an earlier result."""
        final = self.out if accepted else self.rejected
        with written(final):
            shutil.rmtree(self.work)
            old = final.with_name(final.name + ".old")
            if old.exists():
                shutil.rmtree(old)
            if final.exists():
                final.rename(old)
            self.partial.rename(final)
            if old.exists():
                shutil.rmtree(old)
        return final


class Sites(MutableMapping[str, Finished]):
    """Finished weights, each in a native folder of its own, with their receipts."""

    def __init__(self, folder: Path, kept: frozenset[str]) -> None:
        self.folder, self.kept = folder, kept
        self._held: dict[str, Finished] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def _place(self, path: str) -> Path:
        return self.folder / path

    def __contains__(self, path: object) -> bool:
        return isinstance(path, str) and self._place(path).is_dir()

    def __setitem__(self, path: str, done: Finished) -> None:
        tree, receipts = done
        if path in self:
            del self[path]
        save_native(self._place(path), {path: tree}, {}, {"receipts": [asdict(r) for r in receipts]})
        self._hold(path, done)

    def __getitem__(self, path: str) -> Finished:
        if path not in self._held:
            if path not in self:
                raise KeyError(path)
            native = load_native(self._place(path))
            receipts = tuple(Receipt(**each) for each in native.config["receipts"])
            self._hold(path, (native.trees[path], receipts))
        return self._held[path]

    def __delitem__(self, path: str) -> None:
        self._held.pop(path, None)
        shutil.rmtree(self._place(path))

    def __iter__(self) -> Iterator[str]:
        return (place.name for place in sorted(self.folder.iterdir()) if not place.name.endswith(".part"))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _hold(self, path: str, done: Finished) -> None:
        self._held[path] = done
        passing = [held for held in self._held if held not in self.kept]
        for held in passing[:-HELD]:
            del self._held[held]

    def verify(self) -> list[str]:
        """Drop what does not read back (torn by a crash); returns the paths that must be done again."""
        for left in self.folder.glob("*.part"):  # a crash came while it was being written
            shutil.rmtree(left, ignore_errors=True)
        torn = []
        for path in list(self):
            try:
                self[path]
            except (ModelError, KeyError, TypeError):
                torn.append(path)
                shutil.rmtree(self._place(path), ignore_errors=True)
        return torn


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one line with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OutputError(f"{path}: the disk is full; free some space and run the same command again, "
                              "it resumes") from None
        raise OutputError(f"{path}: cannot be written ({error.strerror}); choose another -o") from None
