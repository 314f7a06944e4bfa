"""The targets onnxruntime and openvino for language models: a graph with its cache, and the codes in it.

The proof reads windows in pieces, so that keys and values pass through the cache on the way, in a process
that has nothing of the model but the file. Speed is that of the runtime beside the original as float32
there: reading a prompt, and writing token by token.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from rarefy.core.errors import TargetError
from rarefy.core.nodes import Dense, Node
from rarefy.core.nouns import Choice, Option, Step
from rarefy.export.decoder import Decoder, export_decoder, trace_decoder
from rarefy.export.native import TreeSource
from rarefy.export.onnx import Exported, OnnxSettings
from rarefy.export.pieces import OPERATOR, Use
from rarefy.measure.divergence import log_probs
from rarefy.measure.resources import bytes_on_disk
from rarefy.models.map import Site
from rarefy.models.model import Model
from rarefy.models.runner import Runner
from rarefy.report.verdict import distance
from rarefy.run.effort import Effort
from rarefy.run.engines import INSIDE, Engine, Uses
from rarefy.run.language import DECODE, PREFILL, Language
from rarefy.run.progress import Stage
from rarefy.run.proof import PROMPTS, WORDS
from rarefy.run.subject import Subject
from rarefy.run.target import Beside, Destination, Opened
from rarefy.runtimes.bench import compare_writers
from rarefy.runtimes.session import Session
from rarefy.runtimes.verify import FLOAT, ROUNDED, Agreement

AGREEMENT = 0.02  # KL between the runtime and our own reading of the file
PIECE = 128       # tokens that are read at once in a proof
ACCURACY = 4      # of ONNX Runtime's products with codes: activations may be rounded to 8 bits, in blocks


@dataclass(frozen=True, eq=False)
class _Made:
    """What this process exported last, and the model that it is."""

    path: Path
    exported: Exported
    model: Model


class Writing:
    """Language models as graphs for one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.target = engine, engine.target
        self._decoders: WeakKeyDictionary[Model, Decoder] = WeakKeyDictionary()
        self._made: _Made | None = None

    def ready(self) -> None:
        self.engine.ready()

    def accepts(self, subject: Subject) -> None:
        _model(subject.opened)

    def given(self, subject: Subject, data: Any) -> Destination:
        return self

    # ---- formats

    def choices(self, opened: Opened, site: Site) -> dict[str, Choice]:
        return self.engine.choices(site, _uses(opened, site))

    def held(self, opened: Opened, site: Site, option: Option) -> Option | None:
        return self.engine.held(site, _uses(opened, site), option)

    def untouched(self, opened: Opened, site: Site) -> Option:
        return self.engine.untouched(site, _uses(opened, site))

    def asked(self, opened: Opened, site: Site, steps: Sequence[Step]) -> Option:
        return self.engine.asked(site, _uses(opened, site), steps)

    def shown(self, option: Option, tree: Node | None) -> Option:
        if tree is None or self._made is None:
            return option
        site = self._made.model.map.by_path[option.site]
        return self.engine.shown(site, _uses(self._made.model, site), option, tree)

    # ---- sizes

    def fixed_bytes(self, opened: Opened) -> int:
        """Operators, norms and the tokenizer."""
        model = _model(opened)
        program = self._decoder(model).program
        graph = program.proto.graph
        held = [each for each in graph.initializer if each.raw_data]  # weights are not in it
        numbers = sum(each.ByteSize() for each in held)
        if self.engine.contrib:
            return numbers + sum(_bare(node) for node in graph.node) + _beside(model)
        return numbers + OPERATOR * (len(graph.node) + len(held)) + _beside(model)

    def original_bytes(self, opened: Opened) -> int:
        """Every weight as float32."""
        return self.fixed_bytes(opened) + sum(self.untouched(opened, site).bytes
                                              for site in opened.map.sites)

    def least_bytes(self, opened: Opened, site: Site) -> int:
        """Not known: low rank may go below every format."""
        return 0

    # ---- the export

    def place(self, folder: Path) -> Path:
        return folder / INSIDE

    def export(self, opened: Opened, trees: Mapping[str, Node], plan: Mapping[str, Any], path: Path) -> None:
        model = _model(opened)
        if path.exists():
            shutil.rmtree(path)
        held = {site: trees[site] for site in plan if site in trees}
        done = self._write(model, held, path, OnnxSettings(accuracy=ACCURACY, contrib=self.engine.contrib))
        self._made = _Made(path, done, _holding(model, held, path))
        if done.notes:
            warnings.warn(f"{self.target.name} has no form as small for {len(done.notes)} weights: "
                          f"{done.notes[0]}", stacklevel=1)

    def reopened(self, subject: Subject, path: Path) -> Subject | None:
        """The model that the codes in the file are, as this process wrote them."""
        if self._made is None or self._made.path != path:
            return None
        return Language(self._made.model)

    @torch.no_grad()
    def prove(self, subject: Subject, path: Path, data: Any, effort: Effort, stage: Stage) -> dict[str, Any]:
        """As the runtime computes by itself against the original, and as exactly as it can against us."""
        file, engine = path / self.engine.file, self.target.name
        with Session(file, engine, exact=False) as session:
            found = subject.measure_live(Reading(session), data, effort)
            said = {"name": engine, "version": session.version, **found, "memory": asdict(session.memory())}
        again = self.reopened(subject, path)
        if again is None:
            return said
        with Session(file, engine) as session:
            apart = again.measure_live(Reading(session), data, effort)
            agreed = self._agreed(_model(again.opened), session, data.evaluation[:1], broken=distance(found))
        drift = distance(apart)
        if not drift <= max(AGREEMENT, 0.5 * distance(found)):
            raise TargetError(f"{file.name}: {engine} computes something else than the file says "
                              f"({drift:.3g} apart); this is a bug of the export: report it")
        return {**said, "activations": "8 bits in blocks" if self.engine.contrib else "8 bits, as they come",
                "logit_error_vs_float": {"kl_mean": drift, "relative_error": agreed.error,
                                         "relative_error_allowed": agreed.bound}}

    def _agreed(self, model: Model, session: Session, window: Tensor, broken: float) -> Agreement:
        """Log-probabilities of a window, ours and the runtime's, through its cache."""
        places = torch.arange(0, window.shape[1], 8)
        found = session.read(window, places.tolist(), cuts(window.shape[1])).log_softmax(-1)
        bound = ROUNDED if self.engine.contrib else FLOAT
        agreed = Agreement.of(found[None], log_probs(Runner(model), window, places)[0][None], bound,
                              session.version)
        return agreed if broken > AGREEMENT else agreed.check(session.path)

    @torch.no_grad()
    def check(self, path: Path) -> Agreement:
        """What was just exported, in its runtime, against our own evaluation of a few tokens; TargetError
        when they are too far apart."""
        assert self._made is not None and self._made.path == path
        model = self._made.model
        window = torch.arange(5, 69)[None] % model.map.head.shape[0]
        with Session(path / self.engine.file, self.target.name) as session:
            return self._agreed(model, session, window, broken=0)

    def beside(self, subject: Subject, path: Path, data: Any, work: Path, effort: Effort, stage: Stage
               ) -> Beside:
        """The original as float32 in the same runtime."""
        model = _model(subject.opened)
        stage.line("the original as float32")
        original = self.original(subject, work / "original")[0]
        files = [original, path / self.engine.file]
        rows = compare_writers(files, prompt=PREFILL, count=DECODE, visits=1 + 2 * effort.repeats)
        told = _completions(model, files, self.target.name)
        shutil.rmtree(original.parent)
        first, second = rows
        speed = {"original": {"prefill": first.prefill, "decode": first.decode},
                 "compressed": {"prefill": second.prefill, "decode": second.decode},
                 "ratio_prefill": second.ratio["prefill"], "ratio_decode": second.ratio["decode"],
                 "spread_prefill": second.spread["prefill"], "spread_decode": second.spread["decode"],
                 "drift": max(first.spread.values()), "memory_original": asdict(first.memory),
                 "memory_compressed": asdict(second.memory)}
        return Beside(speed, told)

    def original(self, subject: Subject, folder: Path) -> list[Path]:
        """The uncompressed model as float32 for this runtime. (PyTorch runs what it was opened from.)"""
        model = _model(subject.opened)
        self._write(model, {}, folder, OnnxSettings(contrib=self.engine.contrib))
        return [folder / self.engine.file]

    def how_to_run(self, out: Path) -> list[str]:
        return [self.engine.opens(str(self.place(out) / self.engine.file))]

    # ---- graphs

    def _decoder(self, model: Model) -> Decoder:
        if model not in self._decoders:
            self._decoders[model] = trace_decoder(Language(model).live())
        return self._decoders[model]

    def _write(self, model: Model, trees: Mapping[str, Node], folder: Path, settings: OnnxSettings
               ) -> Exported:
        folder.mkdir(parents=True, exist_ok=True)
        done = export_decoder(self._decoder(model), trees, folder / self.engine.file, settings=settings)
        model.tokenizer.save_pretrained(folder)
        model.config.save_pretrained(folder)
        return done


class Reading(nn.Module):
    """A language model that runs elsewhere: its logits at the positions that are asked for."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor, use_cache: bool = False) -> CausalLMOutput:
        """Of one text. The runtime reads it in pieces, through its cache; ``use_cache`` is for others."""
        del use_cache
        found = self.session.read(input_ids, logits_to_keep.tolist(), cuts(input_ids.shape[1]))
        return CausalLMOutput(logits=found[None])


def cuts(length: int) -> list[int]:
    """Where a text is cut: pieces that need no large table of logits, and one of a single token."""
    return [*range(PIECE, length, PIECE), length - 1]


def _completions(model: Model, files: Sequence[Path], engine: str) -> list[dict[str, str]]:
    """Greedy continuations, by original and export."""
    found = []
    with ExitStack() as stack:
        sessions = [stack.enter_context(Session(file, engine, exact=False)) for file in files]
        for prompt in PROMPTS:
            tokens = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
            told = [model.tokenizer.decode(_until_end(model, each.write(tokens, WORDS).tokens))
                    for each in sessions]
            found.append({"prompt": prompt, "original": told[0], "compressed": told[1]})
    return found


def _until_end(model: Model, tokens: Sequence[int]) -> list[int]:
    end = model.tokenizer.eos_token_id
    return list(tokens[: tokens.index(end)] if end in tokens else tokens)


def _model(opened: Opened) -> Model:
    if isinstance(opened, Model):
        return opened
    raise TargetError(f"{opened.name}: not a language model")


def _uses(opened: Opened, site: Site) -> Uses:
    if site.role != "embed":
        return (Use("linear"),)
    return (Use("Gather"), Use("linear")) if opened.map.tied else (Use("Gather"),)


def _holding(model: Model, trees: Mapping[str, Node], path: Path) -> Model:
    """The model with trees in the place of its weights."""
    params = {param.path: model.param(param.path) for param in model.map.params}
    whole: dict[str, Node] = {}
    for site in model.map.sites:
        whole[site.path] = trees[site.path] if site.path in trees else Dense(model.weight(site.path))
    flipped = {site.path: site for site in model.map.sites if site.transposed}
    source = TreeSource(path, whole, params, flipped)
    return Model(model.name, model.map.family, model.config, source, lambda: model.tokenizer)


def _bare(node: Any) -> int:
    """Bytes of an operator without what the exporter notes on it."""
    return int(node.ByteSize() - sum(each.ByteSize() + 2 for each in node.metadata_props))


_BESIDE: WeakKeyDictionary[Model, int] = WeakKeyDictionary()


def _beside(model: Model) -> int:
    """Bytes of the tokenizer and the configuration."""
    if model not in _BESIDE:
        with tempfile.TemporaryDirectory() as folder:
            model.tokenizer.save_pretrained(folder)
            model.config.save_pretrained(folder)
            _BESIDE[model] = bytes_on_disk(Path(folder))
    return _BESIDE[model]
