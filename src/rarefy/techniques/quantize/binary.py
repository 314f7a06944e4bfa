"""Binary weights: the sign of every weight times one scale per row or group.

    w_j ~ a sign(w_j),      a = sum_j h_j |w_j| / sum_j h_j,

is the best scale for importances h (h = 1 without evidence: the mean of |w|), and signs are the best codes
for any positive scale. A weight of exactly zero counts as positive. Without training that follows only the
least sensitive layers survive this; no runtime has a kernel for it, so it saves bytes on disk alone.

Paper: Rastegari et al. 2016, "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks",
section 3.1 (Binary-Weight-Networks), eq. 4-6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rarefy.core.edit import Edited, Leaf
from rarefy.core.nodes import Dense, Node, Quantized
from rarefy.numerics.grids import Grid, Stored
from rarefy.numerics.rounding import Fit, Number, cast


@dataclass(frozen=True)
class Binary:
    """Signs and a scale. Shapes: leaf target [out, in] float32 -> Quantized [out, in].

    group: neighbouring columns that share a scale; 0: the whole row, as in the paper.
    """

    group: int = 0

    edits: ClassVar[tuple[type[Node], ...]] = (Dense, Quantized)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        rows, columns = leaf.target.shape
        grid = Grid(f"binary{self.group or 'row'}", (-1.0, 1.0), self.group, Stored())
        grid.check(leaf.site, columns)
        h = (torch.ones(columns) if leaf.evidence is None
             else leaf.evidence.gram.diagonal() / max(leaf.evidence.tokens, 1))
        shape = (rows, columns // (self.group or columns), self.group or columns)
        h = (h.expand(rows, columns) if leaf.keep is None else h * leaf.keep).reshape(shape)
        h = torch.where(h.sum(-1, keepdim=True) > 0, h, 1.0)  # inputs that never came still get a scale
        scale = (h * leaf.target.reshape(shape).abs()).sum(-1) / h.sum(-1)
        codes = (leaf.target >= 0).to(torch.uint8)
        return Edited(Quantized.of(codes, Fit(Number(cast(scale, grid.scale.dtype), None), None, grid)))
