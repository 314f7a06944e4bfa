"""Run a classifier with exits: every sample leaves behind the first block that is sure of its answer.

    exits = trained(network, examples, after=(1, 3))       heads that learnt, see ``exit_training``
    exits = exits.calibrated(EarlyExit(max_loss=0.01), others)
    logits, blocks = exits(inputs)                          blocks: how many each sample went through
    save(exits, folder)                                     beside the network in a native folder
    network = rarefy.load(folder)                           a module that leaves early

Samples that left are taken out of the batch, and padding that only they needed with them, so blocks compute
less. The network itself is not changed. An encoder's blocks are called one by one with what it hands to them,
and what stands behind the last block sees the samples that came that far (``Stepped``); a CNN or another
plain network is cut where one tensor carries everything (``runtimes.segments``).

The heads lie in ``exits.safetensors`` beside the weights; its header says where they stand, the rule and its
threshold, and the hash of the weights that they were trained on.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import ModelOutput

from rarefy.calibration.examples import Examples
from rarefy.core.errors import ModelError, RecipeError
from rarefy.core.structure import ExitAnswers, ExitRule
from rarefy.export.networks import EXITS, native_folder, opened, stored_trees
from rarefy.formats.native import TREE
from rarefy.measure.latency import Clock
from rarefy.models.form import MASK
from rarefy.models.hooks import hooked
from rarefy.models.network import TENSOR, Network, call
from rarefy.runtimes.segments import Behind, Cut, Segments
from rarefy.runtimes.torch import attach
from rarefy.techniques.depth.early_exit import EarlyExit

BATCH = 64
TIMED = 256  # samples that are timed
CHOSEN = (0.25, 0.5, 0.75)  # shares of the work behind which exits stand where nobody says


class Staged(Protocol):
    """A network block by block: what ``Stepped`` makes of an encoder, ``Segments`` of a plain network.

    names: the module behind which each block ends. work: the share of all work that is done there.
    """

    network: Network
    blocks: list[nn.Module]
    names: tuple[str, ...]
    work: tuple[float, ...]

    def run(self, inputs: Mapping[str, Tensor], after: Sequence[int], behind: Behind) -> Tensor | None:
        """The answer to the samples that come to the end; None where none does.

        behind: called with the place in ``after`` and what a head reads there, [samples, numbers]; it says
        which samples go on (None: all).
        """

    def taught(self, student: Callable[[Mapping[str, Tensor]], Any], inputs: Mapping[str, Tensor],
               after: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """The answer of a student of the network, and what heads read of its states."""

    def units(self, numbers: int) -> int:
        """Hidden units of a head that reads so many numbers."""


class _Reached(Exception):
    """The first block is to be called: with this."""

    def __init__(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.hidden, self.args_, self.kwargs = hidden, args, kwargs


class _Door(nn.Module):
    """Stands where the blocks stood: on the way in it ends the pass, on the way out it hands on ``state``."""

    state: Any = None

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.state is None:
            raise _Reached(hidden, args, kwargs)
        return self.state


class Stepped:
    """An encoder block by block: ``enter``, ``block``, ``leave``. Weights are the network's own."""

    def __init__(self, network: Network) -> None:
        self.network = network
        whole, total = network.module, getattr(network.config, "num_hidden_layers", -1)
        lists = [part for part in whole.modules() if isinstance(part, nn.ModuleList)
                 and len(part) in (total, getattr(network.config, "num_hidden_groups", total))]
        if not lists:
            raise ModelError(f"{network.name}: its blocks are no list, so nothing can leave between them")
        members = list(lists[0])
        self.blocks = [members[block * len(members) // total] for block in range(total)]
        known = {id(part): name for name, part in whole.named_modules()}
        self.names = tuple(known[id(each)] for each in self.blocks)
        self.work = tuple((block + 1) / total for block in range(total))
        self._door = _Door()
        kept: dict[int, Any] = {id(each): each for each in (*whole.parameters(), *whole.buffers())}
        kept[id(lists[0])] = nn.ModuleList([self._door] * len(members))
        self._shell = copy.deepcopy(whole, kept)  # everything but the blocks; no number is copied
        self._tuple = False

    def enter(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """What the first block is called with."""
        self._door.state = None
        try:
            call(self._shell, inputs, {})
        except _Reached as reached:
            return reached.hidden, reached.args_, reached.kwargs
        raise ModelError(f"{self.network.name}: its blocks were not called")

    def block(self, index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """One block."""
        out = self.blocks[index](hidden, *args, **kwargs)
        self._tuple = isinstance(out, tuple)
        state: Tensor = out[0] if isinstance(out, tuple) else out
        return state

    def leave(self, hidden: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """The network's answer to samples that have passed all blocks."""
        self._door.state = (hidden,) if self._tuple else hidden
        try:
            return self.network.form.answer(call(self._shell, inputs, {}), inputs)
        finally:
            self._door.state = None

    def run(self, inputs: Mapping[str, Tensor], after: Sequence[int], behind: Behind) -> Tensor | None:
        """As ``Staged`` says."""
        hidden, args, kwargs = self.enter(inputs)
        for block in range(len(self.blocks)):
            hidden = self.block(block, hidden, args, kwargs)
            if block not in after:
                continue
            stay = behind(after.index(block), features(hidden, inputs.get(MASK)))
            if stay is not None and not len(stay):
                return None
            if stay is not None:
                inputs, hidden, args, kwargs = _shrunk(stay, inputs, hidden, args, kwargs)
        return self.leave(hidden, inputs)

    def taught(self, student: Callable[[Mapping[str, Tensor]], Any], inputs: Mapping[str, Tensor],
               after: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """As ``Staged`` says."""
        states: list[Tensor] = []  # behind each block, in the order of the calls: blocks may be one module

        def look(part: nn.Module, args: Any, out: Any) -> None:
            states.append(out[0] if isinstance(out, tuple) else out)

        with hooked((block, look) for block in dict.fromkeys(self.blocks)):
            answer = self.network.form.answer(student(inputs), inputs)
        return answer, [features(states[block], inputs.get(MASK)) for block in after]

    def units(self, numbers: int) -> int:
        """As many as the states are wide."""
        return numbers // 2


def staged(network: Network, inputs: Mapping[str, Tensor]) -> Staged:
    """A network block by block. inputs: samples on which one without a list of blocks is watched."""
    return Stepped(network) if network.form.takes == "text" else Segments.of(network, inputs)


class Heads(nn.Module):
    """A head for each exit: one hidden layer, logits. reads, units: how many numbers each reads and makes of
    them."""

    def __init__(self, reads: Sequence[int], units: Sequence[int], classes: int) -> None:
        super().__init__()
        self.inside = nn.ModuleList([nn.Linear(*each) for each in zip(reads, units, strict=True)])
        self.last = nn.ModuleList([nn.Linear(each, classes) for each in units])

    def forward(self, place: int, features: Float[Tensor, "samples numbers"]
                ) -> Float[Tensor, "samples classes"]:
        logits: Tensor = self.last[place](torch.tanh(self.inside[place](features)))
        return logits


def features(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """What a head reads of the states of the tokens: the first, and the mean of those that are real."""
    real = hidden.new_ones(hidden.shape[:2]) if mask is None else mask.to(hidden.dtype)
    mean = (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp_min(1)
    return torch.cat([hidden[:, 0], mean], -1)


@dataclass(frozen=True, eq=False)
class Exits:
    """A classifier with exits. after: behind which blocks (from 0) they stand. rule: when samples leave."""

    stepped: Staged
    after: tuple[int, ...]
    heads: Heads
    technique: EarlyExit = field(default_factory=EarlyExit)
    rule: ExitRule = field(default_factory=lambda: ExitRule(float("inf"), 0.0, 0.0))

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor], threshold: float | None = None
                 ) -> tuple[Float[Tensor, "samples classes"], Int64[Tensor, " samples"]]:
        """Logits, and through how many blocks each sample went. threshold: another than the rule's."""
        limit = self.rule.threshold if threshold is None else threshold
        alive = torch.arange(len(next(iter(inputs.values()))))
        depth, said = torch.full((len(alive),), len(self.stepped.blocks)), list[Tensor]()
        left: list[tuple[Tensor, Tensor]] = []  # samples and their answers

        def behind(place: int, read: Tensor) -> Tensor | None:
            nonlocal alive, said
            said.append(self.heads(place, read))
            sure = self.technique.certainty(torch.stack(said), len(self.after) + 1) >= limit
            go, stay = sure.nonzero()[:, 0], (~sure).nonzero()[:, 0]
            if not len(go):
                return None
            left.append((alive[go], said[-1][go]))
            depth[alive[go]] = self.after[place] + 1
            alive, said = alive[stay], [each[stay] for each in said]
            return stay

        logits = self.stepped.run(inputs, self.after, behind)
        if logits is not None:
            left.append((alive, logits))
        samples, answers = (torch.cat(parts) for parts in zip(*left, strict=True))
        return answers[samples.argsort()], depth

    @torch.no_grad()
    def answers(self, examples: Examples) -> ExitAnswers:
        """What every exit and the network say of all samples."""
        parts = []
        for inputs in examples.batches(BATCH):
            caught, logits = read(self.stepped, self.after, inputs)
            parts.append(torch.stack([*(self.heads(k, each) for k, each in enumerate(caught)), logits]))
        return ExitAnswers(torch.cat(parts, 1), examples.labels)

    def calibrated(self, technique: EarlyExit, examples: Examples) -> Exits:
        """The same with a threshold that samples the heads were not trained on vouch for."""
        return replace(self, technique=technique, rule=technique.calibrated(self.answers(examples)))


@dataclass
class Answer(ModelOutput):  # type: ignore[misc]  # transformers has no types
    """What a network with exits answers: logits [samples, classes]; through how many blocks each went."""

    logits: Tensor | None = None
    blocks: Tensor | None = None


class Early(nn.Module):
    """A network with exits as a module, called like the network it was made of."""

    def __init__(self, exits: Exits) -> None:
        super().__init__()
        self.exits, self.config = exits, exits.stepped.network.config
        self.network, self.heads = exits.stepped.network.module, exits.heads
        self.lowered: dict[str, str] = {}

    def forward(self, values: Tensor | None = None, /, *, threshold: float | None = None, **inputs: Tensor
                ) -> Answer:
        """values: where the network takes one tensor. threshold: of certainty; another than the one that was
        calibrated."""
        given = {} if values is None else {TENSOR: values}
        logits, blocks = self.exits({**given, **inputs}, threshold)
        return Answer(logits=logits, blocks=blocks)


def places(stepped: Staged, after: Sequence[int]) -> tuple[int, ...]:
    """Where exits may stand, or RecipeError. after: nothing: evenly over the work."""
    classifier(stepped.network)
    network, free = stepped.network, len(stepped.blocks) - 1
    if not free:
        raise ModelError(f"{network.name}: has one block, and no exit can stand in front of its end")
    if not after:
        return tuple(sorted({min(range(free), key=lambda block: abs(stepped.work[block] - share))
                             for share in CHOSEN}))
    if list(after) != sorted(set(after)) or not 0 <= after[0] <= after[-1] < free:
        known = ", ".join(f"{block} {name}" for block, name in enumerate(stepped.names[:free]))
        raise RecipeError(f"exits after {list(after)}: choose rising numbers of blocks from 0 to {free - 1} "
                          f"({known})")
    return tuple(after)


def classifier(network: Network) -> None:
    """Refuse a network that gives no classes."""
    if network.form.gives != "classes":
        raise ModelError(f"{network.name}: gives no classes, so no exit can be sure of one; put a head on it "
                         "(rarefy finetune)")


# ---- in a folder

def save(exits: Exits, folder: Path | str) -> None:
    """Put heads and rule beside the network in a native folder, replacing earlier ones."""
    folder, rule = Path(folder), exits.rule
    said = {"after": list(exits.after), "technique": asdict(exits.technique),
            "rule": {**asdict(rule), "threshold": rule.threshold if math.isfinite(rule.threshold) else None},
            "weights": _weights(folder)}
    if isinstance(exits.stepped, Segments):
        said["cuts"] = [asdict(cut) for cut in exits.stepped.cuts]
        said["inputs"] = exits.stepped.inputs
    part = folder / f"{EXITS}.part"
    save_file({name: value.contiguous() for name, value in exits.heads.state_dict().items()}, part,
              {"exits": json.dumps(said)})
    part.replace(folder / EXITS)


def load(ref: Path | str, *, into: nn.Module | None = None, fast: bool = False, exact: bool = False,
         tokens: int | None = None) -> Early:
    """The network with exits in a native folder, or in that of a job.

    into: a module of the network's class, where that is the user's own. fast: weights run by the fastest
    kernels, as ``runtimes.torch.attach`` (exact, tokens) chooses them.
    """
    folder, network = native_folder(ref), opened(ref, into)
    if folder is None or not (folder / EXITS).is_file() or not isinstance(network, Network):
        raise ModelError(f"{ref}: holds no network with exits; rarefy exits makes one")
    lowered = attach(network.module, stored_trees(network), exact=exact, tokens=tokens) if fast else {}
    early = Early(_held(folder, network))
    early.lowered = lowered
    return early


def _held(folder: Path, network: Network) -> Exits:
    """The exits in a folder; ModelError where they do not belong to the network."""
    place = folder / EXITS
    try:
        with safe_open(place, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            said = json.loads(file.metadata()["exits"])
        cuts = [Cut(**cut) for cut in said.get("cuts", ())]
        stepped: Staged = Segments(network, cuts, said["inputs"]) if cuts else Stepped(network)
        after, rule = places(stepped, said["after"]), said["rule"]
        inside = [tensors[f"inside.{place}.weight"].shape for place in range(len(after))]
        heads = Heads([each[1] for each in inside], [each[0] for each in inside], len(tensors["last.0.bias"]))
        heads.load_state_dict(tensors)
        threshold = math.inf if rule["threshold"] is None else float(rule["threshold"])
        found = Exits(stepped, after, heads.eval().requires_grad_(False), EarlyExit(**said["technique"]),
                      ExitRule(**{**rule, "threshold": threshold}))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"{place}: not the exits of this network ({str(error).splitlines()[0]}); make them "
                         "again with rarefy exits") from None
    if said.get("weights") != _weights(folder):
        raise ModelError(f"{place}: was made for other weights than those beside it; make the exits again")
    return found


def _weights(folder: Path) -> str:
    """The hash that a native folder has of its weights."""
    return str(json.loads((folder / TREE).read_text(encoding="utf-8"))["sha256"])


# ---- what they give

def measured(exits: Exits, examples: Examples, batches: Sequence[int] = (1, 32), points: int = 9,
             answers: ExitAnswers | None = None, clock: Clock = time.perf_counter) -> dict[str, Any]:
    """The distribution of exits, quality against mean depth, and wall clock beside the whole network's.

    answers: to these examples, where they are known already. clock: as for ``measure.latency.compare``.
    """
    answers, technique = exits.answers(examples) if answers is None else answers, exits.technique
    ends = [*exits.after, len(exits.stepped.blocks) - 1]
    depths = torch.tensor(ends) + 1
    work = torch.tensor([exits.stepped.work[block] for block in ends])

    def quality(threshold: float) -> dict[str, float]:
        leaves = technique.leaves(answers, threshold)
        given = answers.logits.argmax(-1).gather(0, leaves[None])[0]
        found = {"threshold": threshold, "mean_blocks": float(depths[leaves].float().mean()),
                 "mean_work": float(work[leaves].mean()),
                 "same": float((given == answers.logits[-1].argmax(-1)).float().mean())}
        if answers.labels is not None:
            found["accuracy"] = float((given == answers.labels).float().mean())
        return found

    leaves = technique.leaves(answers, exits.rule.threshold)
    thresholds = [0.5 + 0.5 * k / (points - 1) for k in range(points)]
    return {"rule": technique.rule, "max_loss": technique.max_loss, **quality(exits.rule.threshold),
            "whole": quality(float("inf")), "note": exits.rule.note,
            "left": {int(block): int((depths[leaves] == block).sum()) for block in depths},
            "behind": {block + 1: exits.stepped.names[block] for block in exits.after},
            "curve": [quality(threshold) for threshold in thresholds],
            "seconds": {size: _timed(exits, examples, size, clock) for size in batches}}


def _timed(exits: Exits, examples: Examples, size: int, clock: Clock) -> dict[str, float]:
    """Seconds per sample, with exits and of the network itself, in turns."""
    found = {"exits": 0.0, "whole": 0.0}
    timed = examples.select(torch.linspace(0, len(examples) - 1, min(TIMED, len(examples))).long())
    ways: dict[str, Callable[[Mapping[str, Tensor]], Any]] = {"exits": exits,
                                                              "whole": exits.stepped.network.run}
    with torch.no_grad():
        for way in ways.values():  # kernels prepare themselves for every size of a batch that they meet
            for inputs in timed.batches(size):
                way(inputs)
        for inputs in timed.batches(size):
            for name, way in ways.items():
                started = clock()
                way(inputs)
                found[name] += clock() - started
    return {name: seconds / len(timed) for name, seconds in found.items()}


@torch.no_grad()
def read(stepped: Staged, after: Sequence[int], inputs: Mapping[str, Tensor]
         ) -> tuple[list[Tensor], Tensor]:
    """What heads read behind every exit, and the network's answer."""
    caught: list[Tensor] = []
    logits = stepped.run(inputs, after, lambda _, numbers: caught.append(numbers))
    assert logits is not None
    return caught, logits


def _shrunk(stay: Tensor, inputs: Mapping[str, Tensor], hidden: Tensor, args: tuple[Any, ...],
            kwargs: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor, tuple[Any, ...], dict[str, Any]]:
    """Only the samples that stay, and only the positions that one of them needs."""
    count, width = hidden.shape[:2]
    inputs = {name: value[stay] for name, value in inputs.items()}
    end = int(inputs[MASK].bool().any(0).nonzero().max()) + 1 if MASK in inputs else width

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value[stay] if value.ndim and value.shape[0] == count else value
        if value.ndim == 4:  # masks and biases of attention: [samples, heads, queries, keys]
            value = value[..., :end if value.shape[-2] == width else value.shape[-2], :end]
        return value

    inputs = {name: value[:, :end] if value.ndim > 1 and value.shape[1] == width else value
              for name, value in inputs.items()}
    return inputs, hidden[stay][:, :end], tuple(map(cut, args)), {key: cut(v) for key, v in kwargs.items()}
