"""``rarefy run``: a recipe, spelled out in YAML, from start to end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rarefy.cli.compress import finished, resumable, typed
from rarefy.cli.options import Json, Out, Overwrite
from rarefy.cli.progress import progress
from rarefy.cli.terminal import guarded


@guarded
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file: a model and steps.")],
    out: Out, overwrite: Overwrite = False, as_json: Json = False,
) -> None:
    """Do what a recipe says: any techniques in any order, then measure and report as `compress` does."""
    from rarefy.run.job import run_recipe

    result = resumable(lambda: run_recipe(recipe, out, progress(), overwrite=overwrite, command=typed()), out)
    finished(result, as_json=as_json)
