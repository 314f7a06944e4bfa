"""Arguments and flags that several commands share, each described once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

BUDGET, WORK, SHOWN = "Budget", "How to work", "Output"


class Efforts(StrEnum):
    """How long the search may take."""

    quick = "quick"
    balanced = "balanced"
    max = "max"


Model = Annotated[str, typer.Argument(
    metavar="MODEL", show_default=False,
    help="A folder with safetensors, a .gguf file, a Hugging Face id, or the built-in gemma-3-270m.")]
To = Annotated[str | None, typer.Option(
    "--to", metavar="SIZE", rich_help_panel=BUDGET, show_default=False,
    help="Size of the whole exported file: 160MB, 60% (of the original's), or 4.5bpw (bits per weight).")]
MaxKl = Annotated[float | None, typer.Option(
    "--max-kl", metavar="NATS", rich_help_panel=BUDGET, show_default=False,
    help="Bound on the mean KL to the original per token. Alone: the smallest file that keeps it.")]
Target = Annotated[str, typer.Option(
    "--for", metavar="TARGET", rich_help_panel=BUDGET, help="The runtime that will load the file.")]
Effort = Annotated[Efforts, typer.Option("--effort", rich_help_panel=WORK, help="How long it may take.")]
Data = Annotated[list[str] | None, typer.Option(
    "--data", metavar="TEXT", rich_help_panel=WORK, show_default=False,
    help="Calibration text: a file, a folder, python-docs, or self (the model's own samples, the default). "
         "Repeat for several.")]
EvalData = Annotated[list[str] | None, typer.Option(
    "--eval-data", metavar="TEXT", rich_help_panel=WORK, show_default=False,
    help="Text to measure on; must not overlap the calibration text. Repeat for several.")]
Seed = Annotated[int, typer.Option("--seed", min=0, rich_help_panel=WORK, help="Same seed, same file.")]
Dequantize = Annotated[bool, typer.Option(
    "--dequantize", rich_help_panel=WORK,
    help="Accept a model that is already quantized, and start from that.")]
Out = Annotated[Path, typer.Option(
    "--out", "-o", metavar="DIR", rich_help_panel=SHOWN, show_default=False, help="Folder to create.")]
Overwrite = Annotated[bool, typer.Option(
    "--overwrite", rich_help_panel=SHOWN, help="Replace DIR if it is an earlier result.")]
Json = Annotated[bool, typer.Option("--json", rich_help_panel=SHOWN, help="Print the result as JSON.")]
