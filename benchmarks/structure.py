"""Smaller networks of the same kind: how much faster they are, and what they lose before and after recovery.

    python benchmarks/structure.py --data DATA --work WORK --gemma HF_FOLDER [--only NAME ...] [--rows TEXT]

DATA holds ``wikitext2/valid.txt`` (calibration and recovery) and ``test.raw.txt`` (evaluation only),
``mnist/`` as for ``deep_compression.py``, ``sst2/train.tsv``, ``dev.tsv``, ``test.tsv``. HF_FOLDER is what
``permuted_gemma.py`` writes. Results go to the ledger in WORK; what is there is not run again, and the page
shows all of it, whatever was asked for.

    gemma        a quarter of the body's numbers out, by our criteria and those of LLM-Pruner and
                 Torch-Pruning, each recovered alike
    speed        files of the same formats with and without that quarter, timed in llama.cpp
    vocabulary   Gemma and MiniLM without the tokens that a text does not use

and, in ``structure_networks.py``,

    cnn          a residual CNN with half of its multiplications, beside Torch-Pruning
    separable    the same CNN with two cheap convolutions in the place of each
    albert       MiniLM with shared layers, taught by the network that it was made of
    bottleneck   a student of another shape beside one of fewer blocks
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import structure_networks
from harness import Ledger, Results, table, write_page
from rarefy.calibration.samples import materialize
from rarefy.calibration.text import windows
from rarefy.core.edit import edit
from rarefy.core.nodes import Dense, Node
from rarefy.core.nouns import Step
from rarefy.core.structure import UnitGroup
from rarefy.export.gguf import export_gguf, site_bytes
from rarefy.export.networks import export_network
from rarefy.formats.ggml import CODECS
from rarefy.measure.divergence import Reference
from rarefy.models.model import Model, open_model
from rarefy.models.network import Network
from rarefy.models.opening import open_any
from rarefy.models.runner import Runner
from rarefy.models.shrunk import with_tokens
from rarefy.models.tokens import named_tokens
from rarefy.run.reshape import Reshaped, thinned
from rarefy.run.trim import trimmed
from rarefy.runtimes import llamacpp
from rarefy.techniques.distill.forward_kl import ForwardKL
from rarefy.techniques.prune.units import Units
from rarefy.techniques.quantize.rtn import RTN
from rarefy.training.examples import Rows
from rarefy.training.loop import Settings
from rarefy.training.signals import Distillation
from rarefy.training.teacher import answered
from rarefy.training.tune import Tuning, tune

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "structure.md"


def main() -> None:
    """Run what was asked for and the ledger does not hold; write the page."""
    arguments = _arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    ledger, parts, missing = Ledger(arguments.work / "structure.json"), list[str](), list[str]()
    for name, stage in STAGES.items():
        finished = arguments.finished or name not in arguments.only
        parts += stage(arguments, Results(ledger, finished, arguments.rows, missing))
    if missing:
        parts.append("## Not measured yet\n\n" + "\n".join(f"- {each}" for each in missing))
    write_page(PAGE, "Structure", "python benchmarks/structure.py", [INTRODUCTION, *parts])


# ---- Gemma ---------------------------------------------------------------------------------------------

WINDOWS, LENGTH = 24, 256         # of calibration
LESSONS, LESSON = 48, 128        # windows of recovery, and their tokens
JUDGED = 5                        # windows of evaluation, 512 tokens each
NEURONS = 0.375                   # share of the neurons: 1280 of 2048 stay
RECOVERY = Settings(epochs=1, batch=4, rate=1e-4, warmup=0.1)
FORMATS = ("F16", "Q8_0", "Q4_0")


@dataclass(frozen=True)
class Ranked(Units):
    """Neurons by scores that somebody else gave, [units] for every block; nothing is refitted."""

    given: tuple[Tensor, ...] = ()
    compensate: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def scores(self, group: UnitGroup) -> Tensor:
        return self.given[group.block]


def gemma(arguments: argparse.Namespace, results: Results) -> list[str]:
    """Criteria beside each other."""
    @cache
    def opened() -> tuple[Model, Tensor, Tensor, Reference]:
        model = open_model(arguments.gemma)
        valid, test = (arguments.data / "wikitext2" / file for file in ("valid.txt", "test.raw.txt"))
        judged = windows(test, model.tokenizer, length=512, count=JUDGED, seed=1)
        return (model, windows(valid, model.tokenizer, length=LENGTH, count=WINDOWS, seed=0),
                windows(valid, model.tokenizer, length=LESSON, count=LESSONS, seed=2),
                Reference(model, judged))

    def recovered(prune: Callable[[Model, Tensor], Reshaped]) -> dict[str, float]:
        model, seen, lessons, reference = opened()
        return _recovered(model, prune(model, seen), lessons, reference, arguments.work / "gemma")

    found = results.of(CRITERIA, ("gemma", NEURONS, LESSONS, LESSON, RECOVERY, WINDOWS, JUDGED), recovered)
    if not found:
        return []
    rows = [(name, f"{each['fewer']:.1%}", f"{each['before']:.3f}",
             f"{each['after']:.3f} ± {each['error']:.3f}", f"{each['top1']:.1%}")
            for name, each in found.items()]
    head = ("criterion", "fewer numbers in the body", "KL before", "KL after recovery", "same top token")
    minutes = min(each["seconds"] for each in found.values()) / 60
    said = (f"KL in nats per token to the unpruned model on {JUDGED} windows of WikiText-2's test set. "
            f"Recovery is one pass over {LESSONS} windows of {LESSON} tokens of the validation set (about "
            f"{minutes:.0f} minutes on one thread), the same for every row: far too short for what it could "
            "give, long enough to compare. It is given the original's distribution over the tokens that "
            "occur in that text, so that the head costs little. Rows share their windows, so what lies "
            "between them is surer than the errors say.")
    return ["## Gemma-3-270M", said, table(head, rows)]


def _units(**settings: Any) -> Callable[[Model, Tensor], Reshaped]:
    return lambda model, seen: thinned(model, Units(**{"ratio": NEURONS, **settings}), seen)


def _heads_too(model: Model, seen: Tensor) -> Reshaped:
    """A quarter of the queries, and fewer neurons for it."""
    fewer = thinned(model, Units("queries", 0.25), seen).model
    return thinned(fewer, Units(ratio=0.3125), seen)


def _llm_pruner(model: Model, seen: Tensor) -> Reshaped:
    """LLM-Pruner's first order, sum |w dL/dw| over a neuron's weights, L the loss of the text."""
    network = materialize(model, torch.float32)
    blocks = network.get_submodule(model.map.family.blocks)
    for block in blocks:
        block.mlp.requires_grad_(True)
    for window in seen[:10, :64].split(1):
        logits = network(input_ids=window, use_cache=False).logits[0, :-1]
        nn.functional.cross_entropy(logits, window[0, 1:]).backward()
    scores = tuple(sum((part.weight * part.weight.grad).detach().abs().sum(axis) for part, axis in
                       ((block.mlp.gate_proj, 1), (block.mlp.up_proj, 1), (block.mlp.down_proj, 0)))
                   for block in blocks)
    return thinned(model, Ranked(ratio=NEURONS, given=scores), None)


def _torch_pruning(model: Model, seen: Tensor) -> Reshaped:
    """Torch-Pruning's own importance, on its own group of every feed-forward part."""
    import torch_pruning

    scores = []
    for block in range(model.map.blocks):
        sites = {site.role: site for site in model.map.in_block(block)}
        part = _FeedForward(*(model.weight(sites[role].path) for role in ("gate", "up", "down")))
        graph = torch_pruning.DependencyGraph()
        graph.build_dependency(part, example_inputs=torch.randn(2, part.up.in_features))
        group = graph.get_pruning_group(part.up, torch_pruning.prune_linear_out_channels,
                                        idxs=list(range(part.up.out_features)))
        scores.append(torch_pruning.importance.GroupMagnitudeImportance(p=2)(group))
    return thinned(model, Ranked(ratio=NEURONS, given=tuple(scores)), None)


class _FeedForward(nn.Module):
    """A gated feed-forward part, to be traced."""

    def __init__(self, *weights: Tensor) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*weight.shape[::-1], bias=False) for weight in weights)
        for part, weight in zip((self.gate, self.up, self.down), weights, strict=True):
            part.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.gelu(self.gate(x)) * self.up(x))


CRITERIA: dict[str, Callable[[Model, Tensor], Reshaped]] = {
    "ours: obs, refitted": _units(),
    "LLM-Pruner: first order": _llm_pruner,
    "Torch-Pruning: group norm": _torch_pruning,
    "activation": _units(criterion="activation", compensate=False),
    "taylor, refitted": _units(criterion="taylor"),
    "ours: a quarter of the queries and 5/16 of the neurons": _heads_too,
}


def _recovered(model: Model, pruned: Reshaped, lessons: Tensor, reference: Reference, folder: Path
               ) -> dict[str, float]:
    """KL before and after a short distillation from the original."""
    small = pruned.model
    before = reference.compare(Runner(small)).kl_mean
    kept = torch.cat([lessons.flatten(), torch.tensor(sorted(named_tokens(model.config)))]).unique()
    place = torch.zeros(int(kept.max()) + 1, dtype=torch.int64)
    place[kept] = torch.arange(len(kept))
    teacher, student = with_tokens(model, kept), with_tokens(small, kept)
    rows = answered(teacher, Rows({"input_ids": place[lessons]}), folder, k=64)
    blocks = f"{model.map.family.blocks}.*"
    tuned = tune(student, {}, Tuning(frozenset({"weights", "norms"}), where=(blocks,)),
                 Distillation(student, None, ((1.0, ForwardKL()),)), rows, RECOVERY)
    after = reference.compare(Runner(small, {**tuned.trees, **tuned.params}.get))
    return {"fewer": 1 - _body(small) / _body(model), "before": before, "after": after.kl_mean,
            "error": after.kl_stderr, "top1": after.top1, "seconds": tuned.curve.seconds}


def _body(model: Model) -> int:
    """Numbers of all matrices in blocks."""
    return sum(site.shape[0] * site.shape[1] for site in model.map.sites if site.block is not None)


def speed(arguments: argparse.Namespace, results: Results) -> list[str]:
    """Files of the same format with and without a quarter of the body, in turns."""
    timed = results.of({name: name for name in FORMATS}, ("speed", NEURONS), lambda name:
                       _timed(open_model(arguments.gemma), name, arguments.work / "gemma"))
    rows = []
    if not timed:
        return []
    for name, found in timed.items():
        expected = found["read"][0] / found["read"][1]
        prefill, pruned_prefill, decode, pruned_decode = found["speeds"]
        rows.append((name, f"{found['bytes'][0] / 1e6:.1f}", f"{found['bytes'][1] / 1e6:.1f}",
                     f"{prefill:.0f}", f"{pruned_prefill:.0f}", f"{found['prefill']:.2f}x", f"{decode:.1f}",
                     f"{pruned_decode:.1f}", f"{found['decode']:.2f}x", f"{expected:.2f}x",
                     f"{found['head']:.0%}", f"{found['drift']:.0%}"))
    head = ("format", "MB", "MB pruned", "prefill, tokens/s", "pruned", "ratio", "decode, tokens/s", "pruned",
            "ratio", "bytes read: ratio", "of them head", "drift")
    said = ("One thread, both files in one run and in turns; prefill of 512 tokens, 48 tokens "
            "decoded. Decoding reads every matrix once for a token, and most of these bytes are the head, "
            "which pruning the body leaves alone: the last columns say what ratio of bytes is read, and "
            "what share of it the head is. Drift is the distance between visits to the same file: where it "
            "is large the machine was doing other work.")
    return ["### Speed of Gemma in llama.cpp", said, table(head, rows)]


def _timed(model: Model, name: str, folder: Path) -> dict[str, Any]:
    """Speeds and bytes of both files, in one format throughout; which neurons went does not matter here."""
    small = thinned(model, Units(ratio=NEURONS, criterion="magnitude", compensate=False), None).model
    bytes_read = [sum(site_bytes(site, name) for site in each.map.sites) for each in (model, small)]
    found = _files(model, small, name, folder)
    return found | {"read": bytes_read, "head": site_bytes(small.map.head, name) / bytes_read[1]}


def _files(whole: Model, small: Model, name: str, folder: Path) -> dict[str, Any]:
    """Bytes of the files of both, and how fast they run; ``decode`` and ``prefill`` are ratios."""
    paths = []
    for place, each in (("whole", whole), ("small", small)):
        path = folder / f"{place}-{name}.gguf"
        folder.mkdir(parents=True, exist_ok=True)
        export_gguf(each, _rounded(each, name), {site.path: name for site in each.map.sites}, path)
        paths.append(path)
    found = llamacpp.compare_speed(*paths, prefill=512, decode=48, threads=1, repeats=3)
    sizes = [path.stat().st_size for path in paths]
    for path in paths:
        path.unlink()
    return {"bytes": sizes, "prefill": found.ratio_prefill, "decode": found.ratio_decode,
            "speeds": [found.a.prefill, found.b.prefill, found.a.decode, found.b.decode],
            "drift": found.drift}


def _rounded(model: Model, name: str) -> Mapping[str, Node]:
    """Every matrix on the grid of a format; as it is where the format is of floats."""
    grid = CODECS[name].grid
    if grid is None:
        return {}
    generator = torch.Generator()
    return {site.path: edit(site.path, Dense(weight), weight, RTN(grid), "rtn", None, generator)[0]
            for site in model.map.sites for weight in (model.weight(site.path),)}


# ---- vocabulary ----------------------------------------------------------------------------------------

STORED = "Q8_0"


def vocabulary(arguments: argparse.Namespace, results: Results) -> list[str]:
    """Tokens that a text does not use, left out of Gemma and of MiniLM."""
    folder = arguments.data
    cases = {"Gemma-3-270M": (str(arguments.gemma), folder / "wikitext2" / "valid.txt",
                              folder / "wikitext2" / "test.raw.txt"),
             "MiniLM-L6": ("all-minilm-l6-v2", folder / "sst2" / "train.tsv", folder / "sst2" / "test.tsv")}
    done = results.of(cases, ("vocabulary", STORED), lambda case: _smaller(*case, arguments.work))
    rows = []
    if not done:
        return []
    for name, found in done.items():
        _, text, other = cases[name]
        rows.append((name, text.name, f"{found['tokens'][1]:,} of {found['tokens'][0]:,}",
                     f"{found['bytes'][0] / 1e6:.1f}", f"{found['bytes'][1] / 1e6:.1f}", other.name,
                     f"{found['held']:.2%}", f"{found['longer']:+.2%}",
                     f"{found['decode']:.2f}x" if "decode" in found else ""))
    head = ("model", "text", "tokens kept", "MB", "MB without the others", "another text",
            "of its tokens kept", "longer by", "decode")
    said = (f"Gemma as a GGUF file in {STORED}, MiniLM as a native folder in float32. A text whose tokens "
            "were all kept is cut and answered as before (tested); another text of the same kind has some "
            "tokens that were not, and becomes that much longer. Decoding in llama.cpp, one thread, in "
            "turns.")
    return ["## Vocabulary", said, table(head, rows)]


def _smaller(ref: str, text: Path, other: Path, work: Path) -> dict[str, Any]:
    """Tokens and bytes before and after; how another text fares."""
    whole = open_any(ref)
    small = trimmed(whole, (Step("vocabulary", settings={"text": (str(text),)}),), ()).opened
    lines = [line.split("\t")[0] for line in other.read_text(encoding="utf-8").splitlines() if line.strip()]
    before, after = ([token for ids in each.tokenizer(lines, add_special_tokens=False)["input_ids"]
                      for token in each.tokenizer.convert_ids_to_tokens(ids)] for each in (whole, small))
    known = small.tokenizer.get_vocab()
    found: dict[str, Any] = {
        "tokens": [len(each.tokenizer) for each in (whole, small)],
        "held": sum(token in known for token in before) / len(before), "longer": len(after) / len(before) - 1}
    if isinstance(whole, Model) and isinstance(small, Model):
        return found | _files(whole, small, STORED, work / "vocabulary")
    assert isinstance(whole, Network)
    assert isinstance(small, Network)
    return found | {"bytes": [export_network(each, {}, work / f"vocabulary-{name}")
                              for name, each in (("whole", whole), ("small", small))]}


# ---- the page ------------------------------------------------------------------------------------------

INTRODUCTION = ("Neurons, heads, channels and layers taken out whole: what is left is a smaller network of "
                "the standard kind, so that every runtime is faster by what is no longer there.")
STAGES: dict[str, Callable[[argparse.Namespace, Results], list[str]]] = {
    "gemma": gemma, "speed": speed, "vocabulary": vocabulary, **structure_networks.STAGES}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--gemma", type=Path)
    parser.add_argument("--teacher", type=Path, help="MiniLM fine-tuned on SST-2 (default: it is made here)")
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--rows", default="", help="only the rows whose name has this in it")
    parser.add_argument("--finished", action="store_true", help="write the page from what is in the ledger")
    arguments = parser.parse_args()
    if not arguments.finished and {"gemma", "speed", "vocabulary"} & set(arguments.only) \
            and arguments.gemma is None:
        parser.error("--gemma is missing: the folder that permuted_gemma.py writes")
    return arguments


if __name__ == "__main__":
    main()
