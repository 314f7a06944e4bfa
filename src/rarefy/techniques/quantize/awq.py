"""Scale up the channels that carry large activations, so that their weights are rounded more finely.

A factor s_j per input channel moves from the inputs into the weights, which changes nothing until they are
rounded:

    W x = (W diag(s)) (diag(s)^-1 x),      s_j = (mean_t |x_tj|)^alpha.

Within a group of weights that share a scale a column multiplied by s_j keeps a relative error that is s_j
times smaller. What divides the inputs is folded into whatever writes them (a norm's gain, the rows of v or
up), so nothing is left to do when the network runs. One alpha per group of matrices that read the same
channels is searched on a grid, by the true error of their outputs,

    min_alpha  sum_W || (round(W diag(s)) diag(s)^-1 - W) X ||^2,

with the rounding that follows; alpha = 0 changes nothing and is in the search. Factors are divided by
their geometric mean, which no rounding notices.

Paper: Lin et al. 2024, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
section 3.2, eq. 4 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.core.axes import AxisGroup, Change, Reader
from rarefy.core.errors import EditError
from rarefy.core.nodes import Quantized
from rarefy.numerics.grids import Grid
from rarefy.numerics.rounding import encode, fit

ROWS = 512  # rows of a matrix whose error is measured: errors add up over rows, and a share of them will do


@dataclass(frozen=True)
class AWQ:
    """Activation-aware scaling of channels.

    Shapes: factors [channels] for every group; no weight changes its shape. grid: what all readers will be
    rounded to (none: what follows in the recipe says). steps: how many values of alpha, from 0 up to but
    without 1, are tried.
    """

    grid: Grid | None = None
    steps: int = 20

    scope: ClassVar[str] = "axes"
    edits: ClassVar[tuple[type[AxisGroup], ...]] = (AxisGroup,)
    needs: ClassVar[frozenset[str]] = frozenset({"inputs"})
    beats: ClassVar[str] = "rtn"
    unties: ClassVar[bool] = False

    def transform(self, group: AxisGroup, generator: torch.Generator) -> Change:
        if self.steps < 2:
            raise EditError(f"{group.site}: steps={self.steps} tries no alpha but 0; use 20")
        rounded = [(reader, grid) for reader in group.readers
                   if (grid := self.grid or reader.grid) is not None]
        if group.barred:
            return Change(note=f"left as it is: {group.barrier}")
        if not group.scales or not rounded:
            return Change()
        for reader, grid in rounded:
            grid.check(reader.site, reader.weight.shape[1])
        mean = group.pooled([reader.inputs.mean for reader in group.readers], "mean")
        losses: list[float] = []
        for step in range(self.steps):
            factors = _factors(mean, step / self.steps)
            losses.append(sum(_error(reader, grid, factors) for reader, grid in rounded))
        best = min(range(self.steps), key=losses.__getitem__)
        if best == 0:
            return Change(note="alpha 0: rounding the channels as they are is best")
        gain = losses[best] / losses[0]
        return Change(factors=_factors(mean, best / self.steps),
                      note=f"alpha {best / self.steps:.2f}: {gain:.2f} of the error without")


def _factors(mean: Float[Tensor, " channels"], alpha: float) -> Float[Tensor, " channels"]:
    """mean^alpha over its geometric mean; 1 for channels that never carried anything."""
    logs = torch.where(mean > 0, mean, 1.0).log() * alpha
    seen = mean > 0
    logs = logs - logs[seen].mean() if bool(seen.any()) else logs
    return torch.where(seen, logs.exp(), 1.0)


def _error(reader: Reader, grid: Grid, factors: Float[Tensor, " channels"]) -> float:
    """Mean squared error of a reader's outputs per token and row, rounded under these factors."""
    rows = torch.linspace(0, reader.weight.shape[0] - 1, min(ROWS, reader.weight.shape[0])).long()
    weight, scale = reader.weight[rows], factors[reader.channel]
    evidence = reader.inputs.evidence
    importance = evidence.gram.diagonal() / max(evidence.tokens, 1) / scale.square()
    scaled = weight * scale
    found = fit(scaled, importance, grid)
    delta = Quantized.of(encode(scaled, found), found).dense() / scale - weight
    return evidence.error(delta) * reader.weight.shape[0] / len(rows)
