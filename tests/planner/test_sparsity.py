"""Sharing a sparsity out: against one sort over everything, and against the paper's formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.core.errors import RecipeError
from rarefy.core.nouns import Evidence, Step
from rarefy.planner.sparsity import CEILING, Spread, Statistics, allocate, resolved, statistics
from rarefy.techniques.prune.magnitude import Magnitude

SHAPES = {"a.up": (96, 128, 0.02), "a.down": (64, 96, 0.08), "b.up": (96, 128, 0.03),
          "b.down": (64, 96, 0.01), "head": (200, 64, 0.05)}
GROUPS = {"a.up": 0, "a.down": 0, "b.up": 1, "b.down": 1}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for site, (rows, columns, scale) in SHAPES.items():
        tail = torch.rand(rows, columns, generator=generator) < (0.002 if site.startswith("a") else 0.02)
        found[site] = torch.randn(rows, columns, generator=generator) * scale * torch.where(tail, 12.0, 1.0)
    return found


@pytest.fixture(scope="module")
def seen(weights: dict[str, Tensor]) -> dict[str, Evidence]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for site, weight in weights.items():
        x = torch.randn(300, weight.shape[1], generator=generator)
        found[site] = Evidence(x.T @ x, 300, torch.rand(weight.shape[0], generator=generator))
    return found


@pytest.fixture(scope="module")
def sites(weights: dict[str, Tensor], seen: dict[str, Evidence]) -> dict[str, Statistics]:
    return {site: statistics(weight, seen[site]) for site, weight in weights.items()}


def total(shares: dict[str, float], weights: dict[str, Tensor]) -> float:
    count = {site: weight.numel() for site, weight in weights.items()}
    return sum(shares[site] * count[site] for site in count) / sum(count.values())


def test_spread_counts(weights: dict[str, Tensor]) -> None:
    values = torch.cat([torch.zeros(50), weights["head"].abs().flatten()])
    found = Spread.of(values[:1000]) + Spread.of(values[1000:])
    assert int(found.counts.sum()) == values.numel()
    assert found.mean == pytest.approx(float(values.mean()), rel=1e-5)
    for border in (0.01, 0.05, 0.3):
        assert found.above(border) == pytest.approx(float((values > border).float().mean()), abs=2e-3)


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_global_is_one_threshold(weights: dict[str, Tensor], sites: dict[str, Statistics],
                                 sparsity: float) -> None:
    shares = allocate("global", sparsity, sites, GROUPS)
    everything = torch.cat([weight.abs().flatten() for weight in weights.values()]).sort().values
    border = everything[round(sparsity * everything.numel())]
    for site, weight in weights.items():
        literal = float((weight.abs() < border).float().mean())
        assert shares[site] == pytest.approx(min(literal, CEILING), abs=4e-3)
    assert total(shares, weights) == pytest.approx(sparsity, abs=1e-9)


def test_fisher_is_one_threshold_on_damage(weights: dict[str, Tensor], seen: dict[str, Evidence],
                                           sites: dict[str, Statistics]) -> None:
    shares = allocate("fisher", 0.5, sites, GROUPS)
    damage = {site: seen[site].fisher[:, None] * weight.square() * seen[site].gram.diagonal() / 300
              for site, weight in weights.items()}
    border = torch.cat([each.flatten() for each in damage.values()]).median()
    for site, each in damage.items():
        assert shares[site] == pytest.approx(float((each < border).float().mean()), abs=4e-3)
    assert total(shares, weights) == pytest.approx(0.5, abs=1e-9)


def test_owl_equals_the_paper(weights: dict[str, Tensor], seen: dict[str, Evidence],
                              sites: dict[str, Statistics]) -> None:
    """Yin et al. 2024, section 3.2: blocks of one size, M = 5, lambda = 0.08."""
    inside = {site: found for site, found in sites.items() if site in GROUPS}
    ratios = []
    for block in (0, 1):
        scores = torch.cat([(weights[site].abs() * seen[site].gram.diagonal().sqrt()).flatten()
                            for site in GROUPS if GROUPS[site] == block])
        ratios.append(float((scores > 5 * scores.mean()).float().mean()))
    low, high = min(ratios), max(ratios)
    scaled = [(ratio - low) / (high - low) * 2 * 0.08 for ratio in ratios]
    density = [value - sum(scaled) / 2 + (1 - 0.6) for value in scaled]
    shares = allocate("owl", 0.6, inside, GROUPS)
    for site, block in GROUPS.items():
        assert shares[site] == pytest.approx(1 - density[block], abs=1e-6)
    assert (shares["a.up"] < shares["b.up"]) == (ratios[0] > ratios[1])


@pytest.mark.parametrize("sparsity", [0.02, 0.5, 0.97, 0.995])
@pytest.mark.parametrize("how", ["uniform", "global", "fisher", "owl"])
def test_the_model_ends_at_the_sparsity(weights: dict[str, Tensor], sites: dict[str, Statistics], how: str,
                                        sparsity: float) -> None:
    shares = allocate(how, sparsity, sites, GROUPS)
    assert set(shares) == set(weights)
    assert total(shares, weights) == pytest.approx(sparsity, abs=1e-6)
    assert all(0 <= share <= max(CEILING, sparsity) + 1e-9 for share in shares.values())
    assert {type(share) for share in shares.values()} == {float}  # a recipe writes them down


def test_blocks_alike_are_pruned_alike(weights: dict[str, Tensor], seen: dict[str, Evidence]) -> None:
    one = statistics(weights["head"], seen["head"])
    assert allocate("owl", 0.5, {"x": one, "y": one}, {}) == {"x": 0.5, "y": 0.5}
    assert allocate("owl", 0.5, {"x": one}, {}) == {"x": 0.5}
    zero = statistics(torch.zeros(8, 8))
    assert allocate("global", 0.5, {"x": zero, "y": zero}, {}) == pytest.approx({"x": 0.5, "y": 0.5})


def test_what_is_missing_is_named(weights: dict[str, Tensor], sites: dict[str, Statistics]) -> None:
    blind = {"a.up": statistics(weights["a.up"])}
    with pytest.raises(RecipeError, match=r"a\.up: allocate 'owl' needs calibration evidence \(gram\)"):
        allocate("owl", 0.5, blind, GROUPS)
    with pytest.raises(RecipeError, match=r"allocate 'fisher' needs calibration evidence \(fisher\)"):
        allocate("fisher", 0.5, blind, GROUPS)
    with pytest.raises(RecipeError, match=r"allocate 'unifrom': choose one of .* did you mean 'uniform'"):
        allocate("unifrom", 0.5, sites, GROUPS)


def test_a_step_becomes_one_for_every_site(weights: dict[str, Tensor], sites: dict[str, Statistics]) -> None:
    step = Step("magnitude", ("*",), {"sparsity": 0.6, "allocate": "global", "pattern": "unstructured"})
    steps = resolved(step, sites, GROUPS)
    shares = allocate("global", 0.6, sites, GROUPS)
    for site, own in steps.items():
        assert own.where == (site,) and own.settings == {"sparsity": shares[site], "pattern": "unstructured"}
        Magnitude(**own.settings)
    plain = resolved(Step("magnitude", ("*",), {"pattern": "2:4"}), sites, GROUPS)
    assert plain["head"].settings == {"pattern": "2:4"}
    with pytest.raises(RecipeError, match=r"the pattern 2:4 makes every weight 0\.5 sparse"):
        resolved(Step("wanda", ("*",), {"pattern": "2:4", "allocate": "owl"}), sites, GROUPS)


def test_sites_that_lose_nothing_are_left_out(sites: dict[str, Statistics]) -> None:
    big = statistics(torch.full((10, 10), 3.0))
    steps = resolved(Step("magnitude", settings={"sparsity": 0.1, "allocate": "global"}),
                     {**sites, "big": big}, {})
    assert "big" not in steps and "a.up" in steps
