"""From a model and text to a plan: survey, options, measured swaps, allocation.

What the survey finds is kept in the journal (``survey/``), so that a resumed run and a second budget
for the same model need not look again.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import rarefy.techniques
from rarefy.calibration.evidence import survey
from rarefy.core.axes import Transform
from rarefy.core.edit import Technique
from rarefy.core.errors import RecipeError, did_you_mean
from rarefy.core.nouns import Budget, Choice, Evidence, Option, Step
from rarefy.core.structure import Merging, Shortening, Thinning
from rarefy.export.gguf import fixed_bytes, gguf_bytes, loadable, site_bytes
from rarefy.formats.ggml import CODECS
from rarefy.measure.divergence import Reference
from rarefy.models.map import Site
from rarefy.models.model import Model
from rarefy.models.runner import Runner
from rarefy.planner.allocate import Plan, least_bytes, least_damage, scaled
from rarefy.planner.options import options_at
from rarefy.planner.swaps import Swap, measure_swaps, probe_damage
from rarefy.run.effort import Effort
from rarefy.run.progress import Progress
from rarefy.run.sweep import Work


@dataclass(frozen=True, eq=False)
class Survey:
    """What was learnt of the float model.

    options: by site. outside: evidence of the embedding and the head. probes: predicted damage of
    the probe rounding, by site. swaps: what was measured, by role.
    """

    options: dict[str, tuple[Option, ...]]
    outside: dict[str, Evidence]
    probes: dict[str, float]
    swaps: tuple[Swap, ...]

    def calibrated(self, model: Model) -> dict[str, tuple[Option, ...]]:
        """The options with every role's damage corrected by its swap."""
        factors = {swap.role: swap.factor for swap in self.swaps}
        return scaled(self.options, {site.path: factors.get(site.role, 1.0) for site in model.map.sites})


def take_survey(model: Model, tokens: Tensor, effort: Effort, seed: int, folder: Path,
                progress: Progress) -> Survey:
    """Look at every weight once (or read what an earlier run of the same job saw)."""
    if (folder / "survey.json").is_file():
        return _load(folder)
    generator = torch.Generator().manual_seed(seed)
    options, outside, probes = {}, {}, {}
    techniques = plannable()
    with progress.stage("survey") as stage:
        for seen in survey(Runner(model), tokens[:effort.survey], generator, stage.advance):
            path, weight = seen.site.path, model.weight(seen.site.path)
            options[path] = options_at(path, weight, seen.evidence, choices(model, seen.site), techniques,
                                       generator)
            if effort.swaps:
                probes[path] = probe_damage(weight, seen.evidence)
            if seen.site.block is None:
                outside[path] = seen.evidence
    swaps: tuple[Swap, ...] = ()
    if effort.swaps:
        with progress.stage("measured swaps") as stage:
            reference = Reference(model, tokens[:effort.swaps])
            swaps = measure_swaps(model, probes, lambda runner: reference.compare(runner).kl_mean,
                                  stage.advance)
    found = Survey(options, outside, probes, swaps)
    _save(found, folder)
    return found


def choices(model: Model, site: Site) -> dict[str, Choice]:
    """Every format in which the target could store a site."""
    return {name: Choice(CODECS[name].grid or CODECS[name].dtype, site_bytes(site, name))
            for name in loadable(model, site)}


def allocate(model: Model, found: Survey, budget: Budget) -> Plan:
    """The plan for a budget, over the whole file."""
    options = found.calibrated(model)
    if budget.to is None:
        assert budget.max_kl is not None
        return least_bytes(options, budget.max_kl)
    return least_damage(options, limit_bytes(model, budget), fixed_bytes(model))


def limit_bytes(model: Model, budget: Budget) -> int:
    """The budget in bytes; shares are of the file in which every matrix is F16."""
    limit = budget.limit(original=original_bytes(model), weights=model.parameters)
    assert limit is not None
    return limit


def original_bytes(model: Model) -> int:
    """Bytes of the uncompressed export: matrices in F16, the rest in F32."""
    return gguf_bytes(model, {site.path: "F16" for site in model.map.sites})


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


def build_structure(step: Step) -> Thinning | Shortening | Merging:
    """The technique of scope ``structure`` that a step names, with its settings."""
    technique: Thinning | Shortening | Merging = _made(step, structures(), step.format)
    return technique


def _made(step: Step, known: Mapping[str, type[Any]], format_name: str) -> Any:
    if step.technique not in known:
        raise RecipeError(f"technique {step.technique!r} does not exist"
                          f"{did_you_mean(step.technique, [*techniques(), *transforms(), *structures()])}")
    kind = known[step.technique]
    fields = kind.__dataclass_fields__
    wrong = [name for name in step.settings if name not in fields]
    if wrong:
        raise RecipeError(f"{step.technique}: no setting {wrong[0]!r}{did_you_mean(wrong[0], list(fields))}")
    settings = dict(step.settings)
    if "grid" in fields and "grid" not in settings and format_name:
        settings["grid"] = CODECS[format_name].grid
    return kind(**settings)


def work_of(plan: Plan, effort: Effort) -> dict[str, Work]:
    """The techniques to run at every site of a plan."""
    work = {}
    for path, option in plan.items():
        chain = []
        for step in option.steps:
            if "sweeps" in techniques()[step.technique].__dataclass_fields__:
                step = replace(step, settings={"sweeps": effort.sweeps, **step.settings})
            chain.append((step.technique, build(step, option.format)))
        work[path] = Work(tuple(chain), option.format)
    return work


def _save(found: Survey, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for path, evidence in found.outside.items():
        tensors[f"gram:{path}"] = evidence.gram.contiguous()
        assert evidence.fisher is not None
        tensors[f"fisher:{path}"] = evidence.fisher
    save_file(tensors, folder / "survey.safetensors")
    plain = {"options": {path: [asdict(o) for o in options] for path, options in found.options.items()},
             "tokens": {path: evidence.tokens for path, evidence in found.outside.items()},
             "probes": found.probes, "swaps": [asdict(swap) for swap in found.swaps]}
    # the JSON comes last and in one step: without it the survey is taken again
    part = folder / "survey.json.part"
    part.write_text(json.dumps(plain))
    part.rename(folder / "survey.json")


def _load(folder: Path) -> Survey:
    plain: Mapping[str, Any] = json.loads((folder / "survey.json").read_text())
    tensors = load_file(folder / "survey.safetensors")
    options = {path: tuple(map(_option, found)) for path, found in plain["options"].items()}
    outside = {path: Evidence(tensors[f"gram:{path}"], tokens, tensors[f"fisher:{path}"])
               for path, tokens in plain["tokens"].items()}
    return Survey(options, outside, plain["probes"], tuple(Swap(**s) for s in plain["swaps"]))


def _option(plain: dict[str, Any]) -> Option:
    steps = tuple(Step(**{**step, "where": tuple(step["where"])}) for step in plain["steps"])
    return Option(**{**plain, "steps": steps})
