"""How sparse each weight becomes when a whole model shall be: one sparsity s, shared out.

    uniform   s_i = s
    global    s_i = share of |w| below t in weight i, one t for all:  sum_i n_i s_i = s sum_i n_i
    fisher    the same with fisher_i w_ij^2 H_jj in place of |w|: nats, wherever the weight is
    owl       s_b = s + 2 lambda (mean D - D_b) / (max D - min D),    D_b = share of the |w_ij| ||x_j|| of
              block b above M times their mean

``owl`` keeps more of the blocks that hold more outliers; its mean is weighted by size, so that the model ends
at s. All four need of a weight only how a few kinds of numbers are spread in it (``Statistics``), so that
one pass over the model, a weight at a time, is enough.

Paper: Yin et al. 2024, "Outlier Weighed Layerwise Sparsity (OWL)", section 3.2 (owl); LeCun et al. 1989,
"Optimal Brain Damage" (fisher); Tanaka et al. 2020, "Pruning neural networks without any data", section 4
(what one threshold does to a layer that it cuts through: hence the ceiling).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rarefy.core.errors import RecipeError, did_you_mean
from rarefy.core.nouns import Evidence, Step
from rarefy.core.pruning import Rule
from rarefy.numerics.patterns import NM

WAYS = ("uniform", "global", "fisher", "owl")
CEILING = 0.99           # no weight loses more: one that is cut through ends the network
OUTLIER, SWING = 5.0, 0.08  # owl's M and lambda
LOWEST, OCTAVES, STEPS = -40, 64, 7  # bins: 2^7 to the octave, from 2^-40 on
BINS = OCTAVES << STEPS
CHUNK = 1 << 22          # weights looked at at once


@dataclass(frozen=True, eq=False)
class Spread:
    """How non-negative numbers are spread: how many lie in each of ``BINS`` bins, and their sum. Adds up.

    Bins are as wide as the leading 7 bits of a float32's mantissa tell apart, under one percent.
    """

    counts: Int64[Tensor, " bins"]
    total: float

    @classmethod
    def of(cls, values: Tensor) -> Spread:
        place = (values.flatten().view(torch.int32) >> (23 - STEPS)) - ((127 + LOWEST) << STEPS)
        counts = torch.bincount(place.clamp_(0, BINS - 1), minlength=BINS)
        return cls(counts, float(values.sum(dtype=torch.float64)))

    def __add__(self, other: Spread) -> Spread:
        return Spread(self.counts + other.counts, self.total + other.total)

    @property
    def mean(self) -> float:
        return self.total / max(int(self.counts.sum()), 1)

    def above(self, border: float) -> float:
        """The share of the numbers above ``border``."""
        shares = self.counts.double().cumsum(0).numpy()
        return 1 - float(np.interp(border, _EDGES, np.append(0, shares)) / max(shares[-1], 1))


def _edges() -> np.ndarray:
    """The bins' borders, the lowest of them 0."""
    octave, step = np.divmod(np.arange(BINS + 1), 1 << STEPS)
    edges: np.ndarray = np.ldexp(1 + step / (1 << STEPS), octave + LOWEST)
    edges[0] = 0
    return edges


_EDGES = _edges()


@dataclass(frozen=True, eq=False)
class Statistics:
    """What sharing out needs of one weight.

    magnitude: |w|. activity: |w_ij| ||x_j||. saliency: fisher_i w_ij^2 H_jj. The last two are None where
    calibration evidence, or its Fisher, was not there.
    """

    weights: int
    magnitude: Spread
    activity: Spread | None = None
    saliency: Spread | None = None


def statistics(weight: Float[Tensor, "out in_"], evidence: Evidence | None = None) -> Statistics:
    """The statistics of one weight, a few rows at a time."""
    magnitude, activity, saliency = (Spread(torch.zeros(BINS, dtype=torch.int64), 0.0) for _ in range(3))
    energy = None if evidence is None else evidence.gram.diagonal() / max(evidence.tokens, 1)
    fisher = None if evidence is None else evidence.fisher
    for rows in torch.arange(weight.shape[0]).split(max(1, CHUNK // weight.shape[1])):
        size = weight[rows].abs()
        magnitude += Spread.of(size)
        if energy is not None:
            activity += Spread.of(size * energy.sqrt())
        if energy is not None and fisher is not None:
            saliency += Spread.of(size.square() * energy * fisher[rows, None])
    return Statistics(weight.numel(), magnitude, None if energy is None else activity,
                      None if fisher is None else saliency)


def allocate(how: str, sparsity: float, sites: Mapping[str, Statistics],
             groups: Mapping[str, Hashable]) -> dict[str, float]:
    """The sparsity of every site, such that ``sparsity`` of all their weights go.

    how: one of ``WAYS``. groups: which sites ``owl`` takes as one, the block of each; a site that is not
    named there is its own.
    """
    if not sites:
        return {}
    match how:
        case "uniform":
            return dict.fromkeys(sites, sparsity)
        case "global":
            return _one_threshold({site: found.magnitude for site, found in sites.items()}, sparsity)
        case "fisher":
            spreads = {site: _present(site, found.saliency, how, "fisher") for site, found in sites.items()}
            return _one_threshold(spreads, sparsity)
        case "owl":
            spreads = {site: _present(site, found.activity, how, "gram") for site, found in sites.items()}
            return _by_outliers(spreads, sparsity, {site: groups.get(site, site) for site in sites})
    raise RecipeError(f"allocate {how!r}: choose one of {', '.join(WAYS)}"
                      f"{did_you_mean(str(how), list(WAYS))}")


def resolved(step: Step, sites: Mapping[str, Statistics], groups: Mapping[str, Hashable]) -> dict[str, Step]:
    """A pruning step whose settings say ``allocate``, as a step for every site with a sparsity of its own.

    A site of which less than one weight would go is left out.
    """
    settings = dict(step.settings)
    how = settings.pop("allocate", "uniform")
    rule = Rule.of(settings.get("pattern", "unstructured"), settings.get("sparsity"), "layer")
    if isinstance(rule.pattern, NM) and how != "uniform":
        raise RecipeError(f"allocate {how!r}: the pattern {rule.pattern} makes every weight "
                          f"{rule.sparsity:g} sparse; use another pattern, or leave allocate out")
    if how == "uniform":
        return {site: replace(step, where=(site,), settings=settings) for site in sites}
    shares = allocate(how, rule.sparsity, sites, groups)
    return {site: replace(step, where=(site,), settings={**settings, "sparsity": share})
            for site, share in shares.items() if round(share * sites[site].weights) > 0}


def _present(site: str, spread: Spread | None, how: str, need: str) -> Spread:
    if spread is None:
        raise RecipeError(f"{site}: allocate {how!r} needs calibration evidence ({need}) and there is none; "
                          "pass calibration data, or use 'uniform' or 'global'")
    return spread


def _one_threshold(spreads: Mapping[str, Spread], sparsity: float) -> dict[str, float]:
    """The share of every site below the one threshold that ``sparsity`` of all numbers lie below."""
    below = np.stack([np.append(0, spread.counts.numpy().cumsum()) for spread in spreads.values()])
    weights, ceiling = below[:, -1], max(CEILING, sparsity)

    def shares(place: float) -> np.ndarray:
        """place: where the threshold is, counted in bins; inside a bin numbers lie evenly."""
        low = min(int(place), BINS - 1)
        count = below[:, low] + (place - low) * (below[:, low + 1] - below[:, low])
        return np.minimum(count / weights, ceiling)

    lower, upper = 0.0, float(BINS)
    for _ in range(60):
        middle = (lower + upper) / 2
        lower, upper = ((middle, upper) if shares(middle) @ weights < sparsity * weights.sum()
                        else (lower, middle))
    return dict(zip(spreads, shares(upper).tolist(), strict=True))


def _by_outliers(spreads: Mapping[str, Spread], sparsity: float,
                 groups: Mapping[str, Hashable]) -> dict[str, float]:
    """Less of the groups with many outliers, more of the others, the mean over weights as asked."""
    pooled: dict[Hashable, Spread] = {}
    for site, spread in spreads.items():
        pooled[groups[site]] = pooled[groups[site]] + spread if groups[site] in pooled else spread
    share = {group: spread.above(OUTLIER * spread.mean) for group, spread in pooled.items()}
    width = max(share.values()) - min(share.values())
    if width <= 0:
        return dict.fromkeys(spreads, sparsity)
    weights = {group: int(spread.counts.sum()) for group, spread in pooled.items()}
    mean = sum(weights[group] * share[group] for group in pooled) / sum(weights.values())
    swing = {group: 2 * SWING * (mean - share[group]) / width for group in pooled}
    # as much of the swing as keeps every group between nothing and the ceiling
    room = min((((max(CEILING, sparsity) - sparsity) if by > 0 else sparsity) / abs(by)
                for by in swing.values() if by), default=1.0)
    return {site: sparsity + min(1.0, room) * swing[group] for site, group in groups.items()}
