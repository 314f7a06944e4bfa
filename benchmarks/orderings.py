"""Do the papers' orderings come out: SparseGPT before Wanda before magnitude, whitened SVD before weighted
before plain?

    python benchmarks/orderings.py --data DATA --work WORK --gemma HF_FOLDER

Every matrix of three blocks of the language model (the first, the middle, the last) is edited by one
technique, nothing is trained afterwards, and all techniques of a comparison keep as many weights or numbers.
Techniques that look at inputs see the same ones, those of the original (``DATA/wikitext2/valid.txt``),
gathered once; a job gathers them anew behind every block it has edited. All are judged on the same windows of
``test.raw.txt``, with half of a window as context. Results are kept in WORK/orderings.json.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from harness import Ledger, fingerprint, folder_sha256, table, write_page
from rarefy.core.nodes import Node
from rarefy.core.nouns import Receipt, Step
from rarefy.measure.divergence import Reference
from rarefy.models.model import Model
from rarefy.models.opening import open_any
from rarefy.models.runner import Runner
from rarefy.run.data import Data
from rarefy.run.effort import effort_named
from rarefy.run.language import Language
from rarefy.run.planning import build
from rarefy.run.progress import Silent
from rarefy.run.sweep import Work, rewrite
from techniques import chosen, recorded, source_of, step

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "orderings.md"
COMMAND = "python benchmarks/orderings.py --data DATA --work WORK --gemma HF_FOLDER"
EFFORT = replace(effort_named("quick"), length=256, survey=2, calibration=24, evaluation=4)
CONTEXT = 128  # positions of a window that are not judged
def pruned(**settings: Any) -> tuple[Step, ...]:
    return tuple(step(name, **settings) for name in ("magnitude", "wanda", "sparsegpt"))


def low_rank(ratio: float) -> tuple[Step, ...]:
    return tuple(step(name, ratio=ratio) for name in ("svd", "fwsvd", "svd_llm"))


# each from the one that is said to be worst to the one that is said to be best
COMPARISONS: dict[str, tuple[Step, ...]] = {
    "Half of the weights, wherever they are": pruned(sparsity=0.5),
    "2 of 4 neighbours": pruned(pattern="2:4"),
    "Low rank, 20% fewer numbers": low_rank(0.8),
}


class Subject:
    """The model with its text; the original's answers and the survey are looked at once, if at all."""

    def __init__(self, folder: Path, texts: Path) -> None:
        opened = open_any(folder)
        if not isinstance(opened, Model):
            raise SystemExit(f"{folder}: is no language model")
        self.model, self.language = opened, Language(opened)
        seen, judged = str(texts / "valid.txt"), str(texts / "test.raw.txt")
        self.data: Data = self.language.gather((seen,), (judged,), EFFORT, 0, Silent())
        self.reference = Reference(self.model, self.data.evaluation, skip=CONTEXT)
        self.sites = tuple(chosen(self.language))
        foreseen = {found.site.path: found.evidence for found in self.language.survey(
            self.data, EFFORT, torch.Generator().manual_seed(0), lambda done, total: None)}
        self.seen = recorded(self.language, self.sites, self.data, foreseen)

    def measure(self, asked: Step | None) -> dict[str, Any]:
        """The distance to the original of the model after one step at every matrix of its blocks."""
        done: dict[str, tuple[Node, tuple[Receipt, ...]]] = {}
        if asked is not None:
            work, seen = Work(((asked.technique, build(asked)),)), self.seen
            done = {site.path: rewrite(self.model, site, work, seen[site.path], 0) for site in self.sites}
        trees = {path: tree for path, (tree, _) in done.items()}
        found = asdict(self.reference.compare(Runner(self.model, trees.get)))
        weights = sum(site.shape[0] * site.shape[1] for site in self.sites)
        errors = [receipts[-1].error for _, receipts in done.values()]
        return {**found, "bpw": sum(tree.bits() for tree in trees.values()) / weights,
                "error": sum(errors) / max(len(errors), 1),
                "notes": sorted({receipts[-1].note for _, receipts in done.values()} - {""})}


def section(title: str, names: list[str], found: list[dict[str, Any]], original: dict[str, Any]) -> list[str]:
    """One comparison: a table, and whether every technique is nearer to the original than the one before."""
    rows = [["the original", "", "0", "100%", f"{original['perplexity_original']:.2f}"]]
    rows += [[name, f"{each['bpw']:.2f}", f"{each['kl_mean']:.3f} ± {each['kl_stderr']:.3f}",
              f"{each['top1']:.1%}", f"{each['perplexity']:.2f}"]
             for name, each in zip(names, found, strict=True)]
    said = []
    for (first, one), (second, two) in pairwise(zip(names, found, strict=True)):
        holds = two["kl_mean"] < one["kl_mean"] and two["perplexity"] < one["perplexity"]
        said.append(f"{second} is better than {first}: {'yes' if holds else '**no**'}.")
    head = ["", "bits per weight", "KL (nats)", "same token", "perplexity"]
    return [f"## {title}", table(head, rows), " ".join(said)]


def main() -> None:
    torch.set_num_threads(1)
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--gemma", type=Path, required=True, help="folder of a language model")
    options = parser.parse_args()
    ledger, subject = Ledger(options.work / "orderings.json"), None
    protocol = (folder_sha256(options.gemma, "*.safetensors"), EFFORT, CONTEXT)
    wanted = [None, *(asked for steps in COMPARISONS.values() for asked in steps)]
    found: list[dict[str, Any]] = []
    for asked in wanted:
        key = fingerprint(*protocol, asked, source_of(() if asked is None else (asked,)))
        if ledger.get(key) is None:
            subject = subject or Subject(options.gemma, options.data / "wikitext2")
            ledger.put(key, subject.measure(asked))
            print(asked and asked.technique, ledger.get(key), flush=True)
        found.append(ledger.get(key) or {})
    original, rest = found[0], iter(found[1:])
    about = (f"{__doc__.split(chr(10) * 2, 2)[2].strip()}\n\nCalibrated on {EFFORT.calibration} windows of "
             f"{EFFORT.length} tokens, judged on {original['tokens']} positions of {original['windows']} "
             "others. Factors and weights are kept in float32 here, as the techniques leave them, so bits "
             "per weight compare rows with each other and not with the file, whose weights have 16.")
    parts = [about]
    for title, steps in COMPARISONS.items():
        parts += section(title, [each.technique for each in steps], [next(rest) for _ in steps], original)
    write_page(PAGE, "Orderings of the papers", COMMAND, parts)


if __name__ == "__main__":
    main()
