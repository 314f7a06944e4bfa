"""Tucker-2: a convolution as a 1x1, a small kernel between few channels, and a 1x1.

    W[o, i, w] ~ sum_ab  L[o, a]  K[a, b, w]  R[i, b]

R mixes the input channels to a few, K is a kernel of the same window between them, L mixes its outputs back.
Cost falls from ``out in w`` to ``out a + a b w + in b`` numbers, and so does the arithmetic at every place.

Without evidence R, K and L are the truncated higher-order SVD improved by orthogonal iteration (tensorly),
and the fit is nearest to the weight. With evidence the input channels are whitened first, so that R keeps the
directions that carry activation; and given R, the best L and K are known exactly: with ``M = R^T`` acting on
every place of the window and H the second moment of the unfolded inputs,

    B = W H M^T (M H M^T)^-1,    L K = the whitened truncated SVD of B in the metric M H M^T.

Ranks by energy: each unfolding keeps that share of its squared singular values. By ratio: of all pairs (a, b)
that are cheap enough, the one whose unfoldings lose the least in sum (a bound of the error).

Paper: Kim et al. 2016, "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
Applications", section 3; the whitening and the exact second step are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.core.edit import Edited, Leaf
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.factors import Extent, dtype_of, edited, rank_of_energy, stored, wanted, whitened
from rarefy.core.nodes import Dense, Node
from rarefy.core.nouns import Choice, Option, Step
from rarefy.core.tensors import Tucker as TuckerNode
from rarefy.numerics.decompose import (
    channel_energies,
    channel_gram,
    refit,
    spectrum,
    tucker2,
    whitening,
)

LADDER = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # shares of the weight's size, for the planner


@dataclass(frozen=True)
class Tucker:
    """Tucker-2 of a convolution; one of rank, energy and ratio gives its size, none means ratio 0.8.

    Shapes: leaf target [out, in * window] -> Tucker of [out, a], [a, b * window] and [in, b], in the leaf's
    dtype.

    rank: the two ranks, (a, b). energy: share of the squared singular values that each of the two unfoldings
    keeps. ratio: share of the leaf's bits that the factors may cost. sweeps: of orthogonal iteration, at
    most. damping: share of the Gram's mean diagonal added to it; climbs, and falls back, as in svd_llm.
    """

    rank: Sequence[int] | None = None
    energy: float | None = None
    ratio: float | None = None
    sweeps: int = 20
    damping: float = 0.01

    edits: ClassVar[tuple[type[Node], ...]] = (Dense,)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""
    whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._extent()
        if self.rank is not None and len(self.rank) != 2:
            raise RecipeError(f"rank={self.rank}: Tucker-2 has two ranks, for outputs and inputs: [16, 12]")

    def _extent(self) -> Extent:
        return Extent(self.rank, self.energy, self.ratio)

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        channels, window = _kernel(leaf)
        weight, dtype = wanted(leaf), dtype_of(leaf)
        C, notes = whitened(leaf, self.damping)
        inputs = None if C is None else whitening(channel_gram(C @ C.T, window), 0.0)[0]
        kernel = weight.double().view(weight.shape[0], channels, window)
        kernel = kernel if inputs is None else torch.einsum("oiw,ij->ojw", kernel, inputs)
        ranks = self._ranks(leaf, channel_energies(kernel), window, dtype.itemsize * 8)
        left, core, right = tucker2(kernel, ranks, self.sweeps)
        if C is not None and inputs is not None:
            right = torch.linalg.solve_triangular(inputs.T, right, upper=True)
            right = stored(leaf.site, right / right.norm(dim=0), dtype).dense()
            left, core = _outer(weight, right, window, C, ranks[0])
        parts = [stored(leaf.site, part, dtype) for part in (left, core.flatten(1), right)]
        return edited(leaf, TuckerNode(parts[0], parts[1], parts[2], leaf.kernel[1:]), *notes)

    def _ranks(self, leaf: Leaf, energies: tuple[Tensor, Tensor], window: int, width: int) -> tuple[int, int]:
        """The pair (a, b); no rank may exceed what the other one and the window can carry."""
        out, channels = leaf.target.shape[0], leaf.kernel[0]
        full = (len(energies[0]), len(energies[1]))
        if self.rank is not None:
            a, b = self.rank
            if a > full[0] or b > full[1] or a > b * window or b > a * window:
                raise EditError(f"{leaf.site}: rank=({a}, {b}) is above the full ranks of {out} outputs and "
                                f"{channels} inputs with a window of {window}; pass at most "
                                f"({min(full[0], b * window)}, {min(full[1], a * window)})")
            return a, b
        if self.energy is not None:
            a, b = (rank_of_energy(each, self.energy) for each in energies)
            return min(a, b * window), min(b, a * window)
        allowed = self._extent().allowed(leaf)
        assert allowed is not None
        self._extent().afford(leaf, (out + window + channels) * width, allowed)
        lost = [float(each.sum()) - each.cumsum(0) for each in energies]
        pairs = []
        for a in range(1, full[0] + 1):
            b = min((allowed // width - a * out) // (a * window + channels), full[1], a * window)
            if b >= 1 and a <= b * window:
                pairs.append((float(lost[0][a - 1] + lost[1][b - 1]), a, b))
        return min(pairs)[1:]

    @classmethod
    def options(cls, leaf: Leaf, choices: Mapping[str, Choice]) -> Iterator[Option]:
        """A ladder of ratios with factors in float16, each decomposed as it would be, less the iteration."""
        trees = [name for name, choice in choices.items() if choice.stored is None]
        if not trees or len(leaf.kernel) < 2 or prod(leaf.kernel[1:]) == 1 or not bool(leaf.target.any()):
            return
        assert leaf.evidence is not None
        seen: set[tuple[int, ...]] = set()
        for share in LADDER:
            try:
                node = cls(ratio=share, sweeps=1).rewrite(leaf, torch.Generator()).node
            except EditError:  # too few channels for so small a share
                continue
            assert isinstance(node, TuckerNode)
            ranks = (node.left.shape[1], node.right.shape[1])
            if ranks in seen:
                continue
            seen.add(ranks)
            damage = leaf.evidence.damage(node.dense() - leaf.target)
            size = 2 * sum(prod(child.shape) for child in node.children())
            steps = (Step("tucker", (leaf.site,), {"rank": list(ranks)}),
                     Step("cast", (leaf.site,), {"dtype": "float16"}))
            yield from (Option(leaf.site, name, size, damage, steps) for name in trees)


def _kernel(leaf: Leaf) -> tuple[int, int]:
    """Input channels and places of the window."""
    if len(leaf.kernel) < 2:
        raise EditError(f"{leaf.site}: Tucker-2 decomposes convolutions, and this weight has no window; "
                        "use svd or svd_llm")
    channels, window = leaf.kernel[0], prod(leaf.kernel[1:])
    if window == 1:
        raise EditError(f"{leaf.site}: a 1x1 convolution is a matrix; use svd or svd_llm")
    return channels, window


def _outer(weight: Float[Tensor, "out n"], right: Float[Tensor, "in_ b"], window: int,
           C: Float[Tensor, "n n"], rank: int) -> tuple[Float[Tensor, "out a"], Float[Tensor, "a places"]]:
    """The best left and core for a given right, in the metric ``C C^T`` of the unfolded inputs."""
    M = torch.kron(right.T.contiguous().double(), torch.eye(window, dtype=torch.float64))
    inner, _ = whitening((M @ C) @ (M @ C).T, 0.0)
    return spectrum(refit(weight, M, C), factor=inner).cut(rank)
