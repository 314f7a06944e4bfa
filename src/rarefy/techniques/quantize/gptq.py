"""GPTQ: round one column at a time and let the columns not yet rounded absorb the error.

For a weight row w, inputs with Gram H = X X^T and U upper triangular with ``U^T U = H^-1``, rounding
column j to q_j and moving the later columns k > j by

    w_k <- w_k - (w_j - q_j) / U_jj * U_jk

is the optimal update (Optimal Brain Surgeon) of every column that is still free. All rows share U, so
the work is one triangular sweep over the columns. Updates are applied lazily, panel by panel, so that
most of the arithmetic is matrix products.

The scales of a block are searched when the sweep arrives at it, on the weights as they then are, and
weighted by ``1 / U_jj^2``: the part of column j's damage that no later column can absorb. Blocks are
visited by falling activation energy, and so are the columns inside one ("activation order"); codes
stay at their places, so any format that packs neighbouring columns can store the result.

Paper: Frantar et al. 2023, "GPTQ", algorithm 1 and section 3.3; Frantar & Alistarh 2022, "Optimal
Brain Compression", eq. 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rarefy.core.edit import Edited, Leaf
from rarefy.core.nodes import Dense, Node, Quantized
from rarefy.core.nouns import Choice, Option, Step
from rarefy.numerics.grids import Grid, integer_grid
from rarefy.numerics.linear import inverse_factor, unabsorbed
from rarefy.numerics.rounding import Fit, encode, fit, inverse, join, level_of, nearest

CHUNK = 1 << 21  # weights swept at once; rows are independent, so this only bounds memory
PANEL = 32       # columns between two lazy updates


@dataclass(frozen=True)
class GPTQ:
    """Error-feedback rounding on ``grid``.

    Shapes: leaf target [out, in] float32 -> Quantized [out, in]. damping: share of the Gram's mean
    diagonal added to it; climbs 10x and 100x when the factorization fails, and then falls back to
    rounding to nearest, which the receipt lists.
    """

    grid: Grid = integer_grid(4, 32)
    damping: float = 0.1
    activation_order: bool = True

    edits: ClassVar[tuple[type[Node], ...]] = (Dense, Quantized)
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    beats: ClassVar[str] = "rtn"

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        assert leaf.evidence is not None
        rows, columns = leaf.target.shape
        self.grid.check(leaf.site, columns)
        gram = leaf.evidence.gram / max(leaf.evidence.tokens, 1)
        order = self._order(gram.diagonal())
        U, damping = inverse_factor(gram[order][:, order], self.damping)
        notes = []
        if U is None:
            notes.append(f"Gram not positive definite at damping {damping:g}: rounded to nearest")
            U = torch.eye(columns)
        elif damping > self.damping:
            notes.append(f"damping raised to {damping:g}")
        if leaf.evidence.tokens < columns:
            notes.append(f"{leaf.evidence.tokens} calibration tokens for a Gram of rank {columns}")
        codes, fits = torch.empty((rows, columns), dtype=torch.uint8), []
        step = max(1, CHUNK // columns)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            keep = None if leaf.keep is None else leaf.keep[part]
            fits.append(_sweep(leaf.target[part], keep, U, order, self.grid, codes[part]))
        return Edited(Quantized.of(codes, join(fits, axis=0)), "; ".join(notes))

    @classmethod
    def options(cls, leaf: Leaf, choices: Mapping[str, Choice]) -> Iterator[Option]:
        """One option per grid, with the damage foreseen without running the sweep.

        Column j ends with a rounding error of its own, independent of the others, of which the share
        ``1 / U_jj^2`` reaches the output; so rounding the sample to nearest under these weights gives
        the damage of the sweep.
        """
        assert leaf.evidence is not None and leaf.evidence.fisher is not None
        h = unabsorbed(leaf.evidence.gram / max(leaf.evidence.tokens, 1), cls.damping)
        h = leaf.evidence.gram.diagonal() if h is None else h
        for name, choice in choices.items():
            if not isinstance(choice.stored, Grid):
                continue
            rounded = fit(leaf.target, h, choice.stored)
            delta = Quantized.of(encode(leaf.target, rounded), rounded).dense() - leaf.target
            damage = 0.5 * float(leaf.evidence.fisher @ (delta.square() @ h))
            steps = (Step("gptq", (leaf.site,), format=name), Step("quantease", (leaf.site,)))
            yield Option(leaf.site, name, choice.bytes, damage, steps)

    def _order(self, energy: Float[Tensor, " in_"]) -> Int64[Tensor, " in_"]:
        """Blocks by falling mean energy, columns inside a block by falling energy."""
        columns = energy.numel()
        if not self.activation_order:
            return torch.arange(columns)
        blocks = energy.view(-1, self.grid.block or columns)
        inside = blocks.argsort(dim=1, descending=True, stable=True)
        places = inside + torch.arange(0, columns, blocks.shape[1])[:, None]
        return places[blocks.mean(1).argsort(dim=0, descending=True, stable=True)].flatten()


def _sweep(weights: Tensor, keep: Tensor | None, U: Tensor, order: Tensor, grid: Grid,
           codes: Tensor) -> Fit:
    """Round ``weights`` [rows, in] into ``codes``; returns the fit. U and order as in ``rewrite``."""
    columns = weights.shape[1]
    block = grid.block or columns
    W = weights[:, order].T.contiguous()  # columns become contiguous rows
    K = None if keep is None else keep[:, order].T.contiguous()
    unabsorbed = U.diagonal().square().reciprocal()
    fits: dict[int, Fit] = {}
    for first in range(0, columns, block):
        own = order[first:first + block]
        left = int(own.min())
        back = (own - left).argsort()
        now, h = W[first:first + block].T[:, back], unabsorbed[first:first + block][back]
        if K is not None:
            h = h * K[first:first + block].T[:, back]
        fits[left] = fit(now, h, grid)
        scale, zero = fits[left].values()
        groups = (own - left) // (grid.group or columns)
        for start in range(first, first + block, PANEL):
            stop = min(start + PANEL, first + block)
            inside = groups[start - first:stop - first]
            _panel(W, K, U, start, stop, scale.T[inside], None if zero is None else zero.T[inside],
                   grid, codes, order)
    return join([fits[left] for left in sorted(fits)])


def _panel(W: Tensor, K: Tensor | None, U: Tensor, start: int, stop: int, scale: Tensor,
           zero: Tensor | None, grid: Grid, codes: Tensor, order: Tensor) -> None:
    """Round columns start..stop (rows of W) one by one, then move all later columns at once."""
    per_scale = inverse(scale)
    errors = torch.empty_like(W[start:stop])
    picked = torch.empty_like(W[start:stop])
    for k, j in enumerate(range(start, stop)):
        w = W[j]
        code = nearest((w if zero is None else w - zero[k]) * per_scale[k], grid)
        q = level_of(code, grid) * scale[k]
        if zero is not None:
            q = q + zero[k]
        if K is not None:
            q = torch.where(K[j], q, 0.0)
        picked[k] = code
        torch.mul(w - q, 1 / float(U[j, j]), out=errors[k])
        if j + 1 < stop:
            W[j + 1:stop].addr_(U[j, j + 1:stop], errors[k], alpha=-1)
    codes[:, order[start:stop]] = picked.T.to(torch.uint8)
    if stop < W.shape[0]:
        W[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
