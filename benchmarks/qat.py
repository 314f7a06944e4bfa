"""Weights and activations of few bits on MNIST: rounded after training, and during it.

    python benchmarks/qat.py --data DATA --work WORK [--seeds 3]

DATA holds ``mnist/``, as for ``deep_compression.py``. A LeNet-5 is trained in floats; then every weight and
every input of every layer gets 4, 3 or 2 bits:

    rtn, gptq   after training; ranges of inputs as they come on training images
    qat         straight-through: ranges of weights follow the weights (Jacob et al. 2018)
    lsq         straight-through with learned steps (Esser et al. 2020)
    lsq+        the same, and ranges of inputs learn (Bhalgat et al. 2020) instead of following the batches

The latter three train for three epochs against the labels and the float network's answers; the first four
round inputs by the same rule. Finished rows lie in WORK/qat.json and are not run again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from deep_compression import Digits, data_said, lenet_5, read, trained
from harness import Ledger, fingerprint, source_sha256, table, write_page
from rarefy.calibration.examples import Examples
from rarefy.calibration.observe import inputs
from rarefy.core.edit import Technique, edit
from rarefy.core.nodes import Dense, Node
from rarefy.core.tune import Trainer
from rarefy.models.network import Network
from rarefy.numerics.grids import integer_grid
from rarefy.techniques.distill.hard_labels import HardLabels
from rarefy.techniques.distill.soft_labels import SoftLabels
from rarefy.techniques.quantize.gptq import GPTQ
from rarefy.techniques.quantize.lsq import LSQ
from rarefy.techniques.quantize.qat import QAT
from rarefy.techniques.quantize.rtn import RTN
from rarefy.training.activations import Activations, Rounding
from rarefy.training.loop import Settings
from rarefy.training.signals import Distillation
from rarefy.training.tune import Tuning, tune

BITS = (4, 3, 2)
METHODS = ("rtn", "gptq", "qat", "lsq", "lsq+")
EPOCHS = {"float": 10, "rounded": 3}
CALIBRATED = 1024  # images
PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "qat.md"
SOURCES = ("training/loop.py", "training/activations.py", "techniques/quantize/qat.py",
           "techniques/quantize/lsq.py", "techniques/quantize/gptq.py")


def main() -> None:
    """Run what the ledger does not hold; write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    digits, ledger = read(given.data / "mnist"), Ledger(given.work / "qat.json")
    results: list[dict[str, float]] = []
    for seed in range(given.seeds):
        key = fingerprint(seed, digits.train.digest(), BITS, sorted(EPOCHS.items()), source_sha256(*SOURCES))
        if ledger.get(key) is None:
            ledger.put(key, run(digits, seed))
            print(seed, ledger.get(key), flush=True)
        results.append(ledger.get(key))
    found = {name: statistics.median(each[name] for each in results) for name in results[0]}
    write_page(PAGE, "Few bits, after training and during it", "python benchmarks/qat.py",
               [data_said(digits), said(given.seeds), rows(found), verdict(found, len(digits.test))])


def run(digits: Digits, seed: int) -> dict[str, float]:
    """The error of one network in floats, and under every method and number of bits."""
    torch.manual_seed(seed)
    network = Network.from_module(trained(lenet_5(), digits, EPOCHS["float"]))
    found = {"float": error(network, {}, digits)}
    for bits in BITS:
        for method in METHODS:
            rounded = after if method in ("rtn", "gptq") else during
            found[f"{method} {bits}"] = rounded(network, method, bits, digits, seed)
            print(seed, method, bits, found[f"{method} {bits}"], flush=True)
    return found


def after(network: Network, method: str, bits: int, digits: Digits, seed: int) -> float:
    """Rounded after training."""
    grid, images = integer_grid(bits, 0), digits.train.tensors["0"][:CALIBRATED]
    technique: Technique = RTN(grid) if method == "rtn" else GPTQ(grid)
    evidence = inputs(network, Examples({"0": images}), list(network.map.by_path), {})
    trees: dict[str, Node] = {}
    for site in network.map.sites:
        weight = network.weight(site.path)
        trees[site.path], _ = edit(site.path, Dense(weight), weight, technique, method, evidence[site.path],
                                   torch.Generator().manual_seed(seed), site.kernel)
    layers = [site.layer for site in network.map.sites]  # all of their inputs are rounded, the image's too
    seen, tensors = Activations(layers, bits, delay=CALIBRATED), network.tensors(trees.get)
    with seen.on(network.module), torch.no_grad():
        for batch in images.split(64):
            network.run({"0": batch}, tensors)
    return error(network.with_ranges(seen.ranges()), tensors, digits)


def during(network: Network, method: str, bits: int, digits: Digits, seed: int) -> float:
    """Rounded while training goes on."""
    grid = integer_grid(bits, 0)
    technique: Trainer = QAT(grid) if method == "qat" else LSQ(grid)
    rounding = Rounding(bits, delay=0.1, learned=method == "lsq+")
    tuning = Tuning(frozenset({"biases"}), technique, activations=rounding)
    settings = Settings(epochs=EPOCHS["rounded"], batch=64, rate=1e-3, schedule="linear", seed=seed)
    objective = Distillation(network, network, ((1.0, HardLabels()), (1.0, SoftLabels())))
    tuned = tune(network, {}, tuning, objective, digits.train, settings)
    return error(network.with_ranges(tuned.ranges), network.tensors(tuned.trees.get) | tuned.params, digits)


@torch.no_grad()
def error(network: Network, tensors: Mapping[str, Tensor], digits: Digits) -> float:
    """The share of test images that are read wrongly, inputs rounded in the network's ranges."""
    held = digits.test.tensors
    with network.as_trained():
        answers = network.run({"0": held["0"]}, tensors)
    return float((answers.argmax(1) != held["labels"]).float().mean())


# ---- the page ------------------------------------------------------------------------------------------


def said(seeds: int) -> str:
    """What was done, in words."""
    many = "one seed" if seeds == 1 else f"medians of {seeds} seeds"
    return (f"Test error of a LeNet-5, {many}; one scale for every filter or neuron, one "
            "range for all inputs of a layer, which learns under lsq+ and else follows what comes. Training "
            "goes on for three epochs from the float network.")


def rows(found: Mapping[str, float]) -> str:
    """The table."""
    head = ("bits of weights and inputs", *METHODS)
    lines = [(f"{bits}", *(f"{found[f'{method} {bits}']:.2%}" for method in METHODS)) for bits in BITS]
    return table(head, [("float32", *[f"{found['float']:.2%}"] * len(METHODS)), *lines])


def verdict(found: Mapping[str, float], images: int) -> str:
    """What the papers claim, and whether it came out; what chance may do is called a tie."""
    lines = []
    for bits in BITS:
        best = min(found[f"{method} {bits}"] for method in ("rtn", "gptq"))
        one, other, learned = (found[f"{method} {bits}"] for method in ("qat", "lsq", "lsq+"))
        least = min(one, other, learned)
        lines.append(f"- {bits} bits: training {compared(least, best, images)} rounding after it "
                     f"({least:.2%} against {best:.2%}); lsq {compared(other, one, images)} "
                     f"straight-through ({other:.2%} against {one:.2%}); lsq+ "
                     f"{compared(learned, other, images)} lsq ({learned:.2%} against {other:.2%})")
    return "\n".join(lines)


def compared(error: float, other: float, images: int) -> str:
    """Which error is smaller, by more than one standard error of it."""
    chance = (other * (1 - other) / images) ** 0.5
    return "ties with" if abs(error - other) <= chance else "beats" if error < other else "loses to"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
