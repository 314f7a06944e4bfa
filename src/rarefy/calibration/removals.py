"""What it costs to take channels out of a network: the answer is asked, one backward pass for all of them.

Leaving channel c out of everything that reads it takes x_c to zero there. With v a random vector whose
covariance is the Hessian of the divergence (``observe.direction``), to first order in x,

    D_c = 1/2 E_v[ (v^T dz)^2 ],      v^T dz = - sum over readers and places of x_c d(v^T z)/dx_c,

in nats (or 1 - cosine) per sample. The sum is squared per sample, so what two places do may cancel.

Paper: Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning", eq. 9 (squares of
summed gradients times activations); Molchanov et al. 2017, "Pruning CNNs for resource efficient inference".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rarefy.calibration.examples import Examples
from rarefy.calibration.observe import BATCH, direction
from rarefy.models.hooks import hooked
from rarefy.models.narrowed import ChannelGroup
from rarefy.models.network import Network


def removals(network: Network, groups: Sequence[ChannelGroup], examples: Examples,
             generator: torch.Generator) -> dict[str, Float[Tensor, " channels"]]:
    """Predicted divergence per sample when one channel goes, by root of its group."""
    totals = {group.root: torch.zeros(group.count) for group in groups}
    for inputs in examples.by_length().batches(BATCH):
        with torch.enable_grad(), _entering(network, groups) as entered:
            answer = network.run(inputs)
            vector = direction(answer.detach(), network.form, generator)
            flat = [(group, place, x) for group, place, x in entered]
            pulled = torch.autograd.grad(answer, [x for _, _, x in flat], vector, allow_unused=True)
        sums = {group.root: torch.zeros(len(answer), group.count) for group in groups}
        for (group, place, x), gradient in zip(flat, pulled, strict=True):
            if gradient is not None:
                sums[group.root].index_add_(1, place.unit, _per_position(x.detach() * gradient, place.unit))
        for root, values in sums.items():
            totals[root] += values.square().sum(0) / 2
    return {root: values / len(examples) for root, values in totals.items()}


def work(network: Network, groups: Sequence[ChannelGroup], inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Multiplications of one sample that go with one channel of each group, by root."""
    places: dict[str, float] = {}
    modules = {name: part for name, part in network.module.named_modules()
               if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d)}

    def hook(name: str) -> Any:
        def call(part: nn.Module, args: Any, out: Tensor) -> None:
            width = part.out_features if isinstance(part, nn.Linear) else out.shape[1]
            places[name] = places.get(name, 0.0) + out.numel() / width / len(out)
        return call

    with hooked((part, hook(name)) for name, part in modules.items()):
        network.run(inputs)
    found = {}
    for group in groups:
        total = 0.0
        for place in (*group.writers, *group.readers):
            name = place.path.removesuffix(".weight")
            if name in modules:
                total += places.get(name, 0.0) * modules[name].get_parameter("weight").numel()
        found[group.root] = total / group.count
    return found


def _per_position(values: Tensor, unit: Tensor) -> Tensor:
    """[samples, positions of the channel axis], summed over everything else."""
    if values.ndim > 2 and values.shape[1] == unit.numel():
        return values.flatten(2).sum(2)
    return values if values.ndim == 2 else values.flatten(1, -2).sum(1)


@contextmanager
def _entering(network: Network, groups: Sequence[ChannelGroup]) -> Any:
    """While this lasts, what enters the readers of every group is caught as (group, place, input)."""
    caught: list[tuple[ChannelGroup, Any, Tensor]] = []
    anchor = torch.zeros((), requires_grad=True)
    modules = dict(network.module.named_modules())

    def hook(group: ChannelGroup, place: Any) -> Any:
        def call(part: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0] + anchor
            caught.append((group, place, x))
            return (x, *args[1:])
        return call

    with hooked(before=[(modules[place.path.removesuffix(".weight")], hook(group, place))
                        for group in groups for place in group.readers]):
        yield caught
