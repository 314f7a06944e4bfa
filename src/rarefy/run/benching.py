"""``rarefy bench`` against a model: the original is written for the runtime of the export, and for PyTorch.

What an export is compared with must run in the same place; how long writing it took is told apart from speed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rarefy.core.errors import TargetError
from rarefy.export.gguf import export_gguf
from rarefy.models.model import Model
from rarefy.run.effort import effort_named
from rarefy.run.recipe import read_recipe
from rarefy.run.resolve import exported, subject_of, suited
from rarefy.run.to_decoder import Writing
from rarefy.run.to_llamacpp import PLAIN
from rarefy.run.to_onnx import Traced


@dataclass(frozen=True)
class Originals:
    """files: the original, first in the runtime of the export, then in PyTorch. writes: whether it is a
    language model. seconds: until they were written. compression: seconds of the job that made the export,
    by stage."""

    files: tuple[Path, ...]
    writes: bool
    seconds: float
    compression: dict[str, float]


def model_of(out: Path) -> str:
    """What the job in a folder compressed."""
    around = (out, out.parent, out.parent.parent)
    place = next((each for each in around if (each / "recipe.yaml").is_file()), None)
    if place is None:
        raise TargetError(f"{out}: no recipe.yaml says what it was made of; pass --against MODEL or a file")
    return read_recipe(place / "recipe.yaml").model


def originals(out: Path, model: str, folder: Path, eval_data: Sequence[str] = ()) -> Originals:
    """Write what ``out`` is compared with into ``folder``. eval_data: samples that a network is traced with.
    """
    started = time.perf_counter()
    destination, path = exported(out)
    subject = subject_of(model, dequantize=True)
    destination = suited(destination, subject)
    destination.accepts(subject)
    match destination:
        case Traced():
            data = subject.judged(tuple(eval_data), effort_named("quick"), 0)
            informed = destination.given(subject, data)
            assert isinstance(informed, Traced)
            files = informed.original(subject, folder)
        case Writing():
            found = [Path(model)] if Path(model).exists() else []
            files = [*destination.original(subject, folder), *found]
        case _ if isinstance(subject.opened, Model) and path.suffix == ".gguf":
            files = [folder / "original.gguf"]
            folder.mkdir(parents=True, exist_ok=True)
            export_gguf(subject.opened, {}, {site.path: PLAIN for site in subject.opened.map.sites}, files[0])
        case _:
            raise TargetError(f"{out}: {destination.target.name} is not timed beside a model; its receipt "
                              "has the speed, and rarefy evaluate measures it again")
    return Originals(tuple(files), isinstance(subject.opened, Model), time.perf_counter() - started,
                     _seconds(path))


def _seconds(path: Path) -> dict[str, float]:
    for place in (path, path.parent):
        try:
            found: dict[str, float] = json.loads((place / "receipt.json").read_text())["seconds"]
        except (OSError, ValueError, KeyError):
            continue
        return found
    return {}
