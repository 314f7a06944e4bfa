"""What arrives at matrices, channel by channel: for techniques that rescale channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rarefy.calibration.evidence import Stream
from rarefy.calibration.examples import Examples
from rarefy.calibration.observe import BATCH, positions
from rarefy.core.axes import Inputs
from rarefy.core.nouns import Evidence
from rarefy.models.form import MASK
from rarefy.models.map import Site
from rarefy.models.network import Network


@torch.no_grad()
def block_inputs(stream: Stream, index: int, paths: set[str]) -> dict[str, Inputs]:
    """Second moments, mean and largest magnitudes at the named sites of block ``index``."""
    sums = {path: _Sums() for path in paths}

    def observe(path: str, x: Tensor, y: Tensor) -> None:
        if path in sums:
            sums[path].add(x)

    tensors = stream.runner.load(index)
    for hidden, context in zip(stream.hidden, stream.contexts, strict=True):
        stream.runner.block(index, hidden, context, observe, tensors)
    return {path: each.inputs() for path, each in sums.items()}


@torch.no_grad()
def head_inputs(stream: Stream) -> Inputs:
    """The same at the head, once the stream has passed the last block."""
    sums = _Sums()
    for hidden in stream.hidden:
        sums.add(stream.runner.norm(hidden))
    return sums.inputs()


@torch.no_grad()
def network_inputs(network: Network, examples: Examples, paths: set[str]) -> dict[str, Inputs]:
    """The same at linears of a network that is no language model, padding left out."""
    sums = {path: _Sums() for path in paths}
    mask: Tensor | None = None

    def watch(site: Site, module: nn.Module, x: Tensor, y: Tensor) -> None:
        sums[site.path].add(positions(x, mask))

    with network.watched({path: network.map.by_path[path] for path in paths}, watch):
        for batch in examples.by_length().batches(BATCH):
            mask = batch.get(MASK)
            network.run(batch)
    return {path: each.inputs() for path, each in sums.items()}


class _Sums:
    """Running sums over batches [.., width]."""

    def __init__(self) -> None:
        self.count = 0
        self.gram = self.total = self.peak = torch.zeros(())

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        size = rows.abs()
        self.gram = self.gram + rows.T @ rows
        self.total = self.total + size.sum(0)
        self.peak = torch.maximum(self.peak, size.amax(0))
        self.count += rows.shape[0]

    def inputs(self) -> Inputs:
        return Inputs(Evidence(self.gram, self.count), self.total / max(self.count, 1), self.peak)
