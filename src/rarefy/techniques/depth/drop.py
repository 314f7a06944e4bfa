"""Leave out whole blocks, those that change the residual stream least.

A block adds to the stream, h' = h + B(h); where B(h) is small beside h, or points along it, leaving the
block out changes little. Two measures:

    influence    1 - E_t cos(h_t, h'_t)                  one forward pass
    kl           E_t KL(p || p without this block)       one forward pass per candidate

``kl`` is what the result is judged by, measured for each block alone; blocks then go in the order of their
cost. ``first`` and ``last`` blocks can be kept, which the papers find to matter most.

Paper: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
eq. 1; Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers" (keeping the last).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rarefy.core.errors import EditError, RecipeError
from rarefy.core.structure import Passage


@dataclass(frozen=True)
class Drop:
    """Leave out ``count`` blocks.

    Shapes: no weight changes its shape; there are fewer of them. by: influence or kl. keep_first, keep_last:
    blocks at either end that stay in any case.
    """

    count: int = 1
    by: str = "influence"
    keep_first: int = 1
    keep_last: int = 1

    scope: ClassVar[str] = "structure"
    edits: ClassVar[tuple[type[Passage], ...]] = (Passage,)
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    beats: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.by not in ("influence", "kl"):
            raise RecipeError(f"by {self.by!r}: choose influence or kl")
        if self.count < 1 or self.keep_first < 0 or self.keep_last < 0:
            raise RecipeError(f"count={self.count}, keep_first={self.keep_first}, "
                              f"keep_last={self.keep_last}: count must be 1 or more, the others 0 or more")

    @property
    def measures(self) -> bool:
        """Whether every block's own KL has to be measured."""
        return self.by == "kl"

    def drop(self, passages: tuple[Passage, ...]) -> tuple[int, ...]:
        """The blocks that go, in the order of the network."""
        total = len(passages)
        free = [each for each in passages if self.keep_first <= each.block < total - self.keep_last]
        if self.count > len(free):
            raise EditError(f"count={self.count}: of {total} blocks only {len(free)} may go (keep_first="
                            f"{self.keep_first}, keep_last={self.keep_last}); lower one of them")
        def cost(each: Passage) -> float:
            return each.influence if each.damage is None else each.damage

        return tuple(sorted(each.block for each in sorted(free, key=cost)[:self.count]))
