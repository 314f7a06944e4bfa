"""Allocation: one option per site, least total damage under a bound on bytes, or the other way round.

    minimise   sum_s sum_o damage_so x_so
    subject to sum_s sum_o bytes_so x_so <= limit,    sum_o x_so = 1 for every site,   x binary

is a multiple-choice knapsack; HiGHS solves it exactly (to the tolerance below). Damages add up to
second order, and only while they are small: ``scaled`` corrects them by what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from rarefy.core.errors import BudgetError
from rarefy.core.nouns import Option

GAP = 1e-4       # relative optimality gap: far below what the predictions are worth
SECONDS = 20.0   # HiGHS usually needs well under one

Sites = Mapping[str, Sequence[Option]]
Plan = dict[str, Option]


def least_damage(sites: Sites, limit: int, fixed: int) -> Plan:
    """The plan of least damage whose bytes, with ``fixed`` bytes for all else, stay within ``limit``."""
    smallest = sum(min(o.bytes for o in options) for options in sites.values()) + fixed
    if smallest > limit:
        raise BudgetError(f"{limit:,} bytes are not possible: the smallest file for this target has "
                          f"{smallest:,} bytes ({fixed:,} of them tokenizer, norms and metadata); "
                          f"pass --to {asked(smallest)} or more")
    return _solve(sites, "damage", "bytes", limit - fixed)


def least_bytes(sites: Sites, max_damage: float) -> Plan:
    """The smallest plan whose predicted damage stays within ``max_damage`` nats per token."""
    finest = sum(min(o.damage for o in options) for options in sites.values())
    if finest > max_damage:
        raise BudgetError(f"a KL of {max_damage:g} is not possible: the finest formats of this target are "
                          f"predicted to cost {finest:.2g}; pass --max-kl {finest * 1.2:.2g} or more")
    return _solve(sites, "bytes", "damage", max_damage)


def asked(size: int) -> str:
    """A size as one may ask for it, rounded up: ``79.6MB``, ``15kB``."""
    return f"{-(-size // 10**5) / 10:.1f}MB" if size >= 10**6 else f"{-(-size // 1000)}kB"


def _solve(sites: Sites, goal: str, bound: str, limit: float) -> Plan:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    flat = [(row, option) for row, options in enumerate(sites.values()) for option in options]
    cost = np.array([getattr(option, goal) for _, option in flat], dtype=float)
    load = np.array([getattr(option, bound) for _, option in flat], dtype=float)
    # the solver's tolerances are absolute: bring both sides to the order of one
    cost_unit, load_unit = cost.max() or 1.0, limit or 1.0
    rows = np.array([row for row, _ in flat])
    one_each = csr_array((np.ones(len(flat)), (rows, np.arange(len(flat)))))
    result = milp(cost / cost_unit, integrality=np.ones(len(flat)), bounds=Bounds(0, 1),
                  constraints=[LinearConstraint(one_each, 1, 1),
                               LinearConstraint(load[None, :] / load_unit, -np.inf, 1.0)],
                  options={"mip_rel_gap": GAP, "time_limit": SECONDS})
    if result.x is None:
        raise BudgetError(f"no allocation found ({result.message})")
    chosen = [flat[k][1] for k in np.flatnonzero(result.x > 0.5)]
    plan = {option.site: option for option in chosen}
    if sum(getattr(o, bound) for o in chosen) > limit:  # within the solver's tolerance, not within ours
        plan = _repair(sites, plan, bound, limit)
    return plan


def _repair(sites: Sites, plan: Plan, bound: str, limit: float) -> Plan:
    """Step single sites down until the bound holds to the last byte."""
    plan = dict(plan)
    while (over := sum(getattr(o, bound) for o in plan.values()) - limit) > 0:
        steps = [(getattr(now, bound) - getattr(other, bound), other)
                 for site, now in plan.items() for other in sites[site]
                 if getattr(other, bound) < getattr(now, bound)]
        enough = [step for step in steps if step[0] >= over] or [max(steps, key=lambda step: step[0])]
        other = min(enough, key=lambda step: step[0])[1]
        plan[other.site] = other
    return plan


def scaled(sites: Sites, factors: Mapping[str, float]) -> dict[str, tuple[Option, ...]]:
    """The options with every site's damage times its factor (from measured swaps)."""
    return {site: tuple(replace(o, damage=o.damage * factors.get(site, 1.0)) for o in options)
            for site, options in sites.items()}
