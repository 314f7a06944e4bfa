"""A network in training: its weights are given by soft trees, and nothing of it is overwritten.

``Student`` holds the parameters that move and calls the network with them in the place of its own
(``torch.func.functional_call``): the network that is trained and the one that it learns from can be one
module in memory, no parametrization is registered on anybody's class, and a weight that several modules
share is computed once. What batch normalisation counts is the student's own as well.

``functional_call`` ends with the forward pass, but checkpointed blocks run again during the backward pass.
So a checkpointed block takes the tensors that it was called with along (``_Again``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from rarefy.calibration.samples import materialize
from rarefy.core.errors import RecipeError
from rarefy.core.nodes import Node
from rarefy.core.tune import Soft
from rarefy.models.map import Map, Site
from rarefy.models.model import Model
from rarefy.models.network import TENSOR
from rarefy.training.activations import Activations
from rarefy.training.loop import Batch, Loss, Task

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Trainable(Protocol):
    """A network that can be tuned: its map, its original weights, and itself as a module."""

    @property
    def name(self) -> str: ...

    @property
    def map(self) -> Map: ...

    def weight(self, path: str) -> Tensor: ...


def module_of(network: Trainable) -> nn.Module:
    """The network with its original weights, float32, frozen."""
    if isinstance(network, Model):
        whole: nn.Module = materialize(network, torch.float32)
        return whole
    module: Any = getattr(network, "module", None)
    if not isinstance(module, nn.Module):
        raise RecipeError(f"{network.name}: holds no module to train")
    return module


class Student(nn.Module):
    """``network`` with some of its weights in training.

    softs: by path of a site; fixed ones are computed once. params: paths of other tensors that move. dropout:
    whether the network's own is on during training. checkpointing: compute the members of lists of blocks
    again in the backward pass. activations: inputs of layers that the student, and not a teacher that is the
    same module, sees rounded; not with checkpointing, whose second pass would go unwatched.
    """

    def __init__(self, network: nn.Module, softs: Mapping[str, tuple[Site, Soft]],
                 params: tuple[str, ...] = (), *, dropout: bool = False, checkpointing: bool = False,
                 activations: Activations | None = None) -> None:
        super().__init__()
        if activations is not None and checkpointing:
            raise RecipeError("rounded activations cannot be computed again in the backward pass; leave out "
                              "checkpointing, or take smaller micro batches")
        self.activations = activations
        self.network, self.dropout = network, dropout
        self.sites = {path: site for path, (site, _) in softs.items()}
        self.softs = nn.ModuleDict({_key(path): soft for path, (_, soft) in softs.items()})
        own = dict(network.named_parameters())
        self.params = nn.ParameterDict({_key(path): nn.Parameter(own[path].detach().float().clone())
                                        for path in params})
        self._counted = tuple(name for name, _ in network.named_buffers() if _counts(network, name))
        for name in self._counted:
            self.register_buffer(f"counted_{_key(name)}", network.get_buffer(name).clone())
        self._lists = _block_lists(network) if checkpointing else ()
        self._resting: dict[str, Tensor] | None = None

    def forward(self, inputs: Mapping[str, Tensor], **settings: Any) -> Any:
        """What the network returns; inputs by name, one by position under the name ``TENSOR``."""
        args = tuple(value for name, value in inputs.items() if name == TENSOR)
        named: dict[str, Any] = {name: value for name, value in inputs.items() if name != TENSOR}
        named.update(settings)
        if not (self._lists and self.training):
            with nullcontext() if self.activations is None else self.activations.on(self.network):
                return functional_call(self.network, self.tensors(), args, named)
        inside = {f"network.{path}": value for path, value in self.tensors().items()}
        return functional_call(_Repeating(self.network, self._lists), inside, args, named)

    def tensors(self) -> dict[str, Tensor]:
        """What takes the place of the network's own, as it holds it."""
        if self._resting is not None:
            return self._resting
        found = {path: site.stored(self.soft(path)()) for path, site in self.sites.items()}
        found |= {_path(key): value for key, value in self.params.items()}
        return found | {name: self.get_buffer(f"counted_{_key(name)}") for name in self._counted}

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """While this lasts, nothing moves, and weights are computed once and not for every batch."""
        with torch.no_grad():
            self._resting = self.tensors()
        try:
            yield
        finally:
            self._resting = None

    def soft(self, path: str) -> Soft:
        """The weight of a site."""
        found = self.softs[_key(path)]
        assert isinstance(found, Soft)
        return found

    def penalty(self) -> Tensor:
        """The regularisers of all weights."""
        return sum((self.soft(path).penalty() for path in self.sites), torch.zeros(()))

    def update(self, step: int, total: int) -> None:
        """Tell every weight how far training is."""
        if self.activations is not None:
            self.activations.steps.fill_(step)
        for path in self.sites:
            self.soft(path).update(step, total)

    def settled(self) -> bool:
        """Whether every weight is what its technique was asked for, and inputs are rounded as asked."""
        rounded = self.activations is None or self.activations.settled()
        return rounded and all(self.soft(path).settled() for path in self.sites)

    def train(self, mode: bool = True) -> Student:
        """The network's own dropout only if it was asked for; batch statistics always."""
        super().train(mode)
        if mode and not self.dropout:
            self.network.eval()
            for part in self.network.modules():
                if isinstance(part, NORMS):
                    part.train()
        return self

    @contextmanager
    def original(self) -> Iterator[nn.Module]:
        """The network as it was, for a teacher that is the same module; eval mode, no gradients."""
        modes = {part: part.training for part in self.network.modules()}
        try:
            self.network.eval()
            with torch.no_grad():
                yield self.network
        finally:
            for part, mode in modes.items():
                part.training = mode

    @torch.no_grad()
    def trees(self) -> dict[str, Node]:
        """What every site has become."""
        return {path: self.soft(path).harden() for path in self.sites}

    def notes(self) -> dict[str, str]:
        """What techniques had to do otherwise than asked, by site."""
        found = {path: "; ".join(dict.fromkeys(part.note for part in self.soft(path).modules()
                                               if isinstance(part, Soft) and part.note))
                 for path in self.sites}
        return {path: note for path, note in found.items() if note}

    @torch.no_grad()
    def changed(self) -> dict[str, Tensor]:
        """Params and statistics that are no longer the network's own."""
        found = {_path(key): value.detach().cpu().clone() for key, value in self.params.items()}
        if any(isinstance(part, NORMS) for part in self.network.modules()):
            found |= {name: self.get_buffer(f"counted_{_key(name)}").cpu().clone() for name in self._counted}
        return found


class Objective(Protocol):
    """A loss: one number for each unit (token, row) of a batch, [units]. A module if it learns anything."""

    def __call__(self, student: Student, batch: Batch) -> Tensor: ...


class Learning(Task):
    """A student and what it is to learn."""

    def __init__(self, student: Student, objective: Objective) -> None:
        super().__init__()
        self.student = student
        self.objective = objective

    def forward(self, batch: Batch) -> Loss:
        losses = self.objective(self.student, batch).float()
        units = torch.tensor(float(losses.numel()), device=losses.device)
        penalty = self.student.penalty().to(losses.device) if self.training else losses.new_zeros(())
        return Loss(losses.sum() + penalty * units, units)

    def at_rest(self) -> AbstractContextManager[None]:
        return self.student.at_rest()

    def update(self, step: int, total: int) -> None:
        self.student.update(step, total)

    def settled(self) -> bool:
        return self.student.settled()


def _key(path: str) -> str:
    """A path as a name of a submodule, which may hold no dot."""
    return path.replace(".", ":")


def _path(key: str) -> str:
    return key.replace(":", ".")


def _counts(network: nn.Module, name: str) -> bool:
    """Whether a buffer is a running statistic."""
    owner = network.get_submodule(name.rpartition(".")[0])
    return isinstance(owner, NORMS)


def _block_lists(network: nn.Module) -> tuple[nn.ModuleList, ...]:
    """The outermost lists of blocks."""
    found: dict[str, nn.ModuleList] = {}
    for name, part in network.named_modules():
        if isinstance(part, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = part
    return tuple(found.values())


class _Repeating(nn.Module):
    """The network, the members of its block lists checkpointed."""

    def __init__(self, network: nn.Module, lists: tuple[nn.ModuleList, ...]) -> None:
        super().__init__()
        self.network, self.lists = network, lists

    def forward(self, *args: Any, **named: Any) -> Any:
        members = [(each, key, member) for each in self.lists for key, member in each.named_children()]
        try:
            for each, key, member in members:
                setattr(each, key, _Again(member))
            return self.network(*args, **named)
        finally:
            for each, key, member in members:
                setattr(each, key, member)


class _Again(nn.Module):
    """A block that is computed again in the backward pass, with the tensors of the forward pass."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:  # what the network asks its blocks about
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block, name)

    def forward(self, *args: Any, **named: Any) -> Any:
        tensors = {**dict(self.block.named_parameters()), **dict(self.block.named_buffers())}
        return checkpoint(_called, self.block, tensors, args, named, use_reentrant=False)


def _called(block: nn.Module, tensors: dict[str, Tensor], args: tuple[Any, ...],
            named: dict[str, Any]) -> Any:
    return functional_call(block, tensors, args, named)
