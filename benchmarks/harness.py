"""What every benchmark here needs: a fresh process with its cost, a ledger of results, tables.

The cost of a process is what the kernel says when it ends (``wait4``): wall time and the peak
resident set of the largest process below it. Linux hands the parent's own peak down to a child
at ``exec``, so the scripts of this folder import neither torch nor numpy: whatever needs them
runs in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Cost:
    """Wall seconds and peak resident bytes of one finished process."""

    seconds: float
    peak_rss: int


def run_fresh(command: Sequence[str | Path | int], log: Path, threads: int | None = None) -> Cost:
    """Run a command to its end, its output in ``log``; a failure shows the last lines of it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [str(word) for word in command]
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    with log.open("wb") as out:
        start = time.perf_counter()
        child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                                 env=environment)
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except KeyboardInterrupt:
            child.terminate()
            child.wait()
            raise
        seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        sys.exit(f"exit code {child.returncode}: {' '.join(words)}\n{tail}")
    return Cost(seconds, usage.ru_maxrss * 1024)


def compress(model: Path | str, to: str, effort: str, data: Path | None, out: Path, threads: int) -> Cost:
    """``rarefy compress`` in a fresh process, from the beginning: what an interrupted run left is removed."""
    script = Path(sys.executable).with_name("rarefy")
    if not script.exists():
        sys.exit(f"{script} is missing; install the package into this environment: pip install -e .")
    for old in (out, out.with_name(out.name + ".partial"), out.with_name(out.name + ".rejected")):
        shutil.rmtree(old, ignore_errors=True)
    print(f"rarefy compress {model} --to {to} --effort {effort}", flush=True)
    texts: list[str | Path] = ["--data", data] if data else []
    return run_fresh([script, "compress", model, "--to", to, "--for", "llama.cpp", "--effort", effort, *texts,
                      "-o", out], out.with_name(out.name + ".log"), threads)


def sha256(path: Path) -> str:
    """Hash of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(folder: Path, pattern: str = "*") -> str:
    """One hash for the names and contents of the files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob(pattern) if p.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{sha256(path)}\n".encode())
    return digest.hexdigest()


def source_sha256(*parts: str) -> str:
    """Hash of the package's own source, or of some floors and files of it: a result of another source is not
    this one's."""
    source = Path(__file__).parent.parent / "src" / "rarefy"
    if not parts:
        return folder_sha256(source, "*.py")
    return fingerprint(*(sha256(source / part) if part.endswith(".py")
                         else folder_sha256(source / part, "*.py") for part in parts))


class Ledger:
    """Results by key in one JSON file, saved whole after every entry, so that a run resumes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, key: str) -> Any | None:
        """The entry, or None."""
        return self._entries.get(key)

    def put(self, key: str, value: Any) -> None:
        """Add an entry, as it will be read, and write the file under a temporary name, then in place."""
        self._entries[key] = json.loads(json.dumps(value))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self._entries, indent=1))
        part.replace(self._path)


@dataclass(frozen=True, eq=False)
class Results:
    """What is in a ledger, and what is not: made now, or left out where only finished rows are wanted.

    rows: only cases with this in their name are made. missing: what was left out, by stage and name.
    """

    ledger: Ledger
    finished: bool
    rows: str
    missing: list[str]

    def of(self, cases: Mapping[str, Any], what: tuple[object, ...], work: Callable[[Any], Any]
           ) -> dict[str, Any]:
        """A result for every case, under what was asked for: other settings, other key. what: first, the
        name of the stage."""
        found = {}
        for name, case in cases.items():
            key = fingerprint(name, *what)
            if self.ledger.get(key) is None and not self.finished and self.rows in name:
                print(name, *what, flush=True)
                self.ledger.put(key, work(case))
                print(self.ledger.get(key), flush=True)
            if self.ledger.get(key) is None:
                self.missing.append(f"{what[0]}: {name}")
            else:
                found[name] = self.ledger.get(key)
        return found


def fingerprint(*parts: object) -> str:
    """A short key made of everything that a result depends on."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:24]


def machine() -> list[str]:
    """What a reader must know of the machine and the versions, one fact a line, no paths."""
    packages = [f"{name} {metadata.version(name)}" for name in ("rarefy", "torch", "transformers", "gguf")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return [f"CPU: {cpu_name()}, {os.cpu_count()} cores, {memory:.0f} GiB of memory",
            f"Python {platform.python_version()} on {platform.system()}; {', '.join(packages)}",
            f"written on {time.strftime('%Y-%m-%d')}"]


def cpu_name() -> str:
    """Model name, family and number: hypervisors often blank the name alone."""
    facts: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    flags = facts.get("flags", "").split()
    features = [f for f in ("avx2", "avx512_vnni", "amx_int8") if f in flags]
    return (f"{facts.get('model name', platform.processor() or platform.machine())} "
            f"(family {facts.get('cpu family', '?')}, model {facts.get('model', '?')}; {' '.join(features)})")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers, on the right."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def write_page(path: Path, title: str, command: str, parts: Sequence[str]) -> None:
    """A page of the documentation that says which command wrote it and on what."""
    facts = "\n".join(f"- {fact}" for fact in machine())
    body = "\n\n".join([f"# {title}", f"Written by `{command}`; do not edit by hand.", *parts,
                        f"## Machine and versions\n\n{facts}"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(body + "\n")
    print(f"wrote {path}")
