"""Decompositions of matrices and kernels, in the metric of the data.

For a weight W [out, in], output weights a and inputs with second moment ``H = C C^T`` the best factors of
rank r

    minimise || diag(a) (W - L R) C ||_F

come from the singular value decomposition ``diag(a) W C = U S V^T`` (Eckart & Young 1936): ``L = a^-1 U_r``
and ``R = U_r^T a W``, or equally ``L = W C V_r`` and ``R = V_r^T C^-1``. Only the basis of the smaller side
is ever computed, from the eigenvectors of a Gram matrix in float64: weights come in float32, so squaring
their singular values loses nothing that was there, and a tall embedding needs no second copy.

Kernels of convolutions are tensors [out, in, ...window]; tensor trains see a matrix by the digits of its rows
and columns. Tensors in, tensors out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.numerics.linear import LADDER, damped

CHUNK = 1 << 21   # weights that are in float64 at once
FLOOR = 1e-6      # least damping of a rung that climbs
RIDGE = 1e-10     # of alternating least squares: keeps its solves finite, far below any error that matters


# ---- matrices ------------------------------------------------------------------------------------------


def whitening(gram: Float[Tensor, "n n"], damping: float) -> tuple[Float[Tensor, "n n"] | None, float]:
    """Lower triangular C with ``C C^T = gram + damping * mean(diagonal)``, and the damping that was needed.

    The damping climbs a ladder; None when even its last rung is not positive definite.
    """
    rungs = (damping, *(max(damping, FLOOR) * rung for rung in LADDER[1:]))
    for rung in rungs:
        lower, failed = torch.linalg.cholesky_ex(damped(gram, rung))
        if not failed and bool(torch.isfinite(lower).all()):
            return lower, rung
    return None, rungs[-1]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """``diag(rows) W C = U S V^T``, of which the smaller side is known.

    rows, factor: the weights a and the matrix C (None: identity). energies: S^2, falling. basis: U where the
    weight has no more rows than columns, V elsewhere; orthonormal columns, in the order of ``energies``.
    """

    weight: Float[Tensor, "out in_"]
    rows: Float[Tensor, " out"] | None
    factor: Float[Tensor, "in_ in_"] | None
    energies: Float[Tensor, " side"]
    basis: Float[Tensor, "side side"]

    def cut(self, rank: int) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in_"]]:
        """The best factors of that rank, in float64; left and right of each component have equal norms."""
        basis = self.basis[:, :rank]
        if _wide(self.weight):
            left = basis if self.rows is None else basis / self.rows[:, None]
            seen = basis if self.rows is None else basis * self.rows[:, None]
            return _balanced(left, times(self.weight.T, seen).T)
        left = times(self.weight, basis if self.factor is None else self.factor @ basis)
        right = basis.T
        if self.factor is not None:
            right = torch.linalg.solve_triangular(self.factor, right, upper=False, left=False)
        return _balanced(left, right)

    def split(self, rank: int) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in_"]]:
        """The same without weights: U_r in float64, orthonormal columns, and ``U_r^T W`` in float32."""
        assert self.rows is None and self.factor is None
        basis = self.basis[:, :rank]
        if _wide(self.weight):
            return basis, times(self.weight.T, basis, torch.float32).T
        left = times(self.weight, basis)
        norms = left.norm(dim=0)
        return left / torch.where(norms > 0, norms, 1.0), (basis * norms).T.float()

    def weighed(self, importance: Float[Tensor, " out"]) -> Float[Tensor, " side"]:
        """What each component adds to ``sum_i importance_i |(W C)_i|^2``. For spectra without row weights."""
        assert self.rows is None
        importance = importance.double()
        if _wide(self.weight):
            return self.energies * (importance @ self.basis.square())
        onward = self.basis if self.factor is None else self.factor @ self.basis
        return sum((importance[part] @ (self.weight[part].double() @ onward).square()
                    for part in _chunks(self.weight)), torch.zeros_like(self.energies))


def spectrum(weight: Float[Tensor, "out in_"], rows: Float[Tensor, " out"] | None = None,
             factor: Float[Tensor, "in_ in_"] | None = None) -> Spectrum:
    """Singular values and smaller basis of ``diag(rows) weight factor``, from its Gram in float64."""
    rows = None if rows is None else rows.double()
    if _wide(weight):
        gram = _gram((weight if factor is None else times(weight, factor)).T, None)
        gram = gram if rows is None else rows[:, None] * gram * rows
    else:
        gram = _gram(weight, rows)
        gram = gram if factor is None else factor.T @ gram @ factor
    values, vectors = torch.linalg.eigh(gram)
    return Spectrum(weight, rows, factor, values.flip(0).clamp_min(0), vectors.flip(1).contiguous())


def refit(weight: Float[Tensor, "out in_"], right: Float[Tensor, "rank in_"],
          factor: Float[Tensor, "in_ in_"] | None = None) -> Float[Tensor, "out rank"]:
    """argmin_L ``|| (weight - L right) factor ||_F``, in float64."""
    seen = right.double() if factor is None else right.double() @ factor
    inverse = torch.linalg.pinv(seen @ seen.T, hermitian=True)
    return times(weight, (seen if factor is None else seen @ factor.T).T @ inverse)


def left_vectors(weight: Float[Tensor, "out in_"]) -> Float[Tensor, "out side"]:
    """The left singular vectors, by falling singular value; zero where that is zero."""
    return spectrum(weight).split(min(weight.shape))[0]


def times(weight: Float[Tensor, "rows columns"], matrix: Float[Tensor, "columns n"],
          dtype: torch.dtype = torch.float64) -> Float[Tensor, "rows n"]:
    """``weight @ matrix`` computed in float64, without a float64 copy of a large weight."""
    result = torch.empty(weight.shape[0], matrix.shape[1], dtype=dtype)
    for part in _chunks(weight):
        result[part] = (weight[part].double() @ matrix).to(dtype)
    return result


def _gram(matrix: Float[Tensor, "n side"], rows: Float[Tensor, " n"] | None) -> Float[Tensor, "side side"]:
    """``matrix^T diag(rows)^2 matrix`` in float64."""
    total = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64)
    for part in _chunks(matrix):
        scaled = matrix[part].double() if rows is None else matrix[part].double() * rows[part, None]
        total.addmm_(scaled.T, scaled)
    return total


def _wide(weight: Tensor) -> bool:
    return weight.shape[0] <= weight.shape[1]


def _chunks(weight: Tensor) -> list[slice]:
    step = max(1, CHUNK // weight.shape[1])
    return [slice(start, start + step) for start in range(0, weight.shape[0], step)]


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors of every component at the same norm, so that neither overflows nor rounds worse."""
    a, b = left.norm(dim=0), right.norm(dim=1)
    scale = torch.where((a > 0) & (b > 0), (b / a).sqrt(), 1.0)
    return left * scale, right / scale[:, None]


# ---- kernels of convolutions: Tucker-2 -----------------------------------------------------------------


def channel_energies(kernel: Float[Tensor, "out in_ window"]) -> tuple[Tensor, Tensor]:
    """Squared singular values of the unfoldings along output and input channels, [out] and [in] at most."""
    return (spectrum(kernel.flatten(1)).energies, spectrum(kernel.transpose(0, 1).flatten(1)).energies)


def tucker2(kernel: Float[Tensor, "out in_ window"], ranks: tuple[int, int], sweeps: int) -> tuple[
        Float[Tensor, "out a"], Float[Tensor, "a b window"], Float[Tensor, "in_ b"]]:
    """Left, core and right of ``kernel[o, i, w] = sum_ab left[o, a] core[a, b, w] right[i, b]``.

    tensorly starts from the truncated higher-order SVD and improves it by ``sweeps`` of orthogonal iteration
    (De Lathauwer et al. 2000); left and right have orthonormal columns.
    """
    import tensorly
    from tensorly.decomposition import partial_tucker

    if not bool(kernel.any()):
        left, right = (torch.eye(n, rank).double() for n, rank in zip(kernel.shape, ranks, strict=False))
        return left, torch.zeros(*ranks, kernel.shape[2], dtype=torch.float64), right
    with tensorly.backend_context("numpy", local_threadsafe=True):
        (core, factors), _ = partial_tucker(kernel.double().numpy(), list(ranks), modes=[0, 1],
                                            n_iter_max=max(sweeps, 1), tol=1e-7, random_state=0)
    left, right = (torch.from_numpy(factor.copy()) for factor in factors)
    return left, torch.from_numpy(core.copy()), right


def channel_gram(gram: Float[Tensor, "n n"], window: int) -> Float[Tensor, "in_ in_"]:
    """Second moment of the channels of unfolded inputs, summed over the window's places."""
    channels = gram.shape[0] // window
    return gram.view(channels, window, channels, window).diagonal(dim1=1, dim2=3).sum(-1)


# ---- kernels of convolutions: CP -----------------------------------------------------------------------


def cp_als(kernel: Float[Tensor, "*axes"], factors: Sequence[Float[Tensor, "_ rank"]], sweeps: int,
           tolerance: float, ridge: float = 0.0) -> tuple[list[Tensor], float]:
    """Alternating least squares from ``factors``; returns one factor per axis and the relative error.

    Each step solves ``F_n = M_n (hadamard of F_k^T F_k, k != n + ridge)^-1`` with M_n the unfolded kernel
    times the Khatri-Rao product of the other factors (Kolda & Bader 2009, figure 3.3), which is never formed:
    for the small axes of a large kernel it would be a hundred times the kernel. ridge: share of the kernel's
    energy. Components are kept at equal norms in all axes. Stops when a sweep gains less than ``tolerance``.
    """
    kernel, factors = kernel.double(), [factor.double() for factor in factors]
    energy = float(kernel.square().sum())
    if energy == 0:
        return [torch.zeros_like(factor) for factor in factors], 0.0
    kernel, before = kernel / energy**0.5, float("inf")
    eye = torch.eye(factors[0].shape[1], dtype=torch.float64)
    for _ in range(sweeps):
        for mode in range(kernel.ndim):
            inner = torch.stack([f.T @ f for k, f in enumerate(factors) if k != mode]).prod(0)
            inner = inner + (ridge + RIDGE * inner.diagonal().mean().clamp_min(RIDGE)) * eye
            seen = khatri_rao_product(kernel, factors, mode)
            factors[mode] = torch.linalg.solve(inner, seen.T).T
        last = factors[-1]
        rebuilt = float((last.T @ last * torch.stack([f.T @ f for f in factors[:-1]]).prod(0)).sum())
        error = max(1 - 2 * float((seen * last).sum()) + rebuilt, 0.0)
        factors = _levelled(factors)
        if before - error < tolerance * error:
            break
        before = error
    scale = energy ** (0.5 / len(factors))
    return [factor * scale for factor in factors], error


def khatri_rao_product(kernel: Tensor, factors: Sequence[Tensor], mode: int) -> Float[Tensor, "_ rank"]:
    """The kernel contracted with every factor but that of ``mode``, the longest axis first."""
    axes = list(range(kernel.ndim))
    first, *rest = sorted((k for k in axes if k != mode), key=lambda k: kernel.shape[k], reverse=True)
    seen: Tensor = torch.tensordot(kernel, factors[first], dims=([first], [0]))  # [..., rank]
    axes.remove(first)
    for k in rest:
        place = axes.index(k)
        shape = [-1 if axis == k else 1 for axis in axes]
        seen = (seen * factors[k].view(*shape, factors[k].shape[1])).sum(place)
        axes.remove(k)
    return seen


def khatri_rao(factors: Sequence[Float[Tensor, "_ rank"]]) -> Float[Tensor, "axes rank"]:
    """Column-wise Kronecker product: [a, r], [b, r], ... -> [a * b * ..., r]."""
    return reduce(lambda a, b: torch.einsum("ir,jr->ijr", a, b).flatten(0, 1), factors)


def component_norms(factors: Sequence[Float[Tensor, "_ rank"]]) -> Float[Tensor, " rank"]:
    """The Frobenius norm of every rank-one component."""
    return torch.stack([factor.norm(dim=0) for factor in factors]).prod(0)


def _levelled(factors: Sequence[Tensor]) -> list[Tensor]:
    """The same components, each with equal norms in all axes."""
    norms = torch.stack([factor.norm(dim=0) for factor in factors])
    level = norms.prod(0) ** (1 / len(factors))
    return [factor * torch.where(norm > 0, level / norm, 0.0)
            for factor, norm in zip(factors, norms, strict=True)]


# ---- tensor trains -------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def digits(number: int, count: int, least: int = 2) -> tuple[int, ...] | None:
    """``number`` as a product of ``count`` whole numbers from ``least`` up, as even as possible, ascending.

    None where it has no such product: a prime has none of two.

    >>> digits(640, 3)
    (8, 8, 10)
    """
    if count == 1:
        return (number,) if number >= least else None
    found = []
    for first in range(least, int(number ** (1 / count) + 1e-9) + 1):
        if number % first == 0 and (rest := digits(number // first, count - 1, first)) is not None:
            found.append((first, *rest))
    return min(found, key=sum, default=None)


def prime_factors(number: int) -> tuple[int, ...]:
    """Ascending; (1,) of 1."""
    found, divisor = [], 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return (*found, number) if number > 1 or not found else tuple(found)


def paired(matrix: Float[Tensor, "out in_"], rows: tuple[int, ...],
           columns: tuple[int, ...]) -> Float[Tensor, "*axes"]:
    """The matrix as a tensor with one axis per pair of digits, rows_k * columns_k long."""
    count = len(rows)
    order = [axis for k in range(count) for axis in (k, count + k)]
    pairs = [m * n for m, n in zip(rows, columns, strict=True)]
    return matrix.view(*rows, *columns).permute(order).reshape(pairs)


def train_energies(tensor: Float[Tensor, "*axes"]) -> list[Tensor]:
    """Squared singular values at every cut of the train, left to right."""
    sizes = tensor.shape
    return [spectrum(tensor.reshape(prod(sizes[:k]), -1)).energies for k in range(1, len(sizes))]


def train(tensor: Float[Tensor, "*axes"], ranks: Sequence[int]) -> list[Float[Tensor, "rank axis next"]]:
    """TT-SVD: cores [rank, axis, next rank] cut off one by one from the left, all at the same norm.

    Oseledets 2011, "Tensor-Train Decomposition", algorithm 1: what is left of a cut is orthonormal, so each
    truncation is optimal for what it is given.
    """
    cores, rest, rank = [], tensor, 1
    for axis, wanted in zip(tensor.shape, ranks, strict=False):
        left, rest = spectrum(rest.reshape(rank * axis, -1)).split(wanted)
        cores.append(left.reshape(rank, axis, -1))
        rank = left.shape[1]
    cores.append(rest.double().view(rank, tensor.shape[-1], 1))
    norms = [float(core.norm()) for core in cores]
    level = reduce(lambda a, b: a * b ** (1 / len(norms)), norms, 1.0)
    return [core * (level / norm if norm > 0 else 1.0) for core, norm in zip(cores, norms, strict=True)]
