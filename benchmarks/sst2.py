"""SST-2 for the benchmarks of training: tables, one teacher for all of them, accuracy.

The teacher is MiniLM-L6 (``all-minilm-l6-v2``) under a new head, all weights fine-tuned on the training
sentences for as long as its students will be, the best of three states on the development sentences kept. It
is trained once and lies in WORK/teacher-EPOCHS.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from rarefy.calibration.examples import read_examples
from rarefy.models.network import Network
from rarefy.models.opening import open_any
from rarefy.run.training import Training, train
from rarefy.training.examples import LABELS, Answered, Rows
from rarefy.training.loop import Settings
from rarefy.training.signals import inputs_of
from rarefy.training.teacher import answered

MODEL = "all-minilm-l6-v2"
BATCH, RATE, GATES = 64, 2e-4, 3
SENTENCES = 60_614


@dataclass(frozen=True)
class Tables:
    """The three tables, where results go, and how often the training sentences are seen."""

    folder: Path
    work: Path
    epochs: float

    @property
    def train(self) -> str:
        """60,614 sentences and parts of sentences."""
        return str(self.folder / "sst2" / "train.tsv")

    @property
    def dev(self) -> str:
        """Those that choose among states."""
        return str(self.folder / "sst2" / "dev.tsv")

    @property
    def test(self) -> str:
        """Those that judge, and do nothing else."""
        return str(self.folder / "sst2" / "test.tsv")


def tables(parser: argparse.ArgumentParser) -> None:
    """The arguments that every benchmark here has."""
    parser.add_argument("--data", type=Path, required=True, help="folder with sst2/{train,dev,test}.tsv")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=2.0, help="of the teacher, and of its students")


def teacher(found: Tables) -> Path:
    """The folder of the fine-tuned teacher, trained if it is not there."""
    out = found.work / f"teacher-{found.epochs:g}"
    if not (out / "receipt.json").is_file():
        every = round(found.epochs * SENTENCES / BATCH / GATES)
        settings = Settings(epochs=found.epochs, batch=BATCH, rate=RATE, gate_every=every)
        train(Training(MODEL, out, (found.train,), (found.dev,), settings=settings))
    return out


def rows(network: Network, table: str) -> Rows:
    """A table as the network takes it, with labels."""
    examples = read_examples(network, table)
    assert examples.labels is not None
    return Rows({**examples.inputs, LABELS: examples.labels})


def taught(found: Tables) -> tuple[Network, Answered]:
    """The teacher, and the training sentences with its answers, which are asked for once."""
    network = open_any(teacher(found))
    assert isinstance(network, Network)
    return network, answered(network, rows(network, found.train), found.work)


@torch.no_grad()
def accuracy(network: Network, table: Rows, tensors: dict[str, torch.Tensor] | None = None) -> float:
    """The share of a table's sentences that get their label. tensors: in the place of the network's own."""
    order, right = table.lengths(), 0
    index = torch.arange(len(table)) if order is None else order.argsort(stable=True)
    for part in index.split(64):
        batch = table.batch(part)
        right += int((network.run(inputs_of(batch), tensors).argmax(1) == batch[LABELS]).sum())
    return right / len(table)
