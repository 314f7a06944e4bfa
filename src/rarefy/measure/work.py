"""How much a network computes: multiplications in its linears and convolutions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from rarefy.models.network import Network


class Count:
    """Multiplications of one sample so far."""

    total = 0.0


@contextmanager
def counting(module: nn.Module) -> Iterator[Count]:
    """Counts while this lasts, layer by layer as they are called."""
    count, hooks = Count(), []

    def called(part: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        weight = part.get_parameter("weight")
        count.total += out.numel() / len(out) / weight.shape[0] * weight.numel()

    try:
        for part in module.modules():
            if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d):
                hooks.append(part.register_forward_hook(called))
        yield count
    finally:
        for each in hooks:
            each.remove()


def multiplications(network: Network, inputs: Mapping[str, Tensor]) -> float:
    """Of one sample."""
    with counting(network.module) as count:
        network.run(inputs)
    return count.total
