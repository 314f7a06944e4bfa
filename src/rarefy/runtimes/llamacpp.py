"""Run an exported GGUF file in llama.cpp, where users run it, and measure there.

Everything happens in a fresh child process (``llamacpp_child``): a file that makes the library abort is
an error message here, and memory is the runtime's alone. ``llama-cpp-python`` is preferred when it is
installed (built natively, so its speed is the user's), else the prebuilt ``xllamacpp``; both carry the
same C library and one binding serves both. Tried on Linux with xllamacpp 2026.6, 2026.9 and 2026.10; a
build of llama-cpp-python was not at hand, its library is found and bound by the same names.

    with Session(path) as session:
        for table in session.distributions(tokens, positions): ...   # log-probabilities, window by window
        print(session.complete("The capital of France is", 16))
"""

from __future__ import annotations

import codecs
import importlib.metadata
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarefy.core.errors import TargetError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PACKAGES = (("llama_cpp", "llama-cpp-python", "lib/*llama.*"), ("xllamacpp", "xllamacpp", "xllamacpp*.*"))
LIBRARY_SUFFIXES = (".so", ".dylib", ".dll", ".pyd")
# Threads that wait for each other sleep after some 20 microseconds. By default they spin for far longer,
# which on a machine that does anything else was measured to be 5 to 50 times slower.
SPINS = "1000"
TIMEOUT = 600.0  # seconds without an answer: the largest files load in less from a slow disk


@dataclass(frozen=True)
class Runtime:
    """An installed llama.cpp: the package that carries it, its version, its shared library."""

    name: str
    version: str
    library: Path

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Speed:
    """Tokens per second: of a prompt as a whole, and of the tokens generated after it."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class Memory:
    """Bytes of the child process: at its peak, now, and now without the mapped file's pages."""

    peak: int
    resident: int
    private: int


@dataclass(frozen=True)
class SpeedComparison:
    """Two files measured in turns (a, b, a, b, .., a), so that a slow spell of the machine hits both.

    The ratios are b over a. drift: the largest relative distance between two visits to the first file's
    decode speed; far above 0.1 the machine was busy and the ratios mean little.
    """

    a: Speed
    b: Speed
    memory_a: Memory
    memory_b: Memory
    ratio_prefill: float
    ratio_decode: float
    drift: float


class Refused(TargetError):
    """What the runtime itself gave as its reason; the process lives on."""


def runtime() -> Runtime:
    """The llama.cpp to use, found without importing anything. TargetError when there is none."""
    for module, package, pattern in PACKAGES:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            continue
        found = [file for file in sorted(Path(spec.origin).parent.glob(pattern))
                 if file.suffix in LIBRARY_SUFFIXES]
        if not found:
            raise TargetError(f"{package} is installed without its llama.cpp library ({pattern} beside "
                              f"{spec.origin}); reinstall it: pip install --force-reinstall {package}")
        return Runtime(package, importlib.metadata.version(package), found[0])
    raise TargetError("no llama.cpp to run GGUF files with; pip install xllamacpp (prebuilt), or "
                      "pip install llama-cpp-python (built here, faster)")


def usable_threads() -> int:
    """How many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Session:
    """One GGUF file held open in a child process. Use as a context manager.

    threads: default, all that this process may use. timeout: seconds to wait for any one answer.
    """

    def __init__(self, path: Path | str, *, threads: int | None = None,
                 timeout: float = TIMEOUT) -> None:
        self.path = Path(path)
        self.threads = threads or usable_threads()
        self.timeout = timeout
        self.runtime = runtime()
        self._process: subprocess.Popen[bytes] | None = None
        self._log: Any = None
        self._overdue = False
        if not self.path.is_file():
            raise TargetError(f"{self.path}: there is no such file to run in llama.cpp")
        self.vocabulary = 0
        self.system = ""
        self._start()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child process, whatever it is doing."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, self._log):
                if stream is not None:
                    stream.close()

    def distributions(self, tokens: NDArray[np.integer[Any]],
                      positions: Sequence[int] | None = None) -> Iterator[NDArray[np.float32]]:
        """For each window of ``tokens`` [windows, length], log-probabilities [positions, vocabulary].

        Row k is the distribution of the token *after* ``positions[k]`` (default: every position). Windows
        are taken as they are: put the BOS there. The whole distribution comes back, in float32.
        """
        import numpy as np

        rows = np.asarray(tokens, np.int64)
        if rows.ndim != 2:
            raise ValueError(f"tokens must be [windows, length], got shape {rows.shape}")
        length = rows.shape[1]
        chosen = list(range(length)) if positions is None else [int(p) for p in positions]
        if not chosen or min(chosen) < 0 or max(chosen) >= length or len(set(chosen)) < len(chosen):
            raise ValueError(f"positions must be distinct and lie in 0..{length - 1}, got {chosen[:8]}")
        request = {"do": "distributions", "tokens": rows.tolist(), "positions": chosen}
        for header, payload in self._ask(request):
            yield np.frombuffer(payload, np.float32).reshape(header["shape"])

    def tokenize(self, text: str, *, begin: bool = True, special: bool = False) -> list[int]:
        """llama.cpp's own tokens of ``text``. begin: add BOS where the file says so. special: let the
        text of a control token, like ``<end_of_turn>``, become that token."""
        request = {"do": "tokenize", "text": text, "begin": begin, "special": special}
        return list(self._one(request)["tokens"])

    def check_tokens(self, texts: Sequence[str], expected: Sequence[Sequence[int]]) -> None:
        """llama.cpp must cut ``texts`` into the ``expected`` tokens; a TargetError shows where it does not.

        A wrong pre-tokenizer or a wrong score is no error to llama.cpp: the model merely answers worse.
        """
        for text, wanted in zip(texts, expected, strict=True):
            found = self.tokenize(text)
            if found != list(wanted):
                pairs = zip(found, wanted, strict=False)
                k = next((k for k, (ours, theirs) in enumerate(pairs) if ours != theirs),
                         min(len(found), len(wanted)))
                raise TargetError(f"{self.path}: llama.cpp cuts {text[:40]!r} into other tokens than the "
                                  f"model's own tokenizer: {found[k:k + 4]} against {list(wanted[k:k + 4])} "
                                  f"at token {k}; start from a GGUF of this model, its tokenizer is copied")

    def stream(self, prompt: str, most: int, *, special: bool = False) -> Iterator[str]:
        """The greedy continuation of ``prompt``, piece by piece, until its end or ``most`` tokens."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        request = {"do": "generate", "prompt": self.tokenize(prompt, special=special), "most": most}
        for _, piece in self._ask(request):
            if text := decoder.decode(piece):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def complete(self, prompt: str, most: int, *, special: bool = False) -> str:
        """The greedy continuation of ``prompt`` in at most ``most`` tokens."""
        return "".join(self.stream(prompt, most, special=special))

    def speed(self, *, prefill: int = 256, decode: int = 64, seconds: float = 30.0) -> Speed:
        """Tokens per second, once; each of the two phases stops after about ``seconds``."""
        found = self._one({"do": "speed", "prefill": prefill, "decode": decode, "seconds": seconds})
        return Speed(found["prefill"], found["decode"])

    def memory(self) -> Memory:
        """What the child process takes."""
        found = self._one({"do": "memory"})
        return Memory(found["peak"], found["resident"], found["private"])

    def _one(self, request: dict[str, Any]) -> dict[str, Any]:
        (header, _), = self._ask(request)
        return header

    def _ask(self, request: dict[str, Any]) -> Iterator[tuple[dict[str, Any], bytes]]:
        """The answers to one request. An iteration given up half-way ends the child; the next request
        starts another."""
        finished = False
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            while True:
                header, payload = self._receive()
                if header.get("done"):
                    finished = True
                    return
                yield header, payload
        except Refused:
            finished = True
            raise
        except BrokenPipeError:
            raise self._died() from None
        finally:
            if not finished:
                self.close()

    def _start(self) -> None:
        environment = dict(os.environ)
        if "OMP_WAIT_POLICY" not in environment:
            environment.setdefault("GOMP_SPINCOUNT", SPINS)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rarefy.runtimes.llamacpp_child", str(self.runtime.library),
             str(self.path.resolve()), str(self.threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment)
        try:
            header, _ = self._receive()
        except TargetError as error:
            self.close()
            raise TargetError(f"{error}; export it again, or update the runtime: "
                              f"pip install -U {self.runtime.name}") from None
        except BaseException:
            self.close()
            raise
        self.vocabulary, self.system = header["vocabulary"], header["system"]

    def _receive(self) -> tuple[dict[str, Any], bytes]:
        """One answer, or TargetError when the child refuses, dies or stays silent for too long."""
        process = self._process
        assert process is not None and process.stdout is not None
        self._overdue = False
        watchdog = threading.Timer(self.timeout, self._expire, [process])
        watchdog.start()
        try:
            line = process.stdout.readline()
            header: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {"died": True}
            payload = process.stdout.read(header.get("bytes", 0))
        finally:
            watchdog.cancel()
        if "died" in header or len(payload) < header["bytes"]:
            raise self._died()
        if "refused" in header:
            raise Refused(f"{self.path}: llama.cpp ({self.runtime}) refuses it: {header['refused']}")
        return header, payload

    def _expire(self, process: subprocess.Popen[bytes]) -> None:
        self._overdue = True
        process.kill()

    def _died(self) -> TargetError:
        """What to say about a child that ended without an answer."""
        where = f"{self.path}: llama.cpp ({self.runtime})"
        if self._overdue:
            return TargetError(f"{where} gave no answer within {self.timeout:g} seconds")
        assert self._process is not None
        code = self._process.wait()
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines()]
        told = [line for line in lines if "GGML_ASSERT" in line or "rror" in line] or lines[-1:]
        return TargetError(f"{where} crashed with {cause}: {told[-1] if told else 'it said nothing'}")


def distributions(path: Path | str, tokens: NDArray[np.integer[Any]],
                  positions: Sequence[int] | None = None, *,
                  threads: int | None = None) -> Iterator[NDArray[np.float32]]:
    """``Session.distributions`` in a process of its own, ended with the iteration."""
    with Session(path, threads=threads) as session:
        yield from session.distributions(tokens, positions)


def complete(path: Path | str, prompts: Sequence[str], most: int, *,
             threads: int | None = None) -> list[str]:
    """Greedy continuations of ``prompts``."""
    with Session(path, threads=threads) as session:
        return [session.complete(prompt, most) for prompt in prompts]


def speed(path: Path | str, *, prefill: int = 256, decode: int = 64, threads: int | None = None,
          repeats: int = 3) -> tuple[Speed, Memory]:
    """Median tokens per second of ``repeats`` runs after one to warm up, and the memory that took."""
    with Session(path, threads=threads) as session:
        session.speed(prefill=prefill, decode=min(decode, 8))
        runs = [session.speed(prefill=prefill, decode=decode) for _ in range(repeats)]
        return _median(runs), session.memory()


def compare_speed(a: Path | str, b: Path | str, *, prefill: int = 256, decode: int = 64,
                  threads: int | None = None, repeats: int = 3) -> SpeedComparison:
    """Both files loaded, warmed up, then measured in turns: a, b, a, b, .., a."""
    with Session(a, threads=threads) as first, Session(b, threads=threads) as second:
        for session in (first, second):
            session.speed(prefill=prefill, decode=min(decode, 8))
        ours, theirs = [first.speed(prefill=prefill, decode=decode)], []
        for _ in range(repeats):
            theirs.append(second.speed(prefill=prefill, decode=decode))
            ours.append(first.speed(prefill=prefill, decode=decode))
        taken = first.memory(), second.memory()
    one, two = _median(ours), _median(theirs)
    visits = [run.decode for run in ours]
    return SpeedComparison(one, two, *taken, two.prefill / one.prefill, two.decode / one.decode,
                           max(visits) / min(visits) - 1.0)


def _median(runs: Sequence[Speed]) -> Speed:
    return Speed(statistics.median(run.prefill for run in runs),
                 statistics.median(run.decode for run in runs))
