"""Networks that are no language models, as a job sees them: samples, and the whole network at once."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rarefy.calibration.evidence import Advance, Seen
from rarefy.calibration.examples import Examples, read_examples
from rarefy.calibration.observe import inputs, survey
from rarefy.calibration.text import PYTHON_DOCS
from rarefy.core.errors import DataError
from rarefy.core.nodes import Node
from rarefy.core.nouns import Evidence, Receipt, Recipe
from rarefy.export.networks import stored_trees
from rarefy.measure.task import Judge
from rarefy.models.map import Site
from rarefy.models.network import Network
from rarefy.models.runner import Override
from rarefy.run.attention import attended
from rarefy.run.effort import Effort
from rarefy.run.narrow import narrowed
from rarefy.run.progress import Progress, Stage
from rarefy.run.recipe import split
from rarefy.run.rescale import rescaled_network
from rarefy.run.subject import Pace, Subject
from rarefy.run.sweep import Store, Work, rewrite

STAGES = 12      # passes of a sequential sweep at most
TIMED = 32       # samples that are timed together
GLIMPSE = 128    # samples that tell whether two programs compute the same
LABELS = "labels"


@dataclass(frozen=True, eq=False)
class Shown:
    """Samples to calibrate on and samples to judge on, none in both."""

    calibration: Examples
    evaluation: Examples
    sources: dict[str, str]


class Samples:
    """An encoder, a CNN, or any other network that answers samples."""

    usual = "torch"

    def __init__(self, network: Network) -> None:
        self.opened: Network = network
        self._judge: tuple[Shown, Judge] | None = None

    def about(self) -> dict[str, Any]:
        found, form = self.opened.map, self.opened.form
        family = getattr(self.opened.config, "model_type", None) or type(self.opened.module).__name__
        return {"name": self.opened.name, "family": family, "parameters": found.parameters,
                "weights": sum(site.shape[0] * site.shape[1] for site in found.sites),
                "blocks": found.blocks, "tied": found.tied, "answers": form.gives}

    # ---- examples

    def gather(self, data: tuple[Any, ...], eval_data: tuple[Any, ...], effort: Effort, seed: int,
               progress: Progress, kept: Path | None = None) -> Shown:
        if kept is not None and kept.is_file():
            return _kept(kept)
        with progress.stage("samples"):
            shown = self._gather(data, eval_data, effort, seed)
        if kept is not None:
            _keep(shown, kept)
        return shown

    def _gather(self, data: tuple[Any, ...], eval_data: tuple[Any, ...], effort: Effort, seed: int) -> Shown:
        _, many, judged = effort.samples
        if not data and self.opened.form.takes != "text":
            raise DataError(f"{self.opened.name}: pass data: an .npz, idx files, a folder of pictures, or in "
                            "Python tensors (data=...)")
        if not eval_data:
            return self._split(data, many, judged, seed)
        evaluation = self._read(eval_data, judged, seed + 1)
        calibration = self._read(data or (PYTHON_DOCS,), many, seed).apart_from(evaluation)
        if not len(calibration):
            raise DataError("evaluation data was calibrated on: every calibration sample is in it; pass "
                            "other samples")
        return Shown(calibration, evaluation, {"calibration": _names(data or (PYTHON_DOCS,)),
                                               "evaluation": _names(eval_data)})

    def _split(self, data: tuple[Any, ...], many: int, judged: int, seed: int) -> Shown:
        """One source for both: half of a small one is judged on, and what a large one has beyond ``many``."""
        data = data or (PYTHON_DOCS,)
        found = self._read(data, many + judged, seed)
        found = found.apart_from(found.select(torch.zeros(0, dtype=torch.int64)))  # each sample once
        count = min(judged, len(found) // 2)
        if not count:
            raise DataError(f"{_names(data)}: {len(found)} different samples are too few to hold any out for "
                            "the judgement; pass more, or eval data")
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
        rest, aside = order[count:].sort().values, order[:count].sort().values
        return Shown(found.select(rest), found.select(aside), {
            "calibration": _names(data), "evaluation": f"{_names(data)} ({count} samples held out)"})

    def _read(self, refs: tuple[Any, ...], count: int, seed: int) -> Examples:
        """Every source gives an equal share."""
        share = -(-count // len(refs))
        return joined([read_examples(self.opened, ref, count=share, seed=seed) for ref in refs])

    def judged(self, eval_data: tuple[Any, ...], effort: Effort, seed: int) -> Shown:
        _, _, count = effort.samples
        if not eval_data and self.opened.form.takes != "text":
            raise DataError(f"{self.opened.name}: pass evaluation data: an .npz, idx files or a folder")
        refs = eval_data or (PYTHON_DOCS,)
        found = self._read(refs, count, seed + 1)
        return Shown(found.select(torch.zeros(0, dtype=torch.int64)), found, {"evaluation": _names(refs)})

    # ---- compression

    def reshaped(self, recipe: Recipe, effort: Effort, data: Shown, advance: Advance
                 ) -> tuple[Subject, tuple[Receipt, ...]]:
        whole = split(recipe.steps)[0]
        if not whole:
            return self, ()
        network, changed = attended(self.opened, whole)
        assert isinstance(network, Network)
        smaller = narrowed(network, recipe, data.calibration, advance)
        done = rescaled_network(smaller.network, recipe, effort, data.calibration)
        return Samples(done.model), changed + smaller.receipts + done.receipts

    def survey(self, data: Shown, effort: Effort, generator: torch.Generator, advance: Advance
               ) -> Iterator[Seen]:
        return survey(self.opened, some(data.calibration, effort.samples[0]), generator, advance)

    def outside(self, site: Site) -> bool:
        return any(isinstance(user, nn.Embedding) for user in self.opened.users(site.path))

    def distance(self, data: Shown, effort: Effort) -> Callable[[Override], float]:
        judge = Judge(self.opened, some(data.calibration, effort.samples[0]))
        return lambda override: judge.compare(self.opened, override).mean

    def sweep(self, work: Mapping[str, Work], data: Shown, seen: Mapping[str, Evidence],
              fishers: Mapping[str, Tensor], store: Store, seed: int, effort: Effort, advance: Advance
              ) -> None:
        """Stage by stage in the order of the data, each behind what was already rewritten."""
        network = self.opened
        order = _order(network, data.calibration)
        wanted = [network.map.by_path[path] for path in order if path in work]
        stages = _stages([site for site in wanted if site.path not in seen], effort.sequential)
        finished: set[str] = set()

        def current(path: str) -> Node | None:
            return store[path][0] if path in finished else None

        for count, sites in enumerate([[site for site in wanted if site.path in seen], *stages]):
            missing = [site for site in sites if site.path not in store]
            arrived = {} if not missing or sites[0].path in seen else inputs(
                network, data.calibration, [site.path for site in missing], network.tensors(current))
            for site in missing:
                evidence = seen.get(site.path) or arrived.get(site.path)
                store[site.path] = rewrite(network, site, work[site.path], evidence, seed,
                                           fishers.get(site.path))
            finished |= {site.path for site in sites}
            advance(count + 1, len(stages) + 1)

    # ---- proof

    def measure(self, candidate: Subject, data: Shown, stage: Stage) -> dict[str, Any]:
        assert isinstance(candidate, Samples)
        stage.line(f"{len(data.evaluation)} samples")
        return {"float": self._judging(data).compare(candidate.opened).as_dict(), "second_domain": None}

    def _judging(self, data: Shown) -> Judge:
        """The original's answers, asked for once."""
        if self._judge is None or self._judge[0] is not data:
            calibration = data.calibration if len(data.calibration) else None
            self._judge = data, Judge(self.opened, data.evaluation, calibration)
        return self._judge[1]

    def glimpse(self, data: Shown) -> Shown:
        few = some(data.evaluation, GLIMPSE)
        return Shown(few.select(torch.zeros(0, dtype=torch.int64)), Examples(few.inputs), data.sources)

    def live(self) -> nn.Module:
        return copy.deepcopy(self.opened.module)

    def trees(self) -> dict[str, Node]:
        return stored_trees(self.opened)

    def measure_live(self, candidate: nn.Module, data: Shown, effort: Effort) -> dict[str, Any]:
        return self._judging(data).compare(self.opened.running(candidate)).as_dict()

    def paces(self, data: Shown) -> dict[str, Pace]:
        return {"batch": self._pace(some(data.evaluation, TIMED)),
                "single": self._pace(some(data.evaluation, 1))}

    def _pace(self, examples: Examples) -> Pace:
        batch = next(examples.batches(len(examples)))

        @torch.no_grad()
        def run(module: nn.Module) -> int:
            self.opened.running(module).run(batch)
            return len(examples)

        return run

    def completions(self, original: nn.Module, compressed: nn.Module) -> list[dict[str, str]]:
        return []


def joined(parts: Sequence[Examples]) -> Examples:
    """Several sources as one; what is shorter is padded with zeros, which masks leave out."""
    if len(parts) == 1:
        return parts[0]
    names = list(parts[0].inputs)
    if any(list(part.inputs) != names for part in parts):
        raise DataError("the sources do not hold the same inputs; give each the same form")
    columns = {}
    for name in names:
        values = [part.inputs[name] for part in parts]
        if values[0].ndim == 2 and not values[0].is_floating_point():
            width = max(each.shape[1] for each in values)
            values = [nn.functional.pad(each, (0, width - each.shape[1])) for each in values]
        if len({each.shape[1:] for each in values}) > 1:
            raise DataError("the sources hold samples of different shapes; bring them to one shape")
        columns[name] = torch.cat(values)
    labels = [part.labels for part in parts if part.labels is not None]
    return Examples(columns, torch.cat(labels) if len(labels) == len(parts) else None)


def some(examples: Examples, count: int) -> Examples:
    """As many, spread evenly."""
    if len(examples) <= count:
        return examples
    return examples.select(torch.linspace(0, len(examples) - 1, count).long())


def _names(refs: tuple[Any, ...]) -> str:
    return ", ".join(str(ref) if isinstance(ref, str | Path) else "tensors" for ref in refs)


def identity(refs: tuple[Any, ...], network: Network) -> list[str]:
    """What tells one job's data from another's: names of files, hashes of what is in memory."""
    return [str(ref) if isinstance(ref, str | Path) else
            hashlib.sha256(b"".join(read_examples(network, ref).digests())).hexdigest() for ref in refs]


@torch.no_grad()
def _order(network: Network, examples: Examples) -> list[str]:
    """The sites in the order in which one sample meets them; those that it does not meet come last."""
    met: dict[str, None] = {}
    with network.watched(network.map.by_path, lambda site, module, x, y: met.setdefault(site.path)):
        network.run(next(examples.batches(1)))
    return [*met, *(site.path for site in network.map.sites if site.path not in met)]


def _stages(sites: list[Site], sequential: bool) -> list[list[Site]]:
    """Blocks in the order of the data, where there are any; no more than ``STAGES``."""
    if not sequential or len(sites) < 2:
        return [sites] if sites else []
    parts: list[list[Site]] = []
    for site in sites:
        if parts and site.block is not None and parts[-1][-1].block == site.block:
            parts[-1].append(site)
        else:
            parts.append([site])
    edges = [round(k * len(parts) / min(STAGES, len(parts))) for k in range(min(STAGES, len(parts)) + 1)]
    return [[site for part in parts[start:stop] for site in part]
            for start, stop in pairwise(edges)]


def _keep(shown: Shown, place: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for part, examples in (("calibration", shown.calibration), ("evaluation", shown.evaluation)):
        tensors |= {f"{part}:{name}": values.contiguous() for name, values in examples.inputs.items()}
        if examples.labels is not None:
            tensors[f"{part}:{LABELS}"] = examples.labels.contiguous()
    part_file = place.with_name(place.name + ".part")
    save_file(tensors, part_file, shown.sources)
    part_file.rename(place)


def _kept(place: Path) -> Shown:
    with safe_open(place, framework="pt") as file:
        held: dict[str, dict[str, Tensor]] = {"calibration": {}, "evaluation": {}}
        for key in file.keys():  # noqa: SIM118 - no mapping
            part, _, name = key.partition(":")
            held[part][name] = file.get_tensor(key)
        sources = file.metadata()
    examples = {part: Examples({name: values for name, values in named.items() if name != LABELS},
                               named.get(LABELS)) for part, named in held.items()}
    return Shown(examples["calibration"], examples["evaluation"], sources)
