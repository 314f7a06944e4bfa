"""How much a network computes: multiplications in its linears and convolutions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from rarefy.models.hooks import hooked
from rarefy.models.network import Network


class Count:
    """Multiplications of one sample so far."""

    total = 0.0


@contextmanager
def counting(module: nn.Module) -> Iterator[Count]:
    """Counts while this lasts, layer by layer as they are called."""
    count = Count()

    def called(part: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        weight = part.get_parameter("weight")
        count.total += out.numel() / len(out) / weight.shape[0] * weight.numel()

    with hooked((part, called) for part in module.modules()
                if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d)):
        yield count


def multiplications(network: Network, inputs: Mapping[str, Tensor]) -> float:
    """Of one sample."""
    with counting(network.module) as count:
        network.run(inputs)
    return count.total
