"""Networks in integers alone against their floats: a CNN on MNIST, MiniLM on sentences of SST-2.

    python benchmarks/integer.py --data DATA [--work WORK]

DATA holds ``mnist/`` (as for ``deep_compression.py``) and ``sst2/train.tsv``, ``sst2/test.tsv``. Weights are
rounded to int8, one scale a row, and nothing is trained again; ranges come from training images and
sentences. Every file is compared with the interpreter bit for bit before its numbers count.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deep_compression import Digits, read, trained
from harness import Ledger, fingerprint, source_sha256, table, write_page
from rarefy.calibration.examples import Examples, read_examples
from rarefy.core.edit import edit
from rarefy.core.nodes import Dense, Node
from rarefy.export.onnx import GRIDS, OnnxSettings, export_onnx
from rarefy.export.program import Program, trace
from rarefy.measure.task import divergences
from rarefy.models.folding import fold
from rarefy.models.map import Site
from rarefy.models.network import Network
from rarefy.models.opening import open_any
from rarefy.numerics.fixed_point import IBERT, MINIMAX, Erf
from rarefy.runtimes.bench import compare
from rarefy.runtimes.integer import compiled, export_integer
from rarefy.runtimes.session import Session
from rarefy.techniques.quantize.rtn import RTN

MODEL = "all-minilm-l6-v2"
SEEDS, EPOCHS = 3, 6
IMAGES, SENTENCES, JUDGED, BATCH = 256, 128, 128, 32  # for ranges; sentences that judge; at once
CURVES: dict[str, Erf] = {"of degree 5": MINIMAX, "of I-BERT": IBERT}
INTEGERS = ("encoder.onnx", "encoder-paper.onnx")
FLOORS = ("core", "numerics", "techniques", "models", "export", "formats", "runtimes")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "integer.md"


class Small(nn.Module):
    """Two convolutions with BatchNorm, a residual block and a linear head; images [n, 1, 28, 28]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16))
        self.one = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32))
        self.two = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32))
        self.shrink, self.head = nn.MaxPool2d(2), nn.Linear(32 * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(torch.relu(self.stem(x))))
        x = torch.relu(x + self.two(x))
        return self.head(self.shrink(x).flatten(1))


def main() -> None:
    """Run what the ledger does not hold; write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--no-times", action="store_true", help="the machine is busy: answers alone")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        ledger, source = Ledger(work / "integer.json"), source_sha256(*FLOORS)
        found = {}
        sections = SECTIONS[:2] if arguments.no_times else SECTIONS
        for name, run in sections:
            key = fingerprint(name, SEEDS, EPOCHS, IMAGES, SENTENCES, JUDGED, source)
            if ledger.get(key) is None:
                print(name, flush=True)
                ledger.put(key, run(arguments.data, work))
            found[name] = ledger.get(key)
    write_page(PAGE, "Integers alone", "python benchmarks/integer.py",
               [INTRODUCTION, *digits_said(found["digits"]), *encoder_said(found["encoder"]),
                *times_said(found.get("times"))])


def rounded(program: Program, module: nn.Module) -> dict[str, Node]:
    """Every weight on int8, to the nearest."""
    state = module.state_dict()

    def tree(site: Site) -> Node:
        weight = site.matrix(state[site.path]).contiguous()
        return edit(site.path, Dense(weight), weight, RTN(GRIDS["int8"]), "rtn", None, torch.Generator())[0]

    return {path: tree(site) for path, site in program.sites.items()}


# ---- a CNN on digits -----------------------------------------------------------------------------------


def digits(data: Path, work: Path) -> dict[str, Any]:
    """Accuracies for several seeds, one network each."""
    found = read(data / "mnist")
    return {"split": found.split, "train": len(found.train), "test": len(found.test),
            "seeds": [one_seed(seed, found, work) for seed in range(SEEDS)]}


def one_seed(seed: int, found: Digits, work: Path) -> dict[str, Any]:
    torch.manual_seed(seed)
    module = trained(Small(), found, EPOCHS).eval().requires_grad_(False)
    images = {"0": found.train.tensors["0"][:IMAGES]}
    folded = fold(module, images["0"]).module
    program = trace(folded, {"0": images["0"][:2]})
    trees = rounded(program, folded)
    whole = compiled(program, trees, [images])
    file = export_integer(whole, program, work / f"digits-{seed}.onnx")
    test = {"0": found.test.tensors["0"]}
    file.verify([{"0": test["0"][:IMAGES]}])
    with Session(file.path, "onnxruntime") as session:
        answers = session.answer(test)
    labels = found.test.tensors["labels"]

    def accuracy(logits: Tensor) -> float:
        return float((logits.argmax(1) == labels).float().mean())

    with torch.no_grad():
        floats = module(test["0"])
    return {"float": accuracy(floats), "weights": accuracy(program.run(test, program.tensors(trees))),
            "integer": accuracy(answers), "changed": int((answers.argmax(1) != floats.argmax(1)).sum()),
            "bytes": file.bytes}


# ---- an encoder on sentences ---------------------------------------------------------------------------


def encoder(data: Path, work: Path) -> dict[str, Any]:
    """Cosines to the original for both polynomials, and the latency of the file."""
    network = open_any(MODEL)
    assert isinstance(network, Network)
    seen = read_examples(network, str(data / "sst2" / "train.tsv"), count=SENTENCES).by_length()
    judged = read_examples(network, str(data / "sst2" / "test.tsv"), count=JUDGED).by_length()
    example = next(seen.select(torch.tensor([len(seen) - 2, len(seen) - 1])).batches(2))
    program = trace(network.module, example, (0, 1), fused=True)
    trees = rounded(program, network.module)
    original = torch.cat([network.run(batch) for batch in judged.batches(BATCH)])
    held, rows = program.tensors(trees), {}
    rows["int8 weights, float activations"] = cosines(network, original, (
        pooled(network, program.run(batch, held), batch) for batch in judged.batches(BATCH)))
    files = baselines(network, trees, work, example)
    for name, path in files.items():
        if name != "float32":
            rows[name] = cosines(network, original, asked(network, path, judged))
    for (name, erf), written in zip(CURVES.items(), INTEGERS, strict=True):
        whole = compiled(program, trees, list(seen.batches(BATCH)), erf=erf)
        file = export_integer(whole, program, work / written)
        file.verify([next(judged.batches(4))])
        rows[f"integers alone, GELU {name}"] = cosines(network, original, asked(network, file.path, judged))
    return {"rows": rows, "judged": len(judged)}


def times(data: Path, work: Path) -> dict[str, Any]:
    """Latency of the files that ``encoder`` wrote, in turns."""
    files = {"float32": "float32.onnx", "int8, dynamic": "dynamic.onnx", "integers alone": INTEGERS[0]}
    timed = compare([work / file for file in files.values()])
    return {name: {**asdict(row), "path": ""} for name, row in zip(files, timed, strict=True)}


SECTIONS: tuple[tuple[str, Callable[[Path, Path], dict[str, Any]]], ...] = (
    ("digits", digits), ("encoder", encoder), ("times", times))


def baselines(network: Network, trees: Mapping[str, Node], work: Path, example: Mapping[str, Tensor]
              ) -> dict[str, Path]:
    """Files of the same network for ONNX Runtime: float32, and int8 with activations rounded as they come."""
    found = {"float32": work / "float32.onnx", "int8, dynamic": work / "dynamic.onnx"}
    export_onnx(network.module, {}, found["float32"], inputs=example, dynamic=(0, 1))
    export_onnx(network.module, trees, found["int8, dynamic"], inputs=example, dynamic=(0, 1),
                settings=OnnxSettings("dynamic"))
    return found


def asked(network: Network, path: Path, examples: Examples) -> Iterator[Tensor]:
    with Session(path, "onnxruntime") as session:
        for batch in examples.batches(BATCH):
            yield pooled(network, session.answer(batch), batch)


def pooled(network: Network, states: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """One vector a sentence."""
    return network.form.answer({"last_hidden_state": states}, batch)


def cosines(network: Network, original: Tensor, answers: Iterator[Tensor]) -> dict[str, float]:
    """Mean and smallest."""
    apart = divergences(original, torch.cat(list(answers)), network.form)
    return {"mean": 1 - float(apart.mean()), "least": 1 - float(apart.max())}


# ---- the page ------------------------------------------------------------------------------------------

INTRODUCTION = """\
Networks whose every operation is one of integers: weights and activations of 8 bits, sums of 32,
fixed-point multipliers; softmax, GELU and LayerNorm after I-BERT, the residual path in 18 bits
(`rarefy.runtimes.integer`). Weights are rounded to the nearest int8 and nothing is trained again. Each file
for ONNX Runtime was compared with the interpreter on 256 images or 4 sentences: no bit differed."""


def digits_said(found: Mapping[str, Any]) -> list[str]:
    rows = [(str(seed), *(f"{each[kind]:.2%}" for kind in ("float", "weights", "integer")),
             f"{100 * (each['integer'] - each['float']):+.2f}", str(each["changed"]), f"{each['bytes']:,}")
            for seed, each in enumerate(found["seeds"])]
    worst = max(100 * (each["float"] - each["integer"]) for each in found["seeds"])
    held = "held" if worst <= 0.2 else "missed"
    where = (f"{found['train']:,} images of MNIST's test half train, its other {found['test']:,} judge"
             if found["split"] else "MNIST's own halves")
    heads = ("seed", "float32", "int8 weights", "integers alone", "points", "answers changed", "bytes")
    return ["## A CNN on MNIST", "Three convolutions with BatchNorm, a residual sum, pooling and a head, "
            f"trained for {EPOCHS} epochs; {where}.", table(heads, rows),
            f"Goal: within 0.2 points of float. It is {held}: {worst:.2f} points lost at worst."]


def encoder_said(found: Mapping[str, Any]) -> list[str]:
    rows = [(name, f"{each['mean']:.4f}", f"{each['least']:.4f}") for name, each in found["rows"].items()]
    return ["## MiniLM-L6", f"{MODEL}, {SENTENCES} training sentences of SST-2 for the ranges; cosine of the "
            f"sentence embeddings to the original's, over {found['judged']} test sentences.",
            table(("", "mean cosine", "least cosine"), rows)]


def times_said(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return ["Latency was not measured: the machine was busy."]
    times = [(name, f"{each['bytes'] / 1e6:.1f}",
              *(cell for batch in ("1", "8") for cell in (
                  f"{each['latency'][batch]['median']:.1f}",
                  f"{each['ratio'][batch]:.2f} ±{each['spread'][batch] / 2:.0%}")))
             for name, each in found.items()]
    return ["Latency in ONNX Runtime, 64 tokens, in turns; ratios are to float32.",
            table(("", "MB", "batch 1 ms", "times as fast", "batch 8 ms", "times as fast"), times),
            "The integer file rescales exactly, by plain operators on 64-bit words between the kernels that "
            "multiply; its purpose is processors without floats, and to prove the integers right."]


if __name__ == "__main__":
    main()
