"""Leave out whole blocks, those that change least; let the block before do some of their work.

A block adds to the stream, h' = h + B(h); where B(h) is small beside h, or points along it, leaving the
block out changes little. Two measures:

    influence    1 - E_t cos(h_t, h'_t)                  one forward pass
    kl           E_t KL(p || p without these blocks)     one forward pass per candidate

``kl`` is what the result is judged by. Blocks go in the order of what each costs alone (``each``), one after
another, each time the one that costs least beside those that are gone (``greedy``), or the choice of all that
costs least (``exact``, for few blocks). ``first`` and ``last`` blocks can be kept, which the papers find to
matter most. The block before those that went can take over

    merge        W + sum_l (W_l - W)                         their difference to it, in every tensor
    bridge       W + argmin_D sum_t |h'_t - y_t - D x_t|^2 / |h'_t|^2

where y is what that block puts out, x what its last matrix W reads, and h' what came out of the last block
that went: a linear account of all of them, by least squares, each token weighed as the next norm will.

Paper: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
eq. 1; Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers" (keeping the last); Yang et
al. 2024, "LaCo: Large Language Model Pruning via Layer Collapse", eq. 1 (merge); Shopkhoev et al. 2025,
"ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization", section 3 (bridge,
there a square matrix behind W).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.core.errors import EditError, RecipeError
from rarefy.core.structure import Damage, Passage
from rarefy.numerics.linear import damped

MOST = 2000  # choices that an exact search measures


@dataclass(frozen=True)
class Drop:
    """Leave out ``count`` blocks.

    Shapes: no weight changes its shape, there are fewer of them; bridge [out, in]. by: influence or kl.
    search: each, greedy or exact, of kl. keep_first, keep_last: blocks at either end that stay in any case.
    fold: merge or bridge, "" for neither. damping: share of the moment's mean diagonal added to it.
    """

    count: int = 1
    by: str = "influence"
    search: str = "each"
    keep_first: int = 1
    keep_last: int = 1
    fold: str = ""
    damping: float = 0.01

    scope: ClassVar[str] = "structure"
    edits: ClassVar[tuple[type[Passage], ...]] = (Passage,)
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    beats: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, value, known in (("by", self.by, ("influence", "kl")), ("fold", self.fold,
                                                                          ("", "merge", "bridge")),
                                   ("search", self.search, ("each", "greedy", "exact"))):
            if value not in known:
                raise RecipeError(f"{name} {value!r}: choose {' or '.join(each for each in known if each)}")
        if self.by != "kl" and self.search != "each":
            raise RecipeError(f"search {self.search}: tries choices by their KL; set by: kl")
        if self.count < 1 or self.keep_first < 0 or self.keep_last < 0:
            raise RecipeError(f"count={self.count}, keep_first={self.keep_first}, "
                              f"keep_last={self.keep_last}: count must be 1 or more, the others 0 or more")
        if self.fold and not self.keep_first:
            raise RecipeError(f"fold {self.fold}: the first block has none before it; set keep_first to 1 or "
                              "more")

    def drop(self, passages: tuple[Passage, ...], damage: Damage) -> tuple[int, ...]:
        """The blocks that go, in the order of the network."""
        total = len(passages)
        free = [each for each in passages if self.keep_first <= each.block < total - self.keep_last]
        if self.count > len(free):
            raise EditError(f"count={self.count}: of {total} blocks only {len(free)} may go (keep_first="
                            f"{self.keep_first}, keep_last={self.keep_last}); lower one of them")
        if self.by == "influence":
            return tuple(sorted(each.block for each in sorted(free, key=lambda p: p.influence)[:self.count]))
        blocks = [each.block for each in free]
        match self.search:
            case "each":
                gone = sorted(blocks, key=lambda block: damage(frozenset({block})))[:self.count]
            case "greedy":
                gone = []
                for _ in range(self.count):
                    gone.append(min((block for block in blocks if block not in gone),
                                    key=lambda block: damage(frozenset({*gone, block}))))
            case _:
                if comb(len(blocks), self.count) > MOST:
                    raise EditError(f"count={self.count} of {len(blocks)} blocks: "
                                    f"{comb(len(blocks), self.count):,} choices are too many to try; "
                                    "use search: greedy")
                gone = list(min(combinations(blocks, self.count), key=lambda some: damage(frozenset(some))))
        return tuple(sorted(gone))

    def bridge(self, moment: Float[Tensor, "in_ in_"], missing: Float[Tensor, "out in_"]
               ) -> Float[Tensor, "out in_"]:
        """``missing moment^-1``."""
        factor = torch.linalg.cholesky(damped(moment, self.damping))
        return torch.cholesky_solve(missing.double().T, factor).T.float()
