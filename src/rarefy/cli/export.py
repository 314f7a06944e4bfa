"""``rarefy export``: what was compressed, in the file of another target."""
from __future__ import annotations
from pathlib import Path
from typing import Annotated
import typer
from rarefy.cli.options import Json, Out, Target
from rarefy.cli.terminal import guarded


@guarded
def export(
    source: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that rarefy wrote.")],
    out: Out, target: Target = "llama.cpp", as_json: Json = False,
) -> None:
    """Write a compressed model as another target's file, from the codes it has."""
