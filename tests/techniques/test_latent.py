"""The latent of keys and values against a literal singular value decomposition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nouns import Evidence
from rarefy.core.structure import KeyValues
from rarefy.techniques.attention.latent import Latent


@pytest.fixture(params=[12, 40], ids=["wide", "tall"])
def block(request: pytest.FixtureRequest) -> KeyValues:
    """``rows`` rows of 24 columns, correlated inputs, rows that do not cost alike."""
    generator = torch.Generator().manual_seed(0)
    rows = request.param
    X = torch.randn(24, 24, generator=generator) @ torch.randn(24, 300, generator=generator)
    fisher = torch.rand(rows, generator=generator) + 0.01
    return KeyValues("k", 0, torch.randn(rows, 24, generator=generator), Evidence(X @ X.T, 300, fisher))


def literal(block: KeyValues, costs: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest matrix of that rank, and the squared singular values."""
    assert block.evidence is not None
    H = block.evidence.gram.double() / block.evidence.tokens
    values, vectors = torch.linalg.eigh(H)
    root = vectors * values.sqrt() @ vectors.T
    D = costs.double().sqrt().diag()
    Q, S, V = torch.linalg.svd(D @ block.weight.double() @ root, full_matrices=False)
    cut = D.inverse() @ Q[:, :rank] @ S[:rank].diag() @ V[:rank] @ root.inverse()
    return cut.float(), S.square()


def test_factors_are_those_of_the_weighed_decomposition(block: KeyValues) -> None:
    assert block.evidence is not None and block.evidence.fisher is not None
    technique = Latent(damping=0.0)
    up, down = technique.factors(block, 6)
    wanted, energies = literal(block, block.evidence.fisher, 6)
    assert up.shape == (len(block.weight), 6) and down.shape == (6, 24)
    torch.testing.assert_close(up @ down, wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(technique.energies(block), energies, rtol=1e-4, atol=1e-4)
    # what is cut off is the predicted divergence
    damage = block.evidence.damage(block.weight - up @ down)
    assert damage == pytest.approx(0.5 * float(energies[6:].sum()), rel=1e-3)


def test_energy_weighs_keys_and_values_alike(block: KeyValues) -> None:
    """Keys a hundred times as large get no more of the latent."""
    half = len(block.weight) // 2
    scale = torch.cat([torch.full((half,), 100.0), torch.ones(half)])[:, None]
    large = KeyValues("k", 0, block.weight * scale, block.evidence)
    plain = Latent(weigh="energy")
    assert plain.needs == {"gram"}
    one, other = (up @ down for up, down in (plain.factors(each, 6) for each in (block, large)))
    torch.testing.assert_close(other / scale, one, rtol=1e-3, atol=1e-3)


def test_whitening_loses_less_than_the_weights_alone(block: KeyValues) -> None:
    assert block.evidence is not None
    up, down = Latent(weigh="energy").factors(block, 6)
    U, S, V = torch.linalg.svd(block.weight, full_matrices=False)
    naive = U[:, :6] * S[:6] @ V[:6]
    assert block.evidence.error(block.weight - up @ down) < block.evidence.error(block.weight - naive)


def test_ranks() -> None:
    energies = (torch.tensor([9.0, 8, 7, 6, 5, 4]), torch.tensor([3.0, 0, 0, 0, 0, 0]))
    assert Latent(ratio=0.5, spread="uniform", multiple=2).ranks("m", 8, energies) == (4, 4)
    assert Latent(ratio=0.5, multiple=2).ranks("m", 8, energies) == (6, 2)  # every block keeps some
    assert Latent(ratio=1.0, multiple=2).ranks("m", 8, energies) == (6, 6)  # no more than there are
    with pytest.raises(EditError, match=r"m: a ratio of 0\.2 of 8 numbers a token holds no 2"):
        Latent(ratio=0.2, multiple=2).ranks("m", 8, energies)


def test_outputs_that_cost_nothing_are_not_free(block: KeyValues) -> None:
    assert block.evidence is not None
    for fisher in (torch.zeros(len(block.weight)), torch.eye(len(block.weight))[0]):
        seen = Evidence(block.evidence.gram, 300, fisher)
        up, down = Latent().factors(KeyValues("k", 0, block.weight, seen), 12)
        assert bool(torch.isfinite(up).all())
        assert seen.error(block.weight - up @ down) < seen.error(block.weight)
    with pytest.raises(EditError, match="not finite"):
        Latent().factors(KeyValues("k", 0, block.weight * torch.nan, block.evidence), 2)


@pytest.mark.parametrize(("settings", "match"), [
    ({"ratio": 0.0}, "above 0"), ({"spread": "even"}, "uniform or global"), ({"weigh": "size"}, "fisher"),
    ({"multiple": 3}, "even number")])
def test_settings_that_mean_nothing(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        Latent(**settings)
