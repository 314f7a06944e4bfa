"""llama.cpp's own command-line tools: the rival's quantizer, and the one judge of all files.

``llama-perplexity --kl-divergence`` compares a file with the stored log-probabilities of the
original over windows of 512 tokens. Three things to know about it:

- It puts BOS at the first place of every window (when the file's metadata asks for BOS, which a
  Gemma file must), and scores the second half of a window: 255 positions of 512.
- It stores the original's log-probabilities in 16 bits and cuts them 16 nats below the best
  token. The perplexity that it prints for the original is that of the cut distribution (16.91
  where the exact one is 17.06), and a file compared with itself shows the floor of the method.
- Its standard errors are over tokens, not windows.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import Cost, run_fresh

NAMES = ("llama-quantize", "llama-imatrix", "llama-perplexity", "llama-bench")
WINDOW = 512

HOW_TO_BUILD = """\
The tools are part of llama.cpp, whose source comes with the source package of llama-cpp-python:

    pip download llama-cpp-python==0.3.36 --no-binary llama-cpp-python --no-deps -d DIR
    tar -xzf DIR/llama_cpp_python-0.3.36.tar.gz -C DIR
    cmake -S DIR/llama_cpp_python-0.3.36/vendor/llama.cpp -B DIR/build -DCMAKE_BUILD_TYPE=Release \\
        -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF \\
        -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DBUILD_SHARED_LIBS=OFF
    cmake --build DIR/build -j 2 --target llama-quantize llama-imatrix llama-perplexity llama-bench

then pass --tools DIR/build/bin (about ten minutes on two cores)."""


@dataclass(frozen=True)
class Divergence:
    """How far a file's answers are from the original's, as llama-perplexity measures it."""

    kl_mean: float
    kl_stderr: float
    kl_median: float
    kl_p999: float
    top1: float
    perplexity: float
    perplexity_original: float


@dataclass(frozen=True)
class Speed:
    """Tokens per second, each with the number of measured repetitions behind it."""

    prefill: float
    decode: float
    repeats: int


def parse_divergence(text: str) -> Divergence:
    """Read the statistics at the end of the output of ``llama-perplexity --kl-divergence``."""
    def number(label: str) -> float:
        found = re.search(rf"^{label}\s*:\s*(-?[\d.]+|nan)", text, re.MULTILINE)
        if not found:
            sys.exit(f"llama-perplexity printed no {label!r}: its output changed, or it failed")
        return float(found.group(1))

    spread = re.search(r"^Mean\s+KLD:\s*\S+\s*±\s*([\d.]+)", text, re.MULTILINE)
    return Divergence(number(r"Mean\s+KLD"), float(spread.group(1)) if spread else float("nan"),
                      number(r"Median\s+KLD"), number(r"99\.9%\s+KLD"), number("Same top p") / 100,
                      number(r"Mean PPL\(Q\)"), number(r"Mean PPL\(base\)"))


@dataclass(frozen=True)
class Tools:
    """The four programs of one llama.cpp build, run on the CPU with a fixed number of threads."""

    folder: Path
    threads: int = 2

    def check(self) -> None:
        """Say how to build what is missing, and stop."""
        missing = [name for name in NAMES if not (self.folder / name).exists()]
        if missing:
            sys.exit(f"--tools {self.folder}: {', '.join(missing)} missing.\n\n{HOW_TO_BUILD}")

    def version(self) -> str:
        """The version line of the build."""
        done = subprocess.run([self.folder / "llama-perplexity", "--version"], capture_output=True, text=True)
        found = re.search(r"version: (.+)", done.stdout + done.stderr)
        return found.group(1).strip() if found else "unknown version"

    def importance(self, model: Path, text: Path, out: Path, windows: int) -> None:
        """Collect the importance matrix of a model on a text."""
        self._run("llama-imatrix", out, "-m", model, "-f", text, "-o", out, "-c", WINDOW, "--chunks", windows,
                  "-ngl", 0, "-t", self.threads)

    def quantize(self, model: Path, importance: Path, out: Path, body: str, options: tuple[str, ...]) -> Cost:
        """Write a quantized file; it appears under its name only when it is whole."""
        part = out.with_suffix(".part")
        cost = self._run("llama-quantize", out, "--imatrix", importance, *options, model, part, body,
                         self.threads)
        part.replace(out)
        return cost

    def original(self, model: Path, text: Path, out: Path, windows: int) -> float:
        """Store the log-probabilities of the original; its exact perplexity on the same windows."""
        part = out.with_suffix(".part")
        self._run("llama-perplexity", out, "-m", model, "-f", text, "-c", WINDOW, "--chunks", windows,
                  "--kl-divergence-base", part, "-ngl", 0, "-t", self.threads)
        part.replace(out)
        found = re.search(r"Final estimate: PPL = ([\d.]+)", _log_of(out).read_text(errors="replace"))
        return float(found.group(1)) if found else float("nan")

    def divergence(self, model: Path, original: Path, log: Path) -> Divergence:
        """Compare a file with the stored original."""
        run_fresh([self.folder / "llama-perplexity", "-m", model, "--kl-divergence-base", original,
                   "--kl-divergence", "-c", WINDOW, "-ngl", 0, "-t", self.threads], log)
        return parse_divergence(log.read_text(errors="replace"))

    def speed(self, model: Path, log: Path, repeats: int) -> Speed:
        """Prefill of 256 tokens and decode of 64, as llama-bench measures them."""
        done = subprocess.run([self.folder / "llama-bench", "-m", model, "-p", "256", "-n", "64",
                               "-o", "json", "-r", str(repeats), "-t", str(self.threads), "-ngl", "0"],
                              capture_output=True, text=True)
        log.write_text(done.stdout + done.stderr)
        if done.returncode != 0:
            sys.exit(f"llama-bench failed on {model.name}: {done.stderr.splitlines()[-1:]}")
        runs = json.loads(done.stdout)
        prefill, decode = (next(r["avg_ts"] for r in runs if r[key]) for key in ("n_prompt", "n_gen"))
        return Speed(prefill, decode, repeats)

    def speeds(self, first: Path, second: Path, log: Path, repeats: int = 3) -> tuple[Speed, Speed]:
        """Two files in the order A, B, A, so that a drift of the machine shows on both."""
        before, other, after = (self.speed(path, log, repeats) for path in (first, second, first))
        mean = Speed((before.prefill + after.prefill) / 2, (before.decode + after.decode) / 2, 2 * repeats)
        return mean, other

    def _run(self, name: str, out: Path, *words: object) -> Cost:
        return run_fresh([self.folder / name, *map(str, words)], _log_of(out))


def _log_of(out: Path) -> Path:
    return out.with_name(out.name + ".log")


def as_entry(value: Divergence | Speed | Cost) -> dict[str, Any]:
    """A result as the ledger keeps it."""
    return asdict(value)
