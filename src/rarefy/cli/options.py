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
    help="A folder with safetensors, a .gguf file, a Hugging Face id, or the built-in gemma-3-270m or "
         "all-minilm-l6-v2.")]
To = Annotated[str | None, typer.Option(
    "--to", metavar="SIZE", rich_help_panel=BUDGET, show_default=False,
    help="Size of the whole exported file: 160MB, 60% (of the original's), or 4.5bpw (bits per weight).")]
MaxKl = Annotated[float | None, typer.Option(
    "--max-kl", metavar="NATS", rich_help_panel=BUDGET, show_default=False,
    help="Bound on the mean KL to the original per token. Alone: the smallest file that keeps it.")]
Target = Annotated[str, typer.Option(
    "--for", metavar="TARGET", rich_help_panel=BUDGET,
    help="What will load the export: llama.cpp, torch, onnxruntime, openvino, transformers, integer (8-bit "
         "integers alone), or auto (llama.cpp for language models, torch for the rest).")]
Effort = Annotated[Efforts, typer.Option("--effort", rich_help_panel=WORK, help="How long it may take.")]
Data = Annotated[list[str] | None, typer.Option(
    "--data", metavar="DATA", rich_help_panel=WORK, show_default=False,
    help="To calibrate on. Language models: a text file, a folder, python-docs, or self (the model's own "
         "samples, the default). Encoders: a .tsv or .csv with the columns sentence and label, or sentences "
         "a line each. Images: .npz, idx files, a folder of folders. Repeat for several.")]
EvalData = Annotated[list[str] | None, typer.Option(
    "--eval-data", metavar="DATA", rich_help_panel=WORK, show_default=False,
    help="To measure on; must not overlap the calibration data. Repeat for several.")]
Seed = Annotated[int, typer.Option("--seed", min=0, rich_help_panel=WORK, help="Same seed, same file.")]
Dequantize = Annotated[bool, typer.Option(
    "--dequantize", rich_help_panel=WORK,
    help="Accept a model that is already quantized, and start from that.")]
KeepVocabulary = Annotated[list[str] | None, typer.Option(
    "--keep-vocabulary", metavar="TEXT", rich_help_panel=WORK, show_default=False,
    help="Keep only the tokens that this text uses: a file, a folder (language models) or python-docs. Other "
         "text is cut into smaller tokens. Repeat for several.")]
Out = Annotated[Path, typer.Option(
    "--out", "-o", metavar="DIR", rich_help_panel=SHOWN, show_default=False, help="Folder to create.")]
Overwrite = Annotated[bool, typer.Option(
    "--overwrite", rich_help_panel=SHOWN, help="Replace DIR if it is an earlier result.")]
Json = Annotated[bool, typer.Option("--json", rich_help_panel=SHOWN, help="Print the result as JSON.")]
