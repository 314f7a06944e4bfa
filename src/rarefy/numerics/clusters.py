"""Clusters: few values, or few short vectors, that stand for many, each entry counting by its weight.

Lloyd's alternation lowers ``sum_i h_i (w_i - c_{a(i)})^2`` until no entry changes its cluster: every entry
goes to its nearest center, every center to the weighted mean of its entries.

On a line all is quick once the values are sorted: a cluster is an interval between midpoints of neighbouring
centers, and its mean a difference of two prefix sums, so a round costs k searches whatever the number of
values. Vectors are compared with all centers, two matrix products a chunk, and start from k-means++ seeds.

Paper: Lloyd 1982, "Least squares quantization in PCM"; Arthur & Vassilvitskii 2007, "k-means++".
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

EXACT = 1 << 24  # values up to which each one is looked at; beyond, bins are
BINS = 1 << 20
CHUNK = 1 << 20  # entries that are looked at at once
CACHED = 1 << 18  # distances that are made at once, so that they stay in cache
SEEN = 1 << 18   # vectors that centers are fitted to; all are assigned
TOLERANCE = 1e-4  # relative gain of a round below which vectors are left alone


# ---- on a line

def points(values: Float[Tensor, "rows columns"], columns: Float[Tensor, " columns"],
           rows: Float[Tensor, " rows"] | None,
           keep: Bool[Tensor, "rows columns"] | None) -> tuple[Tensor, Tensor]:
    """The values that count, ascending, and how much each does: ``columns[j] * rows[i]``, 0 if not kept."""
    if values.numel() > EXACT:
        return _binned(values, columns, rows, keep)
    parts = [(value[mass > 0], mass[mass > 0]) for value, mass in _weighed(values, columns, rows, keep)]
    found, order = torch.cat([value for value, _ in parts]).sort(stable=True)
    return found.double(), torch.cat([mass for _, mass in parts])[order].double()


def _weighed(values: Tensor, columns: Tensor, rows: Tensor | None,
             keep: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Values and masses, some rows at a time, flat."""
    step = max(1, CHUNK // values.shape[1])
    for start in range(0, values.shape[0], step):
        part = slice(start, start + step)
        mass = columns.expand(values[part].shape)
        if rows is not None:
            mass = mass * rows[part, None]
        if keep is not None:
            mass = mass * keep[part]
        yield values[part].reshape(-1), mass.reshape(-1)


def _binned(values: Tensor, columns: Tensor, rows: Tensor | None,
            keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same of very many values: those in one of a million bins count together, at their mean."""
    low, high = (float(value) for value in values.aminmax())
    width = (high - low) / BINS or 1.0
    total, first = torch.zeros(BINS, dtype=torch.float64), torch.zeros(BINS, dtype=torch.float64)
    for value, mass in _weighed(values, columns, rows, keep):
        place = ((value.double() - low) / width).long().clamp_max_(BINS - 1)
        mass = mass.double()
        total.index_add_(0, place, mass)
        first.index_add_(0, place, mass * value)
    used = total > 0
    return first[used] / total[used], total[used]


def starts(values: Float[Tensor, " n"], mass: Float[Tensor, " n"], count: int, how: str,
           generator: torch.Generator) -> Float[Tensor, " count"]:
    """First centers, ascending: ``linear`` in value, in ``density`` of the mass, or ``random`` values."""
    if how == "linear":
        return torch.linspace(float(values[0]), float(values[-1]), count, dtype=torch.float64)
    if how == "density":
        share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        summed = mass.cumsum(0)
        return values[torch.searchsorted(summed, share * summed[-1]).clamp_max(values.numel() - 1)]
    picked = torch.randperm(values.numel(), generator=generator)[:count]
    return values[picked.sort()[0]]


def settle(values: Float[Tensor, " n"], mass: Float[Tensor, " n"], centers: Float[Tensor, " count"],
           rounds: int) -> Float[Tensor, " used"]:
    """Lloyd's alternation from ``centers`` on sorted values; centers that no value is near to are dropped."""
    total, first = (torch.cat([each.new_zeros(1), each.cumsum(0)]) for each in (mass, mass * values))
    edges = torch.empty(0, dtype=torch.int64)
    for _ in range(rounds):
        before = edges
        edges = torch.searchsorted(values, midpoints(centers))
        if torch.equal(before, edges):
            break
        ends = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), values.numel())])
        held, moment = total[ends].diff(), first[ends].diff()
        centers = torch.where(held > 0, moment / held.clamp_min(1e-300), centers)
    ends = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), values.numel())])
    return centers[ends.diff() > 0]


def midpoints(centers: Tensor) -> Tensor:
    """Where one center's values end and the next one's begin."""
    return (centers[1:] + centers[:-1]) / 2


def assigned(values: Float[Tensor, "rows columns"], centers: Float[Tensor, " count"]) -> Tensor:
    """The index of the nearest of ascending centers, uint8 if it fits, else int32."""
    index = torch.empty(values.shape, dtype=torch.uint8 if centers.numel() <= 256 else torch.int32)
    edges = midpoints(centers.float())
    step = max(1, CHUNK // values.shape[1])
    for start in range(0, values.shape[0], step):
        part = slice(start, start + step)
        index[part] = torch.bucketize(values[part], edges).to(index.dtype)
    return index


# ---- vectors

def vector_centers(vectors: Float[Tensor, "n d"], weights: Float[Tensor, "n d"], count: int,
                   rounds: int, generator: torch.Generator) -> Float[Tensor, "used d"]:
    """At most ``count`` centers of vectors whose every component has its own weight."""
    if vectors.shape[0] > SEEN:
        picked = torch.randperm(vectors.shape[0], generator=generator)[:SEEN]
        vectors, weights = vectors[picked], weights[picked]
    centers = _seeds(vectors, weights, count, generator)
    last = float("inf")
    for _ in range(rounds):
        index, cost = nearest_center(vectors, weights, centers)
        total = float(cost.double().sum())
        if total >= last * (1 - TOLERANCE):
            break
        last = total
        centers = _means(vectors, weights, index, centers)
        empty = (torch.bincount(index, minlength=centers.shape[0]) == 0).nonzero().view(-1)
        if empty.numel():  # they go where the error is largest
            centers[empty] = vectors[cost.argsort(descending=True, stable=True)[:empty.numel()]]
    return centers


def nearest_center(vectors: Float[Tensor, "n d"], weights: Float[Tensor, "n d"],
                   centers: Float[Tensor, "k d"]) -> tuple[Int64[Tensor, " n"], Float[Tensor, " n"]]:
    """The center with the least ``sum_t h_t (w_t - c_t)^2`` for every vector, and that sum."""
    index = torch.empty(vectors.shape[0], dtype=torch.int64)
    cost = torch.empty(vectors.shape[0])
    both = torch.cat([centers.square(), -2 * centers], 1).T.contiguous()
    step = max(1, CACHED // centers.shape[0])
    for start in range(0, vectors.shape[0], step):
        part = slice(start, start + step)
        w, h = vectors[part], weights[part]
        found = (torch.cat([h, h * w], 1) @ both).argmin(1)  # but for what is the same for all centers
        index[part] = found
        cost[part] = (h * (w - centers[found]).square()).sum(1)
    return index, cost


def _means(vectors: Tensor, weights: Tensor, index: Tensor, centers: Tensor) -> Tensor:
    held = torch.zeros(centers.shape, dtype=torch.float64).index_add_(0, index, weights.double())
    moment = torch.zeros_like(held).index_add_(0, index, (weights * vectors).double())
    return torch.where(held > 0, moment / held.clamp_min(1e-300), centers.double()).float()


def _seeds(vectors: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next center is a vector drawn in proportion to its error under those before."""
    centers: list[Tensor] = []
    cost = weights.sum(1)
    while len(centers) < count and float(cost.max()) > 0:
        summed = cost.double().cumsum(0)
        draw = torch.rand(1, generator=generator, dtype=torch.float64) * summed[-1]
        at = int(torch.searchsorted(summed, draw, right=True).clamp_max(cost.numel() - 1))
        error = (weights * (vectors - vectors[at]).square()).sum(1)
        cost = error if not centers else torch.minimum(cost, error)
        centers.append(vectors[at])
    return torch.stack(centers) if centers else vectors[:1]
