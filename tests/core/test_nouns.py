"""Budgets, sizes and damage."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rarefy.core.errors import RecipeError
from rarefy.core.nouns import Budget, Evidence, bytes_of


@pytest.mark.parametrize(("text", "size"), [("160MB", 160_000_000), ("1.5GiB", 1610612736), ("42", 42),
                                            ("10 kb", 10_000), ("2MiB", 2097152)])
def test_sizes(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "12XB", "1e9", "nan", "0x10"])
def test_bad_sizes_name_the_value_and_the_forms(text: str) -> None:
    with pytest.raises(RecipeError, match="expected bytes like 160MB"):
        bytes_of(text)


def test_budget_forms() -> None:
    assert Budget("60%").limit(original=1000, weights=5) == 600
    assert Budget("4.5bpw").limit(original=1, weights=16) == 9
    assert Budget(max_kl=0.1).limit(original=1, weights=1) is None


@pytest.mark.parametrize("to", ["0%", "101%", "0MB", "xbpw", "-1bpw", "nan%", "inf%"])
def test_bad_budgets(to: str) -> None:
    with pytest.raises(RecipeError):
        Budget(to)


@pytest.mark.parametrize("kl", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_bounds(kl: float) -> None:
    with pytest.raises(RecipeError, match="--max-kl"):
        Budget(max_kl=kl)


def test_no_budget_at_all() -> None:
    with pytest.raises(RecipeError, match="no budget"):
        Budget()


@given(st.integers(0, 10**6))
def test_damage_is_the_second_order_kl_of_a_softmax(seed: int) -> None:
    """For logits y = W x the Fisher of the softmax is p (1 - p) on its diagonal: the KL of a small change
    of one row is half of it times the squared change."""
    generator = torch.Generator().manual_seed(seed)
    W, x = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (6, 1))
    p = (x @ W.T).softmax(-1)
    delta = torch.zeros(6, 4, dtype=torch.float64)
    delta[2] = 1e-2 * torch.randn(4, generator=generator, dtype=torch.float64)
    q = (x @ (W + delta).T).softmax(-1)
    kl = float((p * (p / q).log()).sum())
    evidence = Evidence(x.T @ x, 1, (p - p.square())[0])
    assert evidence.damage(delta) == pytest.approx(kl, rel=0.15, abs=1e-12)
