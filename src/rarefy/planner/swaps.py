"""Swaps: correcting predicted damage by measuring a few changes.

The second-order prediction leaves out how the errors of tokens and of layers add up. For each group of
sites with a common role, all of them are rounded at once to a coarse probe grid, the true KL is measured,
and the ratio

    factor = measured KL / sum of predicted damages of the same rounding

multiplies every option of the group. Ratios are taken where the damage is small enough for the second
order to mean something and large enough to stand out of the noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from rarefy.core.nodes import Node, Quantized
from rarefy.core.nouns import Evidence
from rarefy.models.map import Site
from rarefy.models.runner import Override
from rarefy.numerics.grids import integer_grid
from rarefy.numerics.rounding import encode, fit, join

PROBE = integer_grid(4, 32)
ROWS = 4096             # rows probed at once
LIMITS = (0.1, 10.0)    # a factor beyond these says that the measurement is noise, not that we were wrong


@dataclass(frozen=True)
class Swap:
    """One measured change: the roles rounded, what was predicted and what came out, in nats per token."""

    role: str
    predicted: float
    measured: float

    @property
    def factor(self) -> float:
        """What predictions for this role are multiplied by."""
        if not self.predicted > 0:
            return 1.0
        return min(max(self.measured / self.predicted, LIMITS[0]), LIMITS[1])


def probe(weight: torch.Tensor) -> Node:
    """The weight rounded to nearest on the probe grid (rows padded by no one: it must divide)."""
    grid = PROBE if weight.shape[1] % PROBE.group == 0 else integer_grid(4, 0)
    fits, codes = [], []
    for part in weight.split(ROWS):
        fits.append(fit(part, torch.ones(weight.shape[1]), grid))
        codes.append(encode(part, fits[-1]))
    return Quantized.of(torch.cat(codes), join(fits, axis=0))


def probe_damage(weight: torch.Tensor, evidence: Evidence) -> float:
    """Predicted damage of the probe at one site, summed over all rows."""
    assert evidence.fisher is not None
    total = 0.0
    for part, fisher in zip(weight.split(ROWS), evidence.fisher.split(ROWS), strict=True):
        delta = probe(part).dense() - part
        total += Evidence(evidence.gram, evidence.tokens, fisher).damage(delta)
    return total


def measure_swaps(sites: Sequence[Site], weight: Callable[[str], torch.Tensor],
                  predicted: Mapping[str, float], measure: Callable[[Override], float],
                  advance: Callable[[int, int], None] = lambda done, total: None) -> tuple[Swap, ...]:
    """One swap per role. predicted: ``probe_damage`` of every site that can be probed. measure: how far the
    answers move when weights are overridden."""
    known = [site for site in sites if site.path in predicted]
    roles = tuple(dict.fromkeys(site.role for site in known))
    swaps = []
    for done, role in enumerate(roles):
        members = [site for site in known if site.role == role]
        moved = measure(_Probed(weight, members))
        swaps.append(Swap(role, sum(predicted[site.path] for site in members), moved))
        advance(done + 1, len(roles))
    return tuple(swaps)


class _Probed:
    """Overrides the named sites with their probes, made when asked for; the one outside a block is kept."""

    def __init__(self, weight: Callable[[str], torch.Tensor], sites: Sequence[Site]) -> None:
        self.weight, self.sites = weight, {site.path: site for site in sites}
        self.kept: dict[str, Node] = {}

    def __call__(self, path: str) -> Node | None:
        if path not in self.sites:
            return None
        if path in self.kept:
            return self.kept[path]
        node = probe(self.weight(path))
        if self.sites[path].block is None:
            self.kept[path] = node
        return node
