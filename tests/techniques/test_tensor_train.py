"""Tensor trains against literal TT-SVD, looked up row by row, cut where the digits allow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy.core.edit import edit
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nodes import Dense, Masked, Node, Quantized
from rarefy.core.nouns import Evidence
from rarefy.core.tensors import TensorTrain as TensorTrainNode
from rarefy.numerics.grids import integer_grid
from rarefy.techniques.factorize.tensor_train import TensorTrain
from rarefy.techniques.quantize.rtn import RTN


def run(technique: object, weight: Tensor, tree: Node | None = None, evidence: Evidence | None = None):
    return edit("embed", tree or Dense(weight), weight, technique, "tt", evidence, torch.Generator())


def literal(weight: Tensor, rows: tuple[int, ...], columns: tuple[int, ...], rank: int) -> Tensor:
    """Oseledets 2011, algorithm 1, on the tensor of pairs of digits; put together entry by entry."""
    d = len(rows)
    C = weight.double().view(*rows, *columns).permute([a for k in range(d) for a in (k, d + k)])
    cores, left = [], 1
    for k in range(d - 1):
        C = C.reshape(left * rows[k] * columns[k], -1)
        U, S, V = torch.linalg.svd(C, full_matrices=False)
        r = min(rank, len(S))
        cores.append(U[:, :r].reshape(left, rows[k], columns[k], r))
        C, left = torch.diag(S[:r]) @ V[:r], r
    cores.append(C.reshape(left, rows[-1], columns[-1], 1))
    result = torch.empty_like(weight)
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            product, a, b = torch.ones(1, 1, dtype=torch.float64), o, i
            for k in reversed(range(d)):
                product = cores[k][:, a % rows[k], b % columns[k]] @ product
                a, b = a // rows[k], b // columns[k]
            result[o, i] = product
    return result


def smooth(rows: int, columns: int, noise: float = 0.05) -> Tensor:
    """A matrix that digits describe well: Kronecker products under noise."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(4, 3, 4, generator=generator) for _ in range(3)]
    whole = sum(torch.kron(torch.kron(parts[0][:, :, k].contiguous(), parts[1][:, :, k].contiguous()),
                           parts[2][:, :, k].contiguous()) for k in range(4))
    return whole[:rows, :columns] + noise * torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_equals_literal_tt_svd(rank: int) -> None:
    weight = smooth(24, 18).contiguous()
    tree, _ = run(TensorTrain(rank=rank), weight)
    assert isinstance(tree, TensorTrainNode)
    assert tree.row_digits == (2, 3, 4) and tree.column_digits == (3, 3, 2)
    torch.testing.assert_close(tree.dense(), literal(weight, tree.row_digits, tree.column_digits, rank),
                               rtol=1e-3, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([8, 12, 30, 64, 100]), st.sampled_from([8, 16, 27, 60]), st.integers(1, 4),
       st.integers(2, 3), st.integers(0, 2**31))
def test_rows_are_looked_up_as_they_are_in_the_matrix(out: int, columns: int, rank: int, cores: int,
                                                      seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator)
    tree, _ = run(TensorTrain(rank=rank, cores=cores), weight)
    index = torch.randint(0, out, (17,), generator=generator)
    torch.testing.assert_close(tree.rows(index), tree.dense()[index], rtol=1e-4, atol=1e-5)
    assert tree.rows(index[:0]).shape == (0, columns)


def test_looking_up_never_rebuilds_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    tree, receipt = run(TensorTrain(ratio=0.1), weight)
    assert receipt.bits_after <= 0.1 * receipt.bits_before
    def rebuilt(self: object) -> Tensor:
        raise AssertionError("the matrix was rebuilt")

    monkeypatch.setattr(TensorTrainNode, "dense", rebuilt)
    assert tree.rows(torch.tensor([4095, 0, 77])).shape == (3, 64)


def test_energy_is_kept_and_bits_are_met() -> None:
    weight = smooth(64, 27, noise=0.5)
    for energy in (0.5, 0.9, 0.99, 1.0):
        tree, _ = run(TensorTrain(energy=energy), weight)
        assert (weight - tree.dense()).square().sum() <= (1 - energy) * weight.square().sum() + 1e-4
    for ratio in (0.1, 0.3, 0.9):
        _, receipt = run(TensorTrain(ratio=ratio), weight)
        assert receipt.bits_after <= ratio * receipt.bits_before


def test_ranks_grow_where_they_gain() -> None:
    """At equal bits no worse than one rank for all cuts."""
    weight = smooth(64, 27, noise=0.5)
    for rank in (1, 2, 4, 6):
        capped, _ = run(TensorTrain(rank=rank), weight)
        grown, _ = run(TensorTrain(ratio=(capped.bits() + 1) / Dense(weight).bits()), weight)
        assert grown.bits() <= capped.bits()
        assert (weight - grown.dense()).norm() <= 1.02 * (weight - capped.dense()).norm()


def test_digits_may_be_told() -> None:
    weight = torch.randn(24, 18, generator=torch.Generator().manual_seed(0))
    tree, _ = run(TensorTrain(rank=9, cores=2, row_digits=[12, 2], column_digits=[1, 18]), weight)
    assert tree.row_digits == (12, 2) and tree.column_digits == (1, 18)
    for told, message in (({"row_digits": [5, 5]}, r"embed: row_digits=\[5, 5\] make 25, not 24 rows"),
                              ({"column_digits": [3, 7]}, r"column_digits=\[3, 7\] make 21, not 18 columns")):
        with pytest.raises(EditError, match=message):
            run(TensorTrain(cores=2, **told), weight)


def test_factors_can_be_quantized_and_masks_stay(weight: Tensor) -> None:
    tree, before = run(TensorTrain(rank=16), weight)
    tree, after = run(RTN(integer_grid(8, 0)), weight, tree)
    assert isinstance(tree, TensorTrainNode) and all(isinstance(core, Quantized) for core in tree.cores)
    assert after.bits_after < 0.3 * before.bits_after
    keep = weight.abs() > 0.01
    masked, receipt = run(TensorTrain(), weight, Masked(keep, Dense(weight)))
    assert isinstance(masked, Masked) and isinstance(masked.inner, TensorTrainNode)
    assert "under a mask" in receipt.note and not bool(masked.dense()[~keep].any())


def test_zero_weights_and_half_precision() -> None:
    tree, _ = run(TensorTrain(), torch.zeros(64, 27))
    assert not bool(tree.dense().any())
    weight = smooth(64, 27)
    tree, _ = run(TensorTrain(rank=12), 1000 * weight, Dense((1000 * weight).half()))
    assert all(core.values.dtype == torch.float16 for core in tree.cores)
    torch.testing.assert_close(tree.dense(), 1000 * weight, rtol=0.1, atol=100)
    with pytest.raises(EditError, match="does not fit float16"):
        run(TensorTrain(rank=12), 1e30 * weight, Dense(weight.half()))


@pytest.mark.parametrize(("settings", "shape", "message"), [
    ({}, (151, 64), "embed: 151 rows = 151 cannot be cut into cores=3 digits; no train is cut from a prime; "
                    "use svd or svd_llm"),
    ({}, (64, 26), "embed: 26 columns = 2 x 13 cannot be cut into cores=3 digits; pass cores=2"),
    ({}, (1, 64), "embed: 1 rows = 1 cannot be cut into cores=3 digits; no train"),
    ({}, (64, 1), "embed: 1 columns = 1 cannot"),
    ({"rank": 33}, (64, 27), r"embed: rank=33 is above the full ranks \[12, 12\]; pass rank=12 or less"),
    ({"ratio": 0.001}, (64, 27), "embed: ratio=0.001 of 55296 bits allows 55, .* pass ratio=0.021 or more"),
])
def test_refusals(settings: dict[str, float], shape: tuple[int, int], message: str) -> None:
    with pytest.raises(EditError, match=message):
        run(TensorTrain(**settings), torch.randn(shape))


def test_settings_that_mean_nothing() -> None:
    for told, message in (({"rank": 4, "energy": 0.5}, "rank=4 and energy="), ({"cores": 1}, "cores=1"),
                              ({"row_digits": [2, 3]}, r"row_digits=\[2, 3\]: cores=3 takes 3 of them")):
        with pytest.raises(RecipeError, match=message):
            TensorTrain(**told)
