"""What the recipes of this repository make of a model: bytes, answers, speed, one row each.

    python benchmarks/recipes.py --data DATA --work WORK [--model MODEL] [--finished] [RECIPE.yaml ...]

Every recipe of ``recipes/`` that trains nothing, or those that are named, is run as it stands but for its
data: ``DATA/sst2/train.tsv`` to calibrate (and train) on, ``test.tsv`` to be judged by (columns sentence,
label), and ``--model`` where it is given. Two plain ones stand beside them: all of the blocks in 8 bits, and
in 4. Results are kept in WORK/recipes.json under a hash of the recipe and of the package's source.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

import rarefy
from harness import MEGABYTE, Ledger, fingerprint, source_sha256, table, write_page
from rarefy.core.nouns import Recipe, Step
from rarefy.measure import latency
from rarefy.models.opening import open_any
from rarefy.report.verdict import distance
from rarefy.run.effort import effort_named
from rarefy.run.job import Job, compress
from rarefy.run.progress import Silent
from rarefy.run.recipe import read_recipe, write_recipe
from rarefy.run.resolve import subject_of

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "recipes.md"
COMMAND = "python benchmarks/recipes.py --data DATA --work WORK"
EFFORT = "quick"
STEADY = 0.2  # as in techniques.py
FLOORS = ("techniques", "core", "numerics", "runtimes", "run", "training", "formats", "export")


def plain(blocks: Step) -> Recipe:
    """One step at the blocks of MiniLM, its embedding in 8 bits."""
    return Recipe("all-minilm-l6-v2", (blocks, Step("rtn", ("role:embed",), {}, "int8")), target="torch")


PLAIN = {"8 bits, to compare with": plain(Step("rtn", ("encoder.layer.*",), {}, "int8")),
         "4 bits, to compare with": plain(Step("gptq", ("encoder.layer.*",), {}, "int4-g32"))}


def given(paths: list[Path], model: str) -> dict[str, Recipe]:
    """The recipes by name, after the plain ones; of the folder, those that train are left out."""
    found = dict(PLAIN)
    for path in paths or sorted((ROOT / "recipes").glob("*.yaml")):
        steps = yaml.safe_load(path.read_text()).get("steps") or ()
        if paths or (steps and not any("training" in step for step in steps)):
            found[path.stem] = read_recipe(path)
    return {name: replace(recipe, model=model or recipe.model) for name, recipe in found.items()}


def run(recipe: Recipe, sst2: Path, out: Path) -> dict[str, Any]:
    """One recipe from start to end, as plain data."""
    seen, judged = (str(sst2 / "train.tsv"),), (str(sst2 / "test.tsv"),)
    shown = replace(recipe, effort=EFFORT, data=seen, eval_data=judged)
    job = Job(shown.model, out, target=shown.target, effort=EFFORT, data=seen, eval_data=judged,
              seed=shown.seed, overwrite=True, recipe=shown)
    receipt = compress(job, Silent()).receipt
    summary, task = receipt["measured"]["float"], receipt["measured"]["float"].get("task") or {}
    found = {"bytes": receipt["bytes"], "original": receipt["model"]["original_bytes"],
             "moved": distance(summary), "task": task, "target": receipt["target"],
             "in_runtime": distance(receipt["measured"]["runtime"]), "samples": summary["samples"],
             "seconds": sum(receipt["seconds"].values()),
             "left": sum(row["note"].startswith("left as it is") for row in receipt["axes"])}
    speed = timed(recipe, judged, out) if receipt["target"] == "torch" else told(receipt)
    return found | {"speed": speed}


def timed(recipe: Recipe, judged: tuple[str, ...], out: Path) -> dict[str, dict[str, float]]:
    """The original and the folder as it runs, in turns, in seconds of the processor."""
    subject = subject_of(open_any(recipe.model))
    data = subject.judged(judged, effort_named(EFFORT), 0)
    original, compressed, found = subject.live(), rarefy.load(out, fast=True), {}
    for key, work in subject.paces(data).items():
        paces = latency.compare(partial(work, original), partial(work, compressed), 9,
                                clock=time.process_time)
        found[key] = {"ratio": paces.ratio, "spread": paces.spread}
    return found


def told(receipt: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What the job measured in its runtime, which runs in processes of its own."""
    speed = receipt["speed"]
    return {key.removeprefix("ratio_"): {"ratio": value, "spread": speed.get("drift", 0.0)}
            for key, value in speed.items() if key.startswith("ratio_")}


def row(name: str, found: dict[str, Any]) -> list[str]:
    task = found["task"]
    kept = f"{task['accuracy']:.1%} ± {task['accuracy_stderr']:.1%}" if task else ""
    speed = ", ".join(f"{key} {each['ratio']:.2f}x" if each["spread"] <= STEADY else f"{key} unsteady"
                      for key, each in found["speed"].items())
    return [name, found["target"], f"{found['bytes'] / MEGABYTE:.2f}",
            f"{found['original'] / found['bytes']:.1f}x", f"{found['moved']:.4f}",
            f"{found['in_runtime']:.4f}", kept, speed, f"{found['seconds']:.0f}"]


def main() -> None:
    torch.set_num_threads(1)
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("recipes", nargs="*", type=Path, metavar="RECIPE.yaml")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--finished", action="store_true", help="run nothing: write what there is")
    parser.add_argument("--model", default="", help="in the place of the recipes' own")
    options = parser.parse_args()
    missing = [path for path in options.recipes if not path.is_file()]
    if missing:
        sys.exit(f"{missing[0]}: no such file")
    ledger, source = Ledger(options.work / "recipes.json"), source_sha256(*FLOORS)
    rows, absent, original = [], list[str](), 0.0
    for name, recipe in given(options.recipes, options.model).items():
        key = fingerprint(source, EFFORT, write_recipe(recipe))
        if ledger.get(key) is None and options.finished:
            absent.append(name)
            continue
        if ledger.get(key) is None:
            ledger.put(key, run(recipe, options.data / "sst2", options.work / "recipe"))
        found = ledger.get(key) or {}
        rows.append(row(name, found))
        original = max(original, found["task"].get("accuracy_original", 0.0))
        print(rows[-1], flush=True)
    head = ["recipe", "target", "MB", "smaller", "1 - cosine or KL", "in the runtime", "accuracy", "speed",
            "s"]
    about = __doc__.split("\n\n", 2)[2].strip() + "\n\n" + (
        "Bytes are those of the whole file or folder, tokenizer included. Accuracy is that of the network's "
        f"classes or, where it has none, of a linear probe on its vectors; the original's is {original:.1%}; "
        "the error is of the difference. Speed is the original's time over the result's in the target's "
        "runtime, or `unsteady` where single turns lay too far apart. The last column is what the whole job "
        "took, on a machine that others used.")
    if absent:
        about += f" Not measured when this page was written: {', '.join(absent)}."
    if options.recipes:
        print(table(head, rows))
    else:
        write_page(PAGE, "Recipes, measured", COMMAND, [about, table(head, rows)])


if __name__ == "__main__":
    main()
