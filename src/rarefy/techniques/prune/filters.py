"""Take out whole channels of any network: filters, the BatchNorm behind them, and all that reads them.

Channels that residual connections add are one group and go together. The states of a recurrent layer
that goes one way are channels, too, as many in each of its layers. What channel c costs, over all weights w
that write or read it, all inputs x_c of what reads it, and the answer z:

    l1       sum |w|                                     data-free
    l2       sqrt(sum w^2)
    taylor   1/2 E[(sum x_c dL/dx_c)^2]                  the predicted KL, in nats per sample

Uniform: the same share of every group. Global: the channels that cost least per multiplication that they
save, wherever they are, until ``ratio`` of the multiplications that could go are gone (each channel counted
as if it went alone). ``compensate`` refits the reader, where a group has a single one, to its inputs on the
kept columns K, W' = W G_:K (G_KK)^-1; then the statistics of BatchNorm are taken anew.

Paper: Li et al. 2017, "Pruning Filters for Efficient ConvNets" (l1); Theis et al. 2018, "Faster gaze
prediction with dense networks and Fisher pruning", eq. 9 and 13 (taylor, per multiplication); Fang et al.
2023, "DepGraph" (groups); He et al. 2017, "Channel Pruning", eq. 3 (the refit).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rarefy.core.errors import EditError, RecipeError, did_you_mean
from rarefy.core.structure import Channels
from rarefy.numerics.linear import damped

CRITERIA = ("l1", "l2", "taylor")


@dataclass(frozen=True)
class Filters:
    """Leave out a share of the channels.

    Shapes: keep gives [kept] for each group; refit [kept columns, in]. ratio: the share that goes. spread:
    uniform or global. floor: the share of every group that stays under global. multiple: what stays is a
    multiple of this many channels. ignore: modules whose outputs all stay. compensate: refit single readers.
    damping: share of the Gram's mean diagonal added to it.
    """

    ratio: float = 0.5
    criterion: str = "taylor"
    spread: str = "uniform"
    floor: float = 0.1
    multiple: int = 1
    ignore: tuple[str, ...] = ()
    compensate: bool = True
    damping: float = 0.01

    scope: ClassVar[str] = "structure"
    edits: ClassVar[tuple[type[Channels], ...]] = (Channels,)
    beats: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise RecipeError(f"criterion {self.criterion!r}: choose one of {', '.join(CRITERIA)}"
                              f"{did_you_mean(self.criterion, list(CRITERIA))}")
        if self.spread not in ("uniform", "global"):
            raise RecipeError(f"spread {self.spread!r}: choose uniform or global")
        if self.spread == "global" and self.criterion != "taylor":
            raise RecipeError(f"spread global with criterion {self.criterion}: norms of different layers "
                              "cannot be compared; choose taylor")
        if not 0 < self.ratio < 1 or not 0 <= self.floor < 1:
            raise RecipeError(f"ratio {self.ratio}, floor {self.floor}: must be shares below 1, ratio "
                              "above 0")
        if self.multiple < 1:
            raise RecipeError(f"multiple {self.multiple}: must be 1 or more")

    @property
    def needs(self) -> frozenset[str]:
        """removal: the backward pass; gram: of single readers."""
        return frozenset({"removal"} if self.criterion == "taylor" else set()) | frozenset(
            {"gram"} if self.compensate else set())

    def scores(self, group: Channels) -> Float[Tensor, " channels"]:
        """What leaving each channel out costs."""
        if self.criterion == "taylor":
            assert group.removal is not None
            return group.removal
        return group.absolute if self.criterion == "l1" else group.square.sqrt()

    def keep(self, groups: tuple[Channels, ...]) -> tuple[Int64[Tensor, " kept"], ...]:
        """The channels that stay in every group, sorted."""
        scores = [self.scores(group) for group in groups]
        for group, cost in zip(groups, scores, strict=True):
            if not bool(torch.isfinite(cost).all()):
                raise EditError(f"{group.site}: the cost of its channels is not finite; check the network")
        if self.spread == "global":
            counts = self._global(groups, scores)
        else:
            counts = [round(group.count * (1 - self.ratio)) for group in groups]
        kept = [min(group.count, max(1, -(-count // self.multiple)) * self.multiple)
                for group, count in zip(groups, counts, strict=True)]
        if all(count == group.count for group, count in zip(groups, kept, strict=True)):
            raise EditError(f"a ratio of {self.ratio:g} leaves nothing to take out in steps of "
                            f"{self.multiple}; raise ratio or lower multiple")
        return tuple(cost.argsort(descending=True, stable=True)[:count].sort().values
                     for cost, count in zip(scores, kept, strict=True))

    def _global(self, groups: tuple[Channels, ...], scores: list[Tensor]) -> list[int]:
        """How many stay in every group when the cheapest go, wherever they are."""
        least = [max(1, round(group.count * self.floor)) for group in groups]
        queue = sorted((float(value) / group.work, place) for place, (group, cost, stay)
                       in enumerate(zip(groups, scores, least, strict=True))
                       for value in cost.sort().values[:group.count - stay])
        wanted = self.ratio * sum(group.work * group.count for group in groups)
        counts = [group.count for group in groups]
        for _, place in queue:
            if wanted <= 0:
                break
            counts[place] -= 1
            wanted -= groups[place].work
        return counts

    def refit(self, group: Channels, kept: Int64[Tensor, " kept"]) -> Float[Tensor, "columns in_"] | None:
        """``(G_KK)^-1 G_K:``, for a single reader whose inputs were seen."""
        if not self.compensate or group.evidence is None or group.unit is None:
            return None
        G = damped(group.evidence.gram / max(group.evidence.tokens, 1), self.damping)
        K = torch.isin(group.unit, kept).nonzero()[:, 0]
        factor = torch.linalg.cholesky(G[K][:, K])
        return torch.cholesky_solve(G[K], factor).float()
