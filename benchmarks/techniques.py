"""What every technique for weights makes of real models: bytes, answers and speed, one row each.

    python benchmarks/techniques.py --data DATA --work WORK --gemma HF_FOLDER [--models minilm,gemma,cnn]
        [--only gptq,svd] [--finished]

minilm: the encoder MiniLM-L6 (``all-minilm-l6-v2``) on ``DATA/sst2`` (``train.tsv`` and ``test.tsv``, columns
sentence, label), every matrix of its blocks edited, embeddings left alone. gemma: a language model in a
folder (``permuted_gemma.py`` writes one), three blocks of it (the first, the middle, the last), judged on
``DATA/wikitext2`` (``valid.txt``, ``test.raw.txt``). cnn: four convolutions and a head, trained here on
scikit-learn's digits, everything edited.

The evidence is gathered once for a model, in its original state (once more where a technique changes the
channels first); then each technique edits all sites, the result is written in the native format, attached to
a copy of the network and judged and timed with the kernels that it got. Sites that a technique refuses stay
as they are, and the table counts them. Results are kept in WORK/techniques.json under a hash of the source
that a row depends on; what is there is not run again. One thread: speed is told in the processor's time,
which other processes disturb least.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from harness import MEGABYTE, Ledger, fingerprint, source_sha256, table, write_page
from rarefy.core.edit import Edited, Leaf, edit, leaves
from rarefy.core.errors import EditError, RarefyError
from rarefy.core.nodes import Dense, Node
from rarefy.core.nouns import Evidence, Recipe, Step
from rarefy.formats.native import WEIGHTS, save_native
from rarefy.measure.divergence import compare_tables, log_probs
from rarefy.measure.latency import compare
from rarefy.measure.task import Judge
from rarefy.models.map import Site
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.models.opening import open_any
from rarefy.models.runner import Runner
from rarefy.run.effort import effort_named
from rarefy.run.language import Language
from rarefy.run.planning import build, techniques, transforms
from rarefy.run.progress import Silent
from rarefy.run.recipe import split
from rarefy.run.samples import Samples
from rarefy.run.subject import Pace, Subject
from rarefy.run.sweep import Work, rewrite
from rarefy.runtimes.torch import attach

PAGE = Path(__file__).parent.parent / "docs" / "techniques.md"
COMMAND = "python benchmarks/techniques.py --data DATA --work WORK --gemma HF_FOLDER"
STEADY = 0.2  # how far apart the middle half of the ratios may lie for their median to be shown
# samples: surveyed, calibrated on (the probe learns from them, too), judged on; positions: windows and
# positions of each at which a language model's answers are compared
EFFORT = replace(effort_named("quick"), survey=2, calibration=24, positions=(4, 48), samples=(64, 512, 400),
                 repeats=9)
BLOCKS = 3  # of a language model that are edited
LONG = 0.2  # seconds of a call of which half the turns will do
TOKENS = {"batch": 128, "single": 1}  # that the edited layers of a language model are timed with


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
    (step("awq"), step("rtn", "int4-g32")), (step("smoothquant"), step("rtn", "int8")),
    (step("rotate", residual=False), step("rtn", "int4-g32")),
    (step("rtn", "int8"), step("entropy")),
    (step("sparsegpt", **HALF), step("repair", rank=8), step("rtn", "int8")),
    (step("sparsegpt", **HALF), step("gptq", "int4-g32"), step("entropy")),
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

    original: the network itself, never changed. fitted: evidence that techniques fit to. foreseen: evidence
    that damage is predicted from (empty: it is not, because the channels are others).
    """

    name: str
    subject: Subject
    original: nn.Module
    sites: tuple[Site, ...]
    fitted: dict[str, Evidence]
    foreseen: dict[str, Evidence]
    data: Any
    judge: Callable[[nn.Module], dict[str, Any]]

    def paces(self) -> dict[str, Pace]:
        """What is timed: all of a network, or the layers of a language model that are edited.

        A language model spends most of its time in blocks and a head that nobody edited here.
        """
        if isinstance(self.subject, Samples):
            return self.subject.paces(self.data)
        return {key: layers(self.sites, tokens) for key, tokens in TOKENS.items()}


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
        sys.exit("gemma: pass --gemma HF_FOLDER (permuted_gemma.py writes one), or --models minilm,cnn")
    text = options.data / "wikitext2"
    return looked_at("gemma", Language(open_any(options.gemma)), (str(text / "valid.txt"),),
                     (str(text / "test.raw.txt"),))


def looked_at(name: str, subject: Subject, data: tuple[Any, ...], judged: tuple[Any, ...]) -> Case:
    """The survey, and the evidence of a sweep that changes nothing."""
    shown = subject.gather(data, judged, EFFORT, 0, Silent())
    foreseen = {seen.site.path: seen.evidence for seen in subject.survey(
        shown, EFFORT, torch.Generator().manual_seed(0), lambda done, total: None)}
    sites = tuple(site for site in chosen(subject) if site.path in foreseen)
    foreseen = {site.path: foreseen[site.path] for site in sites}
    fitted = recorded(subject, sites, shown, foreseen)
    return Case(name, subject, subject.live(), sites, fitted, foreseen, shown, judge_of(subject, shown))


def chosen(subject: Subject) -> list[Site]:
    """All weights of a plain network, those of an encoder's blocks, those of some blocks of a large model."""
    found = subject.opened.map
    if isinstance(subject.opened, Model):
        blocks = set(torch.linspace(0, found.blocks - 1, min(BLOCKS, found.blocks)).round().int().tolist())
        return [site for site in found.sites if site.block in blocks]
    return [site for site in found.sites if found.blocks == 0 or site.block is not None]


def recorded(subject: Subject, sites: tuple[Site, ...], shown: Any,
             foreseen: Mapping[str, Evidence]) -> dict[str, Evidence]:
    """What arrives at the sites, with the survey's Fisher, which a change of channels leaves as it is."""
    recorder = Recorder()
    fishers = {path: each.fisher for path, each in foreseen.items() if each.fisher is not None}
    subject.sweep({site.path: Work((("record", recorder),), "") for site in sites}, shown, {}, fishers, {}, 0,
                  EFFORT, lambda done, total: None)
    return {path: replace(each, fisher=fishers[path]) for path, each in recorder.found.items()}


def judge_of(subject: Subject, shown: Any) -> Callable[[nn.Module], dict[str, Any]]:
    """A comparison with the original, whose answers are computed once."""
    if isinstance(subject, Samples):
        network, judge = subject.opened, Judge(subject.opened, shown.evaluation, shown.calibration)
        return lambda module: judge.compare(network.running(module)).as_dict()
    windows, positions = EFFORT.positions
    tokens = shown.evaluation[:windows]
    places = torch.linspace(1, tokens.shape[1] - 1, positions).long()
    answers = log_probs(Runner(subject.opened), tokens, places)  # type: ignore[arg-type]

    @torch.no_grad()
    def judge_text(module: Any) -> dict[str, Any]:
        found = []  # a window at a time: tables are as wide as the vocabulary
        for window, wanted in zip(tokens.split(1), answers, strict=True):
            logits = module(input_ids=window, use_cache=False, logits_to_keep=places).logits[0]
            found.append(compare_tables(wanted, logits.float().log_softmax(-1)))
        moved = [each.kl_mean for each in found]
        return {"kl_mean": statistics.mean(moved), "kl_stderr": statistics.stdev(moved) / len(moved)**0.5,
                "top1": statistics.mean(each.top1 for each in found)}

    return judge_text


def layers(sites: tuple[Site, ...], tokens: int) -> Pace:
    """All layers of the sites, one after the other, on inputs drawn at random."""
    generator = torch.Generator().manual_seed(0)
    inputs = {site.path.removesuffix(".weight"): torch.randn(tokens, site.shape[1], generator=generator)
              for site in sites}

    @torch.no_grad()
    def run(network: nn.Module) -> int:
        for name, x in inputs.items():
            network.get_submodule(name)(x)
        return tokens

    return run


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


MODELS = {"minilm": minilm, "gemma": gemma, "cnn": cnn}
MODELS_RUN = ",".join(MODELS)


# ---- one row -------------------------------------------------------------------------------------------


def viewed(case: Case, steps: tuple[Step, ...]) -> tuple[Case, tuple[Step, ...]]:
    """The case after the steps that change its channels, with evidence of its own, and the other steps."""
    where = tuple(site.path for site in case.sites)
    whole, rest = split([replace(each, where=where) for each in steps])
    if not whole:
        return case, steps
    subject, _ = case.subject.reshaped(Recipe(case.name, (*whole, *rest)), EFFORT, case.data,
                                       lambda done, total: None)
    fitted = recorded(subject, case.sites, case.data, case.foreseen)
    return replace(case, subject=subject, fitted=fitted, foreseen={}), rest


def edited(case: Case, steps: tuple[Step, ...]) -> tuple[dict[str, Node], dict[str, str]]:
    """Every site behind the chain of techniques, and what those sites say that it refuses."""
    chain = tuple((each.technique, build(each, each.format)) for each in steps)
    trees, refused = dict[str, Node](), dict[str, str]()
    for site in case.sites:
        try:
            tree, _ = rewrite(case.subject.opened, site, Work(chain, ""), case.fitted.get(site.path), 0)
            trees[site.path] = as_short(case, site, tree)
        except EditError as error:
            refused[site.path] = str(error)
    return trees, refused


def as_short(case: Case, site: Site, tree: Node) -> Node:
    """Floats of a tree in the type that the model has, where that is shorter: half a float32 is no gain."""
    dtype = getattr(torch, case.subject.opened.source.dtype(site.path), torch.float32)
    held = [leaf.values.dtype.itemsize for leaf in leaves(tree) if isinstance(leaf, Dense)]
    if max(held, default=0) <= dtype.itemsize:
        return tree
    cast = build(step("cast", dtype=str(dtype).removeprefix("torch.")))
    done, _ = edit(site.path, tree, case.subject.opened.weight(site.path), cast, "cast",
                   case.fitted.get(site.path), torch.Generator(), site.kernel)
    return done


def stored(trees: Mapping[str, Node], folder: Path) -> int:
    """Bytes of the file that holds these weights, its header included."""
    for left in (folder, folder.with_name(folder.name + ".part")):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    save_native(folder, trees, {}, {})
    size = (folder / WEIGHTS).stat().st_size
    shutil.rmtree(folder)
    return size


def run(case: Case, steps: tuple[Step, ...], folder: Path) -> dict[str, Any]:
    """One technique on one model, as plain data."""
    found: dict[str, Any] = {"edited": 0, "sites": len(case.sites), "refused": {}}
    try:
        seen, rest = viewed(case, steps)
        trees, found["refused"] = edited(seen, rest)
    except RarefyError as error:
        found["refused"] = {case.name: str(error)}
        return found
    if not trees:
        return found
    opened = seen.subject.opened
    found["edited"], found["bytes"] = len(trees), stored(trees, folder)
    found["original"] = stored(as_they_are(case, set(trees)), folder)
    weights = sum(math.prod(tree.shape) for tree in trees.values())
    found["bpw"] = sum(tree.bits() for tree in trees.values()) / weights
    found["predicted"] = sum(seen.foreseen[path].damage(tree.dense() - opened.weight(path))
                             for path, tree in trees.items()) if seen.foreseen else math.nan
    compressed = shadow(case.original) if seen is case else seen.subject.live()
    found["ways"] = list(attach(compressed, trees).values())
    found["measured"] = case.judge(compressed)
    found["speed"] = timed(case, compressed)
    return found


def as_they_are(case: Case, paths: set[str]) -> dict[str, Node]:
    """The original's weights, in the type that it holds them in."""
    opened = case.subject.opened
    return {site.path: as_short(case, site, Dense(opened.weight(site.path)))
            for site in case.sites if site.path in paths}


def shadow(network: nn.Module) -> nn.Module:
    """A network of its own modules that shares all parameters."""
    kept = {id(each): each for each in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, kept)


def timed(case: Case, network: nn.Module) -> dict[str, dict[str, float]]:
    """The original and the other in turns, in seconds of the processor."""
    found = {}
    for key, work in case.paces().items():
        started = time.process_time()
        work(case.original)
        turns = EFFORT.repeats if time.process_time() - started < LONG else EFFORT.repeats // 2
        paces = compare(partial(work, case.original), partial(work, network), turns, clock=time.process_time)
        found[key] = {"ratio": paces.ratio, "spread": paces.spread}
    return found


# ---- the page ------------------------------------------------------------------------------------------


def row(name: str, found: Mapping[str, Any]) -> list[str]:
    if not found["edited"]:
        return [name, *["refused"] + [""] * 8, next(iter(found["refused"].values()), "")]
    measured = found["measured"]
    moved = next(max(value, 0.0) for key, value in measured.items() if key in ("kl_mean", "distance_mean"))
    kept = measured["task"]["accuracy"] if "task" in measured else measured.get("top1", math.nan)
    ways = Counter(smaller(how) for how in found["ways"]).most_common()
    said = "; ".join(f"{how} ({count})" if len(ways) > 1 else how for how, count in ways)
    predicted = "" if math.isnan(found["predicted"]) else f"{found['predicted']:.3g}"
    speed = ", ".join(pace(each) for each in found["speed"].values())
    return [name, f"{found['original'] / MEGABYTE:.2f}", f"{found['bytes'] / MEGABYTE:.2f}",
            f"{found['original'] / found['bytes']:.1f}x", f"{found['bpw']:.2f}",
            f"{found['edited']} of {found['sites']}", predicted, f"{moved:.3g}", f"{kept:.1%}", speed, said]


def pace(timed: Mapping[str, float]) -> str:
    """A ratio, or nothing where those of single turns lay too far apart for one."""
    return f"{timed['ratio']:.2f}x" if timed["spread"] <= STEADY else "unsteady"


def smaller(how: str) -> str:
    """The kernel without the sizes that differ from weight to weight."""
    how = re.sub(r"\d+ x \d+ of \d+ x \d+", "fewer rows or columns", how)
    how = re.sub(r"\d+ of \d+ filters, \d+ of \d+ channels", "fewer filters or channels", how)
    return re.sub(r"rank \d+", "low rank", re.sub(r"\d+% kept", "few kept", how))


def section(name: str, results: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """One model's table, with what its techniques refused below, and the rows that are missing."""
    missing = [title for title, found in results.items() if found is None]
    what, unit = (("distance", "1 - cosine") if "distance_mean" in base["measured"] else ("KL", "nats"))
    task = base["measured"].get("task")
    kept = f"accuracy ({task['by']})" if task else "same token"
    head = ["technique", "MB before", "MB after", "smaller", "bits per weight", "weights edited",
            f"predicted {what}", f"measured {what}", kept, base["timed"], "how it runs"]
    original = f", {kept} {task['accuracy_original']:.1%}" if task else ""
    copied = ", ".join(map(pace, base["speed"].values()))
    about = (f"{base['about']}{original}. Bytes are those of the edited weights. The {what} to the original "
             f"is in {unit}. Speed is the original's time over the edited one's, in turns in one process on "
             f"one thread, or `unsteady` where the middle half of the ratios of single turns spans more than "
             f"{STEADY:.0%}; a copy of the original, timed so: {copied}.")
    results = {title: found for title, found in results.items() if found is not None}
    refused = [f"- {title}: {reason}" for title, found in results.items() if found["edited"]
               for reason in list(dict.fromkeys(found["refused"].values()))]
    parts = [f"## {name}", about, table(head, [row(title, found) for title, found in results.items()])]
    if missing:
        parts.append(f"Not measured when this page was written: {'; '.join(missing)}.")
    return parts + (["Left as they were, because the technique refuses them:", "\n".join(refused)]
                    if refused else [])


def baseline(case: Case) -> dict[str, Any]:
    """The original against itself: its answers, how steady the clock is, and what was looked at."""
    opened, same = case.subject.opened, shadow(case.original)
    count = sum(math.prod(site.shape) for site in case.sites)
    about = (f"{len(case.sites)} matrices of {count / 1e6:.2f} million weights are edited, of "
             f"{opened.map.parameters / 1e6:.2f} million numbers in all; ")
    if isinstance(case.subject, Language):
        windows, positions = EFFORT.positions
        about += (f"calibrated on {EFFORT.calibration} windows of {EFFORT.length} tokens, judged at "
                  f"{positions} positions of each of {windows} others")
        timed_as = "speed of these layers: " + ", ".join(f"{count} token{'s' * (count > 1)}"
                                                         for count in TOKENS.values())
    else:
        about += f"calibrated on {len(case.data.calibration)} samples, judged on {len(case.data.evaluation)}"
        timed_as = "speed of the network: batch of 32, single"
    return {"measured": case.judge(same), "about": about, "timed": timed_as, "speed": timed(case, same)}


ABOUT = (
    "Each row edits weights of a model with one technique (or a chain of them) and no training, at "
    "settings that are usual for it: the rows say what a technique costs and gives, not which is best at "
    "one size. Smaller on disk is not faster by itself: the last column says which kernel the weights got "
    "(how many, where they differ), and those `expanded once` run as the original does. Predicted is the "
    "second-order estimate that the planner works with; it holds for small changes. Samples are few, so that "
    "the page can be made again: differences of accuracy below two points are noise.")


def main() -> None:
    """Run what is asked for and is not in the ledger; write the page when everything was asked for."""
    torch.set_num_threads(1)
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", default=MODELS_RUN, help="of minilm, gemma, cnn")
    parser.add_argument("--only", default="", help="names of techniques; the page is then not written")
    parser.add_argument("--finished", action="store_true", help="run nothing: write what there is")
    parser.add_argument("--gemma", type=Path, help="folder of a language model")
    options = parser.parse_args()
    only, names = set(filter(None, options.only.split(","))), options.models.split(",")
    all_of_them = {**techniques(), **transforms()}
    for word, known in (*((word, all_of_them) for word in only), *((word, MODELS) for word in names)):
        if word not in known:
            sys.exit(f"{word!r}: choose among {', '.join(known)}")
    missing = set(all_of_them) - {each.technique for steps in ROWS for each in steps}
    if missing:
        sys.exit(f"no row shows {', '.join(sorted(missing))}: add one to ROWS")
    rows = {named(steps): steps for steps in ROWS if not only or only & {each.technique for each in steps}}
    ledger, parts = Ledger(options.work / "techniques.json"), [ABOUT]
    for name in names:
        parts += judged(name, rows, options, ledger)
    if only:
        print("\n\n".join(parts[1:]))
    else:
        more = "" if options.models == MODELS_RUN else f" --models {options.models}"
        write_page(PAGE, "Techniques, measured", COMMAND + more, parts)


def judged(name: str, rows: Mapping[str, tuple[Step, ...]], options: argparse.Namespace,
           ledger: Ledger) -> list[str]:
    """One model's section; the model is only looked at when something of it is missing."""
    protocol = (name, EFFORT, BLOCKS, TOKENS)
    keys = {title: fingerprint(*protocol, title, source_of(steps)) for title, steps in rows.items()}
    start, folder = fingerprint(*protocol, source_of(())), options.work / f"native-{name}"
    complete = ledger.get(start) is not None and all(ledger.get(key) is not None for key in keys.values())
    if not complete and not options.finished:
        case = MODELS[name](options)
        if ledger.get(start) is None:
            ledger.put(start, baseline(case))
        for title, key in keys.items():
            if ledger.get(key) is None:
                ledger.put(key, run(case, rows[title], folder))
                print(name, row(title, ledger.get(key)), flush=True)
    if ledger.get(start) is None:
        return [f"## {name}", "Not measured when this page was written."]
    return section(name, {title: ledger.get(key) for title, key in keys.items()}, ledger.get(start))


def source_of(steps: tuple[Step, ...]) -> str:
    """The hash of what a row depends on: its techniques' files, and what all of them stand on."""
    kinds = {**techniques(), **transforms()}
    modules = {kinds[each.technique].__module__.removeprefix("rarefy.") for each in steps}
    return source_sha256("core", "numerics", "formats/native.py", "runtimes/torch.py", "runtimes/modules.py",
                         *sorted(name.replace(".", "/") + ".py" for name in modules))


if __name__ == "__main__":
    main()
