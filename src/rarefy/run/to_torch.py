"""The target torch: a native folder that keeps every tree, run by PyTorch.

Whatever technique made a weight, the folder holds it at the bits that its tree counts, so the planner may
choose among all of them. What runs faster for it is another question: the proof times both networks, and
says for every weight how it runs.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from rarefy.core.errors import TargetError
from rarefy.core.nodes import Node
from rarefy.core.nouns import Choice, Option, Step, Target
from rarefy.export.native import export_native
from rarefy.export.networks import INSIDE, export_network, opened
from rarefy.measure.latency import compare
from rarefy.models.map import Site
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.models.recurrent import rolled
from rarefy.numerics.grids import Grid, integer_grid_named
from rarefy.planner.allocate import Plan
from rarefy.report.verdict import distance
from rarefy.run.effort import Effort
from rarefy.run.language import Language
from rarefy.run.progress import Stage
from rarefy.run.samples import Samples
from rarefy.run.subject import Subject
from rarefy.run.target import Beside, Destination, Opened
from rarefy.run.trees import FLOATS, TREE, outline, tree_option
from rarefy.runtimes.torch import attach

GRIDS = ("int8", "int6", "int5", "int4", "int3", "int8-g32", "int6-g32", "int5-g32", "int4-g32", "int4-g64",
         "int4-g128", "int3-g32", "int3-g64", "int2-g32", "int2-g16")
TORCH = Target("torch", (TREE, *GRIDS, *FLOATS), "",
               description="A native folder that rarefy.load runs in PyTorch: any technique in any order")
# what tree.json and the header of the weights say of each weight and param, generously
SAID_OF_A_SITE, SAID_OF_A_PARAM, SAID = 900, 260, 4096
AGREEMENT = 0.05  # KL or cosine distance between fast kernels and our own reading of the same folder


class Torch:
    """Native folders."""

    target = TORCH

    def ready(self) -> None:
        """PyTorch is what we are made of."""

    def accepts(self, subject: Subject) -> None:
        """Anything."""

    def given(self, subject: Subject, data: Any) -> Destination:
        return self

    # ---- formats

    def choices(self, opened: Opened, site: Site) -> dict[str, Choice]:
        found = {TREE: Choice(None, 0)}
        for name in GRIDS:
            grid = integer_grid_named(name)
            assert grid is not None
            if site.shape[1] % (grid.block or 1) == 0 and grid.block < site.shape[1]:
                found[name] = Choice(grid, _grid_bytes(site, grid))
        for name, dtype in FLOATS.items():
            found[name] = Choice(dtype, prod(site.shape) * dtype.itemsize)
        return found

    def held(self, opened: Opened, site: Site, option: Option) -> Option | None:
        return option

    def untouched(self, opened: Opened, site: Site) -> Option:
        dtype = _dtype(opened, site)
        return Option(site.path, str(dtype).removeprefix("torch."), prod(site.shape) * dtype.itemsize, 0.0)

    def asked(self, opened: Opened, site: Site, steps: Sequence[Step]) -> Option:
        """Bytes are known when it is done."""
        if not steps:
            return self.untouched(opened, site)
        return tree_option(site, steps, TORCH.formats)

    def shown(self, option: Option, tree: Node | None) -> Option:
        if tree is None:
            return option
        return replace(option, format=outline(tree), bytes=-(-tree.bits() // 8))

    # ---- sizes

    def fixed_bytes(self, opened: Opened) -> int:
        """Params, tokenizer and other files, and what the headers may take."""
        if opened not in _FIXED:
            _FIXED[opened] = _fixed_bytes(opened)
        return _FIXED[opened]

    def original_bytes(self, opened: Opened) -> int:
        """Every weight as the model has it."""
        return self.fixed_bytes(opened) + sum(self.untouched(opened, site).bytes for site in opened.map.sites)

    def least_bytes(self, opened: Opened, site: Site) -> int:
        """Not known: how far a technique can go is its own affair."""
        return 0

    # ---- the export

    def place(self, folder: Path) -> Path:
        return folder / INSIDE

    def export(self, opened: Opened, trees: Mapping[str, Node], plan: Plan, path: Path) -> None:
        if path.exists():
            shutil.rmtree(path)
        held = {site: trees[site] for site in plan if site in trees}
        match opened:
            case Model():
                export_native(opened, held, path)
            case Network():
                export_network(opened, held, path)

    def reopened(self, subject: Subject, path: Path) -> Subject:
        own = subject.opened
        back = opened(path, own.module if isinstance(own, Network) else None)
        return Language(back) if isinstance(back, Model) else Samples(back)

    def prove(self, subject: Subject, path: Path, data: Any, effort: Effort, stage: Stage) -> dict[str, Any]:
        """With the kernels that run it: some of them round on the way."""
        again = self.reopened(subject, path)
        network = again.live()
        attach(network, again.trees())
        network = rolled(network)
        found = subject.measure_live(network, data, effort)
        apart = again.measure_live(network, again.glimpse(data), effort)
        drift, moved = distance(apart), distance(found)
        # a network that compression broke amplifies what the kernels round as well: no fault of theirs
        if not drift <= max(AGREEMENT, 0.5 * moved):
            raise TargetError(f"{path.name}: the kernels compute something else than the weights say "
                              f"({drift:.3g} apart); this is a bug: report it")
        kept = len(again.opened.ranges) if isinstance(again, Samples) else 0
        said = {"activations": f"not rounded in the {kept} ranges of training, which the folder keeps for "
                               "other targets"} if kept else {}
        return {"name": "torch", "version": torch.__version__, **found, **said,
                "logit_error_vs_float": {key: value for key, value in apart.items() if key.endswith("_mean")}}

    def beside(self, subject: Subject, path: Path, data: Any, work: Path, effort: Effort, stage: Stage
               ) -> Beside:
        again = self.reopened(subject, path)
        original, compressed = rolled(subject.live()), again.live()
        lowered = attach(compressed, again.trees())
        compressed = rolled(compressed)
        speed: dict[str, Any] = {"original": {}, "compressed": {}, "drift": 0.0}
        for key, pace in subject.paces(data).items():
            found = compare(lambda pace=pace: pace(original), lambda pace=pace: pace(compressed),  # type: ignore[misc]
                            effort.repeats)
            speed["original"][key], speed["compressed"][key] = found.a, found.b
            speed[f"ratio_{key}"], speed["drift"] = found.ratio, max(speed["drift"], found.drift)
        return Beside(speed, subject.completions(original, compressed), lowered)

    def how_to_run(self, out: Path) -> list[str]:
        return [f"python -c \"import rarefy; network = rarefy.load('{out}', fast=True)\""]


_FIXED: WeakKeyDictionary[Opened, int] = WeakKeyDictionary()


def _fixed_bytes(model: Opened) -> int:
    params = sum(prod(param.shape) * _width(model.source.dtype(param.path)) for param in model.map.params)
    said = SAID + SAID_OF_A_SITE * len(model.map.sites) + SAID_OF_A_PARAM * len(model.map.params)
    files = model.files if isinstance(model, Network) else ()
    written = 0
    if isinstance(model, Model) or model.form.takes == "text":
        with tempfile.TemporaryDirectory() as folder:
            model.tokenizer.save_pretrained(folder)
            written = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return params + said + written + sum(path.stat().st_size for path in files)


def _dtype(model: Opened, site: Site) -> torch.dtype:
    """How the model holds a site; codes of a GGUF file are decoded to float32."""
    found = getattr(torch, model.source.dtype(site.path), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _width(dtype: str) -> int:
    found = getattr(torch, dtype, None)
    return found.itemsize if isinstance(found, torch.dtype) else 4


def _grid_bytes(site: Site, grid: Grid) -> int:
    """Codes and scales, each stream in whole bytes."""
    rows, columns = site.shape
    groups = rows * (columns // (grid.group or columns))
    each = grid.scale.dtype.itemsize + (0 if grid.zero is None else grid.zero.dtype.itemsize)
    return -(-rows * columns * grid.code_bits // 8) + groups * each
