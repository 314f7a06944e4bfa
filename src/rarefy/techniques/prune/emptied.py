"""Take out units that nobody reads any more: masks over columns become a smaller network.

Units u (a neuron; a key-value head with its queries; one of these queries) write channels x_u that one
matrix reads, y = sum_u W_u x_u. Where pruning has emptied W_u, leaving u out changes nothing:

    goes if   |W_u| = 0.

``movement`` over ``column`` (neurons) or ``column 64`` (heads of 64) makes such units while a network trains;
a file without them is smaller for every runtime, and every runtime is faster by it, which a mask alone does
for neither. It may come behind the steps that made the masks.

As many stay in every block as the block with the most of them needs, so that any runtime loads what is left;
of queries as many from all that share keys and values. With spread ``global`` every block keeps the neurons
that it needs: llama.cpp loads a width for each block of Llama and Mistral.

Paper: Lagunas et al. 2021, "Block Pruning For Faster Transformers", section 3.3 (what is left is compacted).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from rarefy.core.errors import RecipeError
from rarefy.core.structure import UNITS, UnitGroup


@dataclass(frozen=True)
class Emptied:
    """Leave out what is read with zeros alone.

    Shapes: scores [units]. units: neurons, heads (with keys and values) or queries. spread: uniform or
    global. multiple: what stays is rounded up to a multiple of this many channels, as block formats need
    whole blocks.
    """

    units: str = "neurons"
    spread: str = "uniform"
    multiple: int = 32

    scope: ClassVar[str] = "structure"
    edits: ClassVar[tuple[type[UnitGroup], ...]] = (UnitGroup,)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.units not in UNITS:
            raise RecipeError(f"units {self.units!r}: choose {', '.join(UNITS)}")
        if self.spread not in ("uniform", "global"):
            raise RecipeError(f"spread {self.spread!r}: choose uniform or global")
        if self.spread == "global" and self.units != "neurons":
            raise RecipeError(f"spread global of {self.units}: only neurons may differ in number")
        if self.multiple < 1:
            raise RecipeError(f"multiple {self.multiple}: must be 1 or more")

    def count(self, group: UnitGroup) -> int:
        """How many units stay."""
        width = group.unit.numel() // group.units
        step = math.lcm(max(1, -(-self.multiple // width)), group.runs)
        alive = int((group.read > 0).view(group.runs, -1).sum(1).max()) * group.runs
        return min(group.units, max(1, -(-alive // step)) * step)

    def counts(self, scores: tuple[Float[Tensor, " units"], ...]) -> tuple[int, ...]:
        """How many units stay in every block that keeps what it needs."""
        alive = [max(1, int((cost > 0).sum())) for cost in scores]
        return tuple(min(cost.numel(), -(-count // self.multiple) * self.multiple)
                     for count, cost in zip(alive, scores, strict=True))

    def scores(self, group: UnitGroup) -> Float[Tensor, " units"]:
        """The norm of what each unit is read with."""
        return group.read

    def refit(self, group: UnitGroup, kept: Tensor) -> None:
        """Nothing is missing, so nothing is refitted."""
