"""``rarefy evaluate``: measure an exported file against its original again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rarefy.cli.options import EvalData, Json
from rarefy.cli.progress import progress
from rarefy.cli.terminal import dump, finite, guarded, show
from rarefy.report.summary import summary


@guarded
def evaluate(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that rarefy wrote, or a .gguf file.")],
    against: Annotated[str, typer.Option("--against", metavar="MODEL", show_default=False,
                                         help="The original that it is measured against.")],
    eval_data: EvalData = None, as_json: Json = False,
) -> None:
    """Measure KL, agreement, perplexity, bytes and speed of a file, in PyTorch and in its runtime."""
    from rarefy.run.job import evaluate as measure

    receipt = measure(out, against, progress(), eval_data=tuple(eval_data or ()))
    if as_json:
        dump(finite(receipt))
        return
    headline, rows = summary(receipt)
    show(f"\n{headline}\n")
    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        show(f"  {label:<{width}}  {text}")
