"""Distillation, and distillation with pruning and quantization, on SST-2: size, speed and accuracy together.

    python benchmarks/distillation.py --data DATA --work WORK [--seeds 3] [--epochs 2]

DATA holds ``sst2/train.tsv``, ``dev.tsv``, ``test.tsv``. The teacher is a fine-tuned MiniLM-L6; the students
are what two recipes of this repository make of it, as ``rarefy run`` does, for ONNX Runtime:

    student    recipes/distil_quantize.yaml without its last step: floats
    8 bits     recipes/distil_quantize.yaml
    pipeline   recipes/prune_distil_quantize.yaml

Bytes are those of the whole export, tokenizer included, against the float32 export of the teacher; speed is
against the same in the same runtime, both in turns; accuracy is the runtime's, on the test sentences, which
no step saw. Finished rows lie in WORK/distillation.json and are not run again.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import sst2
from harness import Ledger, fingerprint, sha256, source_sha256, table, write_page
from rarefy.core.nouns import Recipe
from rarefy.run.job import Job, compress
from rarefy.run.recipe import read_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {"student": "distil_quantize", "8 bits": "distil_quantize", "pipeline": "prune_distil_quantize"}
PAGE = ROOT / "docs" / "benchmarks" / "distillation.md"
SOURCES = ("training/loop.py", "training/tune.py", "run/course.py")
GOALS = {"student": (1 / 0.6, 1.6, 0.99), "pipeline": (8.0, 4.0, 0.98)}  # times smaller, times faster, kept


def main() -> None:
    """Run what the ledger does not hold; write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    sst2.tables(parser)
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--only", nargs="*", choices=list(RECIPES), default=list(RECIPES))
    given = parser.parse_args()
    found = sst2.Tables(given.data, given.work, given.epochs)
    ledger = Ledger(given.work / "distillation.json")
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(given.seeds):
        for name in given.only:
            place = ROOT / "recipes" / f"{RECIPES[name]}.yaml"
            key = fingerprint(name, seed, given.effort, given.epochs, sha256(place),
                              source_sha256(*SOURCES))
            if ledger.get(key) is None:
                ledger.put(key, run(name, placed(read_recipe(place), found, seed, given.effort), found))
                print(name, seed, ledger.get(key), flush=True)
            results.setdefault(name, []).append(ledger.get(key))
    write_page(PAGE, "Distillation on SST-2", f"python benchmarks/distillation.py --epochs {given.epochs:g}",
               [said(results, given.epochs), rows(results), verdict(results)])


def placed(recipe: Recipe, found: sst2.Tables, seed: int, effort: str) -> Recipe:
    """A recipe of the repository on this teacher and these tables."""
    own = {"held": found.dev, "epochs": found.epochs}
    steps = tuple(replace(step, training={**step.training, **own}) if step.training else step
                  for step in recipe.steps)
    return replace(recipe, model=str(sst2.teacher(found)), steps=steps, data=(found.train,),
                   eval_data=(found.test,), seed=seed, effort=effort)


def run(name: str, recipe: Recipe, found: sst2.Tables) -> dict[str, Any]:
    """One job; what its receipt says."""
    if name == "student":
        recipe = replace(recipe, steps=recipe.steps[:-1])
    out = found.work / f"{name.replace(' ', '-')}-{recipe.seed}"
    shutil.rmtree(out, ignore_errors=True)
    receipt = compress(Job(recipe.model, out, target=recipe.target, effort=recipe.effort, data=recipe.data,
                           eval_data=recipe.eval_data, seed=recipe.seed, recipe=recipe)).receipt
    task, speed = receipt["measured"]["runtime"]["task"], receipt["speed"]
    weights = sum(row["shape"][0] * row["shape"][1] for row in receipt["plan"])
    return {"bytes": receipt["bytes"], "original_bytes": receipt["model"]["original_bytes"],
            "single": speed["ratio_single"], "batch": speed["ratio_batch"], "drift": speed["drift"],
            "accuracy": task["accuracy"], "accuracy_original": task["accuracy_original"], "weights": weights,
            "seconds": sum(curve["seconds"] for curve in receipt["training"])}


# ---- the page ------------------------------------------------------------------------------------------


def middle(results: list[dict[str, Any]], key: str) -> float:
    """The median of the seeds."""
    return statistics.median(each[key] for each in results)


def kept(results: list[dict[str, Any]]) -> float:
    """The share of the teacher's accuracy, the median of the seeds."""
    return statistics.median(each["accuracy"] / each["accuracy_original"] for each in results)


def said(results: Mapping[str, list[dict[str, Any]]], epochs: float) -> str:
    """What was done, in words."""
    seeds = min(len(each) for each in results.values())
    drift = max(row["drift"] for each in results.values() for row in each)
    many = "one seed" if seeds == 1 else f"{seeds} seeds (medians)"
    return (f"The teacher is MiniLM-L6 fine-tuned on SST-2; it and its students see the training sentences "
            f"{epochs:g} times; {many}. Half of the teacher's numbers are word "
            "embeddings; they are counted everywhere. Accuracy is on the 872 test sentences, as ONNX Runtime "
            "computes it from the file. The teacher's own time varied by up to "
            f"{drift:.0%} while it was measured.")


def rows(results: Mapping[str, list[dict[str, Any]]]) -> str:
    """The table."""
    first = next(iter(results.values()))
    lines = [("teacher, float32", f"{first[0]['original_bytes'] / 1e6:.1f} MB", "1", "1", "1",
              f"{first[0]['accuracy_original']:.1%}", "100%", "")]
    for name, each in results.items():
        times = middle(each, "original_bytes") / middle(each, "bytes")
        lines.append((f"{name} ({RECIPES[name]})", f"{middle(each, 'bytes') / 1e6:.1f} MB", f"{times:.1f}",
                      f"{middle(each, 'single'):.2f}", f"{middle(each, 'batch'):.2f}",
                      f"{middle(each, 'accuracy'):.1%}", f"{kept(each):.1%}",
                      f"{middle(each, 'seconds'):.0f}"))
    return table(("", "file", "times smaller", "times faster, one", "times faster, eight", "accuracy",
                  "of the teacher's", "seconds of training"), lines)


def verdict(results: Mapping[str, list[dict[str, Any]]]) -> str:
    """The goals, and whether they were met."""
    found = []
    for name, (smaller, faster, share) in GOALS.items():
        if name not in results:
            continue
        each = results[name]
        reached = (middle(each, "original_bytes") / middle(each, "bytes"), middle(each, "single"), kept(each))
        met = all(is_ >= goal for is_, goal in zip(reached, (smaller, faster, share), strict=True))
        found.append(f"- {name}: the goal is {smaller:.2g} times smaller, {faster:g} times faster (one "
                     f"sentence) and {share:.0%} of the accuracy; {'met' if met else 'missed'} with "
                     f"{reached[0]:.1f}, {reached[1]:.1f} and {reached[2]:.1%}")
    return "\n".join(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
