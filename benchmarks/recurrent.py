"""A recurrent network made smaller: an LSTM that reads MNIST's digits row by row, by one way after another.

    python benchmarks/recurrent.py --data DATA [--work WORK] [--rows NAME] [--finished]

DATA holds ``mnist/`` as for ``deep_compression.py``. Three layers of 256 read 28 rows of 28 pixels. Every
way is judged as the folder that it writes: its bytes, the accuracy of what ``rarefy.load(fast=True)`` makes
of it, and its time beside the original's, in turns. What is in WORK's ledger is not run again;
``--finished`` writes the page of what is there.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn

from deep_compression import Digits, percent, read, trained
from harness import Ledger, Results, table, write_page
from rarefy.calibration import observe
from rarefy.calibration.examples import Examples
from rarefy.core.edit import Technique, edit
from rarefy.core.nodes import Dense, Node, Product
from rarefy.core.nouns import Evidence
from rarefy.core.tune import Trainer
from rarefy.export.networks import export_network
from rarefy.measure.latency import compare
from rarefy.models.network import TENSOR, Network
from rarefy.models.recurrent import Recurrent, unrolled
from rarefy.numerics.grids import integer_grid
from rarefy.run.narrow import filtered
from rarefy.run.sharing import follows, relinked, share_layers
from rarefy.runtimes.recurrent import WIDE, Int8Recurrent
from rarefy.runtimes.torch import STEPS, load, lower, row_codes
from rarefy.techniques.distill.soft_labels import SoftLabels
from rarefy.techniques.factorize.svd_llm import SVDLLM
from rarefy.techniques.prune.filters import Filters
from rarefy.techniques.prune.gradual import Gradual
from rarefy.techniques.prune.sparsegpt import SparseGPT
from rarefy.techniques.quantize.gptq import GPTQ
from rarefy.techniques.quantize.rtn import RTN
from rarefy.techniques.share.kmeans import KMeans
from rarefy.techniques.share.layers import Layers
from rarefy.training.loop import Settings
from rarefy.training.signals import Distillation
from rarefy.training.tune import Tuning, tune

WIDTH, LAYERS, EPOCHS, SEEN = 256, 3, 6, 1024
TAUGHT = Settings(epochs=2, batch=64, rate=1e-3)
BATCHES, FEW, WIDTHS = (1, 128), (1, 32), (64, 128, 256, 512, 1024)
TURNS = 5  # of the compressed network, each between two of the original
EIGHT, FOUR = RTN(integer_grid(8, 0)), integer_grid(4, 32)
PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "recurrent.md"

Trees = Mapping[str, Node]


class Reader(nn.Module):
    """Reads images [n, 1, 28, 28] row by row and says which digit it was."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(28, WIDTH, LAYERS, batch_first=True)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.rnn(x.squeeze(1))[0][:, -1])
        return answer


@dataclass(frozen=True)
class Smaller:
    """The weights of a way, biases where they moved, and the network where parts of it were taken out."""

    trees: Trees
    params: Mapping[str, Tensor]
    network: Network | None = None


@dataclass(frozen=True, eq=False)
class Original:
    """The trained network, the digits, and what arrives at its weights: images that it was trained on."""

    module: Reader
    network: Network
    digits: Digits
    seen: Mapping[str, Evidence]
    folder: Path

    @property
    def images(self) -> Examples:
        """What calibration looks at."""
        return Examples({TENSOR: self.digits.train.tensors["0"][:SEEN]})

    def edited(self, *techniques: Technique) -> Smaller:
        """Every recurrent weight under some techniques, one behind the other; the first, whose 28 columns
        divide into no groups, in 8 bits."""
        trees: dict[str, Node] = {}
        for path in self.seen:
            weight = self.network.weight(path)
            trees[path] = Dense(weight)
            for technique in (EIGHT,) if path == "rnn.layers.0.ih.weight" else techniques:
                trees[path] = self._one(path, trees[path], weight, technique)
        return Smaller(trees, {})

    def rounded(self, made: Smaller) -> Smaller:
        """What training made, in 8 bits; weights of several layers are rounded where they are stored."""
        found = {path: tree if follows(tree) or path not in self.seen else
                 self._one(path, tree, tree.dense(), EIGHT) for path, tree in made.trees.items()}
        trees = {path: relinked(tree, found.get) for path, tree in found.items()}
        return Smaller(trees, made.params, made.network)

    def taught(self, trees: Trees, technique: Trainer | None = None, *, epochs: float = TAUGHT.epochs,
               network: Network | None = None) -> Smaller:
        """Distilled from the original on the images that it learnt, without their labels."""
        student, settings = network or self.network, replace(TAUGHT, epochs=epochs)
        tuning = Tuning() if technique is None else Tuning(frozenset({"biases"}), technique)
        lesson = Distillation(student, self.network, ((1.0, SoftLabels()),))
        done = tune(student, trees, tuning, lesson, self.digits.train, settings)
        return Smaller(done.trees, done.params, network)

    def shared(self) -> Smaller:
        """One matrix for what has one shape."""
        return Smaller(share_layers(self.network, Layers(), self.images, dtype=torch.float32).trees, {})

    @cached_property
    def recovered(self) -> Smaller:
        """The same behind distillation."""
        return self.taught(self.shared().trees)

    @cached_property
    def narrow(self) -> Network:
        """Half of the states of every layer, those that cost least."""
        return filtered(self.network, Filters(0.5), self.images).network

    @cached_property
    def narrow_recovered(self) -> Smaller:
        """The same behind distillation."""
        return self.taught({}, network=self.narrow)

    def _one(self, path: str, tree: Node, weight: Tensor, technique: Technique) -> Node:
        seen = self.seen[path] if self.seen[path].gram.shape[0] == weight.shape[1] else None
        return edit(path, tree, weight, technique, type(technique).__name__, seen,
                    torch.Generator().manual_seed(0))[0]

    def judged(self, made: Smaller) -> dict[str, Any]:
        """The folder, read back and run."""
        place = self.folder / "folder"
        shutil.rmtree(place, ignore_errors=True)
        size = export_network(made.network or self.network, made.trees, place, params=made.params)
        fast = load(place, into=Reader())
        speed = {str(images): self._speed(fast, images) for images in BATCHES}
        hows = Counter(how for path, how in fast.lowered.items() if "rnn" in path)
        return {"bytes": size, "accuracy": 1 - self.digits.error(fast), "speed": speed,
                "runs": hows.most_common(1)[0][0]}

    @torch.no_grad()
    def _speed(self, fast: nn.Module, size: int) -> tuple[float, float]:
        """Milliseconds of a batch, and how many times faster than the original."""
        x = self.digits.test.tensors["0"][:size]

        def pace(module: nn.Module) -> Callable[[], int]:
            return lambda: len(module(x))

        found = compare(pace(self.module), pace(fast), TURNS, clock=process_time)
        return 1000 * size / found.b, found.ratio


WAYS: dict[str, Callable[[Original], Smaller]] = {
    "float32": lambda whole: Smaller({}, {}),
    "8 bits (rtn)": lambda whole: whole.edited(EIGHT),
    "4 bits (gptq)": lambda whole: whole.edited(GPTQ(FOUR)),
    "50% pruned (sparsegpt), 8 bits": lambda whole: whole.edited(SparseGPT(0.5), EIGHT),
    "90% pruned (sparsegpt), 8 bits": lambda whole: whole.edited(SparseGPT(0.9), EIGHT),
    f"90% pruned in {EPOCHS} epochs (gradual), 8 bits": lambda whole: whole.rounded(
        whole.taught({}, Gradual(0.9), epochs=EPOCHS)),
    "low rank, 40% of the numbers (svd_llm)": lambda whole: whole.edited(SVDLLM(ratio=0.4)),
    "low rank, 40% of the numbers, 8 bits": lambda whole: whole.edited(SVDLLM(ratio=0.4), EIGHT),
    "16 values, entropy-coded (kmeans)": lambda whole: whole.edited(KMeans(16)),
    "shared (layers)": lambda whole: whole.shared(),
    "shared, distilled": lambda whole: whole.recovered,
    "shared, distilled, 8 bits": lambda whole: whole.rounded(whole.recovered),
    "half of the states (filters)": lambda whole: Smaller({}, {}, whole.narrow),
    "half of the states, distilled": lambda whole: whole.narrow_recovered,
    "half of the states, distilled, 8 bits": lambda whole: whole.rounded(whole.narrow_recovered),
}


def main() -> None:
    """Run what the ledger does not hold; write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--rows", default="")
    parser.add_argument("--finished", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)) / "recurrent"
        results = Results(Ledger(work / "ledger.json"), arguments.finished, arguments.rows, [])
        digits = read(arguments.data / "mnist")
        what = ("recurrent", digits.train.digest(), WIDTH, LAYERS, EPOCHS, SEEN, TAUGHT, TURNS)
        found = results.of(WAYS, what, lambda way: judged(way, original(arguments.data, work)))
        sizes = {f"{kind}, {width}": (kind, width) for kind in ("LSTM", "GRU") for width in WIDTHS}
        widths = results.of(sizes, ("widths", FEW, TURNS), timed)
        if found:
            write_page(PAGE, "A recurrent network", "python benchmarks/recurrent.py",
                       [*said(digits, found), *widths_said(widths)])


def judged(way: Callable[[Original], Smaller], whole: Original) -> dict[str, Any]:
    """One way to make it smaller."""
    return whole.judged(way(whole))


@cache
def original(data: Path, work: Path) -> Original:
    """The network, trained once in plain torch."""
    digits, file, module = read(data / "mnist"), work / "reader.pt", Reader()
    if file.exists():
        module.load_state_dict(torch.load(file, weights_only=True))
    else:
        torch.manual_seed(0)
        trained(module := Reader(), digits, EPOCHS)
        work.mkdir(parents=True, exist_ok=True)
        torch.save(module.state_dict(), file)
    network = Network.from_module(module.eval().requires_grad_(False))
    images = Examples({TENSOR: digits.train.tensors["0"][:SEEN]})
    recurrent = [site.path for site in network.map.sites if site.role != "head"]
    seen = observe.inputs(network, images, recurrent, {})
    return Original(copy.deepcopy(module), network, digits, seen, work)


def said(digits: Digits, found: Mapping[str, Any]) -> list[str]:
    """What was measured, and how."""
    count, whole = len(digits.test), found.get("float32", {}).get("bytes")
    rows = [(name, f"{each['bytes']:,}", f"{whole / each['bytes']:.1f}x" if whole else "",
             percent(each["accuracy"]), *(f"{each['speed'][str(size)][k]:.2f}" + "x" * k
                                          for size in BATCHES for k in range(2)), each["runs"])
            for name, each in found.items()]
    head = ("way", "bytes of the folder", "smaller", "accuracy",
            *(text.format(size) for size in BATCHES for text in ("ms, batch {}", "speed, batch {}")),
            "how most recurrent weights run")
    source = "MNIST's test images, split by a seed" if digits.split else "MNIST"
    return [
        f"An LSTM of {LAYERS} layers of {WIDTH} reads an image row by row; {source}: {len(digits.train):,} "
        f"to train on, {count:,} to judge (one is {100 / count:.2f} points). It learnt for {EPOCHS} epochs. "
        f"What needs samples saw {SEEN:,} of those that it was trained on; what is distilled learns from its "
        f"answers to them all for {TAUGHT.epochs:g} more epochs. One seed each.",
        "The folder is the whole native folder, headers, biases and head (float32) included. Speed is times "
        "faster than torch's own `nn.LSTM` in float32, one thread, in turns, by the processor's own time.",
        table(head, rows),
        "Weights in 8 bits run in torch's integer kernel for recurrent layers. All else becomes torch's own "
        "layer with expanded weights, smaller on disk and not faster, unless faster products save more than "
        "going step by step costs (below). Shared are the hidden weights of all layers and the input weights "
        "of all but the first. With half of its states a layer is a smaller layer of the same kind."]


# ---- widths --------------------------------------------------------------------------------------------


def timed(case: tuple[str, int]) -> dict[str, list[float]]:
    """Milliseconds of torch's own two layers, and times faster in integers, and step by step: as they are, in
    8 bits, and of a quarter of the rank; by batch."""
    kind, width = case
    torch.manual_seed(0)
    own = getattr(nn, kind)(width, width, 2, batch_first=True).eval().requires_grad_(False)
    part, found = unrolled(copy.deepcopy(own)), {}
    assert isinstance(part, Recurrent)
    weights = {name: each.weight for name, each in part.named_modules() if isinstance(each, nn.Linear)}
    eight = {name: edit(name, Dense(weight), weight, EIGHT, "rtn", None, torch.Generator())[0]
             for name, weight in weights.items()}
    codes = {name: each for name, tree in eight.items() if (each := row_codes(tree)) is not None}
    low = {name: Product(Dense(weight[:, :width // 4].contiguous()), Dense(weight[:width // 4].contiguous()))
           for name, weight in weights.items()}
    others = [Int8Recurrent(part, codes), part, stepping(part, eight), stepping(part, low)]
    for size in FEW:
        x = torch.randn(size, 28, width)
        paces = [compare(calling(own, x), calling(other, x), TURNS, clock=process_time) for other in others]
        found[str(size)] = [1000 * size / paces[0].a, *(each.ratio for each in paces)]
    return found


def calling(module: nn.Module, x: Tensor) -> Callable[[], int]:
    """A sequence of every sample, once."""
    def call() -> int:
        with torch.no_grad():
            return len(module(x)[0])
    return call


def stepping(part: nn.Module, trees: Trees) -> nn.Module:
    """A copy of the layer with its products in their fastest ways, which steps in any case."""
    part = copy.deepcopy(part)
    for name, tree in trees.items():
        part.set_submodule(name, lower(tree, part.get_submodule(name), tokens=128)[0])
    return part


def widths_said(found: Mapping[str, Any]) -> list[str]:
    """When integers are faster, and when steps are."""
    head = ("two layers", "batch", "torch's own, ms", "integers", "steps, float32", "steps, 8 bits",
            "steps, a quarter of the rank")
    rows = [(name, size, f"{times[0]:.2f}", *(f"{each:.2f}x" for each in times[1:]))
            for name, sizes in found.items() for size, times in sizes.items()]
    said = ("Two layers that read 28 steps: how many times faster than torch's own in float32 they are in "
            f"its integer kernel, which `fast=True` takes from a width of {WIDE['LSTM']} (LSTM) and "
            f"{WIDE['GRU']} (GRU) on, and step by step, which it takes where products save "
            f"{STEPS / 1e6:.2g} million multiplications a step and layer.")
    return ["## When which is faster", said, table(head, rows)]


if __name__ == "__main__":
    main()
