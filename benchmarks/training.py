"""What training gives, on real data: fine-tuning, half the blocks, recovery of what was compressed.

    python benchmarks/training.py --data DATA --work WORK [--seeds 3] [--subset 2000] [--only NAME ...]

DATA holds ``sst2/train.tsv``, ``dev.tsv``, ``test.tsv`` (columns sentence, label). The encoder is MiniLM-L6
(``all-minilm-l6-v2``). ``--gemma HF_FOLDER --text FILE`` adds the language model: the folder that
``permuted_gemma.py`` wrote, rounded to 3 bits, its scales and norms tuned by distillation.

    finetune   MiniLM-L6 with a new head, all weights and LoRA
    distil     half of its blocks by DistilBERT's recipe; parameters, accuracy, seconds per sentence
    recover    half of the weights pruned by magnitude: accuracy before and after
    gemma      KL to the original before and after

``--subset`` takes that many sentences and is for trying; the table then says so. Results are kept in
WORK/training.json; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Ledger, fingerprint, source_sha256, table, write_page

MODEL = "all-minilm-l6-v2"
FLOORS = ("training", "core", "techniques", "models", "run")
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "training.md"


def main() -> None:
    """Run what is asked for and is not in the ledger; write the page."""
    arguments = _arguments()
    if arguments.stage:
        print(json.dumps(STAGES[arguments.stage](arguments, arguments.seed)))
        return
    ledger, found = Ledger(arguments.work / "training.json"), {}
    names = arguments.only or [name for name in STAGES if name != "gemma" or arguments.gemma]
    for name in names:
        for seed in range(arguments.seeds if name != "gemma" else 1):
            key = fingerprint(name, seed, arguments.subset, arguments.epochs, arguments.steps,
                              source_sha256(*FLOORS))
            if ledger.get(key) is None:
                print(f"{name}, seed {seed}", flush=True)
                ledger.put(key, _fresh(name, seed))
            found.setdefault(name, []).append(ledger.get(key))
    rows = [row for name, results in found.items() for row in _rows(name, results)]
    text = table(("what", "before", "after", "seconds"), rows)
    print(text)
    if arguments.page:
        note = f"On {arguments.subset} sentences only, to try it." if arguments.subset else \
            "SST-2's 60,615 training sentences; accuracy on its 873 test sentences, the state chosen on dev."
        write_page(PAGE, "Training", "python benchmarks/training.py", [note, text])


def _fresh(name: str, seed: int) -> Any:
    """One stage in a process of its own; the last line it prints is its result."""
    command = [sys.executable, __file__, *sys.argv[1:], "--stage", name, "--seed", str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}, seed {seed}: exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def _rows(name: str, results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Medians over the seeds."""
    def middle(key: str, which: str) -> str:
        values = [each[which][key] for each in results if each[which].get(key) is not None]
        return f"{statistics.median(values):.4f}" if values else ""

    return [(f"{name}: {key}", middle(key, "before"), middle(key, "after"),
             f"{statistics.median(each['seconds'] for each in results):.0f}") for key in results[0]["after"]]


# ---- stages --------------------------------------------------------------------------------------------


def _tables(arguments: argparse.Namespace) -> dict[str, Path]:
    """The tables, or their first lines."""
    found = {name: arguments.data / "sst2" / f"{name}.tsv" for name in ("train", "dev", "test")}
    if not arguments.subset:
        return found
    for name, path in found.items():
        part = arguments.work / f"{name}-{arguments.subset}.tsv"
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text("\n".join(path.read_text().splitlines()[:arguments.subset + 1]) + "\n")
        found[name] = part
    return found


def _job(arguments: argparse.Namespace, seed: int, model: str, out: str, **more: Any) -> Any:
    from rarefy.run.training import Training, train
    from rarefy.training.loop import Settings

    tables = _tables(arguments)
    rate = more.pop("rate")
    settings = Settings(epochs=arguments.epochs, steps=arguments.steps, batch=32, rate=rate, seed=seed,
                        patience=4)
    folder = arguments.work / f"{out}-{seed}-{arguments.subset}"
    if (folder / "receipt.json").is_file():
        return folder, json.loads((folder / "receipt.json").read_text())
    return folder, train(Training(model, folder, (str(tables["train"]),), (str(tables["dev"]),),
                                  settings=settings, **more)).receipt


def _accuracy(folder: Path | str, arguments: argparse.Namespace, tensors: Any = None) -> dict[str, float]:
    """On the test sentences, with how long one takes and how many numbers the network has."""
    import time

    import torch

    from rarefy.calibration.examples import read_examples
    from rarefy.models.opening import open_any

    network: Any = open_any(folder)
    examples = read_examples(network, str(_tables(arguments)["test"])).by_length()
    started, answers = time.perf_counter(), []
    with torch.no_grad():
        for batch in examples.batches(32):
            answers.append(network.run(batch, tensors).argmax(1))
    seconds = (time.perf_counter() - started) / len(examples)
    right = torch.cat(answers) == examples.labels
    return {"accuracy": float(right.float().mean()), "milliseconds per sentence": 1000 * seconds,
            "million parameters": network.parameters / 1e6}


def finetune(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """All weights; the teacher of the other stages."""
    folder, receipt = _job(arguments, seed, MODEL, "teacher", rate=5e-5)
    adapted, other = _job(arguments, seed, MODEL, "lora", rate=3e-4, adapter="lora")
    after = {"accuracy": _accuracy(folder, arguments)["accuracy"],
             "accuracy with LoRA": _accuracy(adapted, arguments)["accuracy"]}
    return {"before": {"accuracy": receipt["before"]["accuracy"],
                       "accuracy with LoRA": other["before"]["accuracy"]}, "after": after,
            "seconds": receipt["curve"]["seconds"]}


def distil(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Half of the blocks, by the recipe of DistilBERT but for the length of training."""
    from rarefy.run.training import Term

    teacher, _ = _job(arguments, seed, MODEL, "teacher", rate=5e-5)
    student, receipt = _job(arguments, seed, str(teacher), "student", rate=1e-4, student="half",
                            objectives=(Term("triple"),))
    return {"before": _accuracy(teacher, arguments), "after": _accuracy(student, arguments),
            "seconds": receipt["curve"]["seconds"]}


def recover(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Half of the blocks' weights pruned by magnitude, what remains taught by the teacher."""
    import torch

    from rarefy.calibration.examples import read_examples
    from rarefy.core.nodes import Dense, Masked
    from rarefy.models.opening import open_any
    from rarefy.techniques.distill.soft_labels import SoftLabels
    from rarefy.training.examples import Rows
    from rarefy.training.loop import Settings
    from rarefy.training.signals import Distillation
    from rarefy.training.tune import Tuning, tune

    folder, _ = _job(arguments, seed, MODEL, "teacher", rate=5e-5)
    network: Any = open_any(folder)
    trees = {}
    for site in network.map.sites:
        if site.block is not None:
            weight = network.weight(site.path)
            bound = weight.abs().flatten().kthvalue(round(0.5 * weight.numel())).values
            trees[site.path] = Masked(weight.abs() > bound, Dense(weight.clone()))
    parts = []
    for name in ("train", "dev"):
        found = read_examples(network, str(_tables(arguments)[name]))
        parts.append(Rows({**found.inputs, "labels": found.labels}))
    tensors = network.tensors(trees.get)
    before = _accuracy(folder, arguments, tensors)
    settings = Settings(epochs=arguments.epochs, steps=arguments.steps, rate=1e-4, seed=seed, patience=4)
    tuned = tune(network, trees, Tuning(frozenset({"weights", "norms", "biases"}), where=tuple(trees)),
                 Distillation(network, network, ((1.0, SoftLabels()),)), parts[0], settings, held=parts[1],
                 folder=arguments.work / f"recover-{seed}-{arguments.subset}")
    kept = sum(int(tree.keep.sum()) for tree in tuned.trees.values() if isinstance(tree, Masked))
    total = sum(tree.keep.numel() for tree in tuned.trees.values() if isinstance(tree, Masked))
    torch.testing.assert_close(kept / total, 0.5, atol=0.01, rtol=0)
    after = _accuracy(folder, arguments, network.tensors(tuned.trees.get) | tuned.params)
    return {"before": {"accuracy": before["accuracy"]}, "after": {"accuracy": after["accuracy"]},
            "seconds": tuned.curve.seconds}


def gemma(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """3-bit codes stand still; scales and norms learn from the original's answers to its own text."""
    import torch

    from rarefy.calibration.samples import sample_windows
    from rarefy.calibration.text import windows
    from rarefy.core.edit import edit
    from rarefy.core.nodes import Dense
    from rarefy.measure.divergence import Reference
    from rarefy.models.model import open_model
    from rarefy.models.runner import Runner
    from rarefy.numerics.grids import integer_grid
    from rarefy.techniques.distill.forward_kl import ForwardKL
    from rarefy.techniques.quantize.rtn import RTN
    from rarefy.training.examples import Rows
    from rarefy.training.loop import Settings
    from rarefy.training.signals import Distillation
    from rarefy.training.teacher import answered
    from rarefy.training.tune import Tuning, tune

    model = open_model(arguments.gemma)
    trees = {}
    for site in model.map.sites:
        if site.block is not None:
            weight = model.weight(site.path)
            trees[site.path], _ = edit(site.path, Dense(weight), weight, RTN(integer_grid(3, 64)), "rtn",
                                       None, torch.Generator())
    count = arguments.windows
    text = sample_windows(model, count=count, length=256, seed=seed)
    rows = [Rows({"input_ids": part}) for part in text.split([count - count // 8, count // 8])]
    kept = [answered(model, part, arguments.work / "gemma", k=64) for part in rows]
    reference = Reference(model, windows(arguments.text, model.tokenizer, length=256, count=16, seed=1))
    before = reference.compare(Runner(model, trees.get)).kl_mean
    settings = Settings(epochs=arguments.epochs, steps=arguments.steps, batch=8, micro=2, rate=1e-4,
                        seed=seed, checkpointing=True)
    tuned = tune(model, trees, Tuning(frozenset({"scales", "norms"}), where=tuple(trees)),
                 Distillation(model, None, ((1.0, ForwardKL()),)), kept[0], settings, held=kept[1],
                 folder=arguments.work / f"gemma-{count}")
    changed = {**tuned.trees, **tuned.params}
    return {"before": {"KL, nats per token": before},
            "after": {"KL, nats per token": reference.compare(Runner(model, changed.get)).kl_mean},
            "seconds": tuned.curve.seconds}


STAGES: dict[str, Callable[[argparse.Namespace, int], dict[str, Any]]] = {
    "finetune": finetune, "distil": distil, "recover": recover, "gemma": gemma}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--subset", type=int, default=0, help="sentences of each table (0: all)")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=0, help="steps of every run (0: as epochs say)")
    parser.add_argument("--windows", type=int, default=512, help="windows that Gemma writes")
    parser.add_argument("--gemma", type=Path)
    parser.add_argument("--text", type=str, default="python-docs")
    parser.add_argument("--only", nargs="*", choices=list(STAGES))
    parser.add_argument("--page", action="store_true", help="write the page of the documentation")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
