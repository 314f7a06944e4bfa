"""What does attention cost that looks at less, as texts grow, and what becomes of a trained model's answers?

    OMP_NUM_THREADS=1 python benchmarks/attention.py --model HF_FOLDER --data DATA --work WORK

HF_FOLDER is the permuted Gemma that ``permuted_gemma.py`` writes; DATA holds ``wikitext2/test.raw.txt`` and
``sst2/{train,dev,test}.tsv``.

    curve      one call of attention, Gemma's heads and MiniLM's, from 512 to 8,192 tokens
    prefill    all blocks of Gemma over 2,048 and 8,192 tokens, beside transformers' own attention
    language   KL to Gemma's own answers when its blocks that look at everything do so no more
    encoder    distance to MiniLM's vectors of sentences, converted and after a short distillation

Each in a process of its own; what is in WORK/attention.json is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from harness import Ledger, fingerprint, source_sha256, table, write_page

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "attention.md"
SOURCES = ("numerics/attention.py", "models/attending.py", "techniques/attention/window.py",
           "techniques/attention/strided.py", "techniques/attention/linformer.py",
           "techniques/attention/linear_attention.py")
LENGTHS = (512, 1024, 2048, 4096, 8192)
PREFILL = (2048, 8192)
STEPS = 60


def main() -> None:
    """What is not in the ledger yet; the page."""
    arguments = _arguments()
    if arguments.stage:
        print(json.dumps(STAGES[arguments.stage](arguments)))
        return
    ledger, found = Ledger(arguments.work / "attention.json"), {}
    for name in STAGES:
        key = fingerprint(name, source_sha256(*SOURCES), STEPS)
        if ledger.get(key) is None and name in (arguments.only or STAGES):
            print(name, flush=True)
            ledger.put(key, _fresh(name))
        if ledger.get(key) is not None:
            found[name] = ledger.get(key)
    write_page(PAGE, "Attention that looks at less",
               "python benchmarks/attention.py --model GEMMA --data DATA --work WORK", page(found))


def _fresh(name: str) -> Any:
    command = [sys.executable, __file__, *sys.argv[1:], "--stage", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- one call

def curve(arguments: argparse.Namespace) -> Any:
    """Milliseconds of the best of three calls, by kind of heads, technique and length."""
    import torch

    from rarefy.core.attention import Attention
    from rarefy.models.attending import whole
    from rarefy.techniques.attention.linear_attention import LinearAttention
    from rarefy.techniques.attention.linformer import Linformer
    from rarefy.techniques.attention.strided import Strided
    from rarefy.techniques.attention.window import Window

    techniques: dict[str, dict[str, Any]] = {
        "Gemma: 4 heads of 256, one of keys and values, causal": {
            "everything": None, "window 512": Window(512, 4), "strided 128": Strided(128)},
        "MiniLM: 12 heads of 32, both sides": {
            "everything": None, "window 128": Window(128, 0), "strided 64": Strided(64),
            "linformer 64": Linformer(64, LENGTHS[-1]), "linear, 64 random": LinearAttention(count=64),
            "linear, elu": LinearAttention("elu")}}
    shapes = ((4, 1, 256, True), (12, 12, 32, False))
    found: dict[str, Any] = {}
    for (kind, ways), (heads, groups, width, causal) in zip(techniques.items(), shapes, strict=True):
        for name, technique in ways.items():
            learned = technique.learned(width, torch.Generator().manual_seed(0)) if technique else {}
            for length in LENGTHS:
                query = torch.randn(1, heads, length, width)
                key, value = (torch.randn(1, groups, length, width) for _ in range(2))
                call = Attention(query, key, value, width**-0.5, causal)
                if technique:
                    how: Callable[[], Any] = partial(technique.attend, call, learned)
                else:
                    how = partial(whole, call)
                with torch.no_grad():
                    took = min(_took(how) for _ in range(3))
                found.setdefault(kind, {}).setdefault(name, {})[length] = 1e3 * took
    return found


def _took(work: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    """Seconds; of the processor they are, with one thread, those of a machine that does nothing else."""
    started = clock()
    work()
    return clock() - started


# ---- a language model

def prefill(arguments: argparse.Namespace) -> Any:
    """Seconds for all blocks of Gemma, without its head."""
    import torch

    from rarefy.export.native import network_of
    from rarefy.models.attending import attending
    from rarefy.models.model import open_model
    from rarefy.techniques.attention.window import Window

    model = open_model(arguments.model)
    ways = {"transformers": network_of(model).model,
            "window 512 in all blocks": network_of(attending(model, "window", Window(512, 4))).model}
    found: dict[str, Any] = {name: {} for name in ways}
    with torch.no_grad():
        for network in ways.values():
            network(torch.zeros(1, 64, dtype=torch.int64))
        for length in PREFILL:
            tokens = torch.randint(5, 10_000, (1, length), generator=torch.Generator().manual_seed(0))
            for name, network in ways.items():
                found[name][length] = _took(partial(network, tokens, use_cache=False), time.perf_counter)
    return found


def language(arguments: argparse.Namespace) -> Any:
    """KL in nats per token over the second half of a window of 1,024 tokens."""
    from rarefy.calibration.text import windows
    from rarefy.measure.divergence import Reference
    from rarefy.models.attending import attending
    from rarefy.models.model import open_model
    from rarefy.models.runner import Runner
    from rarefy.techniques.attention.strided import Strided
    from rarefy.techniques.attention.window import Window

    model = open_model(arguments.model)
    text = str(arguments.data / "wikitext2" / "test.raw.txt")
    tokens = windows(text, model.tokenizer, length=1024, count=1, seed=0)
    reference, found = Reference(model, tokens, skip=512), {}
    ways: dict[str, tuple[str, Any]] = {
        "window 128, 4 sinks": ("window", Window(128, 4)), "window 128, none": ("window", Window(128, 0)),
        "strided 64": ("strided", Strided(64))}
    for name, (file, technique) in ways.items():
        summary = reference.compare(Runner(attending(model, file, technique)))
        found[name] = {"kl": summary.kl_mean, "top1": summary.top1, "perplexity": summary.perplexity,
                       "original": summary.perplexity_original, "keys": technique.keys(1024, True)}
    return found


# ---- an encoder

def encoder(arguments: argparse.Namespace) -> Any:
    """1 - cosine to MiniLM's vectors of test sentences, before and after learning from training sentences."""
    from rarefy.calibration.examples import read_examples
    from rarefy.measure.task import Judge
    from rarefy.models.attending import attending
    from rarefy.models.opening import open_any
    from rarefy.techniques.attention.linear_attention import LinearAttention
    from rarefy.techniques.attention.linformer import Linformer
    from rarefy.techniques.attention.strided import Strided
    from rarefy.techniques.attention.window import Window

    network: Any = open_any("all-minilm-l6-v2")
    sst2 = arguments.data / "sst2"
    judge = Judge(network, read_examples(network, str(sst2 / "test.tsv")))
    train = read_examples(network, str(sst2 / "train.tsv"), count=32 * STEPS, seed=0)
    ways: dict[str, tuple[str, Any, bool]] = {
        "window 8": ("window", Window(8, 1), False), "strided 8": ("strided", Strided(8), False),
        "linformer 16 of 64": ("linformer", Linformer(16, 64), True),
        "linear, 128 random": ("linear_attention", LinearAttention(count=128), False),
        "linear, elu": ("linear_attention", LinearAttention("elu"), True)}
    found: dict[str, Any] = {}
    for name, (file, technique, learns) in ways.items():
        converted: Any = attending(network, file, technique)
        found[name] = {"before": judge.compare(converted).mean}
        if learns:
            found[name] |= _distilled(network, converted, train, judge)
    return found


def _distilled(network: Any, converted: Any, train: Any, judge: Any) -> dict[str, float]:
    """The blocks of ``converted`` learn the original's vectors."""
    from rarefy.techniques.distill.cosine import Cosine
    from rarefy.training.examples import Rows
    from rarefy.training.loop import Settings
    from rarefy.training.signals import Distillation
    from rarefy.training.tune import Tuning, tune

    where = tuple(site.path for site in converted.map.sites if site.block is not None)
    tuning = Tuning(frozenset({"weights", "norms", "biases"}), where=where, whole=("*.attending.*",))
    lesson = Distillation(converted, network, ((1.0, Cosine(of="rows")),))
    tuned = tune(converted, {}, tuning, lesson, Rows(train.inputs), Settings(epochs=1, batch=32, rate=2e-4))
    for path, value in tuned.params.items():
        converted.module.get_parameter(path).data.copy_(value)
    return {"after": judge.compare(converted, tuned.trees.get).mean, "seconds": tuned.curve.seconds}


STAGES: dict[str, Callable[[argparse.Namespace], Any]] = {
    "curve": curve, "prefill": prefill, "language": language, "encoder": encoder}


# ---- the page

def page(found: dict[str, Any]) -> list[str]:
    """A section for everything that was measured."""
    missing = [name for name in STAGES if name not in found]
    parts = [SECTIONS[name](one) for name, one in found.items()]
    return parts + ([f"Not measured yet: {', '.join(missing)}."] if missing else [])


def _curve(found: dict[str, Any]) -> str:
    tables = [kind + "\n\n" + table(
        ("", *(f"{length:,}" for length in LENGTHS), "growth"),
        [[name, *(f"{took[str(length)]:.1f}" for length in LENGTHS),
          f"{math.log2(took['8192'] / took['1024']) / 3:.2f}"] for name, took in ways.items()])
        for kind, ways in found.items()]
    said = ("## One call of attention\n\nMilliseconds of the processor, float32, one thread. *Growth* is the "
            "exponent from 1,024 to 8,192 tokens: 1 is linear, 2 is a square.")
    return "\n\n".join([said, *tables])


def _prefill(found: dict[str, Any]) -> str:
    rows = [[name, *(f"{one[str(length)]:.1f}" for length in PREFILL)] for name, one in found.items()]
    return ("## Gemma-3-270M, all blocks\n\nSeconds of wall clock, one thread, on a machine that did other "
            "things as well. Three of its 18 blocks look at everything and become windows; the other 15 have "
            "a window of 512 already, which transformers' kernel masks and ours skips.\n\n"
            + table(("", *(f"{length:,} tokens" for length in PREFILL)), rows))


def _language(found: dict[str, Any]) -> str:
    rows = [[name, f"{one['keys']:.0f}", f"{one['kl']:.4f}", f"{one['top1']:.1%}", f"{one['perplexity']:.2f}",
             f"{one['original']:.2f}"] for name, one in found.items()]
    return ("## Gemma's answers\n\nWithout any training, WikiText-2 test text, positions 512 to 1,023.\n\n"
            + table(("", "keys a query", "KL, nats", "same token", "perplexity", "original's"), rows))


def _encoder(found: dict[str, Any]) -> str:
    rows = [[name, f"{one['before']:.4f}", f"{one['after']:.4f}" if "after" in one else "",
             f"{one['seconds']:.0f}" if "after" in one else ""] for name, one in found.items()]
    said = ("## MiniLM's answers\n\nVectors of SST-2's test sentences, 1 - cosine; distilled for "
            f"{STEPS} steps of 32 training sentences where it says so.\n\n")
    return said + table(("", "converted", "distilled", "seconds"), rows)


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "curve": _curve, "prefill": _prefill, "language": _language, "encoder": _encoder}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=list(STAGES), help="what to measure now")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
