"""A language model trained after compression: what comes back, and what adapters on 4 bits cost.

    python benchmarks/recovery.py --gemma HF_FOLDER --data DATA --work WORK [--steps 60]

HF_FOLDER is what ``permuted_gemma.py`` wrote. DATA holds ``wikitext2/valid.txt``, which is trained on, and
``test.raw.txt``, which judges and does nothing else.

    2:4, low rank, 3 bits   Gemma's blocks compressed without a look at data; then what is left of them learns
                            from the original's answers: kept weights, factors, or scales. KL to the original
                            before and after
    GPTQ 2 bits by blocks   from codes that are as good as rounding after training makes them: each block
                            learns codes and scales from its original, then all scales learn (EfficientQAT)
    full, LoRA, QLoRA       Gemma fine-tuned on the text: everything, adapters beside float weights, adapters
                            beside normal-float codes of 4 bits, rounded to nearest as in the paper, by GPTQ,
                            by GPTQ with keys and values in 8 bits and then block by block, where scales learn
                            beside the adapters. Loss on other text of the kind, peak memory

Every row is a process of its own, so that its memory is its own. Finished rows lie in WORK/recovery.json and
are not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import Ledger, fingerprint, run_fresh, source_sha256, table, write_page

RECOVERIES = {"2:4": ("weights", 2e-5), "low rank": ("factors", 1e-4), "3 bits": ("scales", 3e-4),
              "GPTQ 2 bits by blocks": ("scales", 1e-4)}  # and norms; rates
TUNINGS = ("full", "LoRA", "QLoRA", "QLoRA on GPTQ", "QLoRA by blocks")
BY_BLOCKS = " by blocks"
FINE = ("k", "v")  # in 8 bits under "QLoRA by blocks": they are few, and what they lose all heads lose
LENGTH, BATCH, MICRO = 128, 4, 2
WINDOWS, HELD, JUDGED = 512, 16, 24  # to train on, to choose the state, to judge
PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "recovery.md"
SOURCES = ("training/loop.py", "training/tune.py", "training/teacher.py", "training/blockwise.py",
           "core/tune.py", "core/latent.py", "techniques/adapt/lora.py", "techniques/quantize/lsq.py")


def main() -> None:
    """Run what the ledger does not hold; write the page."""
    given = _arguments()
    if given.row:
        result = (tuned if given.row in TUNINGS else recovered)(given.row, given)
        (given.work / f"{_file(given.row)}.row").write_text(json.dumps(result))
        return
    ledger, found = Ledger(given.work / "recovery.json"), dict[str, dict[str, Any]]()
    for name in given.only:
        key = fingerprint(name, given.steps, LENGTH, BATCH, WINDOWS, given.gemma.resolve().name,
                          source_sha256(*SOURCES))
        if ledger.get(key) is None:
            print(name, flush=True)
            cost = run_fresh([sys.executable, __file__, *sys.argv[1:], "--row", name],
                             given.work / f"{_file(name)}.log")
            result = json.loads((given.work / f"{_file(name)}.row").read_text())
            ledger.put(key, {**result, "peak": cost.peak_rss})
            print(ledger.get(key), flush=True)
        found[name] = ledger.get(key)
    write_page(PAGE, "Training a compressed language model",
               f"python benchmarks/recovery.py --steps {given.steps}",
               _parts(found, given.steps))


def _file(name: str) -> str:
    return "".join(each if each.isalnum() else "-" for each in name)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gemma", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", nargs="*", choices=[*RECOVERIES, *TUNINGS], default=[*RECOVERIES, *TUNINGS])
    parser.add_argument("--row", choices=[*RECOVERIES, *TUNINGS], help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- rows, each in a process of its own ----------------------------------------------------------------


def recovered(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """KL to the original before and after its compressed form has learnt from it."""
    import torch

    from rarefy.measure.divergence import Reference
    from rarefy.models.runner import Runner
    from rarefy.techniques.distill.forward_kl import ForwardKL
    from rarefy.training.signals import Distillation
    from rarefy.training.teacher import answered
    from rarefy.training.tune import Tuning, tune

    model, train, held = _lesson(given, labels=False)
    trees = _compressed(model, name, train.tensors["input_ids"])
    reference = Reference(model, _windows(model, given.data / "wikitext2" / "test.raw.txt", JUDGED, 1))
    before = reference.compare(Runner(model, trees.get)).kl_mean
    if name.endswith(BY_BLOCKS):
        trees = _by_blocks(model, trees, train.tensors["input_ids"])
    kept = [answered(model, rows, given.work / "answers") for rows in (train, held)]
    moves, rate = RECOVERIES[name]
    tuned = tune(model, trees, Tuning(frozenset({moves, "norms"}), where=tuple(trees)),
                 Distillation(model, None, ((1.0, ForwardKL()),)), kept[0], _settings(given.steps, rate),
                 held=kept[1], folder=given.work / _file(name))
    torch.manual_seed(0)
    after = reference.compare(Runner(model, {**tuned.trees, **tuned.params}.get)).kl_mean
    return {"before": before, "after": after, "seconds": tuned.curve.seconds}


def tuned(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """The loss on text that was held out, before and after fine-tuning."""

    from rarefy.techniques.adapt.lora import LoRA
    from rarefy.techniques.distill.hard_labels import HardLabels
    from rarefy.training.signals import Distillation
    from rarefy.training.tune import Tuning, tune

    model, train, held = _lesson(given, labels=True)
    paths = tuple(site.path for site in model.map.sites if site.block is not None)
    trees = _compressed(model, name, train.tensors["input_ids"]) if name.startswith("QLoRA") else {}
    if name.endswith(BY_BLOCKS):
        trees = _by_blocks(model, trees, train.tensors["input_ids"])
    adapter = LoRA(8, scales=name.endswith(BY_BLOCKS))
    tuning = Tuning() if name == "full" else Tuning(frozenset(), adapter, where=paths)
    settings = _settings(given.steps, 5e-5 if name == "full" else 1e-3)
    done = tune(model, trees, tuning, Distillation(model, None, ((1.0, HardLabels()),)), train, settings,
                held=held)
    return {"before": done.curve.points[0].loss, "after": done.curve.best, "seconds": done.curve.seconds,
            "bits": _bits(trees)}


def _lesson(given: argparse.Namespace, *, labels: bool) -> tuple[Any, Any, Any]:
    """The model, windows to train on and windows that choose the state."""
    import torch

    from rarefy.calibration.text import split_windows
    from rarefy.models.model import open_model
    from rarefy.training.examples import LABELS, Rows

    torch.set_num_threads(1)
    model = open_model(given.gemma)
    tokens = _windows(model, given.data / "wikitext2" / "valid.txt", WINDOWS, 0)
    parts = split_windows(tokens, HELD, seed=0)
    if not labels:
        return model, *(Rows({"input_ids": part}) for part in parts)
    return model, *(Rows({"input_ids": part[:, :-1].contiguous(), LABELS: part[:, 1:].contiguous()})
                    for part in parts)


def _windows(model: Any, text: Path, count: int, seed: int) -> Any:
    from rarefy.calibration.text import windows

    return windows(str(text), model.tokenizer, length=LENGTH, count=count, seed=seed)


def _compressed(model: Any, name: str, tokens: Any) -> dict[str, Any]:
    """Every matrix of the blocks; for GPTQ block by block, on what compressed blocks hand on."""
    import torch

    from rarefy.calibration.evidence import Stream
    from rarefy.core.edit import edit
    from rarefy.core.nodes import Dense, Node
    from rarefy.models.runner import Runner

    trees = dict[str, Node]()
    stream = Stream(Runner(model, trees.get), tokens) if _techniques(name, "q")[0].needs else None
    for block in range(model.map.blocks):
        paths = [site.path for site in model.map.in_block(block)]
        seen = {} if stream is None else stream.inputs(block, set(paths))
        for path in paths:
            weight = model.weight(path)
            trees[path] = Dense(weight)
            for technique in _techniques(name, model.map.by_path[path].role):
                trees[path], _ = edit(path, trees[path], weight, technique, name, seen.get(path),
                                      torch.Generator())
        if stream is not None and block + 1 < model.map.blocks:
            stream.advance(block)
    return trees


def _by_blocks(model: Any, trees: Mapping[str, Any], tokens: Any) -> dict[str, Any]:
    """The same codes, each block trained on the text; what has 8 bits stays."""
    from rarefy.techniques.quantize.lsq import LSQ
    from rarefy.training.blockwise import Blockwise, reconstruct

    grid = next(tree.grid for path, tree in trees.items() if model.map.by_path[path].role == "q")
    settings = Blockwise(sequences=WINDOWS, epochs=1, rate=3e-5,
                         where=tuple(path for path, tree in trees.items() if tree.grid == grid))
    return {**trees, **reconstruct(model, LSQ(grid), tokens, settings, before=trees)}


def _techniques(name: str, role: str) -> tuple[Any, ...]:
    from rarefy.numerics.grids import integer_grid, nf4_grid
    from rarefy.techniques.factorize.svd import SVD
    from rarefy.techniques.prune.magnitude import Magnitude
    from rarefy.techniques.quantize.gptq import GPTQ
    from rarefy.techniques.quantize.rtn import RTN

    return {"2:4": (Magnitude(pattern="2:4"),), "low rank": (SVD(ratio=0.75),),
            "3 bits": (RTN(integer_grid(3, 64)),),
            "GPTQ 2 bits by blocks": (GPTQ(integer_grid(2, 64, symmetric=False)),),
            "QLoRA": (RTN(nf4_grid(64, over=2)),), "QLoRA on GPTQ": (GPTQ(nf4_grid(64, over=2)),),
            "QLoRA by blocks": (GPTQ(integer_grid(8, 64) if role in FINE else nf4_grid(32)),)}[name]


def _bits(trees: Mapping[str, Any]) -> float:
    """Of a weight in the blocks, scales counted."""
    import math

    return sum(tree.bits() for tree in trees.values()) / max(sum(math.prod(tree.shape)
                                                                  for tree in trees.values()), 1)


def _settings(steps: int, rate: float) -> Any:
    from rarefy.training.loop import Settings

    return Settings(steps=steps, batch=BATCH, micro=MICRO, rate=rate, checkpointing=True,
                    gate_every=max(1, steps // 3))


# ---- the page ------------------------------------------------------------------------------------------


def _blocks_first(name: str) -> str:
    return "each block (on a grid with zeros), then " if name.endswith(BY_BLOCKS) else ""


def _parts(found: Mapping[str, dict[str, Any]], steps: int) -> list[str]:
    head = (f"Gemma-3-270M with its channels relabelled, one thread, {steps} steps of {BATCH} windows of "
            f"{LENGTH} tokens of WikiText-2's validation text. KL is on {JUDGED} windows of its test text.")
    parts = [head]
    recoveries = [(name, f"{_blocks_first(name)}{RECOVERIES[name][0]} and norms", f"{each['before']:.3f}",
                   f"{each['after']:.3f}", f"{1 - each['after'] / each['before']:.0%}")
                  for name, each in found.items() if name in RECOVERIES]
    if recoveries:
        parts += ["## Recovery", table(("blocks", "what learns", "KL before", "after", "closed"), recoveries)]
        asked = [row[0] for row in recoveries if not row[0].startswith("GPTQ")]
        missed = [name for name in asked if found[name]["after"] > 0.5 * found[name]["before"]]
        parts.append("The goal, half of the KL that compression opened, is " +
                     (f"missed for {', '.join(missed)}." if missed else f"met for {', '.join(asked)}.") +
                     " The row of GPTQ asks another question: whether training beats the best that rounding "
                     "after training does.")
    tunings = [(name, f"{each['bits']:.2f}" if each["bits"] else "float32", f"{each['before']:.3f}",
                f"{each['after']:.3f}", f"{each['peak'] / 1e6:.0f} MB")
               for name, each in found.items() if name in TUNINGS]
    if tunings:
        titles = ("what moves", "bits of a weight that stands", "loss of the first batch", "loss held out",
                  "peak memory")
        parts += ["## Fine-tuning", table(titles, tunings)]
    if {"LoRA", "full"} <= found.keys():
        apart = [f"{name} {found[name]['after'] / found['LoRA']['after'] - 1:+.1%}, at "
                 f"{found[name]['peak'] / found['full']['peak']:.1%} of the memory"
                 for name in TUNINGS if name.startswith("QLoRA") and name in found]
        parts.append("The goal is a loss within 1% of LoRA's on the float model, in under half of the memory "
                     f"of full fine-tuning: {'; '.join(apart)}.")
    return parts


if __name__ == "__main__":
    main()
