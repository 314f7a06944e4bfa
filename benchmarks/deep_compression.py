"""Two papers done again on MNIST: Deep Compression's pipeline, and HashedNets against small dense networks.

    python benchmarks/deep_compression.py --data DATA [--work WORK]

DATA holds ``mnist/``: ``t10k-images-idx3-ubyte.gz``, ``t10k-labels-idx1-ubyte.gz``, and, where they are, the
same of ``train``. Without these, 8,000 of the 10,000 test images are trained on and 2,000 judge, which the
page says. Files and results go to WORK; what is in its ledger is not run again.

    lenet-300-100, lenet-5   train, prune in rounds, share, retrain codebooks, write the file, read it
    hashed                   784-1000-10 with hashed weights against a dense network of as many numbers
"""

from __future__ import annotations

import argparse
import copy
import gzip
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness import Ledger, fingerprint, source_sha256, table, write_page
from rarefy import load
from rarefy.core.codebooks import Clustered, Hashed
from rarefy.core.edit import Technique, edit
from rarefy.core.nodes import Dense, Masked, Node
from rarefy.export.networks import export_network
from rarefy.formats.native import WEIGHTS
from rarefy.models.network import Network
from rarefy.techniques.distill.hard_labels import HardLabels
from rarefy.techniques.prune.magnitude import Magnitude
from rarefy.techniques.share.kmeans import KMeans
from rarefy.training.examples import Rows
from rarefy.training.loop import Settings
from rarefy.training.signals import Distillation
from rarefy.training.tune import Tuning, tune

ROUNDS = 3  # of pruning and retraining
EPOCHS = {"dense": 10, "round": 4, "codebooks": 3, "hashed": 6}
RATIOS = (2, 4, 8, 16, 32, 64)
FLOORS = ("core", "numerics", "techniques", "training", "models", "export", "formats")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "deep_compression.md"

Trees = Mapping[str, Node]


@dataclass(frozen=True)
class Subject:
    """A network of the paper: which share of each weight stays, and what the paper reports."""

    build: Callable[[], nn.Sequential]
    kept: dict[str, float]
    reported: tuple[str, str, str]  # error of the original, error and ratio of the compressed


@dataclass(frozen=True, eq=False)
class Digits:
    """Images [n, 1, 28, 28] in 0 .. 1 and labels, to train on and to judge."""

    train: Rows
    test: Rows
    split: bool

    def error(self, module: nn.Module) -> float:
        """Share of the test images that are read wrongly."""
        with torch.no_grad():
            wrong = module(self.test.tensors["0"]).argmax(1) != self.test.tensors["labels"]
            return float(wrong.float().mean())


def lenet_300_100() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(),
                         nn.Linear(100, 10))


def lenet_5() -> nn.Sequential:
    """As Caffe has it, which is what the paper compresses."""
    return nn.Sequential(nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2),
                         nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


SUBJECTS = {
    "lenet-300-100": Subject(lenet_300_100, {"1.weight": 0.08, "3.weight": 0.09, "5.weight": 0.26},
                             ("1.64%", "1.58%", "40x")),
    "lenet-5": Subject(lenet_5, {"0.weight": 0.66, "2.weight": 0.12, "5.weight": 0.08, "7.weight": 0.19},
                       ("0.80%", "0.74%", "39x"))}


def main() -> None:
    """Run what the ledger does not hold; write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        digits, found = read(arguments.data / "mnist"), {}
        ledger, source = Ledger(work / "deep_compression.json"), source_sha256(*FLOORS)
        for name in (*SUBJECTS, "hashed"):
            key = fingerprint(name, digits.train.digest(), ROUNDS, sorted(EPOCHS.items()), RATIOS, source)
            if ledger.get(key) is None:
                print(name, flush=True)
                ledger.put(key, hashed(digits) if name == "hashed" else deep(name, digits, work / name))
            found[name] = ledger.get(key)
    write_page(PAGE, "Deep Compression and HashedNets", "python benchmarks/deep_compression.py",
               [f"{data_said(digits)} One seed each.", *deep_said(found), hashed_said(found["hashed"])])


# ---- data and training ---------------------------------------------------------------------------------


def read(folder: Path) -> Digits:
    """MNIST's own halves, or its test half split."""
    def rows(name: str) -> Rows:
        images, labels = (
            np.frombuffer(gzip.decompress((folder / f"{name}-{kind}-ubyte.gz").read_bytes()), np.uint8)
            for kind in ("images-idx3", "labels-idx1"))
        pixels = torch.from_numpy(images[16:].astype(np.float32) / 255).view(-1, 1, 28, 28)
        return Rows({"0": pixels, "labels": torch.from_numpy(labels[8:].astype(np.int64))})

    if (folder / "train-images-idx3-ubyte.gz").exists():
        return Digits(rows("train"), rows("t10k"), split=False)
    return Digits(*rows("t10k").split(0.2, seed=0), split=True)


def trained(module: nn.Module, digits: Digits, epochs: int) -> nn.Module:
    """Plain torch: Adam, its rate falling to zero."""
    steps, batch = epochs * len(digits.train) // 64, 64
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = digits.train.batch(torch.randint(len(digits.train), (batch,)))
        loss = nn.functional.cross_entropy(module(rows["0"]), rows["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return module


def retrained(module: nn.Module, trees: Trees, moves: str, digits: Digits, settings: Settings
              ) -> tuple[nn.Module, dict[str, Node]]:
    """The module with its new biases, and the trees after training what ``moves`` names, and biases."""
    network = Network.from_module(module)
    tuned = tune(network, trees, Tuning(frozenset({moves, "biases"})),
                 Distillation(network, None, ((1.0, HardLabels()),)), digits.train, settings)
    return filled(module, {}, tuned.params), tuned.trees


def filled(module: nn.Module, trees: Trees, params: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A copy of the module with what the trees stand for."""
    weights = Network.from_module(module).tensors(trees.get) | dict(params or {})
    copied = copy.deepcopy(module)
    copied.load_state_dict(weights, strict=False)
    return copied


# ---- Deep Compression ----------------------------------------------------------------------------------


def deep(name: str, digits: Digits, folder: Path) -> dict[str, Any]:
    """The pipeline; error and bytes behind every stage, and how each weight ends."""
    subject = SUBJECTS[name]
    torch.manual_seed(0)
    module = trained(subject.build(), digits, EPOCHS["dense"])
    numbers = sum(value.numel() for value in module.parameters())
    trees: dict[str, Node] = {path: Dense(weight) for path, weight in weights_of(module).items()}
    stages = [("trained", digits.error(module), 4 * numbers)]

    def noted(stage: str) -> None:
        size = sum(tree.bits() for tree in trees.values()) / 8 + sum(
            2 * value.numel() for path, value in module.named_parameters() if path not in trees)
        stages.append((stage, digits.error(filled(module, trees)), round(size)))
        print(stages[-1], flush=True)

    for turn in range(1, ROUNDS + 1):
        trees = {path: edited(path, tree, Magnitude(1 - subject.kept[path] ** (turn / ROUNDS)))
                 for path, tree in trees.items()}
        if turn == ROUNDS:
            noted("pruned, last round not retrained")
        settings = Settings(epochs=EPOCHS["round"], batch=64, rate=1e-3, seed=turn)
        module, trees = retrained(module, trees, "weights", digits, settings)
    noted("pruned and retrained")
    shape = {path: value.ndim for path, value in module.named_parameters()}
    trees = {path: edited(path, tree, KMeans(256 if shape[path] == 4 else 32, counts="nothing"))
             for path, tree in trees.items()}
    noted("weights shared")
    module, trees = retrained(module, trees, "codebooks", digits,
                              Settings(epochs=EPOCHS["codebooks"], batch=64, rate=2e-4, seed=9))
    noted("codebooks retrained")
    return {"stages": stages, "file": written(module, trees, digits, folder, subject), "numbers": numbers,
            "layers": [layer(path, tree) for path, tree in trees.items()]}


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    network = Network.from_module(module)
    return {site.path: network.weight(site.path) for site in network.map.sites}


def edited(path: str, tree: Node, technique: Technique) -> Node:
    """What the technique makes of a weight as training left it."""
    return edit(path, tree, tree.dense(), technique, type(technique).__name__, None,
                torch.Generator().manual_seed(0))[0]


def written(module: nn.Module, trees: Trees, digits: Digits, folder: Path, subject: Subject
            ) -> dict[str, Any]:
    """The folder, its bytes, and the error of what is read back from it; biases as float16."""
    shutil.rmtree(folder, ignore_errors=True)
    biases = {path: value.detach().half() for path, value in module.named_parameters() if path not in trees}
    size = export_network(Network.from_module(module), trees, folder, params=biases)
    back = load(folder, into=subject.build())
    return {"bytes": size, "error": digits.error(back),
            "parts": {path.name: path.stat().st_size for path in sorted(folder.iterdir())}}


def layer(path: str, tree: Node) -> tuple[str, int, float, int, float]:
    """Path, weights, share that is kept, values in the codebook, bits of each kept weight, mask included."""
    assert isinstance(tree, Masked)
    assert isinstance(tree.inner, Clustered)
    kept = int(tree.keep.sum())
    return (path, tree.keep.numel(), kept / tree.keep.numel(), tree.inner.codebook.shape[1],
            tree.bits() / kept)


# ---- HashedNets ----------------------------------------------------------------------------------------


def hashed(digits: Digits) -> list[dict[str, Any]]:
    """For every ratio, hashed and dense networks of as many numbers: the same steps, rates and batches."""
    found = [{"ratio": 1, "hashed": None, "dense": small(1000, digits), "hidden": 1000,
              "numbers": 795 * 1000 + 10}]
    for ratio in RATIOS:
        torch.manual_seed(ratio)
        module = two_layers(1000)
        trees = {path: buckets(weight, ratio) for path, weight in weights_of(module).items()}
        numbers = sum(tree.buckets.numel() for tree in trees.values()) + 1010
        module, after = retrained(module, trees, "buckets", digits, hashed_settings())
        hidden = round((numbers - 10) / 795)
        found.append({"ratio": ratio, "hashed": digits.error(filled(module, after)), "numbers": numbers,
                      "dense": small(hidden, digits), "hidden": hidden})
        print(found[-1], flush=True)
    return found


def two_layers(hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def buckets(weight: Tensor, ratio: int) -> Hashed:
    """Numbers drawn as torch draws weights: means of drawn weights would be too small to start from."""
    bound = weight.shape[1] ** -0.5
    count = max(1, round(weight.numel() / ratio))
    return Hashed(torch.empty(count).uniform_(-bound, bound), 0, (weight.shape[0], weight.shape[1]))


def small(hidden: int, digits: Digits) -> float:
    """Error of a dense network with that many hidden units."""
    torch.manual_seed(hidden)
    module = two_layers(hidden)
    trees = {path: Dense(weight) for path, weight in weights_of(module).items()}
    module, after = retrained(module, trees, "weights", digits, hashed_settings())
    return digits.error(filled(module, after))


def hashed_settings() -> Settings:
    return Settings(epochs=EPOCHS["hashed"], batch=100, rate=2e-3, decay=0.0)


# ---- the page ------------------------------------------------------------------------------------------


def data_said(digits: Digits) -> str:
    count = len(digits.test)
    slack = 100 * (0.02 * 0.98 / count) ** 0.5
    parts = f"{len(digits.train):,} images to train on and {count:,} to judge"
    source = (f"MNIST's test set alone, split by a seed: {parts}. The papers train on 60,000 images, so "
              "their errors are lower from the start; what compares is what each stage does to them"
              if digits.split else f"MNIST, {parts}")
    return (f"Data: {source}. At an error of 2%, chance alone moves it by {slack:.2f} points "
            "(one standard error). No stage looks at the images that judge.")


def deep_said(found: Mapping[str, Any]) -> list[str]:
    """The file beside the paper's, stages, layers."""
    names = list(SUBJECTS)
    stages = table(("stage", *(f"{name}: {what}" for name in names for what in ("error", "bytes"))),
                   ((stage, *(text for name in names for text in (percent(found[name]["stages"][k][1]),
                                                                  f"{found[name]['stages'][k][2]:,}")))
                    for k, (stage, _, _) in enumerate(found[names[0]]["stages"])))
    files = table(("network", "float32, bytes", "file, bytes", "ratio", "error before", "error of the file",
                   "paper: ratio", "paper: before", "paper: after"),
                  (file_row(name, found[name]) for name in names))
    layers = table(("weight", "weights", "kept", "values", "bits per kept weight"),
                   ((f"{name} {path}", f"{count:,}", f"{kept:.0%}", f"{values}", f"{bits:.1f}")
                    for name in names for path, count, kept, values, bits in found[name]["layers"]))
    tensors = " and ".join(f"{found[name]['file']['parts'][WEIGHTS]:,} bytes of {name}'s" for name in names)
    return ["## Deep Compression",
            f"Magnitude pruning in {ROUNDS} rounds to the shares that Han et al. kept, {EPOCHS['round']} "
            "epochs of retraining after each; k-means with up to 256 values for convolutions and 32 for the "
            f"rest; codebooks retrained for {EPOCHS['codebooks']} epochs; masks and indices entropy-coded. "
            "The file is the whole native folder, headers and biases included, and its error that of the "
            "network read back from it. The original learns for "
            f"{EPOCHS['dense']} epochs only, so part of what retraining gains is that it learns for longer.",
            files, f"{tensors} are tensors; the rest is JSON that says what they are.",
            "Below, bytes are those of weights and masks as the format codes them and of biases in float16, "
            "without headers.", stages,
            "How every weight ends; bits count the mask and the codebook.", layers]


def file_row(name: str, result: Mapping[str, Any]) -> tuple[str, ...]:
    whole, file = 4 * result["numbers"], result["file"]
    before, after, ratio = SUBJECTS[name].reported
    return (name, f"{whole:,}", f"{file['bytes']:,}", f"{whole / file['bytes']:.1f}x",
            percent(result["stages"][0][1]), percent(file["error"]), ratio, before, after)


def hashed_said(rows: list[dict[str, Any]]) -> str:
    text = table(("numbers per weight", "numbers", "hashed: error", "dense: error", "dense: hidden units"),
                 ((f"1/{row['ratio']}" if row["ratio"] > 1 else "1", f"{row['numbers']:,}",
                   "" if row["hashed"] is None else percent(row["hashed"]), percent(row["dense"]),
                   f"{row['hidden']:,}") for row in rows))
    return ("## HashedNets\n\nA network 784-1000-10 whose weights share numbers by hashing, trained from "
            "scratch, and a dense one with fewer hidden units and as many numbers (biases included). Both: "
            f"{EPOCHS['hashed']} epochs, the same loop, rate and batches.\n\n{text}")


def percent(error: float) -> str:
    return f"{100 * error:.2f}%"


if __name__ == "__main__":
    main()
