"""Round to nearest, with a weighted search for the scale.

Every group of weights gets the scale (and zero) that minimises

    sum_j h_j (w_j - s * level(q_j) - z)^2,        h_j = mean of x_j^2 over calibration tokens,

and every weight goes to its nearest level. The weighting is the diagonal of the output error
``tr(dW H dW^T)``; without evidence h = 1. Errors of one weight are not repaired by another: that is
what ``gptq`` adds.

Paper: Nagel et al. 2021, "A White Paper on Neural Network Quantization", section 2.2-2.3; the weighted
search is the importance-matrix search of llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rarefy.core.edit import Edited, Leaf
from rarefy.core.nodes import Dense, Node, Quantized
from rarefy.numerics.grids import Grid, integer_grid
from rarefy.numerics.rounding import encode, fit, join

CHUNK = 1 << 20  # weights rounded at once, so that temporaries stay in cache


@dataclass(frozen=True)
class RTN:
    """Round to nearest on ``grid``.

    Shapes: leaf target [out, in] float32 -> Quantized [out, in]. ``in`` must be divisible by the
    grid's block.
    """

    grid: Grid = integer_grid(4, 32)

    edits: ClassVar[tuple[type[Node], ...]] = (Dense, Quantized)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        rows, columns = leaf.target.shape
        self.grid.check(leaf.site, columns)
        importance = (torch.ones(columns) if leaf.evidence is None
                      else leaf.evidence.gram.diagonal() / max(leaf.evidence.tokens, 1))
        codes, fits = torch.empty((rows, columns), dtype=torch.uint8), []
        step = max(1, CHUNK // columns)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            weights = leaf.target[part]
            h = importance if leaf.keep is None else importance * leaf.keep[part]
            fits.append(fit(weights, h, self.grid))
            codes[part] = encode(weights, fits[-1])
        return Edited(Quantized.of(codes, join(fits, axis=0)))
