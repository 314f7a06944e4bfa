"""The main job: a model and a budget in; the best file that fits, with proof, out.

    open -> data -> survey -> plan -> sweep -> export -> proof -> receipt and report -> final name

Everything is staged beside the final name (``journal``). A job that was interrupted resumes where it
stopped; one that misses a bound of the user leaves ``OUT.rejected`` and nothing under the final name.
What kind of network it is, and where it goes, is known to a ``Subject`` and a ``Destination``; the flow is
one.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import rarefy
from rarefy.core.errors import BudgetError
from rarefy.core.nouns import Budget, Receipt, Recipe
from rarefy.measure.resources import Clock, fingerprint, peak_rss
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.planner.allocate import Plan
from rarefy.report.page import render
from rarefy.run.attention import check_attention
from rarefy.run.compression import (
    Compression,
    about,
    damage,
    finite,
    limit_of,
    outputs,
    plan_rows,
    possible,
    predicted_bytes,
    versions,
)
from rarefy.run.effort import effort_named
from rarefy.run.exits import check_exits
from rarefy.run.journal import Journal, written
from rarefy.run.planning import allocate
from rarefy.run.progress import Progress, Silent
from rarefy.run.recipe import read_recipe, write_recipe
from rarefy.run.resolve import AUTO, destination_for, exported, named, subject_of, suited
from rarefy.run.samples import identity
from rarefy.run.sharing import check_sharing
from rarefy.run.subject import Subject
from rarefy.run.survey import Survey, take_survey
from rarefy.run.trim import matched, trimmed, vocabulary_steps


@dataclass(frozen=True)
class Job:
    """What to compress, how small, for whom, and how hard to try.

    data, eval_data: names of files; in Python also tensors, for networks that take such. keep_vocabulary:
    text whose tokens stay, others are left out.
    """

    model: str | Model | Network
    out: Path = Path("out")
    to: str | None = None
    max_kl: float | None = None
    target: str = AUTO
    effort: str = "balanced"
    data: tuple[Any, ...] = ()
    eval_data: tuple[Any, ...] = ()
    seed: int = 0
    overwrite: bool = False
    dequantize: bool = False
    command: str = ""
    recipe: Recipe | None = None
    keep_vocabulary: tuple[str, ...] = ()

    def budget(self) -> Budget | None:
        """The budget; None when a recipe says what to do instead."""
        return None if self.recipe is not None else Budget(self.to, self.max_kl)


@dataclass(frozen=True, eq=False)
class Result:
    """A finished job: the folder, the exported file (or folder) in it, and the receipt."""

    out: Path
    exported: Path
    receipt: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Planned:
    """A plan before any weight is touched: what ``rarefy plan`` shows."""

    model: Model | Network
    plan: Plan
    survey: Survey
    predicted_bytes: int
    predicted_kl: float
    original_bytes: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    answers: str = "tokens"


def check(job: Job) -> None:
    """Refuse what cannot work before any work is done."""
    job.budget()  # a budget that means nothing is refused here
    effort_named(job.effort)
    destination = named(job.target)
    if destination is not None:
        destination.ready()


def plan(job: Job, progress: Progress | None = None) -> Planned:
    """What would be done for the budget, at what predicted cost; nothing is compressed or written."""
    progress, effort = progress or Silent(), effort_named(job.effort)
    check(job)
    with _heard() as heard, tempfile.TemporaryDirectory() as folder:
        with progress.stage("open"):
            whole = subject_of(job.model, dequantize=job.dequantize)
            subject, _ = _fewer_tokens(whole, job)
        destination, model = destination_for(job.target, subject), subject.opened
        possible(destination, model, job, whole.opened)
        data = subject.gather(job.data, job.eval_data, effort, job.seed, progress)
        destination = destination.given(subject, data)
        found = take_survey(subject, destination, data, effort, job.seed, Path(folder), progress)
        chosen = allocate(found.calibrated(model.map.sites), limit_of(destination, whole.opened, job),
                          destination.fixed_bytes(model), job.max_kl)
    return Planned(model, chosen, found, predicted_bytes(destination, model, chosen), damage(chosen),
                   destination.original_bytes(whole.opened), plan_rows(model, chosen), list(heard),
                   subject.about()["answers"])


def compress(job: Job, progress: Progress | None = None) -> Result:
    """Do the job. Raises a RarefyError; then nothing stands under the final name."""
    progress, effort, clock = progress or Silent(), effort_named(job.effort), Clock()
    check(job)
    journal = Journal(job.out, overwrite=job.overwrite)
    with _heard() as heard, written(job.out):
        with progress.stage("open"), clock.stage("open"):
            whole = subject_of(job.model, dequantize=job.dequantize)
            destination = destination_for(job.target, whole)
            whole.opened.verify()
            subject, cuts = _fewer_tokens(whole, job)
        if job.recipe is not None:
            check_attention(job.recipe, destination.target.name)
            check_sharing(job.recipe, destination.target.name)
        if job.recipe is not None and job.recipe.exits is not None:
            check_exits(job.recipe.exits, subject.opened, destination.target.name)
        possible(destination, subject.opened, job, whole.opened)
        with journal.opened(_key(job, subject, destination.target.name)):
            work = Compression(job, subject, destination, effort, journal, progress, clock, whole, cuts)
            receipt = work.run(heard)
            accepted = not receipt["missed"]
            with progress.stage("report"), clock.stage("report"):
                _write(journal.partial, receipt, work.recipe)
            final = journal.publish(accepted=accepted)
    if not accepted:
        raise BudgetError(f"{receipt['missed']}; the best candidate is in {final}")
    return Result(final, destination.place(final), receipt)


def run_recipe(path: Path, out: Path, progress: Progress | None = None, *, overwrite: bool = False,
               command: str = "") -> Result:
    """Do what a recipe says, then measure and report as ``compress`` does."""
    return do_recipe(read_recipe(path), out, progress, overwrite=overwrite, command=command)


def do_recipe(recipe: Recipe, out: Path, progress: Progress | None = None, *, overwrite: bool = False,
              command: str = "") -> Result:
    """The same for a recipe in memory."""
    return compress(Job(recipe.model, out, target=recipe.target, effort=recipe.effort, data=recipe.data,
                        eval_data=recipe.eval_data, seed=recipe.seed, overwrite=overwrite,
                        dequantize=recipe.dequantize, command=command, recipe=recipe), progress)


def evaluate(out: Path, against: str | Model | Network, progress: Progress | None = None, *,
             eval_data: tuple[Any, ...] = (), effort: str = "balanced", seed: int = 0) -> dict[str, Any]:
    """Measure an exported file (or the folder it is in) against its original again.

    Returns the parts of a receipt that can be measured. Examples: ``eval_data``, or ``python-docs``.
    """
    progress, clock, how = progress or Silent(), Clock(), effort_named(effort)
    with _heard() as heard:
        destination, path = exported(out)
        destination.ready()
        with progress.stage("open"), clock.stage("open"):
            subject = subject_of(against, dequantize=True)
            destination = suited(destination, subject)
            destination.accepts(subject)
            data = subject.judged(eval_data, how, seed)
            destination = destination.given(subject, data)
        with progress.stage("proof") as stage, clock.stage("proof"):
            again = destination.reopened(subject, path)
            if again is not None and (fewer := matched(subject.opened, again.opened)) is not subject.opened:
                subject = subject_of(fewer)
                data = subject.judged(eval_data, how, seed)
            measured = {} if again is None else subject.measure(again, data, stage)
        with progress.stage(destination.target.name) as stage, clock.stage("runtime"):
            measured["runtime"] = destination.prove(subject, path, data, how, stage)
        with (progress.stage("speed") as stage, clock.stage("speed"),
              tempfile.TemporaryDirectory() as folder):
            beside = destination.beside(subject, path, data, Path(folder), how, stage)
    return {"rarefy": rarefy.__version__, "versions": versions(), "model": about(subject, destination),
            "outputs": [each.as_dict() for each in outputs(path, path.parent)],
            "target": destination.target.name, "measured": measured, "speed": beside.speed,
            "lowered": beside.lowered, "memory": {"peak_rss_bytes": peak_rss()},
            "seconds": clock.seconds, "warnings": list(heard)}


def _fewer_tokens(subject: Subject, job: Job) -> tuple[Subject, tuple[Receipt, ...]]:
    """The subject without the tokens that the job leaves out, and a receipt of them."""
    done = trimmed(subject.opened, vocabulary_steps(job.recipe, job.keep_vocabulary), job.data)
    return subject_of(done.opened) if done.receipts else subject, done.receipts


def _key(job: Job, subject: Subject, target: str) -> dict[str, Any]:
    """Everything that decides the bits of the result."""
    opened, exits = subject.opened, None if job.recipe is None else job.recipe.exits
    refs = (*job.data, *job.eval_data, *job.keep_vocabulary,
            *(() if exits is None else (*exits.data, *exits.calibration)))
    files = [fingerprint(path).as_dict() | {"path": path.name} for path in opened.source.files()]
    texts = [fingerprint(Path(ref)).as_dict() for ref in refs if isinstance(ref, str) and Path(ref).is_file()]
    names = ("to", "max_kl", "effort", "seed", "keep_vocabulary")
    settings = {name: getattr(job, name) for name in names}
    data = {name: list(refs) if isinstance(opened, Model) else identity(refs, opened)
            for name, refs in (("data", job.data), ("eval_data", job.eval_data))}
    settings["parameters"] = opened.parameters  # the text may have changed that says which tokens stay
    if isinstance(opened, Network) and opened.ranges:
        settings["ranges"] = {layer: asdict(span) for layer, span in opened.ranges.items()}
    return {"model": opened.name, "files": files, "texts": texts, "settings": settings | data,
            "target": target, "recipe": None if job.recipe is None else asdict(job.recipe),
            "threads": torch.get_num_threads(), "versions": versions()}


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
