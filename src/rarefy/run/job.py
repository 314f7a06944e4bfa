"""The main job: a model and a budget in; the best file that fits, with proof, out.

    open -> data -> survey -> plan -> sweep -> export -> proof -> receipt and report -> final name

Everything is staged beside the final name (``journal``). A job that was interrupted resumes where it
stopped; one that misses a bound of the user leaves ``OUT.rejected`` and nothing under the final name.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import rarefy
from rarefy.core.errors import BudgetError, OutputError, TargetError, did_you_mean
from rarefy.core.nodes import Node
from rarefy.core.nouns import Budget, Receipt, Recipe
from rarefy.export.gguf import LLAMA_CPP, export_gguf, fixed_bytes
from rarefy.measure.resources import Clock, fingerprint, peak_rss
from rarefy.models.model import Model, open_model
from rarefy.planner.allocate import Plan
from rarefy.report.page import render
from rarefy.run import proof
from rarefy.run.data import Data, evaluation_windows, gather
from rarefy.run.effort import Effort, effort_named
from rarefy.run.journal import Journal, Sites, written
from rarefy.run.planning import (
    Survey,
    allocate,
    choices,
    limit_bytes,
    original_bytes,
    take_survey,
    work_of,
)
from rarefy.run.progress import Progress, Silent
from rarefy.run.recipe import plan_of, read_recipe, recipe_of, split, write_recipe
from rarefy.run.rescale import rescaled
from rarefy.run.reshape import reshaped
from rarefy.run.sweep import sweep
from rarefy.runtimes.llamacpp import runtime

TARGETS = {LLAMA_CPP.name: LLAMA_CPP}
TRIES = 4          # plans tried to meet --max-kl


@dataclass(frozen=True)
class Job:
    """What to compress, how small, for whom, and how hard to try."""

    model: str | Model
    out: Path = Path("out")
    to: str | None = None
    max_kl: float | None = None
    target: str = "llama.cpp"
    effort: str = "balanced"
    data: tuple[str, ...] = ()
    eval_data: tuple[str, ...] = ()
    seed: int = 0
    overwrite: bool = False
    dequantize: bool = False
    command: str = ""
    recipe: Recipe | None = None

    def budget(self) -> Budget | None:
        """The budget; None when a recipe says what to do instead."""
        return None if self.recipe is not None else Budget(self.to, self.max_kl)


@dataclass(frozen=True, eq=False)
class Result:
    """A finished job: the folder, the exported file in it, and the receipt."""

    out: Path
    exported: Path
    receipt: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Planned:
    """A plan before any weight is touched: what ``rarefy plan`` shows."""

    model: Model
    plan: Plan
    survey: Survey
    predicted_bytes: int
    predicted_kl: float
    original_bytes: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check(job: Job) -> None:
    """Refuse what cannot work before any work is done."""
    job.budget()  # a budget that means nothing is refused here
    effort_named(job.effort)
    if job.target not in TARGETS:
        raise TargetError(f"target {job.target!r}: choose one of {', '.join(TARGETS)}"
                          f"{did_you_mean(job.target, list(TARGETS))}")
    runtime()


def plan(job: Job, progress: Progress | None = None) -> Planned:
    """What would be done for the budget, at what predicted cost; nothing is compressed or written."""
    progress, effort = progress or Silent(), effort_named(job.effort)
    check(job)
    with _heard() as heard, tempfile.TemporaryDirectory() as folder:
        with progress.stage("open"):
            model = opened(job)
        _possible(job, model)
        data = gather(model, job.data, job.eval_data, effort, job.seed, progress)
        found = take_survey(model, data.calibration, effort, job.seed, Path(folder), progress)
        chosen = allocate(model, found, Budget(job.to, job.max_kl))
    return Planned(model, chosen, found, _bytes(model, chosen), _damage(chosen), original_bytes(model),
                   plan_rows(model, chosen), list(heard))


def compress(job: Job, progress: Progress | None = None) -> Result:
    """Do the job. Raises a RarefyError; then nothing stands under the final name."""
    progress, effort, clock = progress or Silent(), effort_named(job.effort), Clock()
    check(job)
    journal = Journal(job.out, overwrite=job.overwrite)
    with _heard() as heard, written(job.out):
        with progress.stage("open"), clock.stage("open"):
            model = opened(job)
            model.verify()
        _possible(job, model)
        with journal.opened(_key(job, model)):
            work = _Compression(job, model, effort, journal, progress, clock)
            receipt = work.run(heard)
            accepted = not receipt["missed"]
            with progress.stage("report"), clock.stage("report"):
                _write(journal.partial, receipt, work.recipe)
            final = journal.publish(accepted=accepted)
    if not accepted:
        raise BudgetError(f"{receipt['missed']}; the best candidate is in {final}")
    return Result(final, final / f"model{TARGETS[job.target].suffix}", receipt)


def run_recipe(path: Path, out: Path, progress: Progress | None = None, *, overwrite: bool = False,
               command: str = "") -> Result:
    """Do what a recipe says, then measure and report as ``compress`` does."""
    recipe = read_recipe(path)
    return compress(Job(recipe.model, out, target=recipe.target, effort=recipe.effort, data=recipe.data,
                        eval_data=recipe.eval_data, seed=recipe.seed, overwrite=overwrite,
                        dequantize=recipe.dequantize, command=command, recipe=recipe), progress)


def evaluate(out: Path, against: str | Model, progress: Progress | None = None, *,
             eval_data: tuple[str, ...] = (), effort: str = "balanced", seed: int = 0) -> dict[str, Any]:
    """Measure an exported file (or the folder it is in) against its original again.

    Returns the parts of a receipt that can be measured. Text: ``eval_data``, or ``python-docs``.
    """
    progress, clock, how = progress or Silent(), Clock(), effort_named(effort)
    runtime()
    with _heard() as heard:
        with progress.stage("open"), clock.stage("open"):
            model = against if isinstance(against, Model) else open_model(against, dequantize=True)
            exported = exported_file(out)
            tokens = evaluation_windows(model, eval_data, how, seed)
        with progress.stage("proof") as stage, clock.stage("proof"):
            measured = proof.in_float(model, exported, tokens, None, stage)
        with progress.stage("llama.cpp") as stage, clock.stage("runtime"):
            proof.tokens_agree(model, exported)
            measured["runtime"] = proof.in_runtime(model, exported, tokens, *how.positions, stage)
        with progress.stage("speed"), clock.stage("speed"), tempfile.TemporaryDirectory() as folder:
            original = Path(folder) / "original.gguf"
            export_gguf(model, {}, {site.path: "F16" for site in model.map.sites}, original)
            speed = proof.speeds(original, exported, how.repeats)
    return {"rarefy": rarefy.__version__, "versions": versions(), "model": _about(model),
            "outputs": [fingerprint(exported, exported.parent).as_dict()], "target": LLAMA_CPP.name,
            "measured": measured, "speed": speed, "memory": {"peak_rss_bytes": peak_rss()},
            "seconds": clock.seconds, "warnings": list(heard)}


def exported_file(out: Path) -> Path:
    """The exported file that ``out`` is or holds."""
    if out.is_file():
        return out
    found = sorted(out.glob("*.gguf")) if out.is_dir() else []
    if len(found) != 1:
        raise OutputError(f"{out}: holds {len(found)} .gguf files; pass the file, or a folder that "
                          "rarefy compress wrote")
    return found[0]


def opened(job: Job) -> Model:
    """The model that the job names."""
    return job.model if isinstance(job.model, Model) else open_model(job.model, dequantize=job.dequantize)


class _Compression:
    """One job under way; its methods are the stages."""

    def __init__(self, job: Job, model: Model, effort: Effort, journal: Journal, progress: Progress,
                 clock: Clock) -> None:
        self.job, self.model, self.effort = job, model, effort
        self.journal, self.progress, self.clock = journal, progress, clock
        self.exported = journal.partial / f"model{TARGETS[job.target].suffix}"
        self.chosen: Plan | None = None
        self.view = model
        self.rescalings: tuple[Receipt, ...] = ()

    def run(self, heard: list[str]) -> dict[str, Any]:
        with self.clock.stage("data"):
            data = gather(self.model, self.job.data, self.job.eval_data, self.effort, self.job.seed,
                          self.progress, self.journal.work / "data.safetensors")
        self._rescale(data)
        with self.clock.stage("survey"):
            found = take_survey(self.view, data.calibration, self.effort, self.job.seed,
                                self.journal.work / "survey", self.progress)
        chosen, sites, measured = self._search(data, found)
        self.chosen = chosen
        with self.progress.stage("llama.cpp") as stage, self.clock.stage("runtime"):
            proof.tokens_agree(self.model, self.exported)
            windows, positions = self.effort.positions
            measured["runtime"] = proof.in_runtime(self.model, self.exported, data.evaluation, windows,
                                                   positions, stage)
        speed, completions = self._against_original()
        return self._receipt(data, found, chosen, sites, measured, speed, completions, heard)

    def _rescale(self, data: Data) -> None:
        """From here on the model to compress is what a recipe's steps for the whole model make of it."""
        recipe = self.job.recipe
        if recipe is None or not split(recipe.steps)[0]:
            return
        with self.progress.stage("reshape") as stage, self.clock.stage("reshape"):
            smaller = reshaped(self.model, recipe, data.calibration, stage.advance)
            done = rescaled(smaller.model, recipe, self.effort, data.calibration, stage.advance)
        self.view, self.rescalings = done.model, smaller.receipts + done.receipts

    def _search(self, data: Data, found: Survey) -> tuple[Plan, Sites, dict[str, Any]]:
        """Plan, compress and measure; under --max-kl again with what the measurement taught."""
        job, bound = self.job, self.job.max_kl
        for attempt in range(TRIES):
            if job.recipe is not None:
                chosen = plan_of(self.view, job.recipe)
            else:
                chosen = allocate(self.model, found, Budget(job.to, None if job.to else bound))
            sites, measured = self._candidate(data, found, chosen, attempt)
            kl = measured["float"]["kl_mean"]
            if job.to is not None or job.max_kl is None or kl <= job.max_kl:
                break
            assert bound is not None
            bound *= 0.9 * job.max_kl / kl
        return chosen, sites, measured

    def _candidate(self, data: Data, found: Survey, chosen: Plan,
                   attempt: int) -> tuple[Sites, dict[str, Any]]:
        outer = frozenset(site.path for site in self.view.map.sites if site.block is None)
        sites = Sites(self.journal.work / f"sites{attempt}", outer)
        sites.verify()
        with self.progress.stage("compress") as stage, self.clock.stage("compress"):
            sweep(self.view, work_of(chosen, self.effort), data.calibration, found.outside, sites,
                  self.job.seed, sequential=self.effort.sequential, advance=stage.advance)
        with self.progress.stage("export"), self.clock.stage("export"):
            export_gguf(self.view, _Trees(sites), {path: o.format for path, o in chosen.items()},
                        self.exported)
        with self.progress.stage("proof") as stage, self.clock.stage("proof"):
            return sites, proof.in_float(self.model, self.exported, data.evaluation, data.second, stage)

    def _against_original(self) -> tuple[dict[str, Any], list[dict[str, str]]]:
        """Speed and completions beside the original's, as the same runtime runs it in F16."""
        original = self.journal.work / "original.gguf"
        formats = {site.path: "F16" for site in self.model.map.sites}
        with self.progress.stage("speed") as stage, self.clock.stage("speed"):
            stage.line("the original as F16")
            export_gguf(self.model, {}, formats, original)
            speed = proof.speeds(original, self.exported, self.effort.repeats)
            completions = proof.completions(original, self.exported)
            original.unlink()
        return speed, completions

    def _receipt(self, data: Data, found: Survey, chosen: Plan, sites: Sites, measured: dict[str, Any],
                 speed: dict[str, Any], completions: list[dict[str, str]],
                 heard: list[str]) -> dict[str, Any]:
        job, model = self.job, self.model
        size, kl = self.exported.stat().st_size, measured["float"]["kl_mean"]
        limit = None if job.to is None else limit_bytes(model, Budget(job.to))
        return {
            "rarefy": rarefy.__version__, "command": job.command, "created": datetime.now(UTC).isoformat(),
            "versions": versions(), "seed": job.seed,
            "inputs": [fingerprint(path).as_dict() | {"path": path.name} for path in model.source.files()],
            "outputs": [fingerprint(self.exported, self.journal.partial).as_dict()],
            "model": _about(model),
            "budget": {"to": job.to, "max_kl": job.max_kl, "limit_bytes": limit},
            "target": job.target, "effort": job.effort, "data": data.sources,
            "plan": plan_rows(self.view, chosen),
            "axes": [asdict(r) for r in self.rescalings],
            "sites": [asdict(r) for site in self.view.map.sites for r in sites[site.path][1]],
            "swaps": [asdict(swap) | {"factor": swap.factor} for swap in found.swaps],
            "predicted_kl": _damage(chosen), "measured": measured, "speed": speed,
            "memory": {"peak_rss_bytes": peak_rss(),
                       "runtime_rss_bytes": speed["memory_compressed"]["resident"]},
            "seconds": self.clock.seconds, "bytes": size, "completions": completions,
            "missed": self._missed(size, limit, kl, found, chosen), "warnings": list(heard),
            "how_to_run": [f"llama-cli -m {job.out}/{self.exported.name}", f"rarefy chat {job.out}"],
        }

    @property
    def recipe(self) -> Recipe:
        """What was done, spelled out, so that ``rarefy run`` does it again."""
        assert self.chosen is not None
        job = self.job
        return job.recipe or recipe_of(self.chosen, str(job.model) if isinstance(job.model, str) else
                                       job.model.name, target=job.target, effort=job.effort, data=job.data,
                                       eval_data=job.eval_data, seed=job.seed, dequantize=job.dequantize)

    def _missed(self, size: int, limit: int | None, kl: float, found: Survey, chosen: Plan) -> str:
        """What bound of the user was missed, with the nearest budget that would do; empty: none."""
        if limit is not None and size > limit:
            return f"the file has {size:,} bytes, {size - limit:,} more than allowed; this is a bug"
        if self.job.max_kl is None or kl <= self.job.max_kl:
            return ""
        wanted = _damage(chosen) * self.job.max_kl / kl * 0.95
        try:
            enough = _bytes(self.model, allocate(self.model, found, Budget(max_kl=wanted)))
            remedy = f"about --to {-(-enough // 10**4) / 100:g}MB would do"
        except BudgetError:
            remedy = "no format of this target is predicted to do; pass a larger --max-kl"
        return f"measured KL {kl:.4f} is above --max-kl {self.job.max_kl:g} at {size / 1e6:.2f} MB; {remedy}"


class _Trees(Mapping[str, Node]):
    """The trees of finished sites, read one at a time."""

    def __init__(self, sites: Sites) -> None:
        self.sites = sites

    def __getitem__(self, path: str) -> Node:
        return self.sites[path][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


def _about(model: Model) -> dict[str, Any]:
    return {"name": model.name, "family": model.map.family.name, "parameters": model.parameters,
            "weights": sum(s.shape[0] * s.shape[1] for s in model.map.sites), "blocks": model.map.blocks,
            "tied": model.map.tied, "original_bytes": original_bytes(model)}


def plan_rows(model: Model, chosen: Plan) -> list[dict[str, Any]]:
    """The plan as plain data, in the order of the network."""
    return [{"site": site.path, "role": site.role, "block": site.block, "shape": list(site.shape),
             "format": chosen[site.path].format, "bytes": chosen[site.path].bytes,
             "bits_per_weight": chosen[site.path].bytes * 8 / (site.shape[0] * site.shape[1]),
             "damage": chosen[site.path].damage} for site in model.map.sites]


def _possible(job: Job, model: Model) -> None:
    """Refuse a budget that not even the smallest formats meet, before anything is computed."""
    if job.to is None:
        return
    limit = limit_bytes(model, Budget(job.to))
    smallest = fixed_bytes(model) + sum(min(c.bytes for c in choices(model, site).values())
                                        for site in model.map.sites)
    if smallest > limit:
        raise BudgetError(f"--to {job.to}: not possible; the smallest file that {job.target} can load has "
                          f"{smallest:,} bytes; pass --to {-(-smallest // 10**5) / 10:.1f}MB or more")


def _bytes(model: Model, chosen: Plan) -> int:
    return fixed_bytes(model) + sum(option.bytes for option in chosen.values())


def _damage(chosen: Plan) -> float:
    return sum(option.damage for option in chosen.values())


def _key(job: Job, model: Model) -> dict[str, Any]:
    """Everything that decides the bits of the result."""
    files = [fingerprint(path).as_dict() | {"path": path.name} for path in model.source.files()]
    texts = [fingerprint(Path(ref)).as_dict() for ref in (*job.data, *job.eval_data) if Path(ref).is_file()]
    settings = {name: getattr(job, name) for name in ("to", "max_kl", "target", "effort", "data", "eval_data",
                                                      "seed")}
    return {"model": model.name, "files": files, "texts": texts, "settings": settings,
            "recipe": None if job.recipe is None else asdict(job.recipe),
            "threads": torch.get_num_threads(), "versions": versions()}


def finite(value: Any) -> Any:
    """The same plain data with None for what JSON has no word for (NaN, infinity)."""
    match value:
        case dict():
            return {key: finite(each) for key, each in value.items()}
        case list() | tuple():
            return [finite(each) for each in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value


def versions() -> dict[str, str]:
    """Versions of everything that has a say in the result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("rarefy", "torch", "transformers", "numpy", "scipy", "gguf", "xllamacpp",
                    "llama-cpp-python"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Collect our own warnings, for the receipt, and let the rest pass."""
    heard: list[str] = []
    with warnings.catch_warnings():
        show = warnings.showwarning

        def listen(message: Any, category: Any, filename: str, *rest: Any) -> None:
            if "rarefy" in filename:
                heard.append(str(message))
                print(f"warning: {message}", file=sys.stderr)
            else:
                show(message, category, filename, *rest)

        warnings.showwarning = listen  # type: ignore[assignment]
        yield heard


def _write(folder: Path, receipt: dict[str, Any], recipe: Recipe) -> None:
    (folder / "recipe.yaml").write_text(write_recipe(recipe), encoding="utf-8")
    (folder / "receipt.json").write_text(json.dumps(finite(receipt), indent=1), encoding="utf-8")
    (folder / "report.html").write_text(render(receipt), encoding="utf-8")
