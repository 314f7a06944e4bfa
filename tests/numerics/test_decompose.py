"""The maths below the decompositions: best in the metric of the data, exact at full rank, lean on memory."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy.numerics.decompose import (
    component_norms,
    cp_als,
    digits,
    khatri_rao,
    khatri_rao_product,
    left_vectors,
    paired,
    prime_factors,
    refit,
    spectrum,
    train,
    train_energies,
    tucker2,
    whitening,
)

sizes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))


def problem(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, output weights, and a well-conditioned Gram whose scales differ."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(3 * columns, columns, generator=generator) * torch.logspace(-1, 1, columns)
    return weight, 0.1 + torch.rand(rows, generator=generator), inputs.T @ inputs


def loss(delta: Tensor, rows: Tensor, gram: Tensor) -> float:
    scaled = delta.double() * rows.double()[:, None]
    return float(((scaled @ gram.double()) * scaled).sum())


@settings(max_examples=80, deadline=None)
@given(sizes)
def test_no_matrix_of_that_rank_is_nearer(size: tuple[int, int, int]) -> None:
    """The loss of every cut is the tail of the spectrum, and alternating least squares from elsewhere ends
    no lower (in the metric of rows and Gram alike)."""
    weight, rows, gram = problem(*size)
    C, damping = whitening(gram, 1e-12)
    assert C is not None and damping == 1e-12
    found = spectrum(weight, rows=rows, factor=C)
    total = float(found.energies.sum())
    torch.testing.assert_close(total, loss(weight, rows, gram), rtol=1e-6, atol=1e-9)
    for rank in range(1, min(weight.shape) + 1):
        left, right = found.cut(rank)
        tail = float(found.energies[rank:].sum())
        assert abs(loss(weight - left @ right, rows, gram) - tail) < 1e-6 * total
        torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))
        other = torch.randn(rank, weight.shape[1], generator=torch.Generator().manual_seed(7)).double()
        wanted = weight.double() * rows.double()[:, None]
        for _ in range(30):
            rival = refit(weight, other, C)
            other = torch.linalg.pinv(rival * rows.double()[:, None]) @ wanted
        assert loss(weight - rival @ other, rows, gram) >= tail - 1e-6 * total


@settings(max_examples=40, deadline=None)
@given(sizes)
def test_weighed_components_add_up(size: tuple[int, int, int]) -> None:
    weight, importance, gram = problem(*size)
    C, _ = whitening(gram, 1e-12)
    found = spectrum(weight, factor=C)
    each = found.weighed(importance)
    for rank in range(1, min(weight.shape) + 1):
        left, right = found.cut(rank)
        wanted = loss(weight - left @ right, importance.sqrt(), gram)
        assert abs(float(each[rank:].sum()) - wanted) < 1e-6 * float(each.sum())


def test_refit_is_least_squares() -> None:
    weight, _, gram = problem(9, 7, 3)
    C, _ = whitening(gram, 0.01)
    assert C is not None
    right = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.lstsq((right.double() @ C).T, (weight.double() @ C).T).solution.T
    torch.testing.assert_close(refit(weight, right, C), expected)
    lame = torch.cat([right, right[:1] * 2])  # one row too many: any solution, but a finite one, and as good
    torch.testing.assert_close(refit(weight, lame, C) @ lame.double(), expected @ right.double())


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    whole = spectrum(weight)
    monkeypatch.setattr("rarefy.numerics.decompose.CHUNK", 18)
    parts = spectrum(weight)
    torch.testing.assert_close(whole.energies, parts.energies)
    torch.testing.assert_close(whole.cut(3)[0] @ whole.cut(3)[1], parts.cut(3)[0] @ parts.cut(3)[1])


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 5)])
def test_zero_matrices_have_a_spectrum(shape: tuple[int, int]) -> None:
    left, right = spectrum(torch.zeros(shape)).cut(1)
    assert left.shape == (shape[0], 1) and right.shape == (1, shape[1])
    assert not bool((left @ right).any())


def test_whitening_climbs_and_gives_up() -> None:
    gram = torch.diag(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    gram[2, 3] = gram[3, 2] = 1.0 + 1e-5  # hardly indefinite: the ladder helps
    C, damping = whitening(gram, 1e-6)
    assert C is not None and damping > 1e-6
    gram[2, 3] = gram[3, 2] = 100.0
    assert whitening(gram, 1e-6)[0] is None
    assert whitening(torch.full((2, 2), float("nan")), 0.01)[0] is None
    singular, damping = whitening(torch.ones(3, 3), 0.0)
    assert singular is not None and damping > 0


# ---- tensors -------------------------------------------------------------------------------------------


def test_tucker_of_a_tucker_tensor_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    left, core = torch.randn(9, 4, generator=generator), torch.randn(4, 3, 5, generator=generator)
    right = torch.randn(8, 3, generator=generator)
    kernel = torch.einsum("oa,abw,ib->oiw", left, core, right)
    found = tucker2(kernel, (4, 3), 5)
    torch.testing.assert_close(torch.einsum("oa,abw,ib->oiw", *found).float(), kernel, rtol=1e-4, atol=1e-4)
    for factor in (found[0], found[2]):
        torch.testing.assert_close(factor.T @ factor, torch.eye(factor.shape[1]).double())


def test_khatri_rao_product_is_the_unfolded_kernel_times_the_khatri_rao_matrix() -> None:
    generator = torch.Generator().manual_seed(1)
    kernel = torch.randn(5, 4, 3, 2, generator=generator).double()
    factors = [torch.randn(n, 3, generator=generator).double() for n in kernel.shape]
    for mode in range(4):
        others = [f for k, f in enumerate(factors) if k != mode]
        expected = kernel.movedim(mode, 0).flatten(1) @ khatri_rao(others)
        torch.testing.assert_close(khatri_rao_product(kernel, factors, mode), expected)


@pytest.mark.filterwarnings("ignore")
def test_alternating_least_squares_takes_the_steps_of_tensorly() -> None:
    import tensorly
    from tensorly.decomposition import parafac

    generator = torch.Generator().manual_seed(2)
    kernel = torch.randn(6, 5, 3, 3, generator=generator).double()
    start = [torch.randn(n, 4, generator=generator).double() for n in kernel.shape]
    for sweeps in (1, 2, 7):
        ours, error = cp_als(kernel, start, sweeps, 0.0)
        theirs = parafac(kernel.numpy(), 4, n_iter_max=sweeps, tol=None,
                         init=tensorly.cp_tensor.CPTensor((np.ones(4), [f.numpy().copy() for f in start])))
        rebuilt = (ours[0] @ khatri_rao(ours[1:]).T).view(kernel.shape)
        np.testing.assert_allclose(rebuilt.numpy(), tensorly.cp_to_tensor(theirs), atol=1e-6)
        lost = float((kernel - rebuilt).square().sum() / kernel.square().sum())
        assert error == pytest.approx(lost, abs=1e-9)


def test_a_ridge_keeps_components_small() -> None:
    generator = torch.Generator().manual_seed(3)
    kernel = torch.randn(6, 6, 3, 3, generator=generator).double()
    start = [torch.randn(n, 12, generator=generator).double() for n in kernel.shape]
    free, ridged = cp_als(kernel, start, 50, 0.0), cp_als(kernel, start, 50, 0.0, ridge=0.05)
    assert float(component_norms(ridged[0]).norm()) < float(component_norms(free[0]).norm())
    assert ridged[1] > free[1]
    zero, error = cp_als(torch.zeros(2, 2, 2), [torch.ones(2, 1)] * 3, 3, 1e-5)
    assert error == 0.0 and not any(bool(f.any()) for f in zero)


def test_left_vectors_are_orthonormal() -> None:
    for shape in ((4, 9), (9, 4)):
        vectors = left_vectors(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        assert vectors.shape == (shape[0], 4)
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(4).double())


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 4))
def test_digits_are_the_most_even_exact_factors(number: int, count: int) -> None:
    found, primes = digits(number, count), prime_factors(number)
    assert prod(primes) == number and all(prime_factors(p) == (p,) for p in primes)
    if number == 1 or len(primes) < count:
        assert found is None
        return
    assert found is not None and len(found) == count and prod(found) == number
    assert list(found) == sorted(found) and found[0] > 1
    if count == 2:
        assert found[0] == max(d for d in range(2, int(number**0.5) + 1) if number % d == 0)


def test_trains_are_exact_at_full_rank_and_lose_less_than_the_cuts() -> None:
    matrix = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    tensor = paired(matrix, (2, 2, 3), (5, 3, 2))
    assert tensor.shape == (10, 6, 6)
    # rows are 7 = 1 * 5 + 2, 4 = 1 * 3 + 1, 3 = 1 * 2 + 1
    assert float(tensor[7, 4, 3]) == float(matrix[1 * 6 + 1 * 3 + 1, 2 * 6 + 1 * 2 + 1])
    energies = train_energies(tensor)
    for ranks in ([10, 6], [4, 5], [1, 1], [7, 2]):
        cores = train(tensor, ranks)
        rebuilt = torch.einsum("apb,bqc,crd->pqr", *cores)
        lost = float((tensor - rebuilt).square().sum())
        bound = sum(float(each[rank:].sum()) for each, rank in zip(energies, ranks, strict=True))
        assert bound / len(ranks) - 1e-6 <= lost <= bound + 1e-6
        norms = [float(core.norm()) for core in cores]
        assert max(norms) == pytest.approx(min(norms))
    assert not bool(torch.stack([c.flatten()[0] for c in train(torch.zeros(2, 2, 2), [1, 1])]).any())
