"""Round a weight and start its adapter where the rounding went wrong.

    Q_t = round(W - A_t-1),      A_t = the best matrix of rank r for W - Q_t,        t = 1 .. rounds

A plain adapter starts from nothing, on a base that already lost something. Here the codes and a product of
low rank are fitted to the weight together, in turns, before any training: their sum starts nearer to W than
either. ``lora`` goes on from the product that this leaves.

Paper: Li et al. 2024, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", algorithm 1;
the grid of normal quantiles is that of Dettmers et al. 2023, "QLoRA".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rarefy.core.edit import Edited, Leaf
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nodes import Dense, Node, Product, Quantized, Sum
from rarefy.numerics.grids import Grid, nf4_grid
from rarefy.numerics.rounding import encode, fit


@dataclass(frozen=True)
class LoftQ:
    """Codes and a low-rank start. Shapes: leaf [out, in] -> Sum [out, in].

    rank: r. grid: of the codes. rounds: turns.
    """

    rank: int = 8
    grid: Grid = nf4_grid(64)
    rounds: int = 5

    edits: ClassVar[tuple[type[Node], ...]] = (Dense,)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.rounds < 1:
            raise RecipeError(f"loftq: rank={self.rank} and rounds={self.rounds} must be positive")

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        rows, columns = leaf.target.shape
        self.grid.check(leaf.site, columns)
        if self.rank > min(rows, columns):
            raise EditError(f"{leaf.site}: rank {self.rank} is above the full rank {min(rows, columns)}; "
                            "lower rank")
        weight = leaf.target if leaf.keep is None else leaf.target * leaf.keep
        left, right = torch.zeros(rows, self.rank), torch.zeros(self.rank, columns)
        best: tuple[float, Node] | None = None
        for _ in range(self.rounds):
            rest = weight - left @ right
            found = fit(rest, torch.ones(columns), self.grid)
            codes = Quantized.of(encode(rest, found), found)
            # in float64, so that what LAPACK leaves to chance lies below the bits that are kept
            U, S, V = torch.linalg.svd((weight - codes.dense()).double(), full_matrices=False)
            root = S[:self.rank].sqrt()
            left, right = (U[:, :self.rank] * root).float(), (root[:, None] * V[:self.rank]).float()
            error = float((weight - codes.dense() - left @ right).square().sum())
            if best is None or error < best[0]:  # turns need not descend: rounding is no projection
                best = error, Sum((codes, Product(Dense(left), Dense(right))))
        assert best is not None
        return Edited(best[1])
