"""CP: a convolution as a sum of rank-one kernels, run as four cheap convolutions.

    W[o, i, h, w] ~ sum_r  A[o, r]  B[i, r]  C[h, r]  D[w, r]

A 1x1 convolution to r channels, a vertical and a horizontal filter on each channel by itself, and a 1x1 back:
``r (out + in + height + width)`` numbers for ``out in height width``.

The fit is not convex: alternating least squares runs from several starts (the singular vectors of the
unfoldings, then random ones) and the nearest result is taken. And it may have no minimum: components can grow
without bound while they cancel, close to the weight and useless to round, to tune or to run in float16. Such
a result shows in

    q = (sum_r |component_r|^2)^1/2 / |W|,

which is about 1 when components do their own work. Starts with ``q > limit`` are set aside; if none is left,
the descent is repeated with a ridge on the factors that climbs until q is in bounds, and the receipt says so.

With evidence, input channels are whitened before and A is refitted in closed form behind, in the metric of
the unfolded inputs.

Paper: Lebedev et al. 2015, "Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition";
degenerate components: Phan et al. 2020, "Stable Low-rank Tensor Decomposition for Compression of
Convolutional Neural Network", section 3; alternating least squares: Kolda & Bader 2009, "Tensor
Decompositions and Applications", section 3.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.core.edit import Edited, Leaf
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.factors import Extent, dtype_of, edited, stored, wanted, whitened
from rarefy.core.nodes import Dense, Node
from rarefy.core.tensors import CP as CPNode
from rarefy.numerics.decompose import (
    channel_gram,
    component_norms,
    cp_als,
    khatri_rao,
    left_vectors,
    refit,
    whitening,
)

TOLERANCE = 1e-5                       # share of the error that a sweep must gain to be followed by another
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)      # shares of the weight's energy, when every start degenerates


@dataclass(frozen=True)
class CP:
    """CP of a convolution; rank or ratio gives its size, neither means ratio 0.8.

    Shapes: leaf target [out, in * height * width] -> CP of one [axis, rank] per axis, in the leaf's dtype.

    rank: number of components. ratio: share of the leaf's bits that the factors may cost. starts: how many
    initialisations are tried. sweeps: of alternating least squares, at most, for each. limit: largest q that
    counts as sound. damping: share of the Gram's mean diagonal added to it; climbs, and falls back, as in
    svd_llm.
    """

    rank: int | None = None
    ratio: float | None = None
    starts: int = 3
    sweeps: int = 100
    limit: float = 5.0
    damping: float = 0.01

    edits: ClassVar[tuple[type[Node], ...]] = (Dense,)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self._extent()
        if self.starts < 1 or self.sweeps < 1:
            raise RecipeError(f"starts={self.starts}, sweeps={self.sweeps}: both must be 1 or more")
        if not self.limit > 1:
            raise RecipeError(f"limit={self.limit}: sound components reach 1; pass a limit above it")

    def _extent(self) -> Extent:
        return Extent(self.rank, None, self.ratio)

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        axes = _axes(leaf)
        weight, dtype = wanted(leaf), dtype_of(leaf)
        rank = self._extent().rank_for(leaf, prod(axes) // max(axes), sum(axes) * dtype.itemsize * 8)
        C, notes = whitened(leaf, self.damping)
        inputs = None if C is None else whitening(channel_gram(C @ C.T, prod(axes[2:])), 0.0)[0]
        kernel = weight.double().view(axes)
        kernel = kernel if inputs is None else torch.einsum("oi...,ij->oj...", kernel, inputs)
        factors, note = self._descend(kernel, rank, generator)
        if C is not None and inputs is not None:
            factors[1] = torch.linalg.solve_triangular(inputs.T, factors[1], upper=True)
            factors[1] = factors[1] / factors[1].norm(dim=0).clamp_min(1e-30)
            factors = [factors[0], *(stored(leaf.site, factor, dtype).dense() for factor in factors[1:])]
            factors[0] = refit(weight, khatri_rao(factors[1:]).T, C)
        node = CPNode(tuple(stored(leaf.site, factor, dtype) for factor in factors))
        return edited(leaf, node, *notes, note)

    def _descend(self, kernel: Float[Tensor, "*axes"], rank: int,
                 generator: torch.Generator) -> tuple[list[Tensor], str]:
        """The best sound result of all starts, and what there is to say about it."""
        energy = float(kernel.norm())
        def q(factors: list[Tensor]) -> float:
            return float(component_norms(factors).norm()) / energy if energy > 0 else 0.0

        starts = [_singular(kernel, rank, generator)]
        starts += [_random(kernel, rank, generator) for _ in range(self.starts - 1)]
        found = [cp_als(kernel, start, self.sweeps, TOLERANCE) for start in starts]
        sound = [result for result in found if q(result[0]) <= self.limit]
        if sound:
            return min(sound, key=lambda result: result[1])[0], ""
        worst = min(found, key=lambda result: q(result[0]))
        for ridge in RIDGES:
            factors, _ = cp_als(kernel, worst[0], self.sweeps, TOLERANCE, ridge)
            if q(factors) <= self.limit:
                break
        return factors, (f"all {self.starts} starts degenerate, q = {q(worst[0]):.1f} above {self.limit:g}: "
                         f"ridge {ridge:g}, q = {q(factors):.1f}")


def _axes(leaf: Leaf) -> tuple[int, ...]:
    """The kernel's axes, outputs first."""
    if len(leaf.kernel) < 2:
        raise EditError(f"{leaf.site}: CP decomposes convolutions, and this weight has no window; "
                        "use svd or svd_llm")
    if prod(leaf.kernel[1:]) == 1:
        raise EditError(f"{leaf.site}: a 1x1 convolution is a matrix; use svd or svd_llm")
    return (leaf.target.shape[0], *leaf.kernel)


def _singular(kernel: Tensor, rank: int, generator: torch.Generator) -> list[Tensor]:
    """The leading singular vectors of every unfolding, random ones where an axis has too few."""
    found = [left_vectors(kernel.movedim(axis, 0).flatten(1)) for axis in range(kernel.ndim)]
    return [torch.cat([own[:, :rank], other[:, own.shape[1]:]], 1)
            for own, other in zip(found, _random(kernel, rank, generator), strict=True)]


def _random(kernel: Tensor, rank: int, generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(size, rank, generator=generator, dtype=torch.float64) / size**0.5
            for size in kernel.shape]
