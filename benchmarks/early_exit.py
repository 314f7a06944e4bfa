"""How much sooner does an encoder answer when easy samples may leave early, within a bound on what is lost?

    OMP_NUM_THREADS=1 python benchmarks/early_exit.py MODEL --train TRAIN.tsv --dev DEV.tsv --after 1 3

MODEL is a classifier of sentences (``rarefy finetune`` makes one). Heads behind the blocks ``--after`` learn
the model's own answers on the training sentences; half of the development set calibrates the threshold for
each bound, the other half is what the table shows: where samples left, what was lost, and the wall clock of
one process beside the whole network's, in turns, for batches of 1 and more.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from harness import table
from rarefy.calibration.examples import read_examples
from rarefy.models.network import Network
from rarefy.models.opening import open_any
from rarefy.runtimes.exits import TRAINING, measured, trained
from rarefy.techniques.depth.early_exit import EarlyExit

BOUNDS = (0.01, 0.02, 0.05)


def row(found: dict[str, Any], sizes: tuple[int, ...]) -> list[str]:
    """One rule and bound as the table shows it."""
    whole = found["whole"]
    accuracy = "" if "accuracy" not in found else f"{found['accuracy']:.1%} ({whole['accuracy']:.1%})"
    left = " ".join(f"{block}:{count}" for block, count in found["left"].items())
    speed = [f"{seconds['whole'] / seconds['exits']:.2f}x" for seconds in found["seconds"].values()]
    blocks = f"{found['mean_blocks']:.2f} of {whole['mean_blocks']:g}"
    return [found["rule"], f"{found['max_loss']:.0%}", blocks, f"{found['same']:.1%}", accuracy, left, *speed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    parser.add_argument("--dev", required=True)
    parser.add_argument("--after", type=int, nargs="+", required=True, help="blocks, counted from 0")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--samples", type=int, default=8000, help="training sentences at most")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    network = open_any(options.model)
    if not isinstance(network, Network):
        sys.exit(f"{options.model}: no encoder")
    exits = trained(network, read_examples(network, options.train, count=options.samples), options.after,
                    replace(TRAINING, epochs=10))
    dev = read_examples(network, options.dev)
    order = torch.randperm(len(dev), generator=torch.Generator().manual_seed(0))
    calibration, rest = dev.select(order[::2]), dev.select(order[1::2])
    results = []
    for rule in ("confidence", "entropy", "patience"):
        for bound in BOUNDS:
            done = exits.calibrated(EarlyExit(rule, max_loss=bound), calibration)
            results.append(measured(done, rest, options.batches))
    heads = ["rule", "bound", "blocks", "same answer", "accuracy (whole)", "left behind block",
             *(f"speed, batch {size}" for size in options.batches)]
    print(f"{network.name}: {len(calibration)} samples calibrate, {len(rest)} are measured\n")
    print(table(heads, [row(found, tuple(options.batches)) for found in results]))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
