"""The targets onnxruntime and openvino: a network as a traced graph, with the codes of its trees in it.

Bytes of weights are foreseen by ``engines``, the rest by exporting a stand-in with other codes.

Where every input of a layer can be rounded to 8 bits as well, integers multiply faster than floats. That is
done when it moves answers on calibration samples by no more than the weights did, or by hardly anything.
Inputs that training rounded keep the ranges that it found; where they cannot, a warning says so. OpenVINO
rounds by itself for weights that are stored in few bits.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rarefy.core.errors import ModelError, TargetError
from rarefy.core.nodes import Node
from rarefy.core.nouns import Choice, Option, Step
from rarefy.export.onnx import Exported, OnnxSettings, export_onnx
from rarefy.export.pieces import Use, codes_like, grid_bytes, runs, uses_of
from rarefy.export.program import METHODS, Program, Values, trace
from rarefy.formats.onnx import Compute
from rarefy.measure.resources import bytes_on_disk
from rarefy.measure.task import Judge
from rarefy.models.form import MASK
from rarefy.models.map import Site
from rarefy.models.network import TENSOR, Network
from rarefy.models.recurrent import is_recurrent
from rarefy.numerics.grids import integer_grid_named
from rarefy.report.verdict import distance
from rarefy.run.effort import Effort
from rarefy.run.engines import INSIDE, Engine
from rarefy.run.progress import Stage
from rarefy.run.samples import Samples, Shown, some
from rarefy.run.subject import Subject
from rarefy.run.target import Beside, Destination, Opened
from rarefy.runtimes.bench import Timed, compare
from rarefy.runtimes.session import Session
from rarefy.runtimes.verify import ROUNDED, Agreement, verify

SMALL = 0.002     # KL or cosine distance that rounding activations may cost in any case
AGREEMENT = 0.02  # the same, between the runtime and our own reading of the file
BROKEN = 0.05     # the same, to the original, from where on last bits decide answers
CHOSEN, RANGES, BATCH = 256, 128, 32  # samples to choose by, samples to find ranges on, of them at once
SEED = 0
LINEAR = (Use("linear"),)


@dataclass(frozen=True, eq=False)
class _Made:
    """What this process exported last."""

    path: Path
    network: Network
    exported: Exported


class Traced:
    """Networks as graphs for one engine. shown: the examples of the job, without which nothing is traced."""

    def __init__(self, engine: Engine, shown: Shown | None = None) -> None:
        self.engine, self.target, self.shown_to = engine, engine.target, shown
        self._programs: WeakKeyDictionary[Network, Program] = WeakKeyDictionary()
        self._sizes: WeakKeyDictionary[Network, tuple[int, int]] = WeakKeyDictionary()
        self._made: _Made | None = None

    def ready(self) -> None:
        self.engine.ready()

    def accepts(self, subject: Subject) -> None:
        network = self._network(subject.opened)
        if network.form.takes == "text" and is_recurrent(network.module):
            raise TargetError(f"{network.name}: a graph has the steps of recurrent layers written out, for "
                              "one length, and texts have many; use --for torch")

    def given(self, subject: Subject, data: Any) -> Destination:
        assert isinstance(data, Shown)
        informed = Traced(self.engine, data)
        informed._program(self._network(subject.opened))
        return informed

    # ---- formats

    def choices(self, opened: Opened, site: Site) -> dict[str, Choice]:
        """For linear layers no floats: 8 bits lose next to nothing, and multiply in half the time."""
        uses = self._uses(opened, site)
        found = self.engine.choices(site, uses)
        if uses != LINEAR or "int8" not in found:
            return found
        return {name: each for name, each in found.items() if not isinstance(each.stored, torch.dtype)}

    def held(self, opened: Opened, site: Site, option: Option) -> Option | None:
        return self.engine.held(site, self._uses(opened, site), option)

    def untouched(self, opened: Opened, site: Site) -> Option:
        return self.engine.untouched(site, self._uses(opened, site))

    def asked(self, opened: Opened, site: Site, steps: Sequence[Step]) -> Option:
        return self.engine.asked(site, self._uses(opened, site), steps)

    def shown(self, option: Option, tree: Node | None) -> Option:
        if tree is None or self._made is None:
            return option
        site, network = self._made.network.map.by_path[option.site], self._made.network
        return self.engine.shown(site, self._uses(network, site), option, tree)

    # ---- sizes

    def fixed_bytes(self, opened: Opened) -> int:
        """The graph, what no technique rewrites, and other files; without the graph before examples are
        known."""
        network = self._network(opened)
        if self.shown_to is None:
            return 4 * sum(prod(param.shape) for param in network.map.params) + beside_bytes(network)
        return self._measured(network)[0]

    def original_bytes(self, opened: Opened) -> int:
        """The export with every weight in float32."""
        network = self._network(opened)
        if self.shown_to is None:
            return self.fixed_bytes(network) + 4 * sum(prod(site.shape) for site in network.map.sites)
        return self._measured(network)[1]

    def least_bytes(self, opened: Opened, site: Site) -> int:
        """Not known: low rank may go below every format."""
        return 0

    def _measured(self, network: Network) -> tuple[int, int]:
        """Fixed bytes and those of the original, of files that are written to see."""
        if network not in self._sizes:
            generator, grid = torch.Generator().manual_seed(SEED), integer_grid_named("int8")
            assert grid is not None
            sites, contrib = network.map.sites, self.engine.contrib
            stand_in = {site.path: codes_like(site, grid, generator) for site in sites}
            own = sum(grid_bytes(site, grid, self._uses(network, site), contrib=contrib) for site in sites)
            with tempfile.TemporaryDirectory() as folder:
                place = Path(folder)
                rounded = OnnxSettings(self._computes(network)[0])
                self._write(network, stand_in, place / "small", rounded)
                self._write(network, {}, place / "original", OnnxSettings())
                small, original = bytes_on_disk(place / "small"), bytes_on_disk(place / "original")
            beside = beside_bytes(network)
            self._sizes[network] = max(small - own, 0) + beside, original + beside
        return self._sizes[network]

    # ---- the export

    def place(self, folder: Path) -> Path:
        return folder / INSIDE

    def export(self, opened: Opened, trees: Mapping[str, Node], plan: Mapping[str, Any], path: Path
               ) -> None:
        network = self._network(opened)
        held = {site: trees[site] for site in plan if site in trees}
        if path.exists():
            shutil.rmtree(path)
        done = self._write(network, held, path, self._settings(network, held))
        write_beside(network, path)
        self._made = _Made(path, network, done)
        if done.notes:
            warnings.warn(f"{self.target.name} has no form as small for {len(done.notes)} weights: "
                          f"{done.notes[0]}", stacklevel=1)
        unused = _unused(network, done)
        if unused:
            how = "rounded as they come" if done.settings.compute == "dynamic" else "floats"
            warnings.warn(f"{self.target.name}: {len(unused)} of {len(network.ranges)} inputs that training "
                          f"rounded are {how} here, {unused[0]} first: ranges that stand go with 8-bit "
                          "weights, where rounding so moves answers little", stacklevel=1)

    def reopened(self, subject: Subject, path: Path) -> Subject | None:
        """What the file computes, by our own evaluation of what went into it."""
        if self._made is None or self._made.path != path:
            return None
        return Samples(self._made.network.running(self._reading(self._made.exported)))

    def prove(self, subject: Subject, path: Path, data: Any, effort: Effort, stage: Stage) -> dict[str, Any]:
        """As the runtime computes by itself against the original, and as exactly as it can against us."""
        file, engine = path / self.engine.file, self.target.name
        with Session(file, engine, exact=False) as session:
            found = subject.measure_live(Asking(session), data, effort)
            said = {"name": engine, "version": session.version, **found, "memory": asdict(session.memory())}
        again = self.reopened(subject, path)
        if again is None or self._made is None:
            return said
        done = self._made.exported
        batches = list(some(data.evaluation, 2 * BATCH).by_length().batches(BATCH))
        # rounding flips last bits, and later layers amplify them, though not beyond what rounding itself does
        # (a distance d is a relative error of the root of 2 d); in a network that compression broke, beyond
        moved, rounds = distance(found), done.settings.compute != "float"
        least = ROUNDED * looser(self._made.network)
        flipped = float("inf") if moved > BROKEN else max(least, 2 * (2 * moved) ** 0.5)
        agreed = verify(done, batches, engine=engine, tolerance=flipped if rounds else None)
        with Session(file, engine) as session:
            apart = again.measure_live(Asking(session), data, effort)
        drift = distance(apart)
        if not drift <= max(AGREEMENT, 0.5 * moved):
            raise TargetError(f"{file.name}: {engine} computes something else than the file says "
                              f"({drift:.3g} apart); this is a bug of the export: report it")
        means = {key: value for key, value in apart.items() if key.endswith("_mean")}
        return {**said, **_activations(done),
                "logit_error_vs_float": {**means, "relative_error": agreed.error,
                                         "relative_error_allowed": agreed.bound}}

    def check(self, path: Path) -> Agreement:
        """What was just exported, in its runtime, against our own evaluation of calibration samples;
        TargetError when they are too far apart."""
        assert self._made is not None and self._made.path == path and self.shown_to is not None
        network, done = self._made.network, self._made.exported
        samples = replace(some(self.shown_to.calibration, CHOSEN), labels=None)
        tolerance = None
        if done.settings.compute != "float":  # what rounding activations does, last bits may undo
            moved = Judge(network, samples).compare(network.running(self._reading(done))).mean
            tolerance = max(ROUNDED * looser(network), 2 * (2 * moved) ** 0.5)
        return verify(done, samples.by_length().batches(BATCH), engine=self.target.name, tolerance=tolerance)

    def beside(self, subject: Subject, path: Path, data: Any, work: Path, effort: Effort, stage: Stage
               ) -> Beside:
        stage.line("the original as float32")
        return Beside(self.timed(subject, path / self.engine.file, data, work, effort),
                      lowered=self._lowered())

    def timed(self, subject: Subject, file: Path, data: Shown, work: Path, effort: Effort) -> dict[str, Any]:
        """The speed of a file beside the original as float32 in the same runtime."""
        original = self.original(subject, work / "original")[0]
        length = _length(data)
        rows = compare([original, file], length=length, visits=1 + 2 * effort.repeats)
        shutil.rmtree(original.parent)
        return {**_speed(*rows), "tokens": length}

    def original(self, subject: Subject, folder: Path) -> list[Path]:
        """The uncompressed network as float32: for this runtime, and as a program for PyTorch."""
        network = self._network(subject.opened)
        self._write(network, {}, folder, OnnxSettings(contrib=self.engine.contrib))
        torch.export.save(self._program(network).exported, folder / "original.pt2")
        return [folder / self.engine.file, folder / "original.pt2"]

    def how_to_run(self, out: Path) -> list[str]:
        return [self.engine.opens(str(self.place(out) / self.engine.file))]

    # ---- graphs

    def _network(self, opened: Opened) -> Network:
        if isinstance(opened, Network):
            return opened
        raise TargetError(f"{opened.name}: a causal language model, which is traced with its cache")

    def _computes(self, network: Network) -> tuple[Compute, ...]:
        """How activations could be rounded, as they were in training or else the fastest first."""
        if not self.engine.contrib:
            return ("static",)
        if network.ranges:
            return ("static", "dynamic")
        return ("static", "dynamic") if any(s.kernel for s in network.map.sites) else ("dynamic",)

    def _uses(self, opened: Opened, site: Site) -> tuple[Use, ...]:
        return uses_of(self._network(opened).users(site.path))

    def _example(self) -> dict[str, Tensor]:
        assert self.shown_to is not None
        return example_of(self.shown_to)

    def _reading(self, exported: Exported) -> Reading:
        return Reading(exported.expected, exported.program.key, self._example())

    def _program(self, network: Network) -> Program:
        if network not in self._programs:
            example = self._example()
            self._programs[network] = trace(network.module, example, (0, 1) if MASK in example else (0,))
        return self._programs[network]

    def _write(self, network: Network, trees: Mapping[str, Node], folder: Path, settings: OnnxSettings, *,
               write: Callable[..., Exported] | None = None) -> Exported:
        folder.mkdir(parents=True, exist_ok=True)
        ranges: list[dict[str, Tensor]] = []
        if settings.compute != "float" and self.shown_to is not None:
            ranges = list(some(self.shown_to.calibration, RANGES).by_length().batches(BATCH))
        return (write or self.engine.write)(
            network.module, trees, folder / self.engine.file, inputs=self._example(), settings=settings,
            calibration=ranges, program=self._program(network), ranges=network.ranges)

    def _settings(self, network: Network, trees: Mapping[str, Node]) -> OnnxSettings:
        """How the file computes: in integers where that costs little, decided on calibration samples."""
        assert self.shown_to is not None
        plain = OnnxSettings(contrib=self.engine.contrib)
        with network.as_trained():
            judge = Judge(network, replace(some(self.shown_to.calibration, CHOSEN), labels=None))
            moved = judge.compare(network, trees.get).mean
        with tempfile.TemporaryDirectory() as folder:
            for compute in self._computes(network):
                tried = []
                for method in METHODS if compute == "static" else METHODS[:1]:
                    settings = replace(plain, compute=compute, ranges=method)
                    done = self._write(network, trees, Path(folder), settings, write=export_onnx)
                    if not done.plan.operators:
                        break
                    reading = network.running(self._reading(done))
                    tried.append((judge.compare(reading).mean, METHODS.index(method), settings))
                if tried and min(tried)[0] - moved <= max(moved, SMALL):
                    return min(tried)[2]
        return plain

    def _lowered(self) -> dict[str, str]:
        if self._made is None:
            return {}
        network, done = self._made.network, self._made.exported
        return {site.path: runs(done, site, self._uses(network, site), contrib=self.engine.contrib)
                for site in network.map.sites}


class Reading(nn.Module):
    """What an exported file should answer, by our own evaluation. key: what the network calls its answer;
    example: inputs in the file's order."""

    def __init__(self, answers: Callable[[Values], Tensor], key: str, example: Values) -> None:
        super().__init__()
        self.answers, self.key, self.names = answers, key, tuple(example)

    def forward(self, *args: Tensor, **named: Tensor) -> Any:
        given = {TENSOR: args[0]} if args else {name: named[name] for name in self.names}
        return as_given(self.key, self.answers(given))


class Asking(nn.Module):
    """A network that runs elsewhere."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def forward(self, *args: Tensor, **named: Tensor) -> Any:
        found = self.session.run({TENSOR: args[0]} if args else named)
        name, values = next(iter(found.items()))
        return as_given(name, torch.from_numpy(values.copy()))


def as_given(key: str, values: Tensor) -> Any:
    """An answer as the network itself gives it."""
    return values if key == "output" else {key: values}


def _activations(done: Exported) -> dict[str, Any]:
    """How a receipt says it."""
    match done.settings.compute:
        case "float":
            return {"activations": "floats"}
        case "dynamic":
            return {"activations": "8 bits, a scale for every token"}
        case "static":
            return {"activations": f"8 bits, {ranges_said(done.places, done.settings.ranges)}",
                    "ranges": dict(zip(("trained", "calibrated"), done.places, strict=True))}


def ranges_said(places: tuple[int, int], method: str) -> str:
    """Where ranges are from. places: how many training found, and how many calibration did by ``method``."""
    trained, calibrated = places
    said = f"calibrated ranges ({method})"
    return f"ranges of training in {trained} places, {said} in {calibrated}" if trained else said


def looser(network: Network) -> float:
    """How much further a last bit may lead, behind layers that were trained on codes of few bits: a code of b
    bits is 2^(8 - b) times as wide as one of 8, and its edge as many times as rarely met."""
    return max((2 ** ((8 - span.bits) / 2) for span in network.ranges.values()), default=1.0)


def _unused(network: Network, done: Exported) -> list[str]:
    """Layers whose inputs training rounded, and the file does not as it did."""
    reads = done.program.reads
    kept = {done.program.sites[reads[name]].layer for name in done.trained}
    return [layer for layer in network.ranges if layer not in kept]


def example_of(shown: Shown) -> dict[str, Tensor]:
    """Two of the longest samples."""
    ordered = (shown.calibration if len(shown.calibration) else shown.evaluation).by_length()
    last = torch.arange(max(0, len(ordered) - 2), len(ordered))
    return next(ordered.select(last).batches(2))


def _length(data: Shown) -> int:
    """Tokens of a typical text."""
    mask = data.evaluation.inputs.get(MASK)
    return 64 if mask is None else max(1, round(float(mask.sum(1).float().mean())))


def _speed(original: Timed, compressed: Timed) -> dict[str, Any]:
    """Samples per second one at a time and eight at once, with the latencies that they are from."""
    said: dict[str, Any] = {"drift": max(original.spread.values()), "ratio_single": compressed.ratio[1],
                            "ratio_batch": compressed.ratio[8], "spread_single": compressed.spread[1],
                            "spread_batch": compressed.spread[8]}
    for name, row in (("original", original), ("compressed", compressed)):
        said[name] = {"single": 1000 / row.latency[1].median, "batch": 8000 / row.latency[8].median,
                      "load_seconds": row.load,
                      "latency_ms": {str(batch): asdict(found) for batch, found in row.latency.items()}}
        said[f"memory_{name}"] = {"peak": row.peak}
    return said


# ---- what lies beside the graph


def write_beside(network: Network, folder: Path) -> None:
    """The tokenizer of a text encoder, and how images are prepared."""
    folder.mkdir(parents=True, exist_ok=True)
    if network.form.takes == "text":
        with suppress(ModelError):  # shown tokens in memory, it may have none
            network.tokenizer.save_pretrained(folder)
    for path in network.files:
        shutil.copyfile(path, folder / path.name)


_BESIDE: WeakKeyDictionary[Network, int] = WeakKeyDictionary()


def beside_bytes(network: Network) -> int:
    """What that takes."""
    if network not in _BESIDE:
        with tempfile.TemporaryDirectory() as folder:
            write_beside(network, Path(folder))
            _BESIDE[network] = bytes_on_disk(Path(folder))
    return _BESIDE[network]
