"""What every technique for weights makes of real models: bytes, answers and speed, one row each.

    python benchmarks/techniques.py --data DATA --work WORK [--models minilm,cnn,gemma] [--only gptq,svd]
        [--gemma HF_FOLDER]

minilm: the encoder MiniLM-L6 (``all-minilm-l6-v2``) on ``DATA/sst2`` (``train.tsv`` and ``test.tsv``, columns
sentence, label), every matrix of its blocks edited, embeddings left alone. cnn: four convolutions and a head,
trained here on scikit-learn's digits, everything edited. gemma: a language model in a folder, judged on
``DATA/wikitext2`` (``valid.txt``, ``test.raw.txt``).

The evidence is gathered once for a model, in its original state; then each technique edits all sites, the
result is written as a native folder, attached to a copy of the network and judged and timed with the kernels
that it got. Sites that a technique refuses stay as they are, and the table counts them. Results are kept in
WORK/techniques.json under a hash of the package's source; what is there is not run again.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from harness import MEGABYTE, Ledger, fingerprint, source_sha256, table, write_page
from rarefy.core.edit import Edited, Leaf
from rarefy.core.errors import EditError
from rarefy.core.nodes import Dense, Node
from rarefy.core.nouns import Evidence, Step
from rarefy.export.native import export_native
from rarefy.export.networks import export_network
from rarefy.formats.native import WEIGHTS
from rarefy.measure.latency import compare
from rarefy.measure.task import Judge
from rarefy.models.map import Site
from rarefy.models.network import Network
from rarefy.models.opening import open_any
from rarefy.run.effort import effort_named
from rarefy.run.language import Language
from rarefy.run.planning import build, techniques
from rarefy.run.progress import Silent
from rarefy.run.samples import Samples
from rarefy.run.subject import Subject
from rarefy.run.sweep import Work, rewrite
from rarefy.runtimes.torch import attach

PAGE = Path(__file__).parent.parent / "docs" / "techniques.md"
COMMAND = "python benchmarks/techniques.py --data DATA --work WORK"
STEADY = 0.25  # how far apart the turns of one work may lie for a ratio to be shown
# samples: surveyed, calibrated on (the probe learns from them, too), judged on
EFFORT = replace(effort_named("quick"), samples=(64, 512, 400), repeats=3)


def step(technique: str, format_name: str = "", **settings: Any) -> Step:
    return Step(technique, ("*",), settings, format_name)


HALF = {"sparsity": 0.5}
# one or two representative settings each, in the order of the families
ROWS: tuple[tuple[Step, ...], ...] = (
    (step("magnitude", **HALF),), (step("magnitude", sparsity=0.25, pattern="row 8"),),
    (step("wanda", **HALF),), (step("wanda", pattern="2:4"),), (step("taylor", **HALF),),
    (step("sparsegpt", **HALF),), (step("sparsegpt", sparsity=0.85),),
    (step("cast", dtype="float16"),), (step("cast", dtype="float8_e4m3fn"),),
    (step("rtn", "int8"),), (step("rtn", "int4-g32"),), (step("gptq", "int4-g32"),),
    (step("gptq", "int3-g32"),), (step("rtn", "int3-g32"), step("quantease")), (step("hqq"),),
    (step("outliers", "int3-g32"),), (step("ternary"),), (step("binary"),),
    (step("svd", ratio=0.5),), (step("fwsvd", ratio=0.5),), (step("svd_llm", ratio=0.5),),
    (step("svd_llm", ratio=0.25),), (step("tensor_train", ratio=0.5),), (step("tucker", ratio=0.5),),
    (step("cp", ratio=0.5),), (step("rtn", "int3-g32"), step("repair", rank=8)),
    (step("kmeans", values=16),), (step("product"),), (step("hashed", ratio=0.5),), (step("loftq"),),
    (step("sparsegpt", **HALF), step("repair", rank=8), step("rtn", "int8")),
)


def named(steps: tuple[Step, ...]) -> str:
    """``rtn (int3-g32), then quantease``"""
    said = []
    for each in steps:
        words = [each.format] if each.format else []
        words += [str(value) if isinstance(value, str) else f"{key} {value:g}"
                  for key, value in each.settings.items()]
        said.append(f"{each.technique} ({', '.join(words)})" if words else each.technique)
    return ", then ".join(said)


# ---- models --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """A model, what was seen of it, and how its answers are judged.

    fitted: evidence that techniques fit to. foreseen: evidence that damage is predicted from.
    """

    name: str
    subject: Subject
    sites: tuple[Site, ...]
    fitted: dict[str, Evidence]
    foreseen: dict[str, Evidence]
    data: Any
    judge: Callable[[nn.Module], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Recorder:
    """Keeps the evidence that a sweep brings to each weight, and leaves the weight as it is."""

    found: dict[str, Evidence] = field(default_factory=dict)
    edits: ClassVar[tuple[type[Node], ...]] = (Dense,)
    needs: ClassVar[frozenset[str]] = frozenset()

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        if leaf.evidence is not None:
            self.found[leaf.site] = leaf.evidence
        return Edited(leaf.node)


def minilm(options: argparse.Namespace) -> Case:
    network = open_any("all-minilm-l6-v2")
    sst2 = options.data / "sst2"
    return looked_at("minilm", Samples(network), (str(sst2 / "train.tsv"),), (str(sst2 / "test.tsv"),))


def cnn(options: argparse.Namespace) -> Case:
    x, y = digits()
    network = Network.from_module(trained(x[:1297], y[:1297]), "digits")
    return looked_at("cnn", Samples(network), ((x[:1297], y[:1297]),), ((x[1297:], y[1297:]),))


def gemma(options: argparse.Namespace) -> Case:
    if options.gemma is None:
        sys.exit("gemma: pass --gemma HF_FOLDER (benchmarks/permuted_gemma.py writes one)")
    text = options.data / "wikitext2"
    return looked_at("gemma", Language(open_any(options.gemma)), (str(text / "valid.txt"),),
                     (str(text / "test.raw.txt"),))


def looked_at(name: str, subject: Subject, data: tuple[Any, ...], judged: tuple[Any, ...]) -> Case:
    """The survey, and the evidence of a sweep that changes nothing."""
    shown = subject.gather(data, judged, EFFORT, 0, Silent())
    network = subject.opened
    blocks = isinstance(network, Network) and network.map.blocks == 0  # a plain network: everything counts
    wanted = [site for site in network.map.sites if blocks or site.block is not None]
    foreseen = {seen.site.path: seen.evidence for seen in subject.survey(
        shown, EFFORT, torch.Generator().manual_seed(0), lambda done, total: None)}
    sites = tuple(site for site in wanted if site.path in foreseen)
    fishers: dict[str, Tensor] = {path: evidence.fisher for path, evidence in foreseen.items()
                                  if evidence.fisher is not None}
    recorder = Recorder()
    subject.sweep({site.path: Work((("record", recorder),), "") for site in sites}, shown, {}, fishers, {}, 0,
                  EFFORT, lambda done, total: None)
    fitted = {path: replace(evidence, fisher=fishers[path]) for path, evidence in recorder.found.items()}
    return Case(name, subject, sites, fitted, foreseen, shown, judge_of(subject, shown))


def judge_of(subject: Subject, shown: Any) -> Callable[[nn.Module], dict[str, Any]]:
    if not isinstance(subject, Samples):
        return lambda module: subject.measure_live(module, shown, EFFORT)
    network, judge = subject.opened, Judge(subject.opened, shown.evaluation, shown.calibration)
    return lambda module: judge.compare(network.running(module)).as_dict()


def digits() -> tuple[Tensor, Tensor]:
    """Images [n, 1, 8, 8] in 0..1 and labels, in a fixed order."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return x[order], torch.tensor(labels)[order]


def trained(x: Tensor, y: Tensor, steps: int = 200) -> nn.Module:
    """Four convolutions wide enough for a kernel to matter, and a linear head."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(512, 10))
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(0, len(x), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


MODELS_RUN = "minilm,cnn"
MODELS = {"minilm": minilm, "cnn": cnn, "gemma": gemma}


# ---- one row -------------------------------------------------------------------------------------------


def edited(case: Case, steps: tuple[Step, ...]) -> tuple[dict[str, Node], dict[str, str]]:
    """Every site behind the chain of techniques, and what those sites say that it refuses."""
    chain = tuple((each.technique, build(each, each.format)) for each in steps)
    trees, refused = dict[str, Node](), dict[str, str]()
    for site in case.sites:
        try:
            trees[site.path], _ = rewrite(case.subject.opened, site, Work(chain, ""),
                                          case.fitted.get(site.path), 0)
        except EditError as error:
            refused[site.path] = str(error)
    return trees, refused


def stored(case: Case, trees: Mapping[str, Node], folder: Path) -> int:
    """Bytes of the weights in the native folder."""
    shutil.rmtree(folder, ignore_errors=True)
    opened = case.subject.opened
    if isinstance(opened, Network):
        export_network(opened, trees, folder)
    else:
        export_native(opened, trees, folder)
    size = (folder / WEIGHTS).stat().st_size
    shutil.rmtree(folder)
    return size


def run(case: Case, steps: tuple[Step, ...], folder: Path) -> dict[str, Any]:
    """One technique on one model, as plain data."""
    trees, refused = edited(case, steps)
    found: dict[str, Any] = {"edited": len(trees), "sites": len(case.sites), "refused": refused}
    if not trees:
        return found
    opened = case.subject.opened
    found["bytes"] = stored(case, trees, folder)
    weights = sum(opened.weight(path).numel() for path in trees)
    found["bpw"] = sum(tree.bits() for tree in trees.values()) / weights
    found["predicted"] = sum(case.foreseen[path].damage(tree.dense() - opened.weight(path))
                             for path, tree in trees.items())
    original, compressed = case.subject.live(), case.subject.live()
    found["ways"] = list(attach(compressed, trees).values())
    found["measured"] = case.judge(compressed)
    for key, work in case.subject.paces(case.data).items():
        timed = compare(lambda work=work: work(original), lambda work=work: work(compressed),  # type: ignore[misc]
                        EFFORT.repeats)
        found[key] = {"ratio": timed.ratio, "drift": timed.drift}
    return found


# ---- the page ------------------------------------------------------------------------------------------


def row(name: str, found: Mapping[str, Any], whole: int) -> list[str]:
    if not found["edited"]:
        return [name, *["refused"] * 8, next(iter(found["refused"].values()), "")]
    measured = found["measured"]
    moved = next(value for key, value in measured.items() if key in ("kl_mean", "distance_mean"))
    kept = measured["task"]["accuracy"] if "task" in measured else measured.get("top1", float("nan"))
    ways = Counter(smaller(how) for how in found["ways"]).most_common()
    said = "; ".join(f"{how} ({count})" if len(ways) > 1 else how for how, count in ways)
    return [name, f"{found['bytes'] / MEGABYTE:.2f}", f"{whole / found['bytes']:.1f}x", f"{found['bpw']:.2f}",
            f"{found['edited']} of {found['sites']}", f"{found['predicted']:.3g}", f"{moved:.3g}",
            f"{kept:.1%}", f"{pace(found['batch'])}, {pace(found['single'])}", said]


def pace(timed: Mapping[str, float]) -> str:
    """A ratio, or nothing where the original's own turns lay too far apart for one."""
    return f"{timed['ratio']:.2f}x" if timed["drift"] <= STEADY else "unsteady"


def smaller(how: str) -> str:
    """The kernel without the sizes that differ from weight to weight."""
    how = re.sub(r"\d+ x \d+ of \d+ x \d+", "fewer rows or columns", how)
    how = re.sub(r"\d+ of \d+ filters, \d+ of \d+ channels", "fewer filters or channels", how)
    return re.sub(r"rank \d+", "low rank", re.sub(r"\d+% kept", "few kept", how))


def section(name: str, results: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """One model's table, with what its techniques refused below."""
    what, unit = (("distance", "1 - cosine") if "distance_mean" in base["measured"] else ("KL", "nats"))
    task = base["measured"].get("task")
    kept = f"accuracy ({task['by']})" if task else "same token"
    head = ["technique", "MB", "smaller", "bits per weight", "weights edited", f"predicted {what}",
            f"measured {what}", kept, "speed: batch, single", "how it runs"]
    original = f", {kept} {task['accuracy_original']:.1%}" if task else ""
    about = (f"The original: {base['bytes'] / MEGABYTE:.2f} MB of weights{original}; {base['about']}. The "
             f"{what} to the original is in {unit}. Speed is the original's time over the edited one's, both "
             f"in turns in one process (threads: {base['threads']}), or `unsteady` where the original's own "
             f"turns lay more than {STEADY:.0%} apart; a copy of the original, timed so: "
             f"{pace(base['batch'])}, {pace(base['single'])}.")
    refused = [f"- {title}: {reason}" for title, found in results.items() if found["edited"]
               for reason in list(dict.fromkeys(found["refused"].values()))]
    parts = [f"## {name}", about, table(head, [row(title, found, base["bytes"])
                                               for title, found in results.items()])]
    return parts + (["Left as they were, because the technique refuses them:", "\n".join(refused)]
                    if refused else [])


def baseline(case: Case, folder: Path) -> dict[str, Any]:
    """The original against itself: its bytes, its answers, and how steady the clock is."""
    opened, original, same = case.subject.opened, case.subject.live(), case.subject.live()
    trees: dict[str, Node] = {site.path: Dense(opened.weight(site.path)) for site in case.sites}
    found: dict[str, Any] = {"bytes": stored(case, trees, folder), "measured": case.judge(same)}
    count = sum(tree.shape[0] * tree.shape[1] for tree in trees.values())
    found["threads"] = torch.get_num_threads()
    found["about"] = (f"{len(trees)} matrices of {count / 1e6:.2f} million weights are edited, "
                      f"{opened.map.parameters / 1e6:.2f} million numbers in all")
    for key, work in case.subject.paces(case.data).items():
        timed = compare(lambda work=work: work(original), lambda work=work: work(same),  # type: ignore[misc]
                        EFFORT.repeats)
        found[key] = {"ratio": timed.ratio, "drift": timed.drift}
    return found


ABOUT = (
    "Each row edits every weight of a model with one technique (or a chain of them) and no training, at "
    "settings that are usual for it: the rows say what a technique costs and gives, not which is best at "
    "one size. Smaller on disk is not faster by itself: the last column says which kernel the weights got "
    "(how many, where they differ), and those `expanded once` run as the original does. Predicted is the "
    "second-order estimate that the planner works with; it holds for small changes.")


def main() -> None:
    """Run what is asked for and is not in the ledger; write the page when everything was asked for."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", default=MODELS_RUN, help="of minilm, cnn, gemma")
    parser.add_argument("--only", default="", help="names of techniques; the page is then not written")
    parser.add_argument("--gemma", type=Path, help="folder of a language model")
    options = parser.parse_args()
    only, names = set(filter(None, options.only.split(","))), options.models.split(",")
    for word, known in (*((word, techniques()) for word in only), *((word, MODELS) for word in names)):
        if word not in known:
            sys.exit(f"{word!r}: choose among {', '.join(known)}")
    rows = {named(steps): steps for steps in ROWS if not only or only & {each.technique for each in steps}}
    ledger, parts = Ledger(options.work / "techniques.json"), [ABOUT]
    source = source_sha256("techniques", "core", "numerics", "runtimes", "calibration")
    for name in names:
        parts += judged(name, rows, options, ledger, source)
    if only:
        print("\n\n".join(parts[1:]))
    else:
        more = "" if options.models == MODELS_RUN else f" --models {options.models}"
        write_page(PAGE, "Techniques, measured", COMMAND + more, parts)


def judged(name: str, rows: Mapping[str, tuple[Step, ...]], options: argparse.Namespace, ledger: Ledger,
           source: str) -> list[str]:
    """One model's section; the model is only looked at when something of it is missing."""
    keys = {title: fingerprint(name, title, source, EFFORT) for title in rows}
    start, folder = fingerprint(name, source, EFFORT), options.work / f"native-{name}"
    if ledger.get(start) is None or any(ledger.get(key) is None for key in keys.values()):
        case = MODELS[name](options)
        if ledger.get(start) is None:
            ledger.put(start, baseline(case, folder))
        for title, key in keys.items():
            if ledger.get(key) is None:
                ledger.put(key, run(case, rows[title], folder))
                print(row(title, ledger.get(key), ledger.get(start)["bytes"]), flush=True)
    return section(name, {title: ledger.get(key) for title, key in keys.items()}, ledger.get(start))


if __name__ == "__main__":
    main()
