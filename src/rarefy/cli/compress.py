"""``rarefy compress``: the main job, from a model and a budget to a proven file."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rarefy.cli.options import (
    Data,
    Dequantize,
    Effort,
    Efforts,
    EvalData,
    Json,
    KeepVocabulary,
    MaxKl,
    Model,
    Out,
    Overwrite,
    Seed,
    Target,
    To,
)
from rarefy.cli.progress import progress
from rarefy.cli.terminal import dump, finite, guarded, show, tell
from rarefy.report.summary import summary

if TYPE_CHECKING:
    from rarefy.run.job import Result

R = TypeVar("R")


@guarded
def compress(
    model: Model, *, to: To = None, max_kl: MaxKl = None, target: Target = "auto",
    effort: Effort = Efforts.balanced, data: Data = None, eval_data: EvalData = None, seed: Seed = 0,
    dequantize: Dequantize = False, keep_vocabulary: KeepVocabulary = None, out: Out,
    overwrite: Overwrite = False, as_json: Json = False,
) -> None:
    """Compress a model under a budget, measure what came out, and write file, report and receipt to DIR.

    Interrupted, it leaves nothing under DIR, and the same command resumes.
    """
    from rarefy.run.job import Job
    from rarefy.run.job import compress as work

    job = Job(model, out=out, to=to, max_kl=max_kl, target=target, effort=effort.value,
              data=tuple(data or ()), eval_data=tuple(eval_data or ()), seed=seed, overwrite=overwrite,
              dequantize=dequantize, keep_vocabulary=tuple(keep_vocabulary or ()), command=typed())
    finished(resumable(lambda: work(job, progress()), out), as_json=as_json)


def typed() -> str:
    """The command line, for the receipt."""
    return shlex.join(["rarefy", *sys.argv[1:]])


def resumable(work: Callable[[], R], out: Path) -> R:
    """Do it; when interrupted, say what remains."""
    try:
        return work()
    except KeyboardInterrupt:
        if (partial := out.with_name(out.name + ".partial")).exists():
            tell(f"what is finished is kept in {partial}; the same command resumes there")
        raise


def finished(result: Result, *, as_json: bool) -> None:
    """Say what came out and where it is."""
    if as_json:
        dump(finite(result.receipt))
        return
    headline, rows = summary(result.receipt)
    show(f"\n{headline}\n")
    width = max(len(label) for label, _ in rows)
    for label, text in (*rows, ("file", str(result.exported)), ("report", str(result.out / "report.html"))):
        show(f"  {label:<{width}}  {text}")
