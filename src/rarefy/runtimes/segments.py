"""A CNN or another plain network in blocks: cut where one tensor carries everything that the rest reads.

    segments = Segments.of(network, inputs)     inputs: samples on which it is watched once
    segments.names                              the module behind which each block ends

A cut stands behind a module that is called once and whose output is all that later operators read of the
samples. So a residual block ends in one and has none inside, where the shortcut passes by. Between two cuts
lies at least one linear or convolution: norm, activation and pooling belong to the layer in front of them.

Nothing is traced into another program. A hook behind the module hands on the samples that stay, and the
network's own code goes on with a smaller batch; weights and kernels are whatever the network holds. What an
operator reads is seen (``torch.overrides``), what Python remembers is not (the size of a batch that is asked
for at the start and used at the end), so cuts are tried before they are believed.

A head reads the mean of every channel over the cells of a grid that is the finer the fewer channels there
are, normalised per sample. (Kaya et al. 2019, "Shallow-Deep Networks", section 4.1, mix it with the largest
value, whose kernel took a fifth of the time of the whole network on a batch of a small one.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from rarefy.core.errors import ModelError
from rarefy.measure.work import counting
from rarefy.models.hooks import hooked
from rarefy.models.network import Network, call

GRIDS = (4, 2)  # cells by cells of which a head may read, else all places as one
READ = 512      # numbers that it reads at most, where a grid has more than one cell
INSIDE = 128    # hidden units of a head at most

Behind = Callable[[int, Tensor], Tensor | None]


@dataclass(frozen=True)
class Cut:
    """Behind a module, by its path. work: share of all multiplications that are done there."""

    module: str
    work: float


class _Left(Exception):
    """No sample goes on."""


class Segments:
    """A network between its cuts. Weights are the network's own. inputs: shapes of one sample, by name."""

    def __init__(self, network: Network, cuts: Sequence[Cut], inputs: Mapping[str, Sequence[int]]) -> None:
        parts = dict(network.module.named_modules())
        missing = [cut.module for cut in cuts if cut.module not in parts]
        if missing:
            raise ModelError(f"{network.name}: has no module {missing[0]!r}, behind which it was cut")
        self.network, self.cuts, self.inputs = network, tuple(cuts), dict(inputs)
        self.blocks = [*(parts[cut.module] for cut in cuts), network.module]
        self.names = (*(cut.module for cut in cuts), "the end")
        self.work = (*(cut.work for cut in cuts), 1.0)

    @classmethod
    def of(cls, network: Network, inputs: Mapping[str, Tensor]) -> Segments:
        """All cuts of a network; ModelError where it has none."""
        cuts = _candidates(network, inputs)
        if not cuts:
            raise ModelError(f"{network.name}: no exit can stand in it: behind no module is one tensor all "
                             "that later layers read; put its parts into modules that each return one tensor")
        found = cuts if _hold(network, cuts, inputs) else [each for each in cuts
                                                           if _hold(network, [each], inputs)]
        if not found:
            raise ModelError(f"{network.name}: no exit can stand in it: when samples leave behind "
                             f"{cuts[-1].module!r}, the others' answers change or fail; take sizes from the "
                             "tensor at hand (x.shape[0]), and nothing from the batch as a whole")
        return cls(network, found, _shapes(inputs))

    def run(self, inputs: Mapping[str, Tensor], after: Sequence[int], behind: Behind) -> Tensor | None:
        """The answer to the samples that come to the end; None where none does.

        behind: called with the place in ``after`` and what a head reads there, [samples, numbers]; it says
        which samples go on (None: all).
        """
        try:
            with self._watched(after, behind):
                return self.network.form.answer(call(self.network.module, inputs, {}), inputs)
        except _Left:
            return None

    def taught(self, student: Callable[[Mapping[str, Tensor]], Any], inputs: Mapping[str, Tensor],
               after: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """The answer of a student of the network, and what heads read of its states."""
        caught: list[Tensor] = []
        with self._watched(after, lambda _, read: caught.append(read)):
            answer = self.network.form.answer(student(inputs), inputs)
        return answer, caught

    def units(self, numbers: int) -> int:
        """Hidden units of a head that reads so many numbers."""
        return min(numbers, INSIDE)

    @contextmanager
    def _watched(self, after: Sequence[int], behind: Behind) -> Iterator[None]:
        def hook(place: int) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
            def leave(part: nn.Module, args: Any, state: Tensor) -> Tensor | None:
                stay = behind(place, places_read(state))
                if stay is not None and not len(stay):
                    raise _Left
                return None if stay is None else state[stay]
            return leave

        with hooked((self.blocks[block], hook(place)) for place, block in enumerate(after)):
            yield


def places_read(state: Float[Tensor, "samples channels *places"]) -> Float[Tensor, "samples numbers"]:
    """What a head reads of a state: the mean of each cell, or all numbers where it has no places."""
    if state.ndim > 2:
        state = state.unsqueeze(2) if state.ndim == 3 else state
        grid = next((cells for cells in GRIDS if cells * cells * state.shape[1] <= READ), 1)
        sides = state.shape[2:]
        stride = [max(1, side // grid) for side in sides]
        size = [side - (min(side, grid) - 1) * step for side, step in zip(sides, stride, strict=True)]
        state = nn.functional.avg_pool2d(state, size, stride).flatten(1)
    return nn.functional.layer_norm(state, state.shape[1:])


def _shapes(inputs: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(values.shape[1:]) for name, values in inputs.items()}


# ---- where cuts are

class _Watch(TorchFunctionMode):
    """When tensors that depend on the inputs came to be, and when they were read last."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.clock, self.kept = 0, list(inputs.values())  # kept, so that no id is used twice
        self.born, self.read = {id(each): 0 for each in self.kept}, Counter[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.clock += 1
        given = [id(each) for each in tree_leaves((args, kwargs)) if id(each) in self.born]
        self.read.update(dict.fromkeys(given, 0))
        for each in given:
            self.read[each] = self.clock
        for each in tree_leaves(out) if given else ():
            if isinstance(each, Tensor) and id(each) not in self.born:
                self.born[id(each)] = self.clock
                self.kept.append(each)
        return out

    def carries_all(self, state: int, clock: int) -> bool:
        """Whether of all tensors that there were at a time only one was read later."""
        return all(self.read[each] <= clock for each, born in self.born.items()
                   if born <= clock and each != state)


@dataclass(frozen=True)
class _Seen:
    """The output of a module: which tensor, when, after how many multiplications."""

    module: str
    state: int
    clock: int
    work: float


@torch.no_grad()
def _candidates(network: Network, inputs: Mapping[str, Tensor]) -> list[Cut]:
    """The last module behind every layer where one tensor carries everything; layers must follow."""
    inputs = {name: values[:2].clone() for name, values in inputs.items()}
    watch, calls, seen = _Watch(inputs), Counter[str](), list[_Seen]()
    count = len(next(iter(inputs.values())))
    allowed = {2, 4} | {3 for part in network.module.modules() if isinstance(part, nn.Conv1d)}
    with counting(network.module) as work:

        def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def look(part: nn.Module, args: Any, out: Any) -> None:
                calls[name] += 1
                if isinstance(out, Tensor) and out.ndim in allowed and len(out) == count:
                    seen.append(_Seen(name, id(out), watch.clock, work.total))
            return look

        with hooked((part, hook(name)) for name, part in network.module.named_modules() if name), watch:
            network.run(inputs)
        total = work.total
    last = {each.work: each for each in seen if 0 < each.work < total and calls[each.module] == 1
            and each.state in watch.born and watch.carries_all(each.state, each.clock)}
    return [Cut(each.module, work / total) for work, each in sorted(last.items())]


@torch.no_grad()
def _hold(network: Network, cuts: Sequence[Cut], inputs: Mapping[str, Tensor]) -> bool:
    """Whether the others' answers stay what they are when a sample leaves at every cut."""
    count = len(cuts) + 2
    some = {name: values[torch.arange(count) % len(values)] for name, values in inputs.items()}
    whole, segments = network.run(some), Segments(network, cuts, _shapes(inputs))

    def first(_: int, read: Tensor) -> Tensor:
        return torch.arange(1, len(read))

    try:
        found = segments.run(some, range(len(cuts)), first)
    except Exception:  # noqa: BLE001  whatever the network's code trips over when the batch shrinks
        return False
    wanted = whole[len(cuts):]
    close = 1e-4 * float(wanted.abs().max())
    return found is not None and found.shape == wanted.shape and torch.allclose(found, wanted, 1e-3, close)
