"""The one training loop: everything in this package that learns, learns here.

A step sums the losses of all units (tokens, rows) of a batch, over micro batches and processes, and divides
the gradient of the sum by the number of units once:

    g = (1 / n) sum_i grad loss_i,        so batches cut differently give the same step.

Nothing that a step does depends on anything but the step: the order of the data is a function of (seed,
epoch), the rate of the step, and noise is drawn from generators that are seeded anew with (seed, step,
micro batch, process). What is left to remember are the numbers that move and the optimizer's moments; they
are written in one piece, so a run that was killed goes on to the very same bits.

A gate, if there is one, judges from time to time on what training does not see; the best state it saw is
what remains, and patience ends early. A loss that is no number stops the run at the last good state.

Devices and processes (``torchrun``, data parallel) are accelerate's business; the optimizer is AdamW
(Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization").
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.calibration.samples import fast_bfloat16
from rarefy.core.errors import DataError, RecipeError, TrainingError
from rarefy.core.tune import Soft
from rarefy.training.activations import Activations

Batch = dict[str, Tensor]
Gate = Callable[[], float]
Advance = Callable[[int, int], None]
FILE = "training.pt"
POOL = 50  # batches whose examples are sorted by length together
SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
GATES = 10  # judgements in a run that does not say how many


class Examples(Protocol):
    """What is trained on: ``batch(index)`` gives the examples of some numbers, always the same ones."""

    def __len__(self) -> int: ...

    def batch(self, index: Tensor) -> Batch: ...

    def lengths(self) -> Tensor | None:
        """How long each example is, if examples of one length had better go together."""
        ...

    def digest(self) -> str:
        """A fingerprint of all of it: a run is resumed on the same data only."""
        ...


@dataclass(frozen=True, eq=False)
class Loss:
    """The sum of the losses of some units, and how many there are."""

    total: Tensor
    units: Tensor


class Task(nn.Module):
    """What the loop trains: parameters, and a loss for a batch. Abstract."""

    def forward(self, batch: Batch) -> Loss:
        raise NotImplementedError

    def at_rest(self) -> AbstractContextManager[None]:
        """Around batches between which nothing moves: what does not depend on them is computed once."""
        return nullcontext()

    def update(self, step: int, total: int) -> None:
        """Called after step ``step`` of ``total``: what follows a schedule moves here."""

    def settled(self) -> bool:
        """Whether the state of the moment may be what remains: not while masks still grow."""
        return True


@dataclass(frozen=True)
class Settings:
    """How to train.

    steps: how many (0: as ``epochs`` says). epochs: times that the data is seen. batch: examples of a step.
    micro: examples that go through the network at once (0: all of the batch). rate: the peak learning rate.
    warmup: share of the steps in which the rate grows to it. schedule: how it falls from there to zero.
    decay: weight decay of matrices. clip: bound on the norm of the gradient (0: none). precision: auto is
    bfloat16 where this machine gains from it. checkpointing: compute blocks again in the backward pass
    instead of keeping what is inside them. gate_every: steps between judgements (0: ten in a run). patience:
    judgements without a gain after which to stop (0: never). save_every: steps between checkpoints, where a
    folder is given. seed: of order and noise.
    """

    steps: int = 0
    epochs: float = 1.0
    batch: int = 32
    micro: int = 0
    rate: float = 1e-4
    warmup: float = 0.1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    decay: float = 0.01
    clip: float = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    checkpointing: bool = False
    gate_every: int = 0
    patience: int = 0
    save_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "rate", "epochs", "save_every"):
            if not 0 < getattr(self, name) < math.inf:
                raise RecipeError(f"training: {name}={getattr(self, name)} must be positive")
        for name in ("steps", "micro", "decay", "clip", "gate_every", "patience"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RecipeError(f"training: {name}={getattr(self, name)} must not be negative")
        if not 0 <= self.warmup < 1:
            raise RecipeError(f"training: warmup={self.warmup} must lie in [0, 1)")
        for name, known in (("schedule", ("cosine", "linear", "constant")),
                            ("precision", ("auto", "float32", "bfloat16"))):
            if getattr(self, name) not in known:
                raise RecipeError(f"training: {name}={getattr(self, name)!r}; choose one of "
                                  f"{', '.join(known)}")

    def total(self, examples: int) -> int:
        """Steps of the whole run on that many examples."""
        return self.steps or max(1, round(self.epochs * (examples // min(self.batch, examples))))

    def factor(self, step: int, total: int) -> float:
        """What the rate of step ``step`` (from 0) of ``total`` is multiplied by."""
        rising = round(self.warmup * total)
        if step < rising:
            return (step + 1) / (rising + 1)
        done = (step - rising) / max(1, total - rising)
        match self.schedule:
            case "cosine":
                return 0.5 * (1 + math.cos(math.pi * done))
            case "linear":
                return 1 - done
            case "constant":
                return 1.0


@dataclass(frozen=True)
class Point:
    """One step on the curve; ``gate`` where there was a judgement (lower is better)."""

    step: int
    loss: float
    rate: float
    norm: float
    gate: float | None = None


@dataclass(frozen=True)
class Curve:
    """How a run went: its points; the judgement and step of the state that remains (NaN, the last step:
    nobody judged); why it ended; seconds of this process."""

    points: tuple[Point, ...]
    best: float
    best_step: int
    stopped: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the receipt."""
        return asdict(self)


def fit(task: Task, examples: Examples, settings: Settings, *, gate: Gate | None = None,
        folder: Path | None = None, identity: dict[str, str] | None = None,
        advance: Advance | None = None) -> Curve:
    """Train what of ``task`` requires a gradient; it is left in its best state, on the CPU, in eval mode.

    gate: judges the task as it stands (lower is better). folder: where checkpoints go, and where those of an
    earlier call of the same run are taken from. identity: what else must be the same to resume. advance:
    told (steps done, steps in all). RecipeError: nothing moves, or the folder holds another run's state;
    TrainingError: the loss is no number.
    """
    return _Run(task, examples, settings, gate, folder, identity or {}, advance).go()


def order(examples: Examples, batch: int, seed: int, epoch: int) -> Tensor:
    """The numbers of an epoch's examples, [batches, batch]: shuffled; like lengths together, if they say."""
    generator = torch.Generator().manual_seed(_mixed(seed, epoch))
    count, lengths = len(examples), examples.lengths()
    shuffled = torch.randperm(count, generator=generator)
    if lengths is not None:
        pools = shuffled.split(POOL * batch)
        shuffled = torch.cat([pool[lengths[pool].argsort(stable=True)] for pool in pools])
    whole = shuffled[:count // batch * batch].view(-1, batch)
    return whole if lengths is None else whole[torch.randperm(len(whole), generator=generator)]


def held_out(task: Task, examples: Examples, settings: Settings) -> Gate:
    """The gate that is the mean loss on ``examples``, as many at once as training takes: a language model's
    answers are large, and more of them would be the peak of the memory."""
    lengths = examples.lengths()
    numbers = torch.arange(len(examples)) if lengths is None else lengths.argsort(stable=True)

    def judge() -> float:
        total = units = 0.0
        with task.at_rest():
            for index in numbers.split(settings.micro or settings.batch):
                loss = task(_moved(examples.batch(index), _device(task)))
                total, units = total + float(loss.total), units + float(loss.units)
        return total / max(units, 1.0)

    return judge


class _Run:
    """A run under way."""

    def __init__(self, task: Task, examples: Examples, settings: Settings, gate: Gate | None,
                 folder: Path | None, identity: dict[str, str], advance: Advance | None) -> None:
        self.task, self.examples, self.settings, self.gate = task, examples, settings, gate
        self.folder, self.advance = folder, advance
        self.moving = {name: value for name, value in task.named_parameters() if value.requires_grad}
        if not self.moving:
            raise RecipeError("nothing to train: every parameter is frozen; choose what moves")
        if not len(examples):
            raise DataError("nothing to train on: there are no examples")
        self.batch = min(settings.batch, len(examples))
        self.total = settings.total(len(examples))
        self.every = settings.gate_every or max(1, self.total // GATES)
        self.key = {**{name: str(value) for name, value in asdict(settings).items()}, **identity,
                    "data": examples.digest(), "start": _digest(self.moving)}
        self.step, self.points, self.stopped = 0, list[Point](), ""
        self.best, self.best_step, self.kept = math.nan, 0, dict[str, Tensor]()
        self.epoch, self.index = -1, torch.empty(0)

    def go(self) -> Curve:
        started = time.perf_counter()
        self.accelerator = _accelerator()
        device = self.accelerator.device
        self.task.to(device)
        self.model: Any = self.accelerator.prepare_model(self.task)
        self.optimizer = torch.optim.AdamW(_groups(self.task, self.settings), self.settings.rate,
                                           betas=(0.9, 0.98), eps=1e-8, fused=True)
        self._resume(device)
        with _noise_kept():
            while self.step < self.total and not self.stopped:
                self._advance(device)
                if self.advance is not None:
                    self.advance(self.step, self.total)
        if self.kept:
            self._restore(self.kept)
        self.task.cpu().eval()
        return Curve(tuple(self.points), self.best, self.best_step if self.kept else self.step,
                     self.stopped or "all steps done", time.perf_counter() - started)

    def _advance(self, device: torch.device) -> None:
        """One step, its judgement, its checkpoint."""
        rate = self.settings.rate * self.settings.factor(self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["pace"]
        self.model.train()
        loss, norm = self._gradient(device)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._refuse(loss)
        self.optimizer.step()
        self.step += 1
        self.task.update(self.step, self.total)
        judged = None
        if self.gate is not None and (self.step % self.every == 0 or self.step == self.total):
            judged = self._judge()
        self.points.append(Point(self.step, loss, rate, norm, judged))
        if self.folder is not None and (self.step % self.settings.save_every == 0 or self.stopped
                                        or self.step == self.total):
            self._save()

    def _gradient(self, device: torch.device) -> tuple[float, float]:
        """The gradient of the mean loss, clipped; the loss, and the norm before clipping."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = self._numbers()[rank::world]
        micro = mine.split(self.settings.micro or len(mine))
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for place, index in enumerate(micro):
            _seed(self.settings.seed, self.step, place, rank)
            last = place == len(micro) - 1
            with _synchronized(self.accelerator, self.model, last):
                with arithmetic(self.settings, device):
                    loss: Loss = self.model(_moved(self.examples.batch(index), device))
                loss.total.backward()
            sums += torch.stack([loss.total.detach().double(), loss.units.double()])
        if world > 1:
            sums = self.accelerator.reduce(sums, "sum")
        units = max(float(sums[1]), 1.0)
        gradients = [value.grad for value in self.moving.values() if value.grad is not None]
        if gradients:  # data parallel has averaged over processes
            torch._foreach_mul_(gradients, world / units)
        norm = nn.utils.clip_grad_norm_(self.moving.values(), self.settings.clip or math.inf)
        return float(sums[0]) / units, float(norm)

    def _numbers(self) -> Tensor:
        """The numbers of this step's examples."""
        epoch, place = divmod(self.step, len(self.examples) // self.batch)
        if epoch != self.epoch:
            self.epoch, self.index = epoch, order(self.examples, self.batch, self.settings.seed, epoch)
        return self.index[place]

    @torch.no_grad()
    def _judge(self) -> float:
        assert self.gate is not None
        self.task.eval()
        with arithmetic(self.settings, self.accelerator.device):
            judged = self.gate()
        if not self.task.settled():
            return judged
        if not judged >= self.best:  # also when there is none yet
            self.best, self.best_step, self.kept = judged, self.step, self._state()
        elif self.settings.patience and self.step - self.best_step >= self.settings.patience * self.every:
            self.stopped = f"no gain in {self.settings.patience} judgements"
        return judged

    def _refuse(self, loss: float) -> None:
        """Stop at the last good state and say what broke."""
        broken = next((name for name, value in self.moving.items()
                       if value.grad is not None and not bool(torch.isfinite(value.grad).all())), "")
        if self.folder is not None:
            self._save()  # the numbers before this step: none of them was touched
        if self.kept:
            self._restore(self.kept)
        self.task.cpu().eval()
        where = f", first in the gradient of {broken}" if broken else ""
        raise TrainingError(f"step {self.step + 1}: the loss is {loss}{where}; the last good state is kept; "
                            f"lower rate (now {self.settings.rate:g}), raise warmup or set precision=float32")

    def _state(self) -> dict[str, Tensor]:
        """What moves and what lasts: parameters with a gradient, persistent buffers."""
        fixed = {name for name, value in self.task.named_parameters() if not value.requires_grad}
        return {name: value.detach().cpu().clone() for name, value in self.task.state_dict().items()
                if name not in fixed}

    def _restore(self, state: dict[str, Tensor]) -> None:
        self.task.load_state_dict(state, strict=False)

    def _save(self) -> None:
        """Everything in one file that appears whole."""
        assert self.folder is not None
        if not self.accelerator.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{FILE}.part"
        with part.open("wb") as file:
            torch.save({"key": self.key, "step": self.step, "state": self._state(),
                        "optimizer": self.optimizer.state_dict(), "best": self.best,
                        "best_step": self.best_step, "kept": self.kept, "stopped": self.stopped,
                        "points": [asdict(point) for point in self.points]}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.folder / FILE)

    def _resume(self, device: torch.device) -> None:
        """Go on where an earlier call of the same run was, if there was one."""
        if self.folder is None or not (self.folder / FILE).is_file():
            return
        held: dict[str, Any] = torch.load(self.folder / FILE, map_location="cpu", weights_only=True)
        differing = [f"{name} was {held['key'].get(name, 'absent')}, is {self.key.get(name, 'absent')}"
                     for name in sorted(held["key"].keys() | self.key.keys())
                     if held["key"].get(name) != self.key.get(name)]
        if differing:
            raise RecipeError(f"{self.folder / FILE}: belongs to another run ({'; '.join(differing)}); "
                              "give the same settings, model and data to resume, or another folder")
        self._restore(held["state"])
        self.optimizer.load_state_dict(held["optimizer"])
        self.step, self.stopped, self.kept = held["step"], held["stopped"], held["kept"]
        self.best, self.best_step = held["best"], held["best_step"]
        self.points = [Point(**point) for point in held["points"]]


def arithmetic(settings: Settings, device: torch.device) -> torch.autocast:
    """Mixed precision as the settings want it."""
    gains = torch.cuda.is_bf16_supported() if device.type == "cuda" else fast_bfloat16()
    wanted = settings.precision == "bfloat16" or (settings.precision == "auto" and gains)
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def _accelerator() -> Any:
    """Devices and processes. RecipeError where parameters would be cut in pieces: weights are computed from
    trees, by name, and every process needs all of a tree."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    found = Accelerator(cpu=not torch.accelerator.is_available(),
                        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    how = str(found.distributed_type.value)
    if how in SHARDED:
        raise RecipeError(f"{how}: shards parameters, which training on trees does not support; launch with "
                          "torchrun alone (data parallel), and save memory by micro and checkpointing")
    return found


@contextmanager
def _synchronized(accelerator: Any, model: Any, last: bool) -> Iterator[None]:
    """Processes exchange gradients behind the last micro batch only."""
    if last or accelerator.num_processes == 1:
        yield
    else:
        with accelerator.no_sync(model):
            yield


def _groups(task: Task, settings: Settings) -> list[dict[str, Any]]:
    """Parameters by how fast they learn and whether they decay."""
    paces = {f"{name}.{own}" if name else own: pace for name, part in task.named_modules()
             if isinstance(part, Soft | Activations) for own, pace in part.paces().items()}
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, value in task.named_parameters():
        if value.requires_grad:
            key = (paces.get(name, 1.0), name not in paces and value.ndim > 1)
            groups.setdefault(key, []).append(value)
    return [{"params": values, "pace": pace, "weight_decay": settings.decay if decays else 0.0}
            for (pace, decays), values in groups.items()]


def _mixed(*numbers: int) -> int:
    """One seed from several numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")


def _seed(*numbers: int) -> None:
    seed = _mixed(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def _noise_kept() -> Iterator[None]:
    """The default generators, as they were, afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _digest(tensors: dict[str, nn.Parameter]) -> str:
    """A fingerprint of names, shapes and values."""
    sha = hashlib.sha256()
    for name, value in tensors.items():
        sha.update(f"{name}{tuple(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device) for name, value in batch.items()}


def _device(task: Task) -> torch.device:
    return next(task.parameters()).device
