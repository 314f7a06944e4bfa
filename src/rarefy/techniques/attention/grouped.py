"""Let several queries share one head of keys and values: a trained model becomes grouped- or multi-query.

Of ``heads`` key-value heads, every ``heads / groups`` neighbours become one whose projections are their mean,

    K'_g = 1/n sum_(h in g) K_h,      V'_g = 1/n sum_(h in g) V_h,

so the KV cache, and the time to read it, shrink by n. One group is multi-query attention. Averaging changes
the answers a great deal until the model is trained on: the paper continues for 5% of the original steps;
distil from the original.

Paper: Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
Checkpoints", section 2.1; Shazeer 2019, "Fast Transformer Decoding" (one group).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.core.errors import EditError, RecipeError
from rarefy.core.structure import KeyHeads


@dataclass(frozen=True)
class Grouped:
    """Average neighbouring heads of keys and values until ``groups`` are left.

    Shapes: merge [groups, heads].
    """

    groups: int = 1

    scope: ClassVar[str] = "structure"
    edits: ClassVar[tuple[type[KeyHeads], ...]] = (KeyHeads,)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise RecipeError(f"groups={self.groups}: must be 1 or more")

    def merge(self, heads: KeyHeads) -> Float[Tensor, "groups heads"]:
        count = heads.key.shape[0]
        if count % self.groups or count == self.groups:
            fitting = [n for n in range(1, count) if count % n == 0]
            said = f"groups can be {', '.join(map(str, fitting))}" if fitting else "there is only one already"
            raise EditError(f"{heads.site}: {count} heads of keys and values cannot become {self.groups}; "
                            f"{said}")
        together = count // self.groups
        return torch.eye(self.groups).repeat_interleave(together, 1) / together
