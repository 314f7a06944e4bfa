"""A low-rank correction beside a weight that stands still.

    W' = W + s B A,      B [out, r] from zero, A [r, in] from noise, s = alpha / r

Only A and B train: a fraction of the memory for moments, and the result is a small file of its own. Under
``stabilised`` the factor is s = alpha / sqrt(r), with which the size of the correction's steps does not
depend on the rank. The base may be anything: dense, pruned, or rounded to four bits (QLoRA). What comes out
is ``Sum(base, Product(s B, A))``, which every later step understands; merging is ``cast``, and merging into
few bits is rounding again with the sum as target. Under ``scales`` the scales of a rounded base learn as
well (codes do not): one number for every group of weights, as many as B and A have in a small model, and
what four bits cost it comes back sooner. A sum that ends in a product already (a repair, LoftQ, an
adapter that was trained before) goes on from there, its rows of A brought to the length of fresh ones, which
B makes up for: a repair's may be long, and a step of B would be as long in W'.

Paper: Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1; Kalajdzievski 2023,
"A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", theorem 3.2; Dettmers et al. 2023, "QLoRA:
Efficient Finetuning of Quantized LLMs", eq. 5; Kim et al. 2023, "Memory-Efficient Fine-Tuning of Compressed
Large Language Models via sub-4-bit Integer Quantization", eq. 2 (PEQA: scales alone).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from rarefy.core.edit import Leaf
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nodes import Dense, Node, Product, Sum
from rarefy.core.tune import Fixed, Rescaled, Soft, soften

PACE = 3.0  # of the base's scales: adapters learn at several times the rate of weights, and scales must not


@dataclass(frozen=True)
class LoRA:
    """An adapter of low rank. Shapes: leaf [out, in] -> Sum [out, in].

    rank: r. alpha: how strong the correction is. stabilised: divide alpha by the root of the rank (rsLoRA).
    scales: whether those of the base learn too; then the adapter belongs to the base that comes out.
    """

    rank: int = 8
    alpha: float = 16.0
    stabilised: bool = False
    scales: bool = False

    edits: ClassVar[tuple[type[Node], ...]] = (Node,)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""
    scope: ClassVar[str] = "training"

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise RecipeError(f"lora: rank={self.rank} and alpha={self.alpha} must be positive")

    def soften(self, leaf: Leaf, generator: torch.Generator) -> Soft:
        rows, columns = leaf.node.shape
        if self.rank > min(rows, columns):
            raise EditError(f"{leaf.site}: rank {self.rank} is above the full rank {min(rows, columns)}; "
                            "lower rank, or train the weight itself")
        scale = self.alpha / (math.sqrt(self.rank) if self.stabilised else self.rank)
        match leaf.node:
            case Sum(terms=(*base, Product(left=Dense(values=left), right=Dense(values=right)))) if base:
                rest = base[0] if len(base) == 1 else Sum(tuple(base))
                length = right.float().norm(dim=1)
                longer = torch.where(length > 0, length * math.sqrt(3), 1.0)  # than a fresh one
                up, down = left.float() * longer / scale, right.float() / longer[:, None]
                return _Adapted(self._base(leaf, rest), up, down, scale)
        bound = 1 / math.sqrt(columns)
        down = (torch.rand(self.rank, columns, generator=generator) * 2 - 1) * bound
        return _Adapted(self._base(leaf, leaf.node), torch.zeros(rows, self.rank), down, scale)

    def _base(self, leaf: Leaf, node: Node) -> Soft:
        if not self.scales:
            return Fixed(node)
        base = soften(replace(leaf, node=node), frozenset({"scales"}), still=True)
        for part in base.modules():
            if isinstance(part, Rescaled):
                part.pace = PACE
        return base


class _Adapted(Soft):
    def __init__(self, base: Soft, up: Tensor, down: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.up, self.down = nn.Parameter(up.clone()), nn.Parameter(down.clone())

    def forward(self) -> Tensor:
        return torch.addmm(self.base(), self.up, self.down, alpha=self.scale)

    def harden(self) -> Node:
        factors = Dense(self.scale * self.up.detach().cpu()), Dense(self.down.detach().cpu().clone())
        base = self.base.harden()
        return Sum((*(base.terms if isinstance(base, Sum) else (base,)), Product(*factors)))
