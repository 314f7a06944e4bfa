"""Take out whole neurons or attention heads, and let those that stay do their work.

Units u (a neuron; a key-value head with its queries; one of these queries) write channels x_u that one
matrix reads, y = sum_u W_u x_u. With the inputs' second moment G = X X^T / T, f_i what an error of output i
costs (1, or the Fisher), and g_t the gradient at y_t of -log p of a token drawn from the model's own
prediction, leaving u out costs

    magnitude    sqrt(|writers of u|^2 + |W_u|^2)                   data-free
    activation   sqrt(tr G_uu)                                       how loud the unit is
    wanda        sqrt(tr W_u G_uu W_u^T)                             the part of y that goes
    fisher       1/2 sum_i f_i W_u,i G_uu W_u,i^T                    the same in nats
    taylor       1/2 E_t (g_t^T W_u x_u,t)^2                         in nats, g and x taken together
    obs          1/2 sum_i f_i W_u,i ((G^-1)_uu)^-1 W_u,i^T          what is left when the others step in

The units that cost least go, as many in every block, so that any runtime loads what is left; of queries as
many from all that share keys and values. With spread ``global`` neurons go wherever they cost the fewest
nats, down to ``floor`` of a block's: llama.cpp loads a width for each block of Llama and Mistral.
``compensate`` then refits the reader by least squares on the kept columns K,

    W' = W G_:K (G_KK)^-1,

which is what ``obs`` assumes and what makes most of the difference in practice.

Paper: He et al. 2017, "Channel Pruning", eq. 3 (the refit); Kurtic et al. 2023, "ZipLM", eq. 3 (obs);
Muralidharan et al. 2024, "Minitron" (activation); Ma et al. 2023, "LLM-Pruner" (heads with their group);
Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning", eq. 9 (taylor).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rarefy.core.errors import EditError, RecipeError, did_you_mean
from rarefy.core.structure import UNITS, UnitGroup
from rarefy.numerics.linear import damped

PRICED = ("fisher", "taylor", "obs")  # criteria in nats
CRITERIA = ("magnitude", "activation", "wanda", "fisher", "taylor", "obs")


@dataclass(frozen=True)
class Units:
    """Leave out a share of the units of every block.

    Shapes: scores [units]; refit [kept columns, in]. units: neurons, heads (with keys and values) or queries.
    ratio: the share that goes. spread: uniform or global. floor: the share of every block that stays under
    global. multiple: what stays is rounded up to a multiple of this many channels, as
    block formats need whole blocks. compensate: refit the reader. damping: share of the Gram's mean diagonal
    added to it.
    """

    units: str = "neurons"
    ratio: float = 0.25
    criterion: str = "obs"
    spread: str = "uniform"
    floor: float = 0.25
    compensate: bool = True
    multiple: int = 32
    damping: float = 0.01

    scope: ClassVar[str] = "structure"
    edits: ClassVar[tuple[type[UnitGroup], ...]] = (UnitGroup,)
    beats: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.units not in UNITS:
            raise RecipeError(f"units {self.units!r}: choose {', '.join(UNITS)}")
        if self.criterion not in CRITERIA:
            raise RecipeError(f"criterion {self.criterion!r}: choose one of {', '.join(CRITERIA)}"
                              f"{did_you_mean(self.criterion, list(CRITERIA))}")
        if not 0 < self.ratio < 1:
            raise RecipeError(f"ratio {self.ratio}: must be a share above 0 and below 1")
        if self.spread not in ("uniform", "global"):
            raise RecipeError(f"spread {self.spread!r}: choose uniform or global")
        if self.spread == "global" and (self.units != "neurons" or self.criterion not in PRICED):
            raise RecipeError(f"spread global of {self.units} by {self.criterion}: only neurons differ in "
                              f"number, and only these costs compare across blocks: {', '.join(PRICED)}")
        if not 0 <= self.floor < 1:
            raise RecipeError(f"floor {self.floor}: must be a share below 1")
        if self.multiple < 1:
            raise RecipeError(f"multiple {self.multiple}: must be 1 or more")

    @property
    def needs(self) -> frozenset[str]:
        """The Gram unless nothing is looked at, the Fisher where errors are priced with it, removals."""
        gram = {"gram"} if self.compensate or self.criterion not in ("magnitude", "taylor") else set()
        priced = {"fisher": {"fisher"}, "obs": {"fisher"}, "taylor": {"removal"}}
        return frozenset(gram | priced.get(self.criterion, set()))

    def count(self, group: UnitGroup) -> int:
        """How many units stay."""
        width = group.unit.numel() // group.units
        step = math.lcm(max(1, -(-self.multiple // width)), group.runs)
        wanted = round(group.units * (1 - self.ratio))
        kept = -(-wanted // step) * step
        asked = f"{group.site}: a ratio of {self.ratio:g} of {group.units} {group.role}"
        if kept >= group.units:
            raise EditError(f"{asked} leaves none to take out in steps of {step}; raise ratio or lower "
                            f"multiple={self.multiple}")
        if wanted < 1:
            raise EditError(f"{asked} leaves none that stay; lower it")
        return kept

    def counts(self, scores: tuple[Float[Tensor, " units"], ...]) -> tuple[int, ...]:
        """How many units stay in every block when the cheapest of all go."""
        least = [max(1, round(cost.numel() * self.floor)) for cost in scores]
        queue = sorted((float(value), block)
                       for block, (cost, stay) in enumerate(zip(scores, least, strict=True))
                       for value in cost.sort().values[:cost.numel() - stay])
        counts = [cost.numel() for cost in scores]
        for _, block in queue[:round(self.ratio * sum(counts))]:
            counts[block] -= 1
        return tuple(min(cost.numel(), -(-count // self.multiple) * self.multiple)
                     for count, cost in zip(counts, scores, strict=True))

    def scores(self, group: UnitGroup) -> Float[Tensor, " units"]:
        """What leaving each unit out costs."""
        if self.criterion == "magnitude":
            return (group.written.square() + group.read.square()).sqrt()
        if self.criterion == "taylor":
            assert group.removal is not None
            return group.removal
        assert group.evidence is not None
        G = group.evidence.gram / max(group.evidence.tokens, 1)
        if self.criterion == "activation":
            return torch.zeros(group.units).index_add_(0, group.unit, G.diagonal()).sqrt()
        priced = self.criterion in ("fisher", "obs")
        f = group.evidence.fisher if priced else torch.ones(group.reader.shape[0])
        assert f is not None
        if self.criterion == "obs":
            G = torch.cholesky_inverse(torch.linalg.cholesky(damped(G, self.damping)))
        scores = torch.stack([_cost(group.reader[:, group.unit == u], G[group.unit == u][:, group.unit == u],
                                    f, inverted=self.criterion == "obs") for u in range(group.units)]) \
            if group.units < group.unit.numel() else _single(group.reader, G.diagonal(), f, self.criterion)
        return scores / 2 if priced else scores.sqrt()

    def refit(self, group: UnitGroup, kept: Int64[Tensor, " kept"]) -> Float[Tensor, "columns in_"] | None:
        """``((G_KK)^-1 G_K:)``: the kept inputs' best linear account of all of them."""
        if not self.compensate:
            return None
        assert group.evidence is not None
        G = damped(group.evidence.gram / max(group.evidence.tokens, 1), self.damping)
        K = torch.isin(group.unit, kept).nonzero()[:, 0]
        factor = torch.linalg.cholesky(G[K][:, K])
        return torch.cholesky_solve(G[K], factor).float()


def _cost(W: Tensor, G: Tensor, f: Tensor, *, inverted: bool) -> Tensor:
    """sum_i f_i W_i G W_i^T for the columns of one unit, G or its inverse."""
    W = W.to(G.dtype)
    image = torch.linalg.solve(G, W.T).T if inverted else W @ G
    return ((image * W).sum(1) * f).sum().float()


def _single(W: Tensor, g: Tensor, f: Tensor, criterion: str) -> Tensor:
    """The same where every unit is one column."""
    energy = f @ W.square()
    return (energy / g if criterion == "obs" else energy * g).float()
