"""One job under way: its stages, in order, and the receipt of what they did."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rarefy
from rarefy.core.errors import BudgetError
from rarefy.core.nodes import Node
from rarefy.core.nouns import Budget, Receipt, Recipe, Step
from rarefy.measure.resources import Clock, bytes_on_disk, fingerprint, fingerprints, peak_rss
from rarefy.models.network import Network
from rarefy.planner.allocate import Plan, asked
from rarefy.report.verdict import distance
from rarefy.run.correct import biased
from rarefy.run.course import Course, State, check
from rarefy.run.effort import Effort
from rarefy.run.exits import add_exits, check_places
from rarefy.run.journal import Journal, Sites
from rarefy.run.planning import allocate, work_of
from rarefy.run.progress import Progress
from rarefy.run.recipe import Run, chains, format_of, parts, plan_of, recipe_of
from rarefy.run.sharing import follows, relinked
from rarefy.run.subject import Subject
from rarefy.run.survey import Survey, take_survey
from rarefy.run.target import Beside, Destination, Opened
from rarefy.run.trim import vocabulary_steps

if TYPE_CHECKING:
    from rarefy.run.job import Job

CORRECTION = Step("bias_correction")  # ends every plan for a network that has biases to move
TRIES = 4  # plans tried to meet a bound that is measured


class Compression:
    """One job under way; its methods are the stages."""

    def __init__(self, job: Job, subject: Subject, destination: Destination, effort: Effort,
                 journal: Journal, progress: Progress, clock: Clock, whole: Subject,
                 cuts: tuple[Receipt, ...]) -> None:
        self.job, self.subject, self.destination, self.effort = job, subject, destination, effort
        self.whole = whole  # what the user named; of its tokens ``subject`` may lack some
        self.journal, self.progress, self.clock = journal, progress, clock
        self.exported = destination.place(journal.partial)
        self.state = State(subject, receipts=cuts)  # what a recipe made of it before its last run of leaves
        self.done = self.state  # and behind it
        self.last: tuple[Step, ...] = ()
        self.behind: tuple[Run, ...] = ()  # trainings after these leaves
        self.chosen: Plan = {}
        self.exits: dict[str, Any] = {}

    def run(self, heard: list[str]) -> dict[str, Any]:
        """Everything up to the receipt."""
        job = self.job
        if job.recipe is not None:
            check(job.recipe)
        with self.clock.stage("data"):
            data = self.subject.gather(job.data, job.eval_data, self.effort, job.seed, self.progress,
                                       self.journal.work / "data.safetensors")
            self.destination = self.destination.given(self.subject, data)
        if job.recipe is not None and job.recipe.exits is not None:
            check_places(job.recipe.exits, self.subject.opened, data.evaluation)
        if job.recipe is not None:
            before, self.last, self.behind = parts(job.recipe.steps)
            with self.clock.stage("before"):
                self.state = self._course(data).through(before, self.state)
        with self.clock.stage("survey"):
            found = take_survey(self.state.view, self.destination, data, self.effort, job.seed,
                                self.journal.work / "survey", self.progress,
                                None if job.recipe is None else self.last)
        sites, measured = self._search(data, found)
        target, path = self.destination, self.exported
        with self.progress.stage(target.target.name) as stage, self.clock.stage("runtime"):
            measured["runtime"] = target.prove(self.subject, path, data, self.effort, stage)
        with self.progress.stage("speed") as stage, self.clock.stage("speed"):
            beside = target.beside(self.subject, path, data, self.journal.work, self.effort, stage)
        return self._receipt(data, found, sites, measured, beside, heard)

    def _course(self, data: Any) -> Course:
        return Course(self.subject, self.job.recipe or self.recipe, self.effort, data, self.journal.work,
                      self.progress, partial(self._leaves, data))

    def _leaves(self, data: Any, state: State, steps: tuple[Step, ...], number: int) -> State:
        """A run of leaves that is not the last one."""
        folder = self.journal.work / f"leaves{number}"
        found = take_survey(state.view, self.destination, data, self.effort, self.job.seed, folder / "survey",
                            self.progress, steps)
        sites = self._swept(state, self._asked(state, steps, found), data, found, folder / "sites")
        receipts = tuple(receipt for path in sites for receipt in sites[path][1])
        return replace(state, trees=Trees(sites, state.trees), receipts=state.receipts + receipts)

    def _asked(self, state: State, steps: tuple[Step, ...], found: Survey) -> Plan:
        """What some steps of the recipe ask of every site; nothing of the target, where other steps say how a
        site is stored."""
        assert self.job.recipe is not None
        opened = state.view.opened
        stored = {path for path, chain in chains(opened.map.sites, self.job.recipe).items()
                  if format_of(chain)}
        plan = plan_of(opened, replace(self.job.recipe, steps=steps), self.destination,
                       found.statistics or None, stored)
        followers = {path: self.destination.asked(opened, opened.map.by_path[path], ()) for path in plan
                     if path in state.trees and follows(state.trees[path])}
        return plan | followers  # what is shared is rewritten where it is stored

    def _search(self, data: Any, found: Survey) -> tuple[Sites, dict[str, Any]]:
        """Plan, compress and measure; again, with what the measurement taught, when a bound is missed."""
        job, opened = self.job, self.state.view.opened
        limit, bound = limit_of(self.destination, self.whole.opened, job), job.max_kl
        reserved = self.destination.fixed_bytes(opened)
        options = found.calibrated(opened.map.sites)
        for attempt in range(TRIES):
            if job.recipe is not None:
                self.chosen = self._asked(self.state, job.recipe.steps, found)
            else:
                self.chosen = allocate(options, limit, reserved, bound)
            sites = self._compress(data, found, attempt)
            over = 0 if limit is None else bytes_on_disk(self.exported) - limit
            if over > 0 and job.recipe is None and attempt + 1 < TRIES:
                reserved += over + over // 8  # trees took more than was foreseen
                continue
            with self.progress.stage("proof") as stage, self.clock.stage("proof"):
                candidate = self.destination.reopened(self.subject, self.exported)
                assert candidate is not None  # a target reads what it just wrote
                measured = self.subject.measure(candidate, data, stage)
            moved = distance(measured["float"])
            if job.to is not None or bound is None or job.max_kl is None or moved <= job.max_kl:
                break
            bound *= 0.9 * job.max_kl / moved
        return sites, measured

    def _compress(self, data: Any, found: Survey, attempt: int) -> Sites:
        recipe = self.job.recipe
        plan = self.chosen if recipe is None else self._asked(self.state, self.last, found)
        sites = self._swept(self.state, plan, data, found, self.journal.work / f"sites{attempt}")
        self.done = replace(self.state, trees=Trees(sites, self.state.trees))
        if recipe is not None and self.behind:
            with self.clock.stage("behind"):
                self.done = self._course(data).through(self.behind, self.done, len(recipe.steps))
        if recipe is None and isinstance(self.subject.opened, Network) and biased(self.subject.opened):
            with self.clock.stage("behind"):
                self.done = self._course(data).corrected(self.done, CORRECTION)
        with self.progress.stage("export"), self.clock.stage("export"):
            self.destination.export(self.done.view.opened, self.done.trees, self.chosen, self.exported)
        job, original = self.job, self.subject.opened
        if job.recipe is not None and job.recipe.exits is not None:
            assert isinstance(original, Network)
            with self.progress.stage("exits") as stage, self.clock.stage("exits"):
                self.exits = add_exits(job.recipe.exits, original, job.data, data.evaluation, self.exported,
                                       job.seed, self.journal.work, stage)
        return sites

    def _swept(self, state: State, plan: Plan, data: Any, found: Survey, folder: Path) -> Sites:
        """Every site of a plan rewritten, from the tree that it has become so far."""
        outer = frozenset(site.path for site in state.view.opened.map.sites if site.block is None)
        sites = Sites(folder, outer)
        sites.verify()
        work = {path: replace(each, start=state.trees.get(path))
                for path, each in work_of(plan, self.effort).items()}
        with self.progress.stage("compress") as stage, self.clock.stage("compress"):
            state.view.sweep(work, data, found.seen, found.fishers, sites, self.job.seed, self.effort,
                             stage.advance)
        return sites

    def _receipt(self, data: Any, found: Survey, sites: Sites, measured: dict[str, Any], beside: Beside,
                 heard: list[str]) -> dict[str, Any]:
        job, opened = self.job, self.subject.opened
        size, kl = bytes_on_disk(self.exported), distance(measured["float"])
        view, trees = self.done.view.opened, self.done.trees
        limit = limit_of(self.destination, self.whole.opened, job)
        shown = {path: self.destination.shown(option, trees.get(path))
                 for path, option in self.chosen.items()}
        resident = (beside.speed.get("memory_compressed") or {}).get("resident")
        return {
            "rarefy": rarefy.__version__, "command": job.command, "created": datetime.now(UTC).isoformat(),
            "versions": versions(), "seed": job.seed,
            "inputs": [fingerprint(path).as_dict() | {"path": path.name} for path in opened.source.files()],
            "outputs": [each.as_dict() for each in outputs(self.exported, self.journal.partial)],
            "model": about(self.whole, self.destination),
            "budget": {"to": job.to, "max_kl": job.max_kl, "limit_bytes": limit},
            "target": self.destination.target.name, "effort": job.effort, "data": data.sources,
            "plan": plan_rows(view, shown),
            "axes": [asdict(r) for r in self.done.receipts], "training": list(self.done.curves),
            "sites": [asdict(r) for site in view.map.sites if site.path in sites
                      for r in sites[site.path][1]],
            "swaps": [asdict(swap) | {"factor": swap.factor} for swap in found.swaps],
            "predicted_kl": damage(self.chosen), "measured": measured, "speed": beside.speed,
            "lowered": beside.lowered, **({"exits": self.exits} if self.exits else {}),
            "memory": {"peak_rss_bytes": peak_rss(), "runtime_rss_bytes": resident},
            "seconds": self.clock.seconds, "bytes": size, "completions": beside.completions,
            "missed": self._missed(size, limit, kl, found), "warnings": list(heard),
            "how_to_run": self.destination.how_to_run(job.out),
        }

    @property
    def recipe(self) -> Recipe:
        """What was done, spelled out, so that ``rarefy run`` does it again."""
        job = self.job
        name = str(job.model) if isinstance(job.model, str) else self.subject.opened.name
        texts = tuple(ref for ref in job.data if isinstance(ref, str))
        judged = tuple(ref for ref in job.eval_data if isinstance(ref, str))
        found = job.recipe or recipe_of(self.chosen, name, target=self.destination.target.name,
                                        effort=job.effort, data=texts, eval_data=judged, seed=job.seed,
                                        dequantize=job.dequantize)
        moved = job.recipe is None and self.done.receipts != self.state.receipts
        return replace(found, steps=(*vocabulary_steps(None, job.keep_vocabulary), *found.steps,
                                     *([CORRECTION] if moved else ())))

    def _missed(self, size: int, limit: int | None, kl: float, found: Survey) -> str:
        """What bound of the user was missed, with the nearest budget that would do; empty: none."""
        if limit is not None and size > limit:
            return f"the file has {size:,} bytes, {size - limit:,} more than allowed; this is a bug"
        if self.job.max_kl is None or kl <= self.job.max_kl:
            return ""
        wanted = damage(self.chosen) * self.job.max_kl / kl * 0.95
        opened = self.state.view.opened
        try:
            plan = allocate(found.calibrated(opened.map.sites), None, 0, wanted)
            enough = predicted_bytes(self.destination, opened, plan)
            remedy = f"about --to {asked(enough)} would do"
        except BudgetError:
            remedy = "no format of this target is predicted to do; pass a larger --max-kl"
        return f"measured KL {kl:.4f} is above --max-kl {self.job.max_kl:g} at {size / 1e6:.2f} MB; {remedy}"


class Trees(Mapping[str, Node]):
    """The trees of finished sites, read one at a time; of others what they were before, those that share with
    a finished site what it has become."""

    def __init__(self, sites: Sites, before: Mapping[str, Node]) -> None:
        self.sites, self.before = sites, before

    def __getitem__(self, path: str) -> Node:
        if path in self.sites:
            return self.sites[path][0]
        return relinked(self.before[path], self._swept)

    def _swept(self, path: str) -> Node | None:
        return self.sites[path][0] if path in self.sites else None

    def __contains__(self, path: object) -> bool:
        return path in self.sites or path in self.before

    def __iter__(self) -> Iterator[str]:
        yield from self.sites
        yield from (path for path in self.before if path not in self.sites)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def limit_of(destination: Destination, opened: Opened, job: Job) -> int | None:
    """The budget in bytes; shares are of the uncompressed export."""
    if job.to is None:
        return None
    return Budget(job.to).limit(original=destination.original_bytes(opened), weights=opened.parameters)


def possible(destination: Destination, opened: Opened, job: Job, whole: Opened) -> None:
    """Refuse a budget that not even the smallest formats meet, before anything is computed.

    whole: what the budget is a share of; ``opened`` may know fewer tokens.
    """
    limit = limit_of(destination, whole, job)
    if limit is None:
        return
    smallest = destination.fixed_bytes(opened) + sum(destination.least_bytes(opened, site)
                                                     for site in opened.map.sites)
    if smallest > limit:
        raise BudgetError(f"--to {job.to}: not possible; the smallest file that {destination.target.name} "
                          f"can load has {smallest:,} bytes; pass --to {asked(smallest)} or more")


def predicted_bytes(destination: Destination, opened: Opened, chosen: Plan) -> int:
    """Bytes of the export of a plan, as far as is known beforehand."""
    return destination.fixed_bytes(opened) + sum(option.bytes for option in chosen.values())


def damage(chosen: Plan) -> float:
    """What a plan is foreseen to do to the answers."""
    return sum(option.damage for option in chosen.values())


def outputs(exported: Path, folder: Path) -> list[Any]:
    """Every file of the export, by its path in the folder of the job."""
    if exported.is_file():
        return [fingerprint(exported, folder)]
    return [fingerprint(exported / each.path, folder) for each in fingerprints(exported)]


def about(subject: Subject, destination: Destination) -> dict[str, Any]:
    """What a receipt says of the model."""
    return {**subject.about(), "original_bytes": destination.original_bytes(subject.opened)}


def plan_rows(opened: Opened, chosen: Plan) -> list[dict[str, Any]]:
    """The plan as plain data, in the order of the network."""
    return [{"site": site.path, "role": site.role, "block": site.block, "shape": list(site.shape),
             "format": chosen[site.path].format, "bytes": chosen[site.path].bytes,
             "bits_per_weight": chosen[site.path].bytes * 8 / (site.shape[0] * site.shape[1]),
             "damage": chosen[site.path].damage} for site in opened.map.sites]


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
                    "llama-cpp-python", "onnx", "onnxscript", "onnxruntime", "openvino"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
