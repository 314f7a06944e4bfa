"""The survey: every weight of the float model is looked at once, with examples passing through it.

What is found is kept in the journal (``survey/``), so that a resumed run and a second budget for the same
model need not look again. A recipe chooses for itself, so it is spared the options of the planner.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rarefy.core.nouns import Evidence, Option, Step
from rarefy.models.map import Site
from rarefy.planner.allocate import scaled
from rarefy.planner.options import options_at
from rarefy.planner.sparsity import Spread, Statistics, statistics
from rarefy.planner.swaps import Swap, measure_swaps, probe_damage
from rarefy.run.effort import Effort
from rarefy.run.planning import affordable, plannable
from rarefy.run.progress import Progress
from rarefy.run.subject import Subject
from rarefy.run.target import Destination

KINDS = ("magnitude", "activity", "saliency")


@dataclass(frozen=True, eq=False)
class Survey:
    """What was learnt of the float model, by site.

    options: for the planner. seen: evidence that the sweep will not find again (lookups, the head). fishers:
    the squared gradients at every site's outputs. probes: predicted damage of the probe rounding. swaps: what
    was measured, by role. statistics: what sharing out a sparsity needs.
    """

    options: dict[str, tuple[Option, ...]] = field(default_factory=dict)
    seen: dict[str, Evidence] = field(default_factory=dict)
    fishers: dict[str, Tensor] = field(default_factory=dict)
    probes: dict[str, float] = field(default_factory=dict)
    swaps: tuple[Swap, ...] = ()
    statistics: dict[str, Statistics] = field(default_factory=dict)

    def calibrated(self, sites: Sequence[Site]) -> dict[str, tuple[Option, ...]]:
        """The options with every role's damage corrected by its swap."""
        factors = {swap.role: swap.factor for swap in self.swaps}
        return scaled(self.options, {site.path: factors.get(site.role, 1.0) for site in sites})


def take_survey(subject: Subject, destination: Destination, data: Any, effort: Effort, seed: int,
                folder: Path, progress: Progress, steps: tuple[Step, ...] | None = None) -> Survey:
    """Look at every weight (or read what an earlier run of the same job saw). steps: of a recipe."""
    if (folder / "survey.json").is_file():
        return _load(folder)
    found, opened = Survey(), subject.opened
    shared = any("allocate" in step.settings for step in steps or ())
    generator = torch.Generator().manual_seed(seed)
    techniques = plannable() if steps is None else []
    with progress.stage("survey") as stage:
        for at in subject.survey(data, effort, generator, stage.advance):
            path, weight, evidence = at.site.path, opened.weight(at.site.path), at.evidence
            if steps is None:
                offered = options_at(path, weight, evidence, destination.choices(opened, at.site), techniques,
                                     generator, at.site.kernel, partial(destination.held, opened, at.site))
                found.options[path] = tuple(affordable(option, effort) for option in offered)
                if effort.swaps:
                    found.probes[path] = probe_damage(weight, evidence)
            if shared:
                found.statistics[path] = statistics(weight, evidence)
            if subject.outside(at.site):
                found.seen[path] = evidence
            assert evidence.fisher is not None
            found.fishers[path] = evidence.fisher
    if steps is None:
        found = _completed(found, subject, destination, data, effort, progress)
    _save(found, folder)
    return found


def _completed(found: Survey, subject: Subject, destination: Destination, data: Any, effort: Effort,
               progress: Progress) -> Survey:
    """With swaps, and with sites that no example reaches: they stay as they are."""
    opened, swaps = subject.opened, tuple[Swap, ...]()
    if effort.swaps:
        with progress.stage("measured swaps") as stage:
            swaps = measure_swaps(opened.map.sites, opened.weight, found.probes,
                                  subject.distance(data, effort), stage.advance)
    options = {site.path: found.options.get(site.path) or (destination.untouched(opened, site),)
               for site in opened.map.sites}
    return Survey(options, found.seen, found.fishers, found.probes, swaps, found.statistics)


def _save(found: Survey, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {f"fisher:{path}": fisher for path, fisher in found.fishers.items()}
    tensors |= {f"gram:{path}": evidence.gram.contiguous() for path, evidence in found.seen.items()}
    totals: dict[str, dict[str, float]] = {}
    for path, each in found.statistics.items():
        spreads = {kind: spread for kind in KINDS if (spread := getattr(each, kind)) is not None}
        tensors |= {f"{kind}:{path}": spread.counts for kind, spread in spreads.items()}
        totals[path] = {"weights": each.weights, **{kind: spread.total for kind, spread in spreads.items()}}
    save_file({name: values.contiguous() for name, values in tensors.items()}, folder / "survey.safetensors")
    plain = {"options": {path: [asdict(o) for o in options] for path, options in found.options.items()},
             "tokens": {path: evidence.tokens for path, evidence in found.seen.items()},
             "probes": found.probes, "swaps": [asdict(swap) for swap in found.swaps], "statistics": totals}
    # the JSON comes last and in one step: without it the survey is taken again
    part = folder / "survey.json.part"
    part.write_text(json.dumps(plain))
    part.rename(folder / "survey.json")


def _load(folder: Path) -> Survey:
    plain: Mapping[str, Any] = json.loads((folder / "survey.json").read_text())
    tensors = load_file(folder / "survey.safetensors")
    fishers = {name.removeprefix("fisher:"): values for name, values in tensors.items()
               if name.startswith("fisher:")}
    seen = {path: Evidence(tensors[f"gram:{path}"], tokens, fishers[path])
            for path, tokens in plain["tokens"].items()}
    spread = {path: Statistics(int(totals["weights"]), **{
        kind: Spread(tensors[f"{kind}:{path}"], totals[kind]) for kind in KINDS if kind in totals})
        for path, totals in plain["statistics"].items()}
    return Survey({path: tuple(map(_option, found)) for path, found in plain["options"].items()}, seen,
                  fishers, plain["probes"], tuple(Swap(**s) for s in plain["swaps"]), spread)


def _option(plain: dict[str, Any]) -> Option:
    steps = tuple(Step(**{**step, "where": tuple(step["where"])}) for step in plain["steps"])
    return Option(**{**plain, "steps": steps})
