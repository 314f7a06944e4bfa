"""Recipes: techniques in any order, written down as YAML.

    model: gemma-3-270m
    target: llama.cpp
    steps:
      - technique: gptq
        where: ["role:embed", "*.mlp.*"]
        format: IQ4_NL
      - technique: quantease
        where: ["role:embed"]

Steps run in their order at every weight that a pattern matches. A weight that no step stores in a format
is stored as F16. Unknown keys, techniques, settings and formats are errors, and so is a pattern that
matches nothing. Steps that change coupled axes of the whole model (awq, smoothquant, rotate) come first;
behind them blocks may share their matrices (layers), trained and rounded once for all that use them.

A step can also train what there is (``tune``), or prune or round while it trains (gradual, qat, ...):

      - technique: tune
        training: {moves: [everything], epochs: 2, rate: 1.0e-4, objectives: [soft_labels]}

A classifier can get exits when all steps, if there are any, are done:

    exits:
      after: [1, 3]
      max_loss: 1%
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rarefy.core.errors import RecipeError, did_you_mean
from rarefy.core.nouns import Exiting, Option, Recipe, Step, share_of
from rarefy.models.map import Site
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.planner.allocate import Plan
from rarefy.planner.sparsity import Statistics, resolved
from rarefy.run.planning import (
    TUNE,
    attentions,
    build,
    build_attention,
    build_correction,
    build_sharing,
    build_structure,
    build_trainer,
    build_transform,
    corrections,
    sharings,
    structures,
    techniques,
    trainers,
    transforms,
)

if TYPE_CHECKING:
    from rarefy.run.target import Destination

ALLOCATE = "allocate"
EMPTIES = "emptied"  # takes out what masks have emptied, and so comes behind the steps that made them

Kind = Literal["whole", "sharing", "training", "leaves", "correction"]
Run = tuple[Kind, tuple[Step, ...]]
SINGLE = ("sharing", "training", "correction")  # a step of these is a run of its own


class _StepFile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    technique: str
    where: tuple[str, ...] = ("*",)
    settings: dict[str, Any] = Field(default_factory=dict)
    format: str = ""
    training: dict[str, Any] = Field(default_factory=dict)

    @field_validator("where", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class _ExitsFile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    after: tuple[int, ...] = Field(default=(), min_length=1)
    max_loss: float = 0.01
    settings: dict[str, Any] = Field(default_factory=dict)
    together: bool = False
    data: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()
    samples: int = Field(default=8000, ge=2)
    training: dict[str, Any] = Field(default_factory=dict)

    @field_validator("max_loss", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        return share_of(value) if isinstance(value, str) else value


class _RecipeFile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str
    steps: tuple[_StepFile, ...] = ()
    exits: _ExitsFile | None = None
    target: str = "auto"
    effort: str = "balanced"
    data: tuple[str, ...] = ()
    eval_data: tuple[str, ...] = ()
    seed: int = 0
    dequantize: bool = False


def read_recipe(path: Path) -> Recipe:
    """A recipe from YAML, or RecipeError naming the key that is wrong."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: expected keys like model and steps")
    try:
        found = _RecipeFile.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_first(error, raw)}") from None
    if not found.steps and found.exits is None:
        raise RecipeError(f"{path}: steps: there are none, and no exits; say what to do")
    plain = found.model_dump()
    exits = None if found.exits is None else Exiting(**plain["exits"])
    return Recipe(**{**plain, "steps": tuple(Step(**step) for step in plain["steps"]), "exits": exits})


def _first(error: ValidationError, raw: dict[str, Any]) -> str:
    """The first thing wrong, in one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        kind: type[BaseModel] = _RecipeFile
        if len(first["loc"]) > 1:
            kind = _StepFile if first["loc"][0] == "steps" else _ExitsFile
        known = list(kind.model_fields)
        return f"unknown key {where!r}{did_you_mean(str(first['loc'][-1]), known)}"
    return f"{where or 'recipe'}: {first['msg'].lower()}"


def write_recipe(recipe: Recipe) -> str:
    """The recipe as YAML; ``read_recipe`` gives the same recipe back."""
    plain = asdict(recipe)
    plain["steps"] = [{key: list(value) if isinstance(value, tuple) else value
                       for key, value in step.items() if value not in ({}, "")} for step in plain["steps"]]
    plain["data"], plain["eval_data"] = list(recipe.data), list(recipe.eval_data)
    exits = plain.pop("exits")
    if exits is not None:
        plain["exits"] = {key: list(value) if isinstance(value, tuple) else value
                          for key, value in exits.items() if value not in ({}, ())}
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110)
    return text


def matching(sites: Sequence[Site], patterns: Sequence[str]) -> list[Site]:
    """The sites that any pattern matches; RecipeError for a pattern that matches none."""
    chosen: dict[str, Site] = {}
    for pattern in patterns:
        found = [site for site in sites if site.matches(pattern)]
        if not found:
            known = [site.path for site in sites]
            if pattern.startswith("role:"):
                known = sorted({f"role:{site.role}" for site in sites})
            raise RecipeError(f"pattern {pattern!r} matches no weight{did_you_mean(pattern, known)}")
        chosen |= {site.path: site for site in found}
    return list(chosen.values())


def split(steps: Sequence[Step]) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """The steps for the whole model, which must come first, and those for the leaves.

    Of the first, those that take parts out come before those that change coupled axes of what is left.
    """
    order = {**dict.fromkeys((*structures(), *attentions()), 0), **dict.fromkeys(transforms(), 1)}
    ranks = [order.get(step.technique, 2) for step in steps]
    for before, after, step in zip(ranks, ranks[1:], steps[1:], strict=False):
        if after < before:
            what = f"changes {'channels' if after else 'blocks'} of the whole model"
            raise RecipeError(f"{step.technique}: {what} and must come before the steps that work on what is "
                              "left; move it up")
    count = sum(rank < 2 for rank in ranks)
    return tuple(steps[:count]), tuple(steps[count:])


def runs(steps: Sequence[Step]) -> tuple[Run, ...]:
    """Steps in runs of one kind: for the whole model, for leaves; all others each for itself.

    RecipeError: an order that cannot be.
    """
    found: list[Run] = []
    rewritten = ""
    for kind, each in groupby(steps, _kind):
        run = tuple(each)
        if kind == "whole" and rewritten and any(step.technique != EMPTIES for step in run):
            split((Step(rewritten), *run))
        if kind == "sharing" and rewritten:
            raise RecipeError(f"{run[0].technique}: shares plain numbers, and {rewritten} makes others of "
                              "them; move it up")
        found += [(kind, (step,)) for step in run] if kind in SINGLE else [(kind, run)]
        names = [step.technique for step in run if kind not in ("whole", "correction")
                 and step.technique != TUNE]
        rewritten = next(iter(names), rewritten)
    return tuple(found)


def parts(steps: Sequence[Step]) -> tuple[tuple[Run, ...], tuple[Step, ...], tuple[Run, ...]]:
    """What comes before the last run of leaves, that run (maybe none), and what comes behind it."""
    found = runs(steps)
    last = max((place for place, (kind, _) in enumerate(found) if kind == "leaves"), default=len(found))
    return found[:last], found[last][1] if last < len(found) else (), found[last + 1:]


def _kind(step: Step) -> Kind:
    if step.technique == TUNE or step.technique in trainers():
        return "training"
    if step.technique in sharings():
        return "sharing"
    if step.technique in corrections():
        return "correction"
    return "whole" if step.technique in {*structures(), *attentions(), *transforms()} else "leaves"


def chains(sites: Sequence[Site], recipe: Recipe, statistics: Mapping[str, Statistics] | None = None
           ) -> dict[str, tuple[Step, ...]]:
    """The steps that a recipe asks for at every site, in their order; steps for the whole model aside.

    statistics: of every site, by which a pruner's sparsity is shared out where its settings say ``allocate``
    (None: not looked at yet, every site gets the same).
    """
    found: dict[str, list[Step]] = {site.path: [] for site in sites}
    rest = [step for kind, run in runs(recipe.steps) for step in checked(kind, run)]
    blocks = {site.path: site.block for site in sites if site.block is not None}
    for step in rest:
        if step.technique in trainers():
            for site in matching(sites, step.where):
                found[site.path].append(replace(step, where=(site.path,)))
            continue
        plain = replace(step, settings={name: value for name, value in step.settings.items()
                                        if name != ALLOCATE or not _shares(step)})
        build(plain, plain.format)  # unknown techniques and settings are refused before any work
        chosen = [site.path for site in matching(sites, step.where)]
        if statistics is None or not _shares(step):
            shared = {path: replace(plain, where=(path,)) for path in chosen}
        else:
            shared = resolved(step, {path: statistics[path] for path in chosen}, blocks)
        for path, own in shared.items():
            found[path].append(own)
    return {path: tuple(steps) for path, steps in found.items()}


def checked(kind: Kind, run: tuple[Step, ...]) -> tuple[Step, ...]:
    """The steps of a run that rewrite leaves, at once or in training; others only build their technique."""
    match kind:
        case "leaves":
            return run
        case "sharing":
            for step in run:
                build_sharing(step)
            return ()
        case "correction":
            for step in run:
                build_correction(step)
                if step.where != ("*",):
                    raise RecipeError(f"{step.technique}: corrects all biases, one behind the other; leave "
                                      "'where' out")
            return ()
        case "training":
            made = tuple(step for step in run if step.technique != TUNE)
            for step in made:
                build_trainer(step)
            return made
        case "whole":
            for step in split(run)[0]:
                if step.technique in attentions():
                    build_attention(step)
                elif step.technique in structures():
                    build_structure(step)
                else:
                    build_transform(step)
            return ()


def _shares(step: Step) -> bool:
    """Whether a step's sparsity is shared out over the sites that it matches."""
    return ALLOCATE in step.settings and "sparsity" in techniques()[step.technique].__dataclass_fields__


def format_of(steps: Sequence[Step]) -> str:
    """The format that a chain of steps leads to: the last one that is named."""
    return next((step.format for step in reversed(steps) if step.format), "")


def plan_of(opened: Model | Network, recipe: Recipe, destination: Destination,
            statistics: Mapping[str, Statistics] | None = None, stored: Collection[str] = ()) -> Plan:
    """What a recipe asks of every site, as options without a prediction; arguments as for ``chains``.

    stored: sites of which steps that are not in the recipe say how the target stores them, so that these
    need not.
    """
    asked = chains(opened.map.sites, recipe, statistics)
    return {site.path: Option(site.path, "", 0, float("nan"), asked[site.path])
            if site.path in stored and not format_of(asked[site.path])
            else destination.asked(opened, site, asked[site.path]) for site in opened.map.sites}


def recipe_of(plan: Plan, model: str, **rest: Any) -> Recipe:
    """A plan spelled out: sites with the same chain share their steps."""
    grouped: dict[tuple[str, ...], list[str]] = {}
    chains: dict[tuple[str, ...], tuple[Step, ...]] = {}
    for path, option in plan.items():
        key = tuple(f"{s.technique}|{s.settings}|{s.format}" for s in option.steps)
        grouped.setdefault(key, []).append(path)
        chains[key] = option.steps
    steps = [replace(step, where=tuple(grouped[key])) for key, chain in chains.items() for step in chain]
    return Recipe(model, tuple(steps), **rest)
