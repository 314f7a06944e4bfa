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

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rarefy.core.edit import Edited, Leaf
from rarefy.core.errors import EditError
from rarefy.core.nodes import Dense, Masked, Node, Quantized, Sum
from rarefy.numerics.grids import Grid, integer_grid
from rarefy.numerics.rounding import cast, encode, fit, join

CHUNK = 1 << 20  # weights rounded at once, so that temporaries stay in cache


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
        first = _rounded(leaf.target, kept, h, self.grid)
        saliency = (leaf.target - first.dense()).square_().mul_(h).mul_(kept)
        chosen = saliency.view(-1).topk(count).indices
        top = torch.zeros(leaf.target.numel(), dtype=torch.bool).index_fill_(0, chosen, True)
        top = top.view(leaf.target.shape) & kept
        rest = _rounded(leaf.target, kept & ~top, h, self.grid)
        missing = torch.where(top, leaf.target - rest.dense(), 0.0)
        return Edited(Sum((Masked(top, Dense(cast(missing, torch.float16))), rest)))


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
