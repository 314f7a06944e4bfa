"""How fast and how faithful are exported networks where users run them, beside the original and the rivals?

    python benchmarks/runtimes.py --data DATA --work WORK                  # MiniLM; about ten minutes
    python benchmarks/runtimes.py --data DATA --work WORK --gemma FOLDER   # and a language model
    python benchmarks/runtimes.py --data DATA --work WORK --exits FOLDER   # and a classifier with exits

Sentence embeddings of MiniLM-L6 in ONNX Runtime and OpenVINO: the files of ``rarefy compress`` at two sizes
and of a recipe that trains (``recipes/embeddings_12mb.yaml``), the original as ``torch.onnx.export`` and
OpenVINO's converter write it, ONNX Runtime's own dynamic 8 bits, and NNCF's post-training quantization
where ``--nncf`` names a Python that has it. Answers are compared in the runtime as it computes by itself,
on SST-2's development sentences; calibration, ours and NNCF's, and training see sentences of the training
set. Speed is measured in turns (``runtimes.bench``) with 64 tokens. ``--own`` measures processor time of
one thread, which other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from harness import Ledger, fingerprint, run_fresh, source_sha256, table, write_page
from rarefy.calibration.examples import Examples, read_examples
from rarefy.core.nodes import Quantized
from rarefy.export.decoder import export_decoder, trace_decoder
from rarefy.export.networks import live
from rarefy.export.onnx import OnnxSettings, export_onnx
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.models.opening import open_any
from rarefy.numerics.grids import integer_grid
from rarefy.numerics.rounding import encode, fit
from rarefy.run.recipe import read_recipe, write_recipe
from rarefy.runtimes.bench import bytes_of, compare, compare_writers, engine_of
from rarefy.runtimes.exit_graph import export_exits
from rarefy.runtimes.exits import load as load_exits
from rarefy.runtimes.session import Session

MODEL, LENGTH, JUDGED, SHOWN = "all-minilm-l6-v2", 64, 256, 300
SENTENCES, CALLS = 200, 5  # that leave early, and calls of each
SECTIONS = ("minilm", "gemma", "exits")
SIZES = ("25.5MB", "12.7MB")  # of the whole folder, tokenizer (0.7 MB) included
ENGINES = {"onnxruntime": "model.onnx", "openvino": "model.xml"}
ROOT = Path(__file__).resolve().parent.parent
PAGE, RECIPE = ROOT / "docs" / "benchmarks" / "runtimes.md", ROOT / "recipes" / "embeddings_12mb.yaml"
NNCF = """
import sys, numpy, openvino, nncf
source, samples, out = sys.argv[1:]
held = numpy.load(samples)
rows = [{name: held[name][k:k + 1] for name in held.files} for k in range(len(held["input_ids"]))]
done = nncf.quantize(openvino.Core().read_model(source), nncf.Dataset(rows),
                     model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows))
openvino.save_model(done, out, compress_to_fp16=False)
"""


@dataclass(frozen=True)
class File:
    """One row: what it is, where it lies, whether the runtime shall compute exactly what it stores."""

    name: str
    path: Path
    exact: bool = False


# ---- files


def jobs(work: Path, data: Path, effort: str, *, finished: bool) -> dict[str, list[File]]:
    """Ours, in both runtimes and sizes; what is there is kept. finished: nothing else is asked for."""
    found: dict[str, list[File]] = {engine: [] for engine in ENGINES}
    for engine, file in ENGINES.items():
        for size in SIZES:
            out = work / f"{engine}-{size}"
            if not (out / "model" / file).is_file() and finished:
                continue
            if not (out / "model" / file).is_file():
                print(f"rarefy compress {MODEL} --to {size} --for {engine}", flush=True)
                run_fresh([Path(sys.executable).with_name("rarefy"), "compress", MODEL, "--to", size, "--for",
                           engine, "--effort", effort, "--data", data / "sst2" / "train.tsv", "--eval-data",
                           data / "sst2" / "dev.tsv", "-o", out, "--overwrite"], work / f"{out.name}.log")
            found[engine].append(File(f"rarefy --to {size}", out / "model" / file))
        out = work / f"{engine}-recipe"
        if not (out / "model" / file).is_file() and not finished:
            print(f"rarefy run {RECIPE.name}, target {engine}", flush=True)
            trained(engine, data, out)
        if (out / "model" / file).is_file():
            found[engine].append(File(f"rarefy run {RECIPE.name}", out / "model" / file))
    return found


def trained(engine: str, data: Path, out: Path) -> None:
    """The recipe on this machine's data, for one runtime."""
    train, judged = (str(data / "sst2" / f"{name}.tsv") for name in ("train", "dev"))
    recipe = replace(read_recipe(RECIPE), target=engine, data=(train,), eval_data=(judged,))
    out.with_suffix(".yaml").write_text(write_recipe(recipe), encoding="utf-8")
    run_fresh([Path(sys.executable).with_name("rarefy"), "run", out.with_suffix(".yaml"), "-o", out,
               "--overwrite"], out.with_suffix(".log"))


def originals(work: Path, network: Network, sample: dict[str, torch.Tensor]) -> dict[str, Path]:
    """As each runtime's own tools write the float32 network."""
    import openvino

    onnx, xml = work / "original.onnx", work / "original.xml"
    if not onnx.exists():
        free = torch.export.Dim.DYNAMIC
        made = torch.onnx.export(network.module, (), kwargs=dict(sample), dynamo=True, verbose=False,
                                 dynamic_shapes={name: {0: free, 1: free} for name in sample})
        assert made is not None
        made.save(onnx)
    if not xml.exists():
        openvino.save_model(openvino.convert_model(onnx), xml, compress_to_fp16=False)
    return {"onnxruntime": onnx, "openvino": xml}


def dynamic(original: Path, out: Path) -> File:
    """ONNX Runtime's own dynamic quantization, a scale for every output."""
    if not out.exists():
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(original, out, per_channel=True, weight_type=QuantType.QInt8)
    return File("ONNX Runtime's quantize_dynamic", out)


def nncf(python: Path, original: Path, shown: Examples, out: Path) -> File:
    """NNCF's post-training quantization, in an environment that has it."""
    if not out.exists():
        samples = out.with_suffix(".npz")
        np.savez(samples, **{name: values.numpy() for name, values in shown.inputs.items()})
        subprocess.run([python, "-c", NNCF, original, samples, out], check=True)
    return File("NNCF, static 8 bits", out)


# ---- measurements


def cosines(file: File, network: Network, judged: Examples) -> tuple[float, float]:
    """Mean and worst over the sentences, by what the runtime answers."""
    found = []
    with Session(file.path, engine_of(file.path), exact=file.exact) as session, torch.no_grad():
        for batch in judged.batches(32):
            states = {"last_hidden_state": session.answer(batch)}
            found.append(cosine_similarity(network.form.answer(states, batch), network.run(batch)))
    together = torch.cat(found)
    return float(together.mean()), float(together.min())


def rows(files: Sequence[File], network: Network, judged: Examples, args: argparse.Namespace
         ) -> list[list[str]]:
    """Of one runtime; ratios are to the first file."""
    timed = compare([file.path for file in files], length=LENGTH, visits=args.visits, own=args.own,
                    threads=1 if args.own else 2, exact=[file.path for file in files if file.exact])
    lines = []
    for file, row in zip(files, timed, strict=True):
        mean, worst = cosines(file, network, judged)
        times = [cell for batch in row.latency for cell in (
            f"{row.latency[batch].median:.1f}", f"{row.ratio[batch]:.2f} ± {row.spread[batch] / 2:.2f}")]
        lines.append([file.name, f"{bytes_of(file.path) / 1e6:.1f}", f"{mean:.4f}", f"{worst:.4f}", *times])
    return lines


def minilm(args: argparse.Namespace) -> list[str]:
    """The part of the page about sentence embeddings."""
    network = open_any(MODEL)
    assert isinstance(network, Network)
    judged = read_examples(network, args.data / "sst2" / "dev.tsv", count=JUDGED, seed=0).by_length()
    shown = read_examples(network, args.data / "sst2" / "train.tsv", count=SHOWN, seed=1)
    floats = originals(args.work, network, next(judged.batches(2)))
    ours = jobs(args.work, args.data, args.effort, finished=args.finished)
    precise = args.work / "original-f32.xml"
    if not precise.exists():
        precise.symlink_to(floats["openvino"])
        precise.with_suffix(".bin").symlink_to(floats["openvino"].with_suffix(".bin"))
    files = {"onnxruntime": [File("original, float32", floats["onnxruntime"]),
                             dynamic(floats["onnxruntime"], args.work / "dynamic.onnx"),
                             *ours["onnxruntime"]],
             "openvino": [File("original, float32", precise, exact=True),
                          File("original as the plugin runs it", floats["openvino"]), *ours["openvino"]]}
    if args.nncf:
        files["openvino"].append(nncf(args.nncf, floats["openvino"], shown, args.work / "nncf.xml"))
    head = ["file", "MB", "cosine, mean", "worst", "batch 1, ms", "times as fast", "batch 8, ms",
            "times as fast"]
    parts = [f"## Sentence embeddings\n\n{MODEL}, {LENGTH} tokens, {clock(args)}. Cosines are to the "
             f"original in PyTorch, over {len(judged)} sentences. Sizes are those of the graph; a budget "
             "counts the tokenizer too (0.7 MB)."]
    for engine, listed in files.items():
        parts += [f"### {engine}", table(head, rows(listed, network, judged, args))]
    return [*parts, GIVEN]


GIVEN = ("NNCF and ONNX Runtime's dynamic 8 bits as they were measured elsewhere before, on two threads: "
         "OpenVINO 12.9 to 6.4 ms at batch 1 and 81 to 31.5 ms at batch 8 (2.0 and 2.6 times as fast), 91 to "
         "23.1 MB, cosine 0.9972 on average and 0.990 at worst; ONNX Runtime 13.1 to 7.8 and 84.6 to 49.4 ms "
         "(1.7 times).")


def leaving(args: argparse.Namespace) -> list[str]:
    """The part about exits: one sentence at a time, in the graph that stops and in that of the network."""
    exits = load_exits(args.exits).exits
    network = exits.stepped.network
    read = read_examples(network, args.data / "sst2" / "test.tsv", count=SENTENCES, seed=0)
    batches = list(read.batches(1))
    paths = [args.work / f"exits-{name}.onnx" for name in ("whole", "early")]
    example = next(read.by_length().batches(len(read)))
    export_onnx(network.module, {}, paths[0], inputs=example, dynamic=(0, 1))
    export_exits(exits, {}, paths[1], inputs=example).verify(batches)
    seconds, said, blocks = [0.0, 0.0], list[list[int]]([[], []]), []
    threads = 1 if args.own else 2
    with Session(paths[0], "onnxruntime", threads=threads) as whole, Session(
            paths[1], "onnxruntime", threads=threads) as early:
        for inputs in batches:
            for place, session in enumerate((whole, early)):
                seconds[place] += min(session.latency(inputs, CALLS, own=args.own)) / len(batches)
                said[place].append(int(session.answer(inputs).argmax()))
            blocks.append(int(early.run(inputs)["blocks"][0]))
    same = sum(a == b for a, b in zip(*said, strict=True)) / len(batches)
    head = ["file", "MB", "blocks, mean", "same answer", "ms a sentence", "times as fast"]
    total = len(exits.stepped.blocks)
    rows = [[name, f"{bytes_of(path) / 1e6:.1f}", f"{mean:.2f}", f"{share:.1%}", f"{1000 * taken:.1f}",
             f"{seconds[0] / taken:.2f}"] for name, path, mean, share, taken in (
                 ("the network", paths[0], float(total), 1.0, seconds[0]),
                 ("with exits", paths[1], sum(blocks) / len(blocks), same, seconds[1]))]
    rule = exits.technique
    return [f"## Leaving early in ONNX Runtime\n\nA classifier of {total} blocks with exits behind "
            f"{', '.join(str(block + 1) for block in exits.after)} (`early_exit.py`), {rule.rule} at least "
            f"{exits.rule.threshold:.4f}, which was calibrated to lose at most {rule.max_loss:.0%} of the "
            f"answers; float32, {len(batches)} test sentences of SST-2 one by one, {clock(args)}, the best "
            f"of {CALLS} calls each.", table(head, rows)]


def clock(args: argparse.Namespace) -> str:
    """What the times are of."""
    return "processor time of one thread" if args.own else "two threads"


def decoders(work: Path, folder: Path) -> list[File]:
    """A language model in 4 bits for both runtimes, rounded to nearest: speed is what is asked."""
    found = [File(f"{engine}, 4 bits", work / f"gemma-{engine}" / file) for engine, file in ENGINES.items()]
    if all(file.path.exists() for file in found):
        return found
    model = open_any(folder)
    assert isinstance(model, Model)
    network = live(model).eval().requires_grad_(False)
    trees, grid = {}, integer_grid(4, 32)
    for site in model.map.sites:
        weight = model.weight(site.path)
        fitted = fit(weight, torch.ones(weight.shape[1]), grid)
        trees[site.path] = Quantized.of(encode(weight, fitted), fitted)
    decoder = trace_decoder(network)
    for file in found:
        file.path.parent.mkdir(exist_ok=True)
        export_decoder(decoder, trees, file.path,
                       settings=OnnxSettings(accuracy=4, contrib=file.path.suffix == ".onnx"))
    return found


def writing(args: argparse.Namespace) -> list[str]:
    """The part about a language model: prefill and decode, in turns with PyTorch."""
    files = [File("PyTorch, float32", args.gemma), *decoders(args.work, args.gemma)]
    paths = [file.path for file in files]
    timed = compare_writers(paths, prompt=128, count=24, visits=args.visits, threads=2)
    lines = [[file.name, f"{row.bytes / 1e6:.0f}", f"{row.memory.peak / 1e6:.0f}", f"{row.prefill:.0f}",
              f"{row.ratio['prefill']:.2f} ± {row.spread['prefill'] / 2:.2f}", f"{row.decode:.1f}",
              f"{row.ratio['decode']:.2f} ± {row.spread['decode'] / 2:.2f}"]
             for file, row in zip(files, timed, strict=True)]
    head = ["file", "MB", "peak memory, MB", "prefill, tokens/s", "times as fast", "decode, tokens/s",
            "times as fast"]
    return ["## A language model\n\nGemma-3-270M, every weight in 4 bits with a scale for 32, rounded to "
            "nearest; 128 tokens read, 24 written one by one, two threads. Memory is the peak of a fresh "
            "process. The first row is PyTorch against itself: how far that is from 1 is how busy the "
            "machine was, and ratios are worth no more than that; PyTorch's threads wait for one another and "
            "lose most.",
            table(head, lines)]


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="holds sst2/train.tsv and dev.tsv, test.tsv "
                        "for exits")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--gemma", type=Path, help="a language model to time as well")
    parser.add_argument("--nncf", type=Path, help="a Python that has nncf")
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--visits", type=int, default=7)
    parser.add_argument("--own", action="store_true", help="processor time of one thread")
    parser.add_argument("--finished", action="store_true", help="leave out jobs that were not done before")
    parser.add_argument("--exits", type=Path, help="a classifier with exits, of early_exit.py")
    parser.add_argument("--only", choices=SECTIONS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(args.work / "runtimes.json")
    asked = {"minilm": True, "gemma": args.gemma is not None, "exits": args.exits is not None}
    for name, measure in zip(SECTIONS, (minilm, writing, leaving), strict=True):
        if asked[name] and args.only in (None, name):
            ledger.put(name, {"source": fingerprint(source_sha256()), "parts": measure(args)})
    kept: list[Any] = [ledger.get(name) for name in SECTIONS]
    write_page(PAGE, "Runtimes", "python benchmarks/runtimes.py",
               [part for entry in kept if entry for part in entry["parts"]])


if __name__ == "__main__":
    main()
