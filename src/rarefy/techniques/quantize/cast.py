"""Cast: store the weight in a shorter floating type.

What is stored is what the leaf holds, not what it should stand for: a repair that an earlier step made
(SparseGPT's) is kept.

float16 keeps 11 bits of mantissa up to 65504, bfloat16 8 bits over float32's range. What overflows
float16 is refused by name rather than stored as infinity. float8_e4m3fn keeps 4 bits of mantissa over 18
powers of two; every row gets a float32 scale that puts its largest weight at the end of that range,

    w_j ~ s fp8(w_j / s),      s = max|w| / 448.

Paper: Micikevicius et al. 2018, "Mixed Precision Training", section 3 (the range of float16); Micikevicius et
al. 2022, "FP8 Formats for Deep Learning", sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from rarefy.core.edit import Edited, Leaf
from rarefy.core.errors import EditError, did_you_mean
from rarefy.core.nodes import Dense, Node, Quantized
from rarefy.core.nouns import Choice, Option, Step
from rarefy.numerics.grids import Grid, Stored
from rarefy.numerics.rounding import Fit, Number, inverse

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
EIGHT = "float8_e4m3fn"
CHUNK = 1 << 20  # weights rounded at once, so that temporaries stay in cache


@dataclass(frozen=True)
class Cast:
    """Round to ``dtype``: float16, bfloat16, float32 or float8_e4m3fn.

    Shapes: leaf target [out, in] -> Dense [out, in], or Quantized [out, in] with a scale per row for eight
    bits.
    """

    dtype: str = "float16"

    edits: ClassVar[tuple[type[Node], ...]] = (Dense,)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        held = leaf.node.dense()
        if self.dtype == EIGHT:
            return Edited(_eight(held))
        if self.dtype not in FLOATS:
            known = [*FLOATS, EIGHT]
            raise EditError(f"{leaf.site}: dtype={self.dtype!r}: choose one of {', '.join(known)}"
                            f"{did_you_mean(self.dtype, known)}")
        values = held.to(FLOATS[self.dtype])
        if not bool(torch.isfinite(values).all()):
            peak = float(held.abs().max())
            raise EditError(f"{leaf.site}: {peak:g} does not fit {self.dtype}; use bfloat16 or float32")
        return Edited(Dense(values))

    @classmethod
    def options(cls, leaf: Leaf, choices: Mapping[str, Choice]) -> Iterator[Option]:
        """One option per floating format; the damage is what rounding the sample costs.

        Eight bits under a scale per row are offered where the target keeps any tree.
        """
        assert leaf.evidence is not None
        stands_for = (leaf.sampled_from or leaf.target.shape[0]) / leaf.target.shape[0]
        for name, choice in choices.items():
            if choice.stored is None:
                node = _eight(leaf.target)
                yield Option(leaf.site, name, ceil(node.bits() / 8 * stands_for),
                             leaf.evidence.damage(node.dense() - leaf.target),
                             (Step("cast", (leaf.site,), {"dtype": EIGHT}),))
            if not isinstance(choice.stored, torch.dtype):
                continue
            step = Step("cast", (leaf.site,), {"dtype": str(choice.stored).removeprefix("torch.")}, name)
            delta = leaf.target.to(choice.stored).float() - leaf.target
            if bool(torch.isfinite(delta).all()):
                yield Option(leaf.site, name, choice.bytes, leaf.evidence.damage(delta), (step,))


def _eight(weights: Float[Tensor, "out in_"]) -> Quantized:
    """Eight-bit floats under a scale per row: codes on a grid whose levels are the type's values."""
    grid, index = _grid()
    scale = weights.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    codes = torch.empty(weights.shape, dtype=torch.uint8)
    for rows in torch.arange(weights.shape[0]).split(max(1, CHUNK // weights.shape[1])):
        # torch rounds to the nearest, ties to even, as every processor with this type does
        bits = (weights[rows] * inverse(scale[rows])).to(torch.float8_e4m3fn).view(torch.uint8)
        codes[rows] = index[bits.int()]
    return Quantized.of(codes, Fit(Number(scale * SMALLEST, None), None, grid))


SMALLEST = 2.0**-9  # of the positive numbers; all others are whole multiples


@lru_cache(maxsize=1)
def _grid() -> tuple[Grid, UInt8[Tensor, " 256"]]:
    """The finite values in ascending order, in units of the smallest, and the place of every byte there."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float() / SMALLEST
    levels = values[torch.isfinite(values)].unique()
    index = torch.searchsorted(levels, values.nan_to_num()).to(torch.uint8)
    return Grid(EIGHT, tuple(levels.tolist()), 0, Stored(dtype=torch.float32)), index
