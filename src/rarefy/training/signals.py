"""Reading signals: what a student and its teacher say, as objectives of distillation take it.

A ``Reader`` knows a network: which tensors of a batch go in, what comes out, which modules make queries, keys
and values. Teachers are online (a module, run beside the student) or kept: answers that were stored on disk
once (``training.teacher``) come with the batch, under names that begin with ``teacher.``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.errors import RecipeError
from rarefy.core.signals import Objective, Signals, Top
from rarefy.models.form import MASK
from rarefy.models.hooks import hooked
from rarefy.models.map import Map
from rarefy.models.model import Model
from rarefy.models.network import TENSOR
from rarefy.training.examples import IGNORED, LABELS
from rarefy.training.loop import Batch
from rarefy.training.student import Student, Trainable, module_of

TEACHER = "teacher."
VALUES, INDEX, ROWS, STATES = (TEACHER + name for name in ("values", "index", "rows", "states"))
INSIDE = frozenset({"hidden", "attention", "relations"})  # what is never kept on disk
ROTARY = ("rope_parameters", "rope_theta", "rope_scaling")


class Reader:
    """Reads what ``network`` says. needs: what of it is wanted, as objectives name it."""

    def __init__(self, network: Trainable, needs: frozenset[str], *, classes: int | None = None) -> None:
        self.network, self.needs, self.classes = network, needs, classes
        self.causal = isinstance(network, Model)
        self.config: Any = getattr(network, "config", None)
        self.wanted = _projections(network.map, needs, network.name)
        if "attention" in needs and any(getattr(self.config, name, None) for name in ROTARY):
            raise RecipeError(f"{network.name}: attention scores are made behind rotary embeddings, where "
                              "they cannot be read; use relations with kinds=v")

    def __call__(self, call: Callable[..., Any], module: nn.Module, batch: Batch) -> Signals:
        """call: the network with whatever weights; module: whose submodules do the work."""
        inputs = inputs_of(batch)
        extra: dict[str, Any] = {"use_cache": False} if self.causal else {}
        if "hidden" in self.needs:
            extra["output_hidden_states"] = True
        with _caught(module, self.wanted) as caught:
            out = call(inputs, **extra)
        real = batch[MASK].bool() if MASK in batch else None
        chosen = units(batch) if self.causal else None
        inside = {role: tuple(caught[path] for path in paths) for role, paths in self.wanted.items()}
        return Signals(self._rows(out, inputs, chosen), labels=labels_of(batch, chosen),
                       hidden=tuple(out.hidden_states) if "hidden" in self.needs else (),
                       queries=inside.get("q", ()), keys=inside.get("k", ()), values=inside.get("v", ()),
                       heads=int(getattr(self.config, "num_attention_heads", 0)), real=real, chosen=chosen)

    def _rows(self, out: Any, inputs: Mapping[str, Tensor], chosen: Tensor | None) -> Tensor:
        if chosen is not None:
            rows: Tensor = out.logits[chosen].float()
            return rows[:, :self.classes]
        form: Any = getattr(self.network, "form")  # noqa: B009  a Network's
        answer: Tensor = form.answer(out, inputs)
        return answer


class Distillation(nn.Module):
    """Weighted objectives between a student and its teacher: one loss per unit.

    terms: (weight, objective). teacher: None for one whose answers come with the batch, and for objectives
    that need none; a network otherwise, of which ``student`` may be a compressed form.
    """

    def __init__(self, student: Trainable, teacher: Trainable | None,
                 terms: tuple[tuple[float, Objective], ...], *, classes: int | None = None) -> None:
        super().__init__()
        if not terms or any(not weight > 0 for weight, _ in terms):
            raise RecipeError("distillation needs at least one objective, each of a positive weight")
        needs = frozenset().union(*(term.needs for _, term in terms))
        self.terms, self.needs = terms, needs
        self.reader = Reader(student, needs, classes=classes)
        self.same = teacher is student
        self.asked = None if teacher is None else Reader(teacher, needs, classes=classes)
        self.teacher = None if teacher is None or self.same else module_of(teacher)
        self.learned = nn.ModuleDict()
        for place, (_, term) in enumerate(terms):
            if hasattr(term, "learned"):
                if teacher is None:
                    raise RecipeError("objectives on states inside the network need the teacher at hand")
                with torch.random.fork_rng():
                    torch.manual_seed(place)
                    self.learned[str(place)] = term.learned(_size(student), _size(teacher))

    def __call__(self, student: Student, batch: Batch) -> Tensor:  # typed, unlike nn.Module's
        losses: Tensor = super().__call__(student, batch)
        return losses

    def forward(self, student: Student, batch: Batch) -> Tensor:
        said = self._ask(student, batch)
        own = self.reader(student, student.network, batch)
        maps = dict(self.learned.items())
        losses = [weight * term.loss(own, said, maps.get(str(place)))
                  for place, (weight, term) in enumerate(self.terms)]
        return torch.stack(losses).sum(0)

    def _ask(self, student: Student, batch: Batch) -> Signals:
        if self.asked is None:
            return kept(batch)
        if self.same:
            with student.original() as module:
                return self.asked(_caller(module), module, batch)
        assert self.teacher is not None
        self.teacher.eval()
        with torch.no_grad():
            return self.asked(_caller(self.teacher), self.teacher, batch)


def inputs_of(batch: Batch) -> Batch:
    """What of a batch goes into the network."""
    return {name: value for name, value in batch.items() if name != LABELS and not name.startswith(TEACHER)}


def units(batch: Batch) -> Tensor:
    """Which tokens a language model is trained at: those with a label, or all that are real."""
    if LABELS in batch:
        return batch[LABELS] != IGNORED
    tokens = batch["input_ids"]
    return batch[MASK].bool() if MASK in batch else torch.ones_like(tokens, dtype=torch.bool)


def labels_of(batch: Batch, chosen: Tensor | None) -> Tensor | None:
    """The label of every unit."""
    if LABELS not in batch:
        return None
    return batch[LABELS] if chosen is None else batch[LABELS][chosen]


def kept(batch: Batch) -> Signals:
    """What a teacher said earlier."""
    chosen = units(batch) if VALUES in batch else None
    if chosen is not None:
        return Signals(None, Top(batch[VALUES][chosen].float(), batch[INDEX][chosen].long()))
    return Signals(batch[ROWS].float() if ROWS in batch else None)


def _projections(map_: Map, needs: frozenset[str], name: str) -> dict[str, tuple[str, ...]]:
    """Modules that make queries, keys and values, block by block, where they are wanted."""
    roles = "qkv" if "relations" in needs else "qk" if "attention" in needs else ""
    found = {role: tuple(site.layer for site in map_.sites
                         if site.role == role and site.block is not None) for role in roles}
    if any(not paths for paths in found.values()):
        raise RecipeError(f"{name}: has no separate queries, keys and values to look at; use soft_labels or "
                          "hidden_states")
    return found


@contextmanager
def _caught(module: nn.Module, wanted: Mapping[str, tuple[str, ...]]) -> Iterator[dict[str, Tensor]]:
    """While this lasts, the outputs of some submodules are caught."""
    caught: dict[str, Tensor] = {}
    with hooked((module.get_submodule(path),
                 lambda part, inputs, output, path=path: caught.__setitem__(path, output))
                for paths in wanted.values() for path in paths):
        yield caught


def _caller(module: nn.Module) -> Callable[..., Any]:
    return lambda inputs, **extra: module(*[v for k, v in inputs.items() if k == TENSOR],
                                          **{k: v for k, v in inputs.items() if k != TENSOR}, **extra)


def _size(network: Trainable) -> tuple[int, int]:
    """Blocks and width."""
    config: Any = getattr(network, "config", None)
    blocks, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if not blocks or not width:
        raise RecipeError(f"{network.name}: its configuration does not say how many states it has; match "
                          "logits instead")
    return int(blocks), int(width)
