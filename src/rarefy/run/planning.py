"""Techniques by name, and plans: what every site becomes under a budget, and the work that this is."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import rarefy.techniques
from rarefy.core.attention import Attending
from rarefy.core.axes import Transform
from rarefy.core.edit import Technique
from rarefy.core.errors import RecipeError, did_you_mean
from rarefy.core.means import Correcting
from rarefy.core.nouns import Option, Step
from rarefy.core.structure import (
    Merging,
    Narrowing,
    Remembering,
    Sharing,
    Shortening,
    Slicing,
    Thinning,
    Trimming,
)
from rarefy.core.tune import Trainer
from rarefy.formats.ggml import CODECS
from rarefy.numerics.grids import Grid, integer_grid_named
from rarefy.planner.allocate import Plan, least_bytes, least_damage
from rarefy.run.effort import Effort
from rarefy.run.sweep import Work
from rarefy.techniques.depth.early_exit import EarlyExit

Structure = Thinning | Shortening | Merging | Narrowing | Trimming | Slicing | Remembering
TUNE = "tune"  # a step that trains what there is, under no technique


def allocate(options: Mapping[str, tuple[Option, ...]], limit: int | None, fixed: int,
             max_kl: float | None) -> Plan:
    """The plan for a budget: the least damage within ``limit`` bytes, else the fewest bytes for ``max_kl``.

    fixed: bytes of the export that no choice changes.
    """
    if limit is None:
        assert max_kl is not None
        return least_bytes(options, max_kl)
    return least_damage(options, limit, fixed)


def techniques() -> dict[str, type[Any]]:
    """Every technique that rewrites leaves, by its file's stem."""
    return {name: kind for name, kind in _found().items() if hasattr(kind, "rewrite")}


def trainers() -> dict[str, type[Any]]:
    """Every technique that works during training, by its file's stem."""
    return {name: kind for name, kind in _found().items() if getattr(kind, "scope", "leaf") == "training"}


def transforms() -> dict[str, type[Any]]:
    """Every technique that changes coupled axes of a model before its leaves, by its file's stem."""
    return {name: kind for name, kind in _found().items() if getattr(kind, "scope", "leaf") == "axes"}


def structures() -> dict[str, type[Any]]:
    """Every technique that takes parts of a model out, by its file's stem."""
    return {name: kind for name, kind in _found().items() if getattr(kind, "scope", "leaf") == "structure"}


def attentions() -> dict[str, type[Any]]:
    """Every technique that computes attention otherwise, by its file's stem."""
    return {name: kind for name, kind in _found().items() if getattr(kind, "scope", "leaf") == "attention"}


def sharings() -> dict[str, type[Any]]:
    """Every technique that lets blocks share weights, by its file's stem."""
    return {name: kind for name, kind in _found().items() if getattr(kind, "scope", "leaf") == "stack"}


def corrections() -> dict[str, type[Any]]:
    """Every technique that moves biases when weights are what they will be, by its file's stem."""
    return {name: kind for name, kind in _found().items() if getattr(kind, "scope", "leaf") == "means"}


def objectives() -> dict[str, type[Any]]:
    """Every loss of distillation, by its file's stem."""
    return {name: kind for name, kind in _found().items() if getattr(kind, "scope", "leaf") == "objective"}


def _found() -> dict[str, type[Any]]:
    """The dataclass that each file under ``techniques/`` defines: the one that declares what it edits."""
    found = {}
    for info in pkgutil.walk_packages(rarefy.techniques.__path__, "rarefy.techniques."):
        if info.ispkg:
            continue
        module = importlib.import_module(info.name)
        own = [value for value in vars(module).values()
               if isinstance(value, type) and value.__module__ == info.name and hasattr(value, "edits")]
        if len(own) != 1:
            raise RecipeError(f"{info.name}: a technique's file defines exactly one class with `edits`")
        found[info.name.rpartition(".")[2]] = own[0]
    return found


def plannable() -> list[type[Any]]:
    """Techniques that can offer options to the planner."""
    return [technique for technique in techniques().values() if hasattr(technique, "options")]


def build(step: Step, format_name: str = "") -> Technique:
    """The technique that a step names, with its settings; the grid is the format's where it takes one."""
    technique: Technique = _made(step, techniques(), format_name)
    return technique


def build_transform(step: Step) -> Transform:
    """The technique of scope ``axes`` that a step names, with its settings."""
    technique: Transform = _made(step, transforms(), step.format)
    return technique


def build_structure(step: Step) -> Structure:
    """The technique of scope ``structure`` that a step names, with its settings."""
    technique: Structure = _made(step, structures(), step.format)
    return technique


def build_attention(step: Step) -> Attending:
    """The technique of scope ``attention`` that a step names, with its settings."""
    technique: Attending = _made(step, attentions(), step.format)
    return technique


def build_sharing(step: Step) -> Sharing:
    """The technique of scope ``stack`` that a step names, with its settings."""
    technique: Sharing = _made(step, sharings(), step.format)
    return technique


def build_correction(step: Step) -> Correcting:
    """The technique of scope ``means`` that a step names, with its settings."""
    technique: Correcting = _made(step, corrections(), step.format)
    return technique


def build_exit(step: Step) -> EarlyExit:
    """The technique of scope ``exits`` that a step names, with its settings."""
    known = {name: kind for name, kind in _found().items() if getattr(kind, "scope", "leaf") == "exits"}
    technique: EarlyExit = _made(step, known, "")
    return technique


def build_trainer(step: Step) -> Trainer:
    """The technique of scope ``training`` that a step names, with its settings."""
    technique: Trainer = _made(step, trainers(), step.format)
    return technique


def _made(step: Step, known: Mapping[str, type[Any]], format_name: str) -> Any:
    other = _found().get(step.technique)
    if other is not None and step.technique not in known:
        raise RecipeError(f"{step.technique}: is no step of a recipe of this kind (its scope is "
                          f"{getattr(other, 'scope', 'leaf')!r}); rarefy techniques {step.technique} says "
                          "where it works")
    if step.technique not in known:
        named = [TUNE, *(name for name, kind in _found().items() if kind not in objectives().values())]
        raise RecipeError(f"technique {step.technique!r} does not exist{did_you_mean(step.technique, named)}")
    kind = known[step.technique]
    fields = kind.__dataclass_fields__
    wrong = [name for name in step.settings if name not in fields]
    if wrong:
        raise RecipeError(f"{step.technique}: no setting {wrong[0]!r}{did_you_mean(wrong[0], list(fields))}")
    settings = {key: tuple(value) if isinstance(value, list) else value
                for key, value in step.settings.items()}
    if "grid" in fields and "grid" not in settings and (grid := grid_named(format_name)) is not None:
        settings["grid"] = grid
    return kind(**settings)


def grid_named(name: str) -> Grid | None:
    """The grid of a format: one of llama.cpp's, or integers (``int4``, ``int4-g32``); else None."""
    return CODECS[name].grid if name in CODECS else integer_grid_named(name)


def chain(steps: Sequence[Step], format_name: str, effort: Effort) -> tuple[tuple[str, Technique], ...]:
    """The techniques of a chain of steps, each on the grid of its own format or of the one it leads to."""
    made = []
    for step in steps:
        if step.technique == "quantease":
            step = replace(step, settings={"sweeps": max(1, effort.sweeps), **step.settings})
        made.append((step.technique, build(step, step.format or format_name)))
    return tuple(made)


def affordable(option: Option, effort: Effort) -> Option:
    """The option without the refinement for which the effort has no time."""
    if effort.sweeps:
        return option
    return replace(option, steps=tuple(step for step in option.steps if step.technique != "quantease"))


def work_of(plan: Plan, effort: Effort) -> dict[str, Work]:
    """The techniques to run at every site of a plan, where there are any."""
    return {path: Work(chain(option.steps, option.format, effort), option.format)
            for path, option in plan.items() if option.steps}
