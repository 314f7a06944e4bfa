"""What the work cost: peak memory from the kernel, bytes on disk, SHA-256 of files, seconds per stage."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rarefy.core.errors import OutputError


def peak_rss() -> int:
    """The most resident memory this process ever had, in bytes.

    Linux: VmHWM, which begins anew with the program; ``ru_maxrss`` would carry over what the parent
    process held when it forked.
    """
    if (status := Path("/proc/self/status")).exists():
        return _status(status, "VmHWM")
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def resident(pid: int | None = None) -> int | None:
    """Resident memory of a process now, in bytes; None where the system has no /proc."""
    status = Path(f"/proc/{'self' if pid is None else pid}/status")
    return _status(status, "VmRSS") if status.exists() else None


def _status(path: Path, key: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


@dataclass(frozen=True)
class FileRecord:
    """One file as a receipt lists it."""

    path: str
    sha256: str
    bytes: int

    def as_dict(self) -> dict[str, str | int]:
        return asdict(self)


def fingerprint(path: Path, relative_to: Path | None = None) -> FileRecord:
    """Name, SHA-256 and size of one file."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
    except OSError as error:
        raise OutputError(f"{path}: cannot be read back ({error.strerror}); was it moved?") from error
    return FileRecord(str(path.relative_to(relative_to) if relative_to else path), digest, size)


def fingerprints(path: Path) -> tuple[FileRecord, ...]:
    """Every file of a folder, by name; of a file, itself."""
    if path.is_file():
        return (fingerprint(path, path.parent),)
    return tuple(fingerprint(each, path) for each in sorted(path.rglob("*")) if each.is_file())


def bytes_on_disk(path: Path) -> int:
    """Length of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())


@dataclass
class Clock:
    """Seconds by stage, in the order they first began; a stage that runs again adds to its own."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        self.seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started
