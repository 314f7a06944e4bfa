"""The target transformers: a checkpoint of compressed-tensors, proven in plain transformers.

Linear layers go over as codes of 8 or 4 bits, everything else (embeddings, norms, what was pruned) as floats
of 16 bits where the original has no more, else of 32; a low-rank repair that a recipe asks for lies beside it
as a PEFT adapter. The proof loads the folder in a fresh process that knows nothing of this project.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from rarefy.core.errors import TargetError
from rarefy.core.nodes import Dense, Node
from rarefy.core.nouns import Choice, Option, Step
from rarefy.export.compressed_tensors import TRANSFORMERS, Checkpoint, export_transformers
from rarefy.export.native import TreeSource
from rarefy.export.networks import live
from rarefy.measure.resources import bytes_on_disk
from rarefy.models.map import Site
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.numerics.grids import Grid, integer_grid_named
from rarefy.planner.allocate import Plan
from rarefy.report.verdict import distance
from rarefy.run.effort import Effort
from rarefy.run.language import Language
from rarefy.run.progress import Stage
from rarefy.run.samples import Samples
from rarefy.run.subject import Subject
from rarefy.run.target import Beside, Destination, Opened
from rarefy.run.trees import TREE, outline, tree_option
from rarefy.runtimes.session import require
from rarefy.runtimes.transformers import LOADER, answer

INSIDE = "model"
GRIDS = ("int8", "int8-g32", "int8-g128", "int4-g32", "int4-g64", "int4-g128")
PACKAGES = ("compressed_tensors", "peft")
AGREEMENT = 1e-3  # KL or cosine distance between transformers and our own reading, both in float32
SAID_OF_A_TENSOR, SAID = 110, 2048  # header and configuration, about


@dataclass(frozen=True, eq=False)
class _Made:
    """What this process exported last."""

    path: Path
    done: Checkpoint
    subject: Subject


class Transformers:
    """Checkpoints."""

    target = replace(TRANSFORMERS, formats=(TREE, *GRIDS, "float16", "float32"))

    def __init__(self) -> None:
        self._beside: WeakKeyDictionary[Opened, int] = WeakKeyDictionary()
        self._made: _Made | None = None

    def ready(self) -> None:
        for package in PACKAGES:
            require(package)

    def accepts(self, subject: Subject) -> None:
        if subject.opened.config is None:
            raise TargetError(f"{subject.opened.name}: a network of your own, which transformers does not "
                              "know; pass --for torch, onnxruntime or openvino")

    def given(self, subject: Subject, data: Any) -> Destination:
        return self

    # ---- formats

    def choices(self, opened: Opened, site: Site) -> dict[str, Choice]:
        dtype = _dtype(opened)
        found = {str(dtype).removeprefix("torch."): Choice(dtype, prod(site.shape) * dtype.itemsize)}
        for name in GRIDS if _linear(opened, site) else ():
            grid = integer_grid_named(name)
            assert grid is not None
            if site.shape[1] % (grid.block or 1) == 0 and grid.block < site.shape[1] and (
                    site.shape[1] * grid.code_bits % 32 == 0):
                found[name] = Choice(grid, _bytes(site, grid, dtype))
        return found

    def held(self, opened: Opened, site: Site, option: Option) -> Option | None:
        """Of trees, none: a mask is stored as zeros, and low rank has no layer."""
        return None if option.format == TREE else option

    def untouched(self, opened: Opened, site: Site) -> Option:
        dtype = _dtype(opened)
        name = str(dtype).removeprefix("torch.")
        return Option(site.path, name, prod(site.shape) * dtype.itemsize, 0.0)

    def asked(self, opened: Opened, site: Site, steps: Sequence[Step]) -> Option:
        """Bytes are known when it is done."""
        if not steps:
            return self.untouched(opened, site)
        return tree_option(site, steps, self.target.formats)

    def shown(self, option: Option, tree: Node | None) -> Option:
        if tree is None or self._made is None:
            return option
        scheme = self._made.done.schemes.get(option.site.removesuffix(".weight"))
        kept = -(-tree.bits() // 8) if scheme is not None else prod(tree.shape) * _dtype(
            self._made.subject.opened).itemsize
        return replace(option, format=outline(tree), bytes=kept)

    # ---- sizes

    def fixed_bytes(self, opened: Opened) -> int:
        if opened not in self._beside:
            with tempfile.TemporaryDirectory() as folder:
                _tokenizer(opened, Path(folder))
                self._beside[opened] = bytes_on_disk(Path(folder))
        params = sum(prod(param.shape) for param in opened.map.params) * _dtype(opened).itemsize
        tensors = 3 * len(opened.map.sites) + len(opened.map.params)
        return params + self._beside[opened] + SAID + SAID_OF_A_TENSOR * tensors

    def original_bytes(self, opened: Opened) -> int:
        return self.fixed_bytes(opened) + sum(self.untouched(opened, site).bytes
                                              for site in opened.map.sites)

    def least_bytes(self, opened: Opened, site: Site) -> int:
        return min(choice.bytes for choice in self.choices(opened, site).values())

    # ---- the export

    def place(self, folder: Path) -> Path:
        return folder / INSIDE

    def export(self, opened: Opened, trees: Mapping[str, Node], plan: Plan, path: Path) -> None:
        if path.exists():
            shutil.rmtree(path)
        held = {site: trees[site] for site in plan if site in trees}
        done = export_transformers(live(opened), held, path, dtype=_dtype(opened))
        _tokenizer(opened, path)
        self._made = _Made(path, done, _holding(opened, held, path))
        if done.notes:
            warnings.warn(f"transformers has no form as small for {len(done.notes)} weights: "
                          f"{done.notes[0]}", stacklevel=1)
        if isinstance(opened, Network) and opened.ranges:
            warnings.warn(f"transformers: checkpoints are written without ranges that stand; the inputs of "
                          f"{len(opened.ranges)} layers that training rounded are floats", stacklevel=1)

    def reopened(self, subject: Subject, path: Path) -> Subject | None:
        """The network that the folder stands for, as this process wrote it."""
        return None if self._made is None or self._made.path != path else self._made.subject

    def prove(self, subject: Subject, path: Path, data: Any, effort: Effort, stage: Stage) -> dict[str, Any]:
        adapter = path / "adapter"
        elsewhere = Elsewhere(path, subject.opened, adapter if adapter.is_dir() else None)
        few = subject.glimpse(data)
        found = subject.measure_live(elsewhere, few, effort)
        said = {"name": "transformers", "version": elsewhere.version, **found}
        again = self.reopened(subject, path)
        if again is None:
            return said
        drift = distance(again.measure_live(elsewhere, few, effort))
        if not drift <= max(AGREEMENT, 0.05 * distance(found)):
            raise TargetError(f"{path.name}: transformers computes something else than the weights say "
                              f"({drift:.3g} apart); this is a bug of the export: report it")
        kind = "kl_mean" if "kl_mean" in found else "distance_mean"
        return {**said, "logit_error_vs_float": {kind: drift}}

    def beside(self, subject: Subject, path: Path, data: Any, work: Path, effort: Effort, stage: Stage
               ) -> Beside:
        """No speed: transformers decodes the codes when it runs; what is fast for them is vLLM."""
        schemes = {} if self._made is None else self._made.done.schemes
        return Beside({}, lowered={site.path: "decoded from its codes" if site.path.removesuffix(".weight")
                                   in schemes else "floats" for site in subject.opened.map.sites})

    def how_to_run(self, out: Path) -> list[str]:
        maker = LOADER if self._made is None else _loader(self._made.subject.opened)
        return [f"python -c \"import transformers; network = transformers.{maker}.from_pretrained("
                f"'{self.place(out)}')\""]


class Elsewhere(nn.Module):
    """A checkpoint that a fresh process loads and runs for every call; float32, whatever it is stored in."""

    def __init__(self, folder: Path, opened: Opened, adapter: Path | None) -> None:
        super().__init__()
        import transformers

        self.folder, self.loader, self.adapter = folder, _loader(opened), adapter
        self.language, self.version = isinstance(opened, Model), f"transformers {transformers.__version__}"
        self._known: dict[bytes, Tensor] = {}

    def forward(self, use_cache: bool = False, **named: Tensor) -> Any:
        """The answer to some inputs; asked again, the same."""
        del use_cache
        key = b"".join(values.numpy().tobytes() for values in named.values())
        if key not in self._known:
            self._known[key] = answer(self.folder, named, loader=self.loader, adapter=self.adapter)
        found = self._known[key]
        if self.language:
            return CausalLMOutput(logits=found)
        return {"logits" if self.loader.endswith("Classification") else "last_hidden_state": found}


def _loader(opened: Opened) -> str:
    return LOADER if isinstance(opened, Model) else opened.form.loader


def _linear(opened: Opened, site: Site) -> bool:
    """Whether a site is the weight of linear layers alone: what compressed-tensors knows codes of."""
    if isinstance(opened, Model):
        return site.role != "embed" and not site.transposed
    return all(isinstance(user, nn.Linear) for user in opened.users(site.path))


def _dtype(opened: Opened) -> torch.dtype:
    """Of floats and scales: 16 bits where the original has no more."""
    widest = max(getattr(getattr(torch, opened.source.dtype(site.path), None), "itemsize", 2)
                 for site in opened.map.sites)
    return torch.float32 if widest > 2 else torch.float16


def _bytes(site: Site, grid: Grid, dtype: torch.dtype) -> int:
    rows, columns = site.shape
    return rows * columns * grid.code_bits // 8 + rows * (columns // (grid.group or columns)) * dtype.itemsize


def _tokenizer(opened: Opened, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(opened, Model) or opened.form.takes == "text":
        opened.tokenizer.save_pretrained(folder)
    for path in () if isinstance(opened, Model) else opened.files:
        shutil.copyfile(path, folder / path.name)


def _holding(opened: Opened, trees: Mapping[str, Node], path: Path) -> Subject:
    """The network with trees in the place of its weights, floats as they are stored."""
    dtype = _dtype(opened)
    if isinstance(opened, Network):
        return Samples(opened.running(_filled(opened, trees, dtype)))
    params = {param.path: opened.param(param.path).to(dtype) for param in opened.map.params}
    whole = {site.path: trees[site.path] if site.path in trees else Dense(opened.weight(site.path).to(dtype))
             for site in opened.map.sites}
    flipped = {site.path: site for site in opened.map.sites if site.transposed}
    source = TreeSource(path, whole, params, flipped)
    return Language(Model(opened.name, opened.map.family, opened.config, source, lambda: opened.tokenizer))


def _filled(opened: Network, trees: Mapping[str, Node], dtype: torch.dtype) -> nn.Module:
    module: nn.Module = live(opened).eval().requires_grad_(False)
    state = {name: values.to(dtype).float() if values.is_floating_point() else values
             for name, values in module.state_dict().items()}
    state |= {path: opened.map.by_path[path].stored(tree.dense()) for path, tree in trees.items()}
    module.load_state_dict(state)
    return module
