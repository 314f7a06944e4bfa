"""The stages of ``structure.py`` about networks that write no text: a CNN, encoders of sentences."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deep_compression import Digits, read
from harness import Results, table
from rarefy.calibration.examples import Examples, read_examples
from rarefy.core.nodes import Node
from rarefy.export.onnx import export_onnx
from rarefy.measure.latency import compare
from rarefy.measure.work import multiplications
from rarefy.models.network import Network
from rarefy.models.opening import open_any
from rarefy.run.narrow import filtered
from rarefy.run.sharing import share_layers
from rarefy.run.training import Training, train
from rarefy.runtimes import bench
from rarefy.techniques.distill.hard_labels import HardLabels
from rarefy.techniques.distill.soft_labels import SoftLabels
from rarefy.techniques.prune.filters import Filters
from rarefy.techniques.share.layers import Layers
from rarefy.training.architectures import bottleneck, separable
from rarefy.training.examples import Rows
from rarefy.training.loop import Settings
from rarefy.training.signals import Distillation
from rarefy.training.students import every_second, shallower
from rarefy.training.teacher import answered
from rarefy.training.tune import Tuning, tune

# ---- a residual CNN ------------------------------------------------------------------------------------

CHANNELS = 0.375                                             # share that goes
TRAINED = Settings(epochs=6, batch=64, rate=2e-3, decay=1e-4)
TAUGHT = replace(TRAINED, epochs=3, rate=1e-3)
BATCHES = (1, 32)


class ResNet(nn.Module):
    """A stem of stride 2 and three residual blocks of 32, 64 and 128 channels, for images of 28 x 28."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]),
                                  nn.ReLU())
        before = (widths[0], *widths)
        self.blocks = nn.Sequential(*(Block(inner, outer) for inner, outer in
                                      zip(before, widths, strict=False)))
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Block(nn.Module):
    """Two convolutions beside a shortcut, which is a convolution where the width changes."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        stride = 1 if inner == outer else 2
        self.one = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.two = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm_one, self.norm_two = nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)
        self.past = nn.Identity() if stride == 1 else nn.Sequential(
            nn.Conv2d(inner, outer, 1, 2, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norm_one(self.one(x)).relu()
        return (self.norm_two(self.two(inside)) + self.past(x)).relu()


@dataclass(frozen=True, eq=False)
class Trained:
    """The CNN, and the digits that it learnt and is judged on."""

    network: Network
    digits: Digits
    folder: Path

    def case(self, prune: Callable[[Network, Digits], Network]) -> dict[str, Any]:
        """One way to make it smaller."""
        return _taught(self.network, prune(self.network, self.digits), self.digits, self.folder)

    def table(self, what: str, found: Mapping[str, dict[str, Any]]) -> str:
        """Every way beside the whole."""
        work = _work(self.network)
        whole = ("whole", f"{work / 1e6:.2f}", "1.00x", "",
                 f"{1 - self.digits.error(self.network.module):.2%}", *[""] * 4)
        rows = [(name, f"{each['work'] / 1e6:.2f}", f"{work / each['work']:.2f}x", f"{each['before']:.2%}",
                 f"{each['after']:.2%}", *each["speed"]) for name, each in found.items()]
        head = (what, "million multiplications", "fewer", "accuracy before", "accuracy after",
                *(f"{engine}, batch {size}" for engine in ("PyTorch", "ONNX Runtime") for size in BATCHES))
        return table(head, [whole, *rows])


@cache
def _trained(data: Path, work: Path) -> Trained:
    digits = read(data / "mnist")
    return Trained(Network.from_module(_trained_resnet(digits, work / "cnn.pt"), "ResNet"), digits, work)


def cnn(arguments: argparse.Namespace, results: Results) -> list[str]:
    """Trained, pruned, taught; then timed."""
    digits = read(arguments.data / "mnist")
    what = ("cnn", CHANNELS, TRAINED, TAUGHT, digits.train.digest())
    found = results.of(PRUNERS, what, lambda prune: _trained(arguments.data, arguments.work).case(prune))
    if not found:
        return []
    count = len(digits.test)
    split = "MNIST's test images, split by a seed" if digits.split else "MNIST"
    said = (f"A residual network of three blocks; {split}: {len(digits.train):,} to train on, {count:,} to "
            f"judge (one of them is {100 / count:.2f} points). {CHANNELS:.1%} of the channels go, "
            f"{TAUGHT.epochs:g} epochs of distillation from the unpruned network and the labels follow, the "
            "same for all. What stays is a multiple of 8 channels, which ours rounds up and Torch-Pruning "
            "down. Speed is times faster than the unpruned network, one thread, in turns.")
    return ["## A residual CNN", said, _trained(arguments.data, arguments.work).table("channels", found)]


def separated(arguments: argparse.Namespace, results: Results) -> list[str]:
    """The same network with convolutions in two steps, taught alike."""
    what = ("separable", TRAINED, TAUGHT, read(arguments.data / "mnist").train.digest())
    found = results.of(SEPARABLE, what, lambda build: _trained(arguments.data, arguments.work).case(build))
    if not found:
        return []
    said = ("The same CNN, judged alike; every convolution of 3 x 3 is a filter or more for each channel and "
            "a mixture of channels behind them. Students begin as the nearest of their shape and are taught "
            "as the pruned ones were. Fewer multiplications are not less time where a runtime has a fast "
            "kernel for one filter a channel alone. Speed is by the processor's own time, which a busy "
            "machine stretches less.")
    return ["### Convolutions in two steps", said,
            _trained(arguments.data, arguments.work).table("student", found)]


def _trained_resnet(digits: Digits, place: Path) -> nn.Module:
    torch.manual_seed(0)
    module = ResNet()
    if not place.is_file():
        network = Network.from_module(module)
        tuned = tune(network, {}, Tuning(), Distillation(network, None, ((1.0, HardLabels()),)), digits.train,
                     TRAINED)
        place.parent.mkdir(parents=True, exist_ok=True)
        torch.save(_filled(network, tuned.trees, tuned.params), place)
    module.load_state_dict(torch.load(place, weights_only=True))
    return module.eval()


def _filled(network: Network, trees: Mapping[str, Node], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a network after training."""
    state = {name: value.clone() for name, value in network.module.state_dict().items()}
    state |= {path: network.map.by_path[path].stored(tree.dense()) for path, tree in trees.items()}
    return state | dict(params)


def _filters(**settings: Any) -> Callable[[Network, Digits], Network]:
    technique = Filters(**{"ratio": CHANNELS, "multiple": 8, **settings})
    return lambda network, digits: filtered(network, technique, _some(digits)).network


def _some(digits: Digits) -> Examples:
    batch = digits.train.batch(torch.arange(1000))
    return Examples({"0": batch["0"]}, batch["labels"])


def _group_norm(network: Network, digits: Digits) -> Network:
    """Torch-Pruning's own pruner with its own importance."""
    import torch_pruning

    module = copy.deepcopy(network.module).requires_grad_(True)
    images = digits.train.tensors["0"][:2]
    torch_pruning.pruner.BasePruner(
        module, images, importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=CHANNELS, round_to=8, ignored_layers=[module.head]).step()
    return Network.from_module(module, network.name)


SEPARABLE: dict[str, Callable[[Network, Digits], Network]] = {
    f"{count} a channel": lambda network, digits, count=count: separable(network, multiplier=count)
    for count in (1, 2, 4)}
PRUNERS: dict[str, Callable[[Network, Digits], Network]] = {
    "taylor, refitted": _filters(),
    "taylor, wherever they cost least": _filters(spread="global", ratio=0.55),
    "l2": _filters(criterion="l2", compensate=False),
    "Torch-Pruning: group norm": _group_norm,
}


def _work(network: Network) -> float:
    return multiplications(network, {"0": torch.zeros(2, 1, 28, 28)})


def _taught(network: Network, small: Network, digits: Digits, folder: Path) -> dict[str, Any]:
    """Accuracy before and after distillation, and how much faster the result is."""
    before = 1 - digits.error(small.module)
    rows = answered(network, digits.train, folder / "cnn")
    tuned = tune(small, {}, Tuning(), Distillation(small, None, ((1.0, SoftLabels()), (0.5, HardLabels()))),
                 rows, TAUGHT)
    small.module.load_state_dict(_filled(small, tuned.trees, tuned.params))
    small.module.eval()
    return {"work": _work(small), "before": before, "after": 1 - digits.error(small.module),
            "speed": [*_in_torch(network.module, small.module), *_in_onnx(network, small, folder)],
            "seconds": tuned.curve.seconds}


@torch.no_grad()
def _in_torch(whole: nn.Module, small: nn.Module) -> list[str]:
    """Times faster, by batch."""
    found = []
    for size in BATCHES:
        images = torch.randn(size, 1, 28, 28)
        works = (_calling(partial(module, images), size) for module in (whole, small))
        found.append(f"{compare(*works, 9, time.process_time).ratio:.2f}x")
    return found


def _calling(call: Callable[[], Any], units: int) -> Callable[[], int]:
    def work() -> int:
        call()
        return units

    return work


def _in_onnx(whole: Network, small: Network, folder: Path) -> list[str]:
    """The same of ONNX files, floats both."""
    paths = []
    for name, each in (("whole", whole), ("small", small)):
        path = folder / f"cnn-{name}.onnx"
        export_onnx(each.module, {}, path, inputs={"0": torch.randn(2, 1, 28, 28)})
        paths.append(path)
    second = bench.compare(paths, batches=BATCHES, visits=9, calls=20, threads=1, own=True)[1]
    return [f"{second.ratio[size]:.2f}x" for size in BATCHES]


# ---- encoders ------------------------------------------------------------------------------------------

SENTENCES = 60_000
TEACHER = Settings(epochs=1, batch=32, rate=1e-4, patience=0)
PUPIL = Settings(epochs=2, batch=32, rate=3e-4, patience=0)


@dataclass(frozen=True, eq=False)
class Judge:
    """MiniLM fine-tuned on SST-2, sentences to learn from and to judge by."""

    network: Network
    train: Examples
    test: Examples
    folder: Path

    def rows(self) -> Any:
        """The training sentences with labels and with what the network says of them."""
        assert self.train.labels is not None
        return answered(self.network, Rows({**self.train.inputs, "labels": self.train.labels}), self.folder)

    def accuracy(self, network: Network, tensors: Mapping[str, Tensor] | None = None) -> float:
        """On the test sentences."""
        ordered, answers = self.test.by_length(), []
        with torch.no_grad():
            for batch in ordered.batches(32):
                answers.append(network.run(batch, tensors or None).argmax(1))
        return float((torch.cat(answers) == ordered.labels).float().mean())


@cache
def _judge(data: Path, work: Path, given: Path | None) -> Judge:
    folder = given or _teacher(data, work)
    network = open_any(folder)
    assert isinstance(network, Network)
    train_set, test = (read_examples(network, data / "sst2" / f"{name}.tsv",
                                     count=SENTENCES if name == "train" else None)
                       for name in ("train", "test"))
    return Judge(network, train_set, test, work / f"answers-{network.name}")


def albert(arguments: argparse.Namespace, results: Results) -> list[str]:
    """MiniLM fine-tuned, its layers shared, taught by what it was."""
    opened = (arguments.data, arguments.work, arguments.teacher)
    found = results.of(SHARED, ("albert", SENTENCES, PUPIL),
                       lambda technique: _shared(_judge(*opened), technique))
    if not found:
        return []
    judge = _judge(*opened)
    whole = ("fine-tuned", f"{_encoder(judge.network, {}) / 1e6:.2f}", "1.00x", "",
             f"{judge.accuracy(judge.network):.2%}")
    rows = [(name, f"{each['numbers'] / 1e6:.2f}", f"{each['fewer']:.2f}x", f"{each['before']:.2%}",
             f"{each['after']:.2%}") for name, each in found.items()]
    head = ("MiniLM-L6", "million numbers in blocks", "fewer", "accuracy before", "accuracy after")
    said = ("Accuracy on SST-2's test sentences (one standard error is 1 point). Numbers are those stored "
            "for the six blocks, biases and norms included, the embedding not. The pupil learns the "
            f"fine-tuned network's answers and the labels of {SENTENCES:,} training sentences, each seen "
            f"{PUPIL.epochs:g} times.")
    return ["## ALBERT made of MiniLM", said, table(head, [whole, *rows])]


SHARED = {
    "3 blocks share, fitted": Layers(group=3),
    "3 blocks share, corrections of rank 16": Layers(group=3, rank=16),
    "3 blocks share, averaged": Layers(group=3, start="average"),
    "all 6 blocks share, fitted": Layers(),
}


def _teacher(data: Path, work: Path) -> Path:
    """MiniLM with a new head, on some of the sentences."""
    folder, table_ = work / f"minilm-{SENTENCES}", work / f"train-{SENTENCES}.tsv"
    if not (folder / "receipt.json").is_file():
        lines = (data / "sst2" / "train.tsv").read_text(encoding="utf-8").splitlines()
        table_.write_text("\n".join(lines[:SENTENCES + 1]) + "\n", encoding="utf-8")
        train(Training("all-minilm-l6-v2", folder, (str(table_),), settings=TEACHER))
    return folder


def _shared(judge: Judge, technique: Layers) -> dict[str, float]:
    """Accuracy before and after distillation; shared matrices are trained once for all that use them."""
    network, some = judge.network, judge.train.select(torch.arange(512))
    trees = share_layers(network, technique, some, dtype=torch.float32).trees
    before = judge.accuracy(network, network.tensors(trees.get))
    objective = Distillation(network, None, ((1.0, SoftLabels()), (0.5, HardLabels())))
    tuned = tune(network, trees, Tuning(frozenset({"weights", "adapters", "norms", "biases"}),
                                        where=tuple(trees)), objective, judge.rows(), PUPIL)
    after = judge.accuracy(network, network.tensors(tuned.trees.get) | tuned.params)
    numbers = _encoder(network, tuned.trees)
    return {"before": before, "after": after, "numbers": numbers, "seconds": tuned.curve.seconds,
            "fewer": _encoder(network, {}) / numbers}


def _encoder(network: Network, trees: Mapping[str, Node]) -> float:
    """Numbers stored for all blocks: matrices by their bits, vectors."""
    matrices = sum(trees[site.path].bits() / 32 if site.path in trees else site.shape[0] * site.shape[1]
                   for site in network.map.sites if site.block is not None)
    return matrices + sum(param.shape[0] for param in network.map.params if ".layer." in param.path)


# ---- students of another shape -------------------------------------------------------------------------

STUDENTS: dict[str, Callable[[Network], Any]] = {
    "bottleneck, 96 wide inside": lambda teacher: bottleneck(teacher, inner=96, feedforwards=2),
    "every second block": lambda teacher: shallower(teacher, every_second(teacher.map.blocks))}


def bottlenecked(arguments: argparse.Namespace, results: Results) -> list[str]:
    """A student that begins with its teacher's words alone, beside one that begins with half its blocks."""
    opened = (arguments.data, arguments.work, arguments.teacher)
    found = results.of(STUDENTS, ("bottleneck", SENTENCES, PUPIL),
                       lambda build: _student(_judge(*opened), build))
    if not found:
        return []
    judge = _judge(*opened)
    whole = ("fine-tuned", f"{judge.network.parameters / 1e6:.2f}",
             f"{_encoder(judge.network, {}) / 1e6:.2f}", "", f"{judge.accuracy(judge.network):.2%}",
             *[""] * len(BATCHES))
    rows = [(name, f"{each['parameters'] / 1e6:.2f}", f"{each['blocks'] / 1e6:.2f}", f"{each['before']:.2%}",
             f"{each['after']:.2%}", *each["speed"]) for name, each in found.items()]
    head = ("MiniLM-L6", "million numbers", "of them in blocks", "accuracy before", "accuracy after",
            *(f"PyTorch, batch {size}" for size in BATCHES))
    said = ("Judged and taught as above. The bottleneck has a table of words of rank 128 and blocks that "
            "begin at random; the other student begins as part of its teacher. Speed is times faster than "
            "the teacher, one thread, in turns, by the processor's own time, on test sentences.")
    return ["## Students of MiniLM", said, table(head, [whole, *rows])]


def _student(judge: Judge, build: Callable[[Network], Any]) -> dict[str, Any]:
    """Accuracy before and after distillation, size, speed."""
    student: Network = build(judge.network)
    before = judge.accuracy(student)
    objective = Distillation(student, None, ((1.0, SoftLabels()), (0.5, HardLabels())))
    tuned = tune(student, {}, Tuning(), objective, judge.rows(), PUPIL)
    student.module.load_state_dict(_filled(student, tuned.trees, tuned.params))
    return {"before": before, "after": judge.accuracy(student), "parameters": student.parameters,
            "blocks": _encoder(student, {}), "seconds": tuned.curve.seconds,
            "speed": [_sooner(judge, student, size) for size in BATCHES]}


def _sooner(judge: Judge, student: Network, size: int) -> str:
    """Times faster than the teacher on the first test sentences."""
    inputs = next(judge.test.select(torch.arange(size)).batches(size))
    works = (_calling(partial(network.run, inputs), size) for network in (judge.network, student))
    return f"{compare(*works, 9, time.process_time).ratio:.2f}x"


STAGES: dict[str, Callable[[argparse.Namespace, Results], list[str]]] = {
    "cnn": cnn, "separable": separated, "albert": albert, "bottleneck": bottlenecked}
