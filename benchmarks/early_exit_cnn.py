"""How much sooner does a CNN answer when easy digits may leave early, within a bound on what is lost?

    OMP_NUM_THREADS=1 python benchmarks/early_exit_cnn.py --data DATA [--work WORK]

DATA holds ``mnist/`` as ``deep_compression.py`` reads it. A residual network of six blocks is trained on most
of the training digits. It gets exits twice: heads alone, and network and heads together, both taught by the
network's own answers to digits that it was trained on. Digits that were kept aside choose the threshold for
each rule and bound; the test digits are what the table shows: where they leave, what is lost, the
multiplications that are left, and the time beside the whole network's, in turns in one process, and in ONNX
Runtime, where exits are branches of one graph. Of one thread, the processor's own time is the wall clock of
an idle machine, and a busy one stretches it less. What has learnt is kept in WORK: without the ledger there
(``early_exit_cnn.json``) it is only measured again.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deep_compression import Digits, read
from harness import Ledger, fingerprint, source_sha256, table, write_page
from rarefy.calibration.examples import Examples
from rarefy.export.networks import export_network, has_exits, opened
from rarefy.export.onnx import export_onnx
from rarefy.models.network import TENSOR, Network
from rarefy.runtimes.exit_graph import export_exits
from rarefy.runtimes.exit_training import PLAIN, together, trained
from rarefy.runtimes.exits import Exits, load, measured, save, staged
from rarefy.techniques.depth.early_exit import EarlyExit
from rarefy.techniques.distill.hard_labels import HardLabels
from rarefy.training.examples import LABELS, Rows
from rarefy.training.loop import Settings
from rarefy.training.signals import Distillation
from rarefy.training.tune import Tuning, tune
from structure_networks import ResNet

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "early_exit_cnn.md"
SOURCE = ("runtimes/exits.py", "runtimes/segments.py", "runtimes/exit_training.py", "runtimes/exit_graph.py",
          "techniques/depth/early_exit.py")
LEARNING = ("runtimes/segments.py", "runtimes/exit_training.py", "training/loop.py")
WIDTHS = (32, 32, 64, 64, 128, 128)
TRAINED = Settings(epochs=6, batch=64, rate=2e-3, decay=1e-4, precision="float32")
ASIDE = 0.2  # of the training digits: these choose thresholds
AFTER, BOUNDS, BATCHES = (0, 1, 2, 4), (0.005, 0.01, 0.02), (1, 32)
RULES = ("confidence", "entropy", "patience")
KINDS = {"heads alone": False, "network and heads": True}
GRAPH = ("confidence", 0.01)  # whose threshold goes into a graph


def main() -> None:
    """Both kinds of exits, every rule and bound; the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        subject = Subject(read(arguments.data / "mnist"), work)
        ledger, found = Ledger(work / "early_exit_cnn.json"), {}
        for kind, joint in KINDS.items():
            key = fingerprint(kind, subject.digits.train.digest(), TRAINED, PLAIN, AFTER, BOUNDS,
                              source_sha256(*SOURCE))
            if ledger.get(key) is None:
                ledger.put(key, measure(subject, joint))
            found[kind] = ledger.get(key)
            print(table(HEADS, rows(found)), flush=True)
    write_page(PAGE, "Early exit in a CNN", "python benchmarks/early_exit_cnn.py --data DATA", page(found))


@dataclass(frozen=True, eq=False)
class Subject:
    """The CNN, and digits to learn from, to choose thresholds by, to judge."""

    digits: Digits
    folder: Path

    @cached_property
    def parts(self) -> tuple[Rows, Rows]:
        """What the network learns from, and what it never sees."""
        return self.digits.train.split(ASIDE, seed=1)

    @cached_property
    def network(self) -> Network:
        """Trained once."""
        torch.manual_seed(0)
        network, place = Network.from_module(ResNet(WIDTHS), "ResNet"), self.folder / "early_exit_cnn"
        if not place.exists():
            tuned = tune(network, {}, Tuning(), Distillation(network, None, ((1.0, HardLabels()),)),
                         self.parts[0], TRAINED)
            export_network(network, tuned.trees, place, params=tuned.params)
        return reopened(place)


def reopened(folder: Path) -> Network:
    network = opened(folder, ResNet(WIDTHS))
    assert isinstance(network, Network)
    return network


def examples(digits: Rows) -> Examples:
    return Examples({TENSOR: digits.tensors[TENSOR]}, digits.tensors[LABELS])


def measure(subject: Subject, joint: bool) -> dict[str, Any]:
    """Exits, then every rule and bound on them."""
    learn, aside = (examples(each) for each in subject.parts)
    test = examples(subject.digits.test)
    exits, results = learnt(subject, learn, joint), []
    answers = [exits.answers(each) for each in (aside, test)]
    for rule in RULES:
        for bound in BOUNDS:
            technique = EarlyExit(rule, max_loss=bound)
            done = replace(exits, technique=technique, rule=technique.calibrated(answers[0]))
            found = measured(done, test, BATCHES, answers=answers[1], clock=time.process_time)
            results.append({"rule": rule, "bound": bound, "test": found})
            if (rule, bound) == GRAPH:
                graph = in_a_graph(done, test, subject.folder / f"graph-{joint}")
    alone = [float((each.argmax(-1) == test.labels).float().mean()) for each in answers[1].logits]
    return {"results": results, "graph": graph, "alone": alone, "learn": len(learn),
            "aside": len(aside), "test": len(test), "split": subject.digits.split,
            "original": 1 - subject.digits.error(subject.network.module),
            "names": list(exits.stepped.names), "work": list(exits.stepped.work)}


def learnt(subject: Subject, learn: Examples, joint: bool) -> Exits:
    """Heads, or network and heads, trained once and read from a folder."""
    network, how = subject.network, (joint, TRAINED, PLAIN, AFTER, learn.digests(), source_sha256(*LEARNING))
    folder = subject.folder / f"learnt-{fingerprint(*how)}"
    if not has_exits(folder):
        shutil.rmtree(folder, ignore_errors=True)
        if joint:
            heads, tuned = together(network, {}, network, learn, AFTER, PLAIN)
            export_network(network, tuned.trees, folder, params=tuned.params)
        else:
            heads = trained(network, learn, AFTER, PLAIN).heads
            export_network(network, {}, folder)
        save(Exits(staged(reopened(folder), next(learn.batches(2))), AFTER, heads), folder)
    return load(folder, into=ResNet(WIDTHS)).exits


# ---- in a graph

def in_a_graph(exits: Exits, test: Examples, folder: Path) -> dict[str, Any]:
    """Seconds a digit with exits and without, in turns, and how many answers are those of PyTorch."""
    import onnxruntime

    folder.mkdir(parents=True, exist_ok=True)
    inputs = next(test.batches(4))
    early = export_exits(exits, {}, folder / "exits.onnx", inputs=inputs)
    early.verify(test.batches(BATCHES[-1]))
    whole = export_onnx(exits.stepped.network.module, {}, folder / "whole.onnx", inputs=inputs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    sessions = {name: onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
                for name, path in (("exits", early.path), ("whole", whole.path))}
    calls = {name: asking(session) for name, session in sessions.items()}
    return {size: clock(calls, test.select(torch.arange(512)), size) for size in BATCHES}


def asking(session: Any) -> Callable[[Mapping[str, Tensor]], Any]:
    name = session.get_inputs()[0].name
    return lambda inputs: session.run(None, {name: inputs[TENSOR].numpy()})


def clock(calls: Mapping[str, Callable[[Mapping[str, Tensor]], Any]], test: Examples, size: int
          ) -> dict[str, float]:
    """Seconds a sample, both ways in turns; the first round warms up."""
    found = dict.fromkeys(calls, 0.0)
    for counts in (False, True):
        for inputs in test.batches(size):
            for name, call in calls.items():
                started = time.process_time()
                call(inputs)
                found[name] += counts * (time.process_time() - started)
    return {name: seconds / len(test) for name, seconds in found.items()}


# ---- the page

HEADS = ("exits learn", "rule", "may lose", "blocks", "multiplications", "same answer", "accuracy",
         "left behind block", *(f"speed, batch {size}" for size in BATCHES))


def rows(found: dict[str, Any]) -> list[list[str]]:
    """Every kind, rule and bound."""
    lines = []
    for kind, one in found.items():
        for each in one["results"]:
            seen = each["test"]
            left = " ".join(f"{block}:{count}" for block, count in seen["left"].items())
            speed = [f"{took['whole'] / took['exits']:.2f}x" for took in seen["seconds"].values()]
            lines.append([kind, each["rule"], f"{each['bound']:.1%}", f"{seen['mean_blocks']:.2f}",
                          f"{seen['mean_work']:.1%}", f"{seen['same']:.2%}", f"{seen['accuracy']:.2%}", left,
                          *speed])
    return lines


def page(found: dict[str, Any]) -> list[str]:
    """The tables and what they mean."""
    one = next(iter(found.values()))
    split = "MNIST's test images, split by a seed" if one["split"] else "MNIST"
    wholes = ", ".join(f"{kind} {each['results'][0]['test']['whole']['accuracy']:.2%}"
                       for kind, each in found.items())
    places = [[f"{block + 1}", f"`{one['names'][block]}`", f"{one['work'][block]:.1%}",
               *(f"{each['alone'][place]:.2%}" for each in found.values())]
              for place, block in enumerate((*AFTER, len(one["names"]) - 1))]
    graph = [[kind, *(f"{1e3 * took['whole']:.3f} ms, {took['whole'] / took['exits']:.2f}x"
                      for took in each["graph"].values())] for kind, each in found.items()]
    return [
        f"A residual network of {len(WIDTHS)} blocks; {split}: {one['learn']:,} digits to train on, "
        f"{one['aside']:,} that choose thresholds, {one['test']:,} to judge (one of them is "
        f"{100 / one['test']:.2f} points). It reads {one['original']:.2%} of these rightly. Exits learnt "
        f"from its answers to the digits that it was trained on, {PLAIN.epochs:g} epochs; to the end, those "
        f"networks get: {wholes}. With 95% confidence at most the share *may lose* gets another answer than "
        "to the end. " + verdict(found),
        "## Where exits stand\n\nCuts are found by themselves. *Accuracy*: of all test digits, were this the "
        "only exit.",
        table(("block", "ends behind", "multiplications so far", *found), places),
        "## Test digits\n\nThe *multiplications* of a digit on average, heads aside. Speed is that of "
        "PyTorch with one thread beside the whole network in turns, by the processor's own time, which a "
        "busy machine stretches less than the wall clock.",
        table(HEADS, rows(found)),
        f"## One graph\n\nONNX Runtime, one thread, the same clock, {GRAPH[0]} at {GRAPH[1]:.0%}: time a "
        "digit of the whole network, and how much faster the graph with exits is. There a batch is computed "
        "until its last digit is sure.",
        table(("exits learn", *(f"batch {size}" for size in BATCHES)), graph)]


def verdict(found: dict[str, Any]) -> str:
    """The fastest at either batch that loses no more than half a point."""
    said = []
    for size in map(str, BATCHES):
        fits = [(each["test"]["seconds"][size]["whole"] / each["test"]["seconds"][size]["exits"], kind, each)
                for kind, one in found.items() for each in one["results"]
                if each["test"]["accuracy"] >= one["original"] - 0.005]
        if not fits:
            return "No rule stays within half a point of its accuracy."
        speed, kind, each = max(fits, key=lambda best: best[0])
        said.append(f"{speed:.2f}x at batch {size} ({each['rule']} at {each['bound']:.1%}, {kind})")
    return f"Within half a point of its accuracy the fastest is {' and '.join(said)}."


if __name__ == "__main__":
    main()
