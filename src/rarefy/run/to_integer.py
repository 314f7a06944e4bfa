"""The target integer: a CNN or an encoder in integers alone, for processors that compute nothing else.

Every weight gets 8 bits with one scale a row, activations too, so there is nothing to plan: a budget is met
or it is not. BatchNorm is folded into the scales of rows. Layers whose inputs were rounded in training keep
the ranges that it found; the others are found by each of three methods, and the one stays under which answers
on calibration samples move least. The file is ONNX in integer operators, and its proof is that no bit of its
answers differs from the interpreter's (``runtimes.integer``).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rarefy.core.errors import RecipeError, TargetError
from rarefy.core.nodes import Node
from rarefy.core.nouns import Choice, Option, Step, Target
from rarefy.export.pieces import codes_like
from rarefy.export.program import METHODS, Program, trace
from rarefy.measure.task import Judge
from rarefy.models.folding import fold, folded_rows, gains
from rarefy.models.form import MASK
from rarefy.models.map import Site
from rarefy.models.network import TENSOR, Network
from rarefy.models.recurrent import is_recurrent
from rarefy.numerics.grids import integer_grid_named
from rarefy.planner.allocate import Plan
from rarefy.report.verdict import distance
from rarefy.run.effort import Effort
from rarefy.run.engines import ENGINES, INSIDE
from rarefy.run.planning import grid_named
from rarefy.run.progress import Stage
from rarefy.run.samples import Samples, Shown, some
from rarefy.run.subject import Subject
from rarefy.run.target import Beside, Destination, Opened
from rarefy.run.to_onnx import (
    BATCH,
    CHOSEN,
    RANGES,
    SEED,
    Asking,
    Reading,
    Traced,
    beside_bytes,
    example_of,
    looser,
    ranges_said,
    write_beside,
)
from rarefy.runtimes.integer import Fake, IntegerFile, compiled, export_integer, multiplied
from rarefy.runtimes.session import Session, require

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INTEGER = Target("integer", ("int8",), ".onnx",
                 description="ONNX files of integer operators alone: weights and activations of 8 bits, "
                             "fixed-point multipliers; CNNs and encoders")
FLOATS = ENGINES[0]  # where the original is timed
FILE = FLOATS.file
LITTLE = 4       # samples that the interpreter answers, which is slow
BOUND = 0.02     # relative distance of the integers from fake quantization, in a network that rounding spares
LIVELY = 2.0     # how much further it may be, in distances that rounding itself moved the answers


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A network as it is compiled. factors: of the rows of layers that a normalisation was folded into."""

    program: Program
    factors: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class _Made:
    """What this process exported last."""

    path: Path
    network: Network
    file: IntegerFile
    fake: Fake
    ranges: str


class IntegersAlone:
    """Networks as integers. shown: the examples of the job, without which nothing is traced."""

    target = INTEGER

    def __init__(self, shown: Shown | None = None) -> None:
        self.shown_to = shown
        self._held: WeakKeyDictionary[Network, _Prepared] = WeakKeyDictionary()
        self._sizes: WeakKeyDictionary[Network, int] = WeakKeyDictionary()
        self._made: _Made | None = None

    def ready(self) -> None:
        for package in PACKAGES:
            require(package)

    def accepts(self, subject: Subject) -> None:
        self._network(subject.opened)

    def given(self, subject: Subject, data: Any) -> Destination:
        """Compiled once with other codes: what has no integer form is refused before any work."""
        assert isinstance(data, Shown)
        informed = IntegersAlone(data)
        informed.fixed_bytes(subject.opened)
        return informed

    # ---- formats

    def choices(self, opened: Opened, site: Site) -> dict[str, Choice]:
        grid = integer_grid_named("int8")
        assert grid is not None
        return {"int8": Choice(grid, prod(site.shape))}

    def held(self, opened: Opened, site: Site, option: Option) -> Option | None:
        return option

    def untouched(self, opened: Opened, site: Site) -> Option:
        """Of a weight that the answer does not need, and that the file leaves out."""
        return Option(site.path, "left out", 0, 0.0)

    def asked(self, opened: Opened, site: Site, steps: Sequence[Step]) -> Option:
        if site.path not in multiplied(self._prepared(self._network(opened)).program):
            return self.untouched(opened, site)
        for step in steps:
            grid = grid_named(step.format)
            if step.format and (grid is None or grid.group or grid.zero is not None):
                raise RecipeError(f"{site.path}: format {step.format!r} has not one scale a row, which "
                                  "integers alone need; choose int8")
        if not any(step.format for step in steps):
            raise RecipeError(f"{site.path}: no step rounds it, and there are no floats for it; add one (rtn "
                              "or gptq, format int8)")
        return Option(site.path, "int8", prod(site.shape), float("nan"), tuple(steps))

    def shown(self, option: Option, tree: Node | None) -> Option:
        return option

    # ---- sizes

    def fixed_bytes(self, opened: Opened) -> int:
        """Steps, multipliers and biases, of a file with other codes, and what lies beside it."""
        network = self._network(opened)
        if self.shown_to is None:
            return beside_bytes(network)
        if network not in self._sizes:
            generator, grid = torch.Generator().manual_seed(SEED), integer_grid_named("int8")
            assert grid is not None
            trees = {site.path: codes_like(site, grid, generator) for site in network.map.sites}
            with tempfile.TemporaryDirectory() as folder:
                file, _ = self._written(network, trees, Path(folder) / FILE, METHODS[0])
            used = multiplied(self._prepared(network).program)
            codes = sum(prod(site.shape) for site in network.map.sites if site.path in used)
            self._sizes[network] = max(file.bytes - codes, 0) + beside_bytes(network)
        return self._sizes[network]

    def original_bytes(self, opened: Opened) -> int:
        """Every number as float32."""
        network = self._network(opened)
        return 4 * network.parameters + beside_bytes(network)

    def least_bytes(self, opened: Opened, site: Site) -> int:
        """Nothing, should the answer not need it."""
        return 0

    # ---- the export

    def place(self, folder: Path) -> Path:
        return folder / INSIDE

    def export(self, opened: Opened, trees: Mapping[str, Node], plan: Plan, path: Path) -> None:
        """By the method for ranges that moves answers on calibration samples least."""
        network, shown = self._network(opened), self.shown_to
        assert shown is not None
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
        held = {site: trees[site] for site in plan if site in trees}
        with network.as_trained():
            judge = Judge(network, replace(some(shown.calibration, CHOSEN), labels=None))
        tried = []
        with tempfile.TemporaryDirectory() as folder:
            for place, method in enumerate(METHODS):
                file, fake = self._written(network, held, Path(folder) / f"{place}.onnx", method)
                moved = judge.compare(network.running(self._reading(fake))).mean
                tried.append((moved, place, file, fake))
            _, place, file, fake = min(tried, key=lambda each: each[:2])
            kept = replace(file, path=path / FILE)
            shutil.copyfile(file.path, kept.path)
        write_beside(network, path)
        self._made = _Made(path, network, kept, fake, METHODS[place])

    def reopened(self, subject: Subject, path: Path) -> Subject | None:
        """Fake quantization: floats that are rounded where the integers are."""
        if self._made is None or self._made.path != path:
            return None
        return Samples(self._made.network.running(self._reading(self._made.fake)))

    def prove(self, subject: Subject, path: Path, data: Any, effort: Effort, stage: Stage) -> dict[str, Any]:
        """Bit for bit against the interpreter, and the runtime's answers against the original's."""
        made = self._made if self._made is not None and self._made.path == path else None
        if made is not None:
            made.file.verify(some(data.evaluation, LITTLE).by_length().batches(LITTLE))
        with Session(path / FILE, FLOATS.target.name) as session:
            found = subject.measure_live(Asking(session), data, effort)
            said = {"name": FLOATS.target.name, "version": session.version, **found,
                    "memory": asdict(session.memory())}
            if made is None:
                return said
            again = Samples(made.network.running(self._reading(made.fake)))
            apart = again.measure_live(Asking(session), data, effort)
            error = _relative(session, made, data)
        moved = distance(found)
        # a distance d is a relative error of the root of 2 d
        bound = max(BOUND * looser(made.network), LIVELY * (2 * moved) ** 0.5)
        if not error <= bound:
            raise TargetError(f"{FILE}: integers answer {error:.3g} from fake quantization (relative), more "
                              f"than {bound:.3g}; this is a bug: report it")
        means = {key: value for key, value in apart.items() if key.endswith("_mean")}
        places = made.file.network.places()
        return {**said, "activations": f"integers of 8 bits, {ranges_said(places, made.ranges)}",
                "ranges": dict(zip(("trained", "calibrated"), places, strict=True)),
                "bits_differing": 0, "logit_error_vs_float": {**means, "relative_error": error,
                                                              "relative_error_allowed": bound}}

    def beside(self, subject: Subject, path: Path, data: Any, work: Path, effort: Effort, stage: Stage
               ) -> Beside:
        """The original as float32 in ONNX Runtime."""
        stage.line("the original as float32")
        floats = Traced(FLOATS, data)
        used = multiplied(self._prepared(self._network(subject.opened)).program)
        lowered = {site.path: "8-bit integers" if site.path in used else "left out"
                   for site in subject.opened.map.sites}
        return Beside(floats.timed(subject, path / FILE, data, work, effort), lowered=lowered)

    def how_to_run(self, out: Path) -> list[str]:
        return [FLOATS.opens(str(self.place(out) / FILE))]

    # ---- integers

    def _network(self, opened: Opened) -> Network:
        if isinstance(opened, Network):
            if is_recurrent(opened.module):
                raise TargetError(f"{opened.name}: recurrent layers have no form in integers alone; use "
                                  "--for torch or onnxruntime")
            return opened
        raise TargetError(f"{opened.name}: causal attention has no form in integers alone; CNNs and encoders "
                          "have one (for language models choose llama.cpp, onnxruntime or openvino)")

    def _prepared(self, network: Network) -> _Prepared:
        """Normalisations folded, and traced with attention as one operator."""
        if network not in self._held:
            assert self.shown_to is not None
            example, factors = example_of(self.shown_to), dict[str, Tensor]()
            module = network.module
            if any(isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) for part in module.modules()):
                folded = fold(module, *example.values())
                factors = {f"{layer}.weight": gains(module.get_submodule(norm))  # type: ignore[arg-type]
                           for layer, norm in folded.pairs}
                module = folded.module
            program = trace(module, example, (0, 1) if MASK in example else (0,), fused=True)
            self._held[network] = _Prepared(program, factors)
        return self._held[network]

    def _written(self, network: Network, trees: Mapping[str, Node], path: Path, method: str
                 ) -> tuple[IntegerFile, Fake]:
        assert self.shown_to is not None
        prepared = self._prepared(network)
        held = {site: tree if site not in prepared.factors else folded_rows(tree, prepared.factors[site])
                for site, tree in trees.items()}
        samples = self.shown_to.calibration if len(self.shown_to.calibration) else self.shown_to.evaluation
        batches = list(some(samples, RANGES).by_length().batches(BATCH))
        whole = compiled(prepared.program, held, batches, method, ranges=network.ranges)
        kept = {site: held[site] for site in multiplied(prepared.program)}
        return export_integer(whole, prepared.program, path), Fake(whole, prepared.program, kept)

    def _reading(self, fake: Fake) -> Reading:
        assert self.shown_to is not None
        return Reading(fake.answers, fake.program.key, example_of(self.shown_to))


def _relative(session: Session, made: _Made, data: Shown) -> float:
    """How far the runtime is from fake quantization on some samples, relative to the answers' norm."""
    apart, whole = 0.0, 0.0
    for batch in some(data.evaluation, 2 * BATCH).by_length().batches(BATCH):
        expected = made.fake.answers(batch)
        inputs = {TENSOR: next(iter(batch.values()))} if TENSOR in batch else batch
        apart += float((session.answer(inputs) - expected).square().sum())
        whole += float(expected.square().sum())
    return (apart / whole) ** 0.5 if whole else 0.0
