"""Students chosen by measurement: ``blocks=3,units=50%`` keeps what the teacher can least do without.

Blocks go by what the answers lose without each of them, neurons by what those that read them lose; the
readers are refitted. What is looked at is a part of what the student will be trained on.
"""

from __future__ import annotations

import re

import torch

from rarefy.calibration.examples import Examples
from rarefy.core.errors import RecipeError, did_you_mean
from rarefy.core.nouns import Recipe, Step
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.run.narrow import narrowed
from rarefy.run.reshape import reshaped
from rarefy.training.examples import LABELS, Rows

SAMPLES, WINDOWS = 256, 8  # that importance is measured on
WORDS = ("blocks", "units")


def is_measured(text: str) -> bool:
    """Whether ``text`` says how much of the teacher stays, and not which parts or what model."""
    return "=" in text


def measured(teacher: Model | Network, text: str, rows: Rows, seed: int) -> Model | Network:
    """The student that ``text`` describes: ``blocks=N`` of them stay, ``units=P%`` of the neurons."""
    steps = tuple(_step(part.strip(), teacher) for part in text.split(","))
    recipe = Recipe(teacher.name, tuple(sorted(steps, key=lambda step: step.technique)), seed=seed)
    count = min(len(rows), WINDOWS if isinstance(teacher, Model) else SAMPLES)
    some = {name: values for name, values in rows.batch(torch.arange(count)).items() if name != LABELS}
    if isinstance(teacher, Model):
        return reshaped(teacher, recipe, some["input_ids"]).model
    return narrowed(teacher, recipe, Examples(some)).network


def _step(part: str, teacher: Model | Network) -> Step:
    """One word and its number as a step of a recipe."""
    name, _, value = part.partition("=")
    total = teacher.map.blocks
    match name:
        case "blocks":
            if not value.isdigit() or not 0 < int(value) < total:
                raise RecipeError(f"--student {part}: choose a number of blocks from 1 to {total - 1}")
            gone = {"count": total - int(value), "by": "kl", "keep_first": 0, "keep_last": 0}
            return Step("drop", settings=gone)
        case "units":
            share = re.fullmatch(r"(\d+(?:\.\d+)?)%", value)
            if share is None or not 0 < float(share[1]) < 100:
                raise RecipeError(f"--student {part}: choose a share of the neurons, like units=50%")
            return Step("units", settings={"ratio": 1 - float(share[1]) / 100})
    raise RecipeError(f"--student {part}: nothing is called {name!r}{did_you_mean(name, list(WORDS))}; write "
                      "blocks=3, units=50% or both")
