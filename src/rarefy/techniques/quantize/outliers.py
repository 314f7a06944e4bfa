"""Keep the few weights that rounding hurts most in 16 bits, and round the rest.

The weight becomes a sum of a sparse matrix of floats and a dense one of codes,

    W ~ S + Q,      S_ij = W_ij - Q_ij  at the share of places with the largest  h_j (W_ij - Q_ij)^2,

and 0 elsewhere; h_j = mean of x_j^2 is what an error of column j costs. Places are chosen with the errors of
a first rounding; then Q is rounded anew with scales that no longer need to reach the outliers, and S holds
what is missing there, so that the sum is exact to 16 bits.

Both terms are made in one step, because the sparse one must stay in floats: a technique that rounds `Dense`
leaves (gptq, rtn) would round it as well. What may follow is a technique that edits `Quantized` leaves alone:
`quantease` then moves the codes towards what the sparse term leaves over.

Paper: Dettmers et al. 2023, "SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight
Compression", section 3 (with the diagonal of the Hessian in place of its inverse's); Kim et al. 2023,
"SqueezeLLM: Dense-and-Sparse Quantization", section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from rarefy.core.edit import Edited, Leaf
from rarefy.core.errors import EditError
from rarefy.core.nodes import Dense, Masked, Node, Quantized, Sum
from rarefy.core.nouns import Choice, Option, Step
from rarefy.numerics.grids import Grid, integer_grid
from rarefy.numerics.linear import unabsorbed
from rarefy.numerics.rounding import cast, encode, fit, join

CHUNK = 1 << 20  # weights rounded at once, so that temporaries stay in cache
PLANNED = (0.002, 0.005, 0.01, 0.02)  # shares that a planner is offered
DAMPING = 0.1  # as in GPTQ and QuantEase


@dataclass(frozen=True)
class Outliers:
    """Sparse floats beside codes on ``grid``.

    Shapes: leaf target [out, in] float32 -> Sum(Masked(Dense float16), Quantized) [out, in]. share: of the
    weights that are kept in 16 bits, between 0 and 1.
    """

    grid: Grid = integer_grid(3, 32)
    share: float = 0.01

    edits: ClassVar[tuple[type[Node], ...]] = (Dense,)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        columns = leaf.target.shape[1]
        self.grid.check(leaf.site, columns)
        count = round(self.share * leaf.target.numel())
        if not 0 < self.share < 1 or count == 0:
            what = "everything" if self.share >= 1 else "nothing"
            raise EditError(f"{leaf.site}: share={self.share} of {leaf.target.numel()} weights keeps {what}; "
                            "use a share like 0.01, or rtn for none and cast for all")
        h = (torch.ones(columns) if leaf.evidence is None
             else leaf.evidence.gram.diagonal() / max(leaf.evidence.tokens, 1))
        kept = torch.ones_like(leaf.target, dtype=torch.bool) if leaf.keep is None else leaf.keep
        return Edited(_parted(leaf.target, kept, h, self.grid, count))

    @classmethod
    def options(cls, leaf: Leaf, choices: Mapping[str, Choice]) -> Iterator[Option]:
        """A few shares on every grid, where the target keeps any tree.

        `quantease` follows, so of column j's error the share ``1 / U_jj^2`` will reach the output, with
        ``U^T U`` the inverse of the Gram: places and scales are foreseen under these weights.
        """
        tree = next((name for name, choice in choices.items() if choice.stored is None), None)
        if tree is None:
            return
        assert leaf.evidence is not None and leaf.evidence.fisher is not None
        h = unabsorbed(leaf.evidence.gram / max(leaf.evidence.tokens, 1), DAMPING)
        h = leaf.evidence.gram.diagonal() if h is None else h
        kept = torch.ones_like(leaf.target, dtype=torch.bool)
        scale = (leaf.sampled_from or leaf.target.shape[0]) / leaf.target.shape[0]
        grids = {name: choice.stored for name, choice in choices.items() if isinstance(choice.stored, Grid)}
        for (name, grid), share in product(grids.items(), PLANNED):
            node = _parted(leaf.target, kept, h, grid, max(1, round(share * leaf.target.numel())))
            lost = (node.dense() - leaf.target).square() @ h
            steps = (Step("outliers", (leaf.site,), {"share": share}, name), Step("quantease", (leaf.site,)))
            yield Option(leaf.site, tree, ceil(node.bits() / 8 * scale),
                         0.5 * float(leaf.evidence.fisher @ lost), steps)


def _parted(weights: Tensor, kept: Tensor, h: Tensor, grid: Grid, count: int) -> Sum:
    """The sum that stands for ``weights`` (where ``kept``), ``count`` places of it in floats."""
    first = _rounded(weights, kept, h, grid)
    saliency = (weights - first.dense()).square_().mul_(h).mul_(kept)
    chosen = saliency.view(-1).topk(count).indices
    top = torch.zeros(weights.numel(), dtype=torch.bool).index_fill_(0, chosen, True)
    top = top.view(weights.shape) & kept
    rest = _rounded(weights, kept & ~top, h, grid)
    missing = torch.where(top, weights - rest.dense(), 0.0)
    return Sum((Masked(top, Dense(cast(missing, torch.float16))), rest))


def _rounded(weights: Tensor, counted: Tensor, h: Tensor, grid: Grid) -> Quantized:
    """Nearest codes, with scales that only the ``counted`` weights have a say in (others count as zeros)."""
    rows, columns = weights.shape
    codes, fits = torch.empty((rows, columns), dtype=torch.uint8), []
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        inside = torch.where(counted[part], weights[part], 0.0)
        fits.append(fit(inside, h * counted[part], grid))
        codes[part] = encode(inside, fits[-1])
    return Quantized.of(codes, join(fits, axis=0))
