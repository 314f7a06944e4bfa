"""Pruning while a network learns its task: movement, gradual magnitude and one-shot magnitude, on SST-2.

    python benchmarks/pruning_in_training.py --data DATA --work WORK [--seeds 3] [--steps 2500]

DATA holds ``sst2/train.tsv``, ``dev.tsv``, ``test.tsv``. Every row starts from the same pre-trained encoder
under the same new head, takes the same steps on the same batches towards the same loss (the labels and the
answers of one fine-tuned teacher), and ends with the same share of the weights of its blocks; embeddings
stand still. Only how the weights that go are chosen differs. Finished rows lie in
WORK/pruning_in_training.json and are not run again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import sst2
from harness import Ledger, fingerprint, source_sha256, table, write_page
from rarefy.core.nodes import Dense, Masked, Node
from rarefy.core.pruning import Rule
from rarefy.core.tune import Trainer
from rarefy.models.network import Network
from rarefy.models.opening import open_any
from rarefy.techniques.distill.hard_labels import HardLabels
from rarefy.techniques.distill.soft_labels import SoftLabels
from rarefy.techniques.prune.gradual import Gradual
from rarefy.techniques.prune.movement import Movement
from rarefy.training.heads import with_head
from rarefy.training.loop import Settings
from rarefy.training.signals import Distillation
from rarefy.training.tune import Tuning, tune

REMAINING = (0.15, 0.03)
METHODS = ("one-shot", "gradual", "movement")
EVERY = 10  # steps between two masks
PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "pruning_in_training.md"
SOURCES = ("training/loop.py", "core/growing.py", "techniques/prune/movement.py",
           "techniques/prune/gradual.py")
JUDGES = ("test", "dev")


def main() -> None:
    """Run what the ledger does not hold; write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    sst2.tables(parser)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--finished", action="store_true", help="leave out rows that were not run before")
    given = parser.parse_args()
    found = sst2.Tables(given.data, given.work, given.epochs)
    ledger = Ledger(given.work / "pruning_in_training.json")
    results: dict[tuple[str, float], list[dict[str, float]]] = {}
    for seed in range(given.seeds):
        for remaining in REMAINING:
            for method in METHODS:
                key = fingerprint(method, remaining, seed, given.steps, given.epochs, EVERY,
                                  source_sha256(*SOURCES))
                if ledger.get(key) is None and given.finished:
                    continue
                if ledger.get(key) is None:
                    ledger.put(key, run(method, remaining, seed, given.steps, found))
                    print(method, remaining, seed, ledger.get(key), flush=True)
                results.setdefault((method, remaining), []).append(ledger.get(key))
    network, _ = sst2.taught(found)
    whole = {name: sst2.accuracy(network, sst2.rows(network, getattr(found, name))) for name in JUDGES}
    write_page(PAGE, "Pruning during training",
               f"python benchmarks/pruning_in_training.py --epochs {given.epochs:g} --seeds {given.seeds} "
               f"--steps {given.steps}{' --finished' if given.finished else ''}",
               [said(given.seeds, given.steps), rows(results, whole), verdict(results)])


def run(method: str, remaining: float, seed: int, steps: int, found: sst2.Tables) -> dict[str, float]:
    """Train one network; accuracy on both tables, and the share of the weights that is left."""
    _, lesson = sst2.taught(found)
    network, trees, tuning = start(method, remaining, seed)
    settings = Settings(steps=steps, batch=32, rate=1e-4, schedule="linear", seed=seed)
    objective = Distillation(network, None, ((1.0, HardLabels()), (1.0, SoftLabels())))
    tuned = tune(network, trees, tuning, objective, lesson, settings)
    masks = [tree.keep for tree in tuned.trees.values() if isinstance(tree, Masked)]
    left = sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    tensors = network.tensors(tuned.trees.get) | tuned.params
    return {"left": left, "seconds": tuned.curve.seconds,
            **{name: sst2.accuracy(network, sst2.rows(network, getattr(found, name)), tensors)
               for name in JUDGES}}


def start(method: str, remaining: float, seed: int) -> tuple[Network, dict[str, Node], Tuning]:
    """The encoder under a new head, the trees that it begins with, and what moves."""
    plain = open_any(sst2.MODEL)
    assert isinstance(plain, Network)
    network, fresh = with_head(plain, ("negative", "positive"), seed)
    paths = tuple(site.path for site in network.map.sites if site.block is not None)
    if method == "one-shot":
        return network, pruned(network, paths, remaining), Tuning(
            frozenset({"weights", "norms", "biases"}), where=paths, whole=fresh)
    # a mask that is made anew at every step costs as long as the step
    technique: Trainer = {"gradual": Gradual(1 - remaining, begin=0.1, end=0.7, every=EVERY),
                          "movement": Movement(1 - remaining, begin=0.1, end=0.7, every=EVERY)}[method]
    return network, {}, Tuning(frozenset({"norms", "biases"}), technique, where=paths, whole=fresh)


def pruned(network: Network, paths: tuple[str, ...], remaining: float) -> dict[str, Node]:
    """Every weight of the blocks without its smallest values, before any training."""
    rule = Rule.of("unstructured", 1 - remaining, "layer")
    weights = {path: network.weight(path) for path in paths}
    return {path: Masked(rule.keep(weight.square()), Dense(weight)) for path, weight in weights.items()}


# ---- the page ------------------------------------------------------------------------------------------


def said(seeds: int, steps: int) -> str:
    """What was done, in words."""
    return (f"MiniLM-L6 under a new head on SST-2, {steps:,} steps of 32 sentences, medians of {seeds} "
            f"{'seed' if seeds == 1 else 'seeds'}. The share is of the weights in the blocks; embeddings "
            "stand still and are not counted. Accuracy of the last state: on the 872 test sentences, and on "
            "the development sentences, which chose nothing here.")


def middle(results: list[dict[str, float]], key: str) -> float:
    """The median of the seeds."""
    return statistics.median(each[key] for each in results)


def rows(results: Mapping[tuple[str, float], list[dict[str, float]]], whole: Mapping[str, float]) -> str:
    """The table."""
    lines = [("fine-tuned teacher, not pruned", "100%", f"{whole['test']:.1%}", f"{whole['dev']:.1%}")]
    lines += [(method, *(f"{middle(each, key):.1%}" for key in ("left", *JUDGES)))
              for (method, _), each in results.items()]
    return table(("how weights are chosen", "weights left", "test", "development"), lines)


def verdict(results: Mapping[tuple[str, float], list[dict[str, Any]]]) -> str:
    """What the papers claim, and whether it came out."""
    found = []
    for remaining in dict.fromkeys(share for _, share in results):
        for better, worse in (("movement", "gradual"), ("gradual", "one-shot")):
            if not {(better, remaining), (worse, remaining)} <= results.keys():
                continue
            gains = [middle(results[better, remaining], name) - middle(results[worse, remaining], name)
                     for name in JUDGES]
            word = "beats" if min(gains) > 0 else "does not beat" if max(gains) <= 0 else "ties with"
            found.append(f"- {remaining:.0%} left: {better} {word} {worse} ({100 * gains[0]:+.1f} points on "
                         f"test, {100 * gains[1]:+.1f} on development)")
    return "\n".join(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
