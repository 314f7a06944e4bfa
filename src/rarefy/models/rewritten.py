"""A model with some tensors replaced, as a model: what reads it cannot tell.

The replaced tensors are not kept. Each has a list of small changes (a factor per channel, a rotation) that
are applied whenever it is read, so the view costs no more memory than the model, and an export, a survey or
a runner that is given the view works on what was changed without knowing of it.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rarefy.core.errors import ModelError, did_you_mean
from rarefy.models.map import Site
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.models.opening import fill
from rarefy.models.shrunk import ShrunkSource
from rarefy.models.sources import Source
from rarefy.numerics.hadamard import Rotation


@dataclass(frozen=True, eq=False)
class Scale:
    """Positions of one axis times factors. offset: what the network adds to the values that are stored."""

    axis: int
    factors: Tensor
    offset: float = 0.0

    def applied(self, values: Tensor) -> Tensor:
        factors = self.factors if values.ndim == 1 or self.axis == 1 else self.factors[:, None]
        return (values + self.offset) * factors - self.offset


@dataclass(frozen=True, eq=False)
class Turn:
    """Positions start .. stop of one axis rotated, in runs of the rotation's width: W Q, or Q^T W."""

    axis: int
    start: int
    stop: int
    rotation: Rotation

    def applied(self, values: Tensor) -> Tensor:
        last = values if values.ndim == 1 or self.axis == 1 else values.T
        part = last[..., self.start:self.stop].unflatten(-1, (-1, self.rotation.width))
        done = torch.cat([last[..., :self.start], self.rotation.turned(part).flatten(-2),
                          last[..., self.stop:]], -1)
        return done if last is values else done.T


@dataclass(frozen=True, eq=False)
class Fill:
    """One value everywhere."""

    value: float

    def applied(self, values: Tensor) -> Tensor:
        return torch.full_like(values, self.value)


@dataclass(frozen=True, eq=False)
class Plus:
    """Something of the same shape added; of matrices as [out, in]."""

    values: Tensor
    axis: int = 0  # all rows are read, though some may be wanted

    def applied(self, values: Tensor) -> Tensor:
        return values + self.values


Alteration = Scale | Turn | Fill | Plus


def rewritten(model: Model, changes: Iterable[tuple[str, Alteration]]) -> Model:
    """A view of ``model`` in which every named tensor is changed, in the order given."""
    view = copy.copy(model)
    view.source = _changed(model, changes)
    return view


def rewritten_network(network: Network, changes: Iterable[tuple[str, Alteration]]) -> Network:
    """The same of any network; it runs, so it holds what was changed."""
    source, module = _changed(network, changes), copy.deepcopy(network.module)
    fill(module, source, network.name)
    tokenizer = (lambda: network.tokenizer) if network.form.takes == "text" else None
    return Network(network.name, module, source, network.form, config=network.config, tokenizer=tokenizer,
                   files=network.files)


def _changed(opened: Model | Network, changes: Iterable[tuple[str, Alteration]]) -> RewrittenSource:
    lists: dict[str, list[Alteration]] = defaultdict(list)
    known = [*opened.map.by_path, *(param.path for param in opened.map.params)]
    for path, change in changes:
        if path not in known:
            raise ModelError(f"{path}: no such tensor{did_you_mean(path, known)}")
        lists[path].append(change)
    return RewrittenSource(opened.source, {path: tuple(each) for path, each in lists.items()},
                           opened.map.by_path, {})


def untied(model: Model) -> Model:
    """A view of a model with a tied head in which the head is a matrix of its own, with the same values."""
    if not model.map.tied:
        return model
    family, config = model.map.family, copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    source = RewrittenSource(model.source, {}, {}, {f"{family.head}.weight": f"{family.embed}.weight"})
    return Model(model.name, family, config, source, lambda: model.tokenizer)


def collapsed(model: Model, dropped: Collection[int]) -> Model:
    """A view in which the block before some that are to go has taken over their differences to it."""
    family, changes = model.map.family, list[tuple[str, Alteration]]()
    for path in (*model.map.by_path, *(param.path for param in model.map.params)):
        inside = family.inside(path)
        if inside is None or inside[0] in dropped or inside[0] + 1 not in dropped:
            continue
        own, total, behind = _values(model, path), torch.zeros(()), inside[0] + 1
        while behind in dropped:
            total, behind = total + _values(model, f"{family.blocks}.{behind}.{inside[1]}") - own, behind + 1
        changes.append((path, Plus(total)))
    return rewritten(model, changes)


def _values(model: Model, path: str) -> Tensor:
    return model.weight(path) if path in model.map.by_path else model.param(path)


class RewrittenSource(Source):
    """The tensors of another source, changed as they are read.

    sites: says which matrices the file holds transposed. aliases: further names, and whose values they have.
    """

    def __init__(self, inner: Source, changes: Mapping[str, tuple[Alteration, ...]],
                 sites: Mapping[str, Site], aliases: Mapping[str, str]) -> None:
        super().__init__()
        self.inner, self._changes, self._sites, self._aliases = inner, changes, sites, aliases

    def names(self) -> tuple[str, ...]:
        return (*self.inner.names(), *(name for name in self._aliases if name not in self.inner.names()))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.inner.shape(self._aliases.get(name, name))

    def dtype(self, name: str) -> str:
        return "float32" if name in self._changes else self.inner.dtype(self._aliases.get(name, name))

    def files(self) -> tuple[Path, ...]:
        return self.inner.files()

    def check(self, name: str) -> None:
        """Factors and rotations are finite, so what was finite stays so."""
        self.inner.check(self._aliases.get(name, name))

    def rows(self, name: str, index: slice | Tensor) -> Tensor:
        """Some rows; the others are read only where a change mixes rows, or the file has them as columns."""
        stored, changes = self._aliases.get(name, name), self._changes.get(name, ())
        site = self._sites.get(name)
        flipped = site is not None and site.transposed
        if flipped or any(not isinstance(each, Fill) and each.axis == 0 for each in changes):
            values = self.inner.rows(stored, slice(None))
            return self._changed(values.T if flipped else values, changes, flipped)[index]
        return self._changed(self.inner.rows(stored, index), changes, flipped)

    def _changed(self, matrix: Tensor, changes: tuple[Alteration, ...], flipped: bool) -> Tensor:
        for change in changes:
            matrix = change.applied(matrix.float())
        return matrix.T if flipped else matrix

    def _rows(self, name: str, index: slice | Tensor) -> Tensor:
        return self.rows(name, index)


def is_shrunk(source: Source) -> bool:
    """Whether parts of the model that the files hold have been left out."""
    while isinstance(source, RewrittenSource):
        source = source.inner
    return isinstance(source, ShrunkSource)


def original(source: Source) -> Source:
    """The source behind all changes: what the files hold."""
    while isinstance(source, RewrittenSource | ShrunkSource):
        source = source.inner
    return source
