"""``rarefy plan``: what a compression would give, without computing it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from rarefy.cli.options import (
    SHOWN,
    Data,
    Dequantize,
    Effort,
    Efforts,
    EvalData,
    Json,
    KeepVocabulary,
    MaxKl,
    Model,
    Seed,
    Target,
    To,
)
from rarefy.cli.progress import progress
from rarefy.cli.terminal import dump, finite, guarded, show, table
from rarefy.report import words
from rarefy.report.answers import KINDS
from rarefy.report.page import by_role

if TYPE_CHECKING:
    from rarefy.run.job import Planned


@guarded
def plan(
    model: Model, to: To = None, max_kl: MaxKl = None, target: Target = "auto",
    effort: Effort = Efforts.balanced, data: Data = None, eval_data: EvalData = None, seed: Seed = 0,
    dequantize: Dequantize = False, keep_vocabulary: KeepVocabulary = None,
    tensors: Annotated[bool, typer.Option("--tensors", rich_help_panel=SHOWN,
                                          help="List every tensor, not only every role.")] = False,
    as_json: Json = False,
) -> None:
    """Show what every tensor would become, and the predicted size and KL; write nothing."""
    from rarefy.run.job import Job
    from rarefy.run.job import plan as make

    job = Job(model, to=to, max_kl=max_kl, target=target, effort=effort.value, data=tuple(data or ()),
              eval_data=tuple(eval_data or ()), seed=seed, dequantize=dequantize,
              keep_vocabulary=tuple(keep_vocabulary or ()))
    planned = make(job, progress())
    if as_json:
        dump(finite(facts(planned)))
        return
    if tensors:
        _tensors(planned.rows)
    else:
        _roles(planned)
    smaller = words.times(planned.original_bytes / planned.predicted_bytes)
    show(f"\n{planned.model.name} would take {words.size(planned.predicted_bytes)}, {smaller} smaller than "
         f"{words.size(planned.original_bytes)} uncompressed; predicted "
         f"{KINDS[planned.answers].told(planned.predicted_kl)}.")


def facts(planned: Planned) -> dict[str, Any]:
    """The plan as plain data."""
    return {"model": planned.model.name, "bytes": planned.predicted_bytes, "kl": planned.predicted_kl,
            "original_bytes": planned.original_bytes, "plan": planned.rows, "warnings": planned.warnings}


def _roles(planned: Planned) -> None:
    table("", ("role", "tensors", "weights", "bytes", "bits/weight", "predicted KL", "formats"),
          [(row["name"], str(row["tensors"]), words.count(row["weights"]), words.size(row["bytes"]),
            f"{row['bits']:.2f}", words.nats(row["damage"]), row["formats"].replace("\u00a0", " "))
           for row in by_role(planned.rows, planned.model.map.tied)], right=(1, 2, 3, 4, 5))


def _tensors(rows: list[dict[str, Any]]) -> None:
    table("", ("tensor", "shape", "format", "bits/weight", "bytes", "predicted KL"),
          [(row["site"], " x ".join(str(n) for n in row["shape"]), row["format"],
            f"{row['bits_per_weight']:.2f}", words.size(row["bytes"]), words.nats(row["damage"]))
           for row in rows], right=(3, 4, 5))
