"""Quality at equal bytes in llama.cpp: ours against llama.cpp's own quantizer. One command:

    python benchmarks/gguf_quality.py --tools LLAMA_CPP/build/bin --data DATA --work WORK

DATA holds ``wikitext2/valid.txt`` (calibration, for both sides) and ``wikitext2/test.raw.txt``
(evaluation only). The model is the permuted Gemma-3-270M of ``permuted_gemma.py``, built into WORK
or given by ``--model``. The rivals (``rivals.py``) get an importance matrix from 40 windows of 512
tokens. Ours run as ``rarefy compress``, each in a process of its own. All files are judged by one
harness, ``llama-perplexity --kl-divergence`` on 8 windows of 512 tokens, at the bytes of the whole
file; at every point a rival may be up to half a megabyte larger than our budget. Speed is
llama-bench's, ours and the best rival's interleaved. Results are cached in WORK by content; a second
run continues.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import (
    MEGABYTE,
    Ledger,
    compress,
    fingerprint,
    folder_sha256,
    run_fresh,
    sha256,
    source_sha256,
    table,
    write_page,
)
from llama_tools import Divergence, Speed, Tools, as_entry
from rivals import RIVALS, Rival

POINTS = (253, 197, 190, 169, 158)
CALIBRATION_WINDOWS = 40
EVALUATION_WINDOWS = 8
SLACK = MEGABYTE // 2
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "gguf_quality.md"

METHOD = f"""\
The original is the permuted Gemma-3-270M in F16, {{size:.1f}} MB, perplexity {{exact:.2f}} on these windows.
Mean KL to it over {EVALUATION_WINDOWS} windows of 512 tokens of the wikitext-2 raw test set, BOS at each, the
second half of each scored (255 positions), by `llama-perplexity`; standard errors over tokens. The stored
answers of the original are cut 16 nats below the best token (perplexity {{cut:.2f}}); the original against
itself has a KL of {{floor:.4f}} there, the floor of the method. Calibration, ours and theirs: wikitext-2
validation text; their importance matrix from {CALIBRATION_WINDOWS} windows of 512 tokens. MB are 10^6 bytes
of the whole file. *stock*: a plain type of llama-quantize; *embedding*: with `--token-embedding-type`; *by
hand*: with types of single tensors."""

COLUMNS = """\
The best rival is the lowest mean KL among all below that are at most 0.5 MB over the budget. Decode (64
tokens) and prefill (256) are tokens/s by `llama-bench` with {threads} threads, interleaved A/B/A in one run.
Minutes and peak memory are of `rarefy compress`, a fresh process, loading, saving and its own measurements
included; on a machine with other work to do they are upper bounds, and speeds are worth their ratio only."""


@dataclass(frozen=True)
class Judged:
    """A file, its size and how far its answers are from the original's."""

    name: str
    kind: str
    path: Path
    size: int
    divergence: Divergence


@dataclass(frozen=True)
class Ours:
    """Our file for one budget, with what it cost to make."""

    point: int
    judged: Judged
    seconds: float
    peak_rss: int


class Bench:
    """One work folder: the original, its stored answers, and the cached verdicts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.tools = Tools(options.tools, options.threads)
        self.tools.check()
        self.work: Path = options.work
        self.calibration: Path = options.data / "wikitext2" / "valid.txt"
        self.evaluation: Path = options.data / "wikitext2" / "test.raw.txt"
        for path in (self.calibration, self.evaluation):
            if not path.exists():
                sys.exit(f"--data {options.data}: {path.name} is missing below it, in wikitext2/")
        self.work.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(self.work / "results.json")
        model: Path = options.model or self._build_model()
        self.folder, self.f16 = model / "hf", model / "f16.gguf"
        self.key = fingerprint(sha256(self.f16), sha256(self.evaluation), EVALUATION_WINDOWS,
                               self.tools.version())

    def _build_model(self) -> Path:
        model = self.work / "model"
        if not (model / "f16.gguf").exists():
            print("building the permuted Gemma-3-270M")
            script = Path(__file__).with_name("permuted_gemma.py")
            run_fresh([sys.executable, script, model], self.work / "model.log")
        return model

    def prepare(self) -> None:
        """The importance matrix and the original's answers, once."""
        if not self.importance.exists():
            print(f"importance matrix from {CALIBRATION_WINDOWS} windows")
            part = self.importance.with_name("part-" + self.importance.name)
            self.tools.importance(self.f16, self.calibration, part, CALIBRATION_WINDOWS)
            part.replace(self.importance)
        if not self.answers.exists() or self.ledger.get("original " + self.key) is None:
            print(f"the original's answers on {EVALUATION_WINDOWS} windows")
            exact = self.tools.original(self.f16, self.evaluation, self.answers, EVALUATION_WINDOWS)
            if not exact < 20:
                sys.exit(f"the original's perplexity is {exact}, expected about 17: a Gemma file that does "
                         "not ask for BOS gives garbage; check tokenizer.ggml.add_bos_token")
            self.ledger.put("original " + self.key, exact)

    @property
    def importance(self) -> Path:
        """Where the importance matrix lies."""
        return self.work / f"importance-{self._model_key()}.gguf"

    @property
    def answers(self) -> Path:
        """Where the original's log-probabilities lie (about 1 GB)."""
        return self.work / f"original-{self.key}.kld"

    def _model_key(self) -> str:
        return fingerprint(self.key, sha256(self.calibration), CALIBRATION_WINDOWS)

    def exact_perplexity(self) -> float:
        """Perplexity of the original, not cut to 16 nats."""
        return float(self.ledger.get("original " + self.key) or "nan")

    def judge(self, name: str, kind: str, path: Path) -> Judged:
        """The verdict on a file, from the cache if its content was judged before."""
        key = f"divergence {self.key} {sha256(path)}"
        found = self.ledger.get(key)
        if found is None:
            verdict = self.tools.divergence(path, self.answers, self.work / "logs" / f"{path.stem}.log")
            self.ledger.put(key, found := as_entry(verdict))
        judged = Judged(name, kind, path, path.stat().st_size, Divergence(**found))
        print(f"{judged.size / MEGABYTE:8.1f} MB  KL {judged.divergence.kl_mean:.4f}  {name}", flush=True)
        return judged

    def rival(self, rival: Rival) -> Judged:
        """Make a rival's file unless it is there, and judge it."""
        path = self.work / "rivals" / self._model_key() / f"{rival.stem}.gguf"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            self.tools.quantize(self.f16, self.importance, path, rival.body, rival.options)
        return self.judge(rival.name, rival.kind, path)

    def ours(self, point: int, effort: str) -> Ours:
        """Compress to a budget in a fresh process unless this source did it before, and judge the file."""
        out = self.work / "ours" / f"{point}MB-{effort}"
        key = "ours " + fingerprint(folder_sha256(self.folder), sha256(self.calibration), point, effort,
                                    source_sha256())
        cost = self.ledger.get(key)
        path = out / "model.gguf"
        if cost is None or not path.exists() or sha256(path) != cost["sha256"]:
            spent = compress(self.folder, f"{point}MB", effort, self.calibration, out, self.tools.threads)
            cost = as_entry(spent) | {"sha256": sha256(path)}
            self.ledger.put(key, cost)
        judged = self.judge(f"rarefy, {point} MB", "ours", path)
        if judged.size > point * MEGABYTE:
            sys.exit(f"{judged.size} bytes are over the budget of {point} MB")
        return Ours(point, judged, cost["seconds"], int(cost["peak_rss"]))

    def speeds(self, first: Judged, second: Judged) -> tuple[Speed, Speed]:
        """Interleaved speeds of two files, cached for this pair."""
        key = "speed " + fingerprint(self.tools.version(), self.tools.threads, sha256(first.path),
                                     sha256(second.path))
        found = self.ledger.get(key)
        if found is None:
            print(f"speed: {first.name} / {second.name}", flush=True)
            pair = self.tools.speeds(first.path, second.path, self.work / "logs" / "bench.log")
            self.ledger.put(key, found := [as_entry(speed) for speed in pair])
        return Speed(**found[0]), Speed(**found[1])


def best_rival(point: int, rivals: Sequence[Judged]) -> Judged:
    """The rival with the lowest mean KL that is at most half a megabyte over the budget."""
    allowed = [r for r in rivals if r.size <= point * MEGABYTE + SLACK]
    if not allowed:
        sys.exit(f"no rival is as small as {point} MB; add one to rivals.py")
    return min(allowed, key=lambda r: r.divergence.kl_mean)


def with_error(divergence: Divergence) -> str:
    """The mean KL and its standard error."""
    return f"{divergence.kl_mean:.4f} ± {divergence.kl_stderr:.4f}"


def quality_row(judged: Judged) -> list[str]:
    """One row of the big table."""
    d = judged.divergence
    return [judged.name, judged.kind, f"{judged.size / MEGABYTE:.1f}", with_error(d), f"{d.kl_median:.4f}",
            f"{d.kl_p999:.2f}", f"{100 * d.top1:.1f}%", f"{d.perplexity:.2f}"]


def points_table(bench: Bench, ours: Sequence[Ours], rivals: Sequence[Judged]) -> str:
    """Ours against the best rival at every budget, with speed and cost."""
    rows = []
    for one in ours:
        rival = best_rival(one.point, rivals)
        mine, theirs = bench.speeds(one.judged, rival)
        a, b = one.judged.divergence, rival.divergence
        rows.append([f"{one.point} MB", f"{one.judged.size / MEGABYTE:.1f}", with_error(a), rival.name,
                     f"{rival.size / MEGABYTE:.1f}", with_error(b), f"{a.kl_mean / b.kl_mean:.2f}",
                     f"{mine.decode:.1f} / {theirs.decode:.1f}",
                     f"{mine.prefill:.0f} / {theirs.prefill:.0f}", f"{one.seconds / 60:.1f}",
                     f"{one.peak_rss / 2**30:.2f}"])
    return table(["budget", "ours, MB", "our mean KL", "best rival", "its MB", "its mean KL", "KL ratio",
                  "decode, ours / its", "prefill, ours / its", "minutes", "peak RSS, GiB"], rows)


def page(bench: Bench, rivals: Sequence[Judged], floor: Judged, ours: Sequence[Ours]) -> list[str]:
    """The parts of the page."""
    files = sorted([*rivals, *(one.judged for one in ours)], key=lambda r: -r.size)
    head = ["file", "kind", "MB", "mean KL", "median", "99.9%", "same top token", "perplexity"]
    parts = [METHOD.format(size=bench.f16.stat().st_size / MEGABYTE, exact=bench.exact_perplexity(),
                           cut=floor.divergence.perplexity_original, floor=abs(floor.divergence.kl_mean))]
    if ours:
        parts += ["## At equal bytes", points_table(bench, ours, rivals),
                  COLUMNS.format(threads=bench.tools.threads)]
    parts += ["## All files", table(head, [quality_row(judged) for judged in files])]
    return [*parts, f"llama.cpp: {bench.tools.version()}."]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tools", type=Path, required=True, help="folder of llama-quantize and the others")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds wikitext2/")
    parser.add_argument("--work", type=Path, required=True, help="files and cached results")
    parser.add_argument("--model", type=Path, help="folder that permuted_gemma.py made, else it is built")
    parser.add_argument("--points", default=",".join(map(str, POINTS)), help="budgets in MB")
    parser.add_argument("--effort", default="balanced", choices=("quick", "balanced", "max"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rivals-only", action="store_true", help="judge the rivals and stop")
    return parser.parse_args()


def main() -> None:
    """Run what is not cached, and write the page."""
    options = arguments()
    bench = Bench(options)
    bench.prepare()
    floor = bench.judge("the original, F16", "original", bench.f16)
    rivals = [bench.rival(rival) for rival in RIVALS]
    points = [int(word) for word in options.points.split(",")]
    if options.rivals_only:
        for point in points:
            best = best_rival(point, rivals)
            print(f"best at {point} MB: {best.name}, {best.divergence.kl_mean:.4f}")
        return
    ours = [bench.ours(point, options.effort) for point in points]
    write_page(PAGE, "Quality at equal bytes in llama.cpp",
               "python benchmarks/gguf_quality.py --tools LLAMA_CPP/build/bin --data DATA --work WORK "
               f"--effort {options.effort}", page(bench, rivals, floor, ours))


if __name__ == "__main__":
    main()
