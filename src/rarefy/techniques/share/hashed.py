"""HashedNets: a hash function of its position says which stored number a weight takes.

    W[o, i] = sign(o, i) * b[h(o, i)],      h in 0 .. K - 1,  sign in -1, +1

Nothing is stored but the K numbers b: neither which weight takes which, as codebooks do, nor where weights
are, as masks do. Which weights share a number is chance; the sign hash makes what they put on each other
cancel on average. Both hashes are xxHash32 of the position, under two seeds. The numbers that come nearest to
the weights there are, are the means of their own,

    b_k = sum h_j sign(o, j) w_oj / sum h_j      over the weights of bucket k,

h_j being the mean square of input j. That is a start, not an end: the paper trains b, and only training
reaches its curves. A hashed layer is smaller in memory, too: its forward pass makes some rows at a time.

Paper: Chen et al. 2015, "Compressing Neural Networks with the Hashing Trick", eq. 3 and 7, section 4.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rarefy.core.codebooks import Hashed
from rarefy.core.edit import Edited, Leaf
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nodes import Dense, Node, Quantized
from rarefy.core.sharing import DTYPES, choose, energy, finite, stored, unseen

CHUNK = 1 << 17  # weights hashed at once, so that what is in between stays in cache


@dataclass(frozen=True)
class HashedNets:
    """``ratio`` times as many numbers as weights, shared by hashing.

    Shapes: leaf target [out, in] float32 -> Hashed [out, in] with buckets [ratio * out * in].

    ratio: stored numbers per weight, in (0, 1]. seed: of the hash functions, 0 to 2^32 - 1. dtype: of the
    numbers: float16, bfloat16 or float32.
    """

    ratio: float = 0.125
    seed: int = 0
    dtype: str = "float16"

    edits: ClassVar[tuple[type[Node], ...]] = (Dense, Quantized)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise RecipeError(f"ratio={self.ratio}: stored numbers per weight lie in (0, 1]")
        if not 0 <= self.seed < 1 << 32:
            raise RecipeError(f"seed={self.seed}: a seed lies between 0 and 2^32 - 1")
        choose("dtype", self.dtype, DTYPES)

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        rows, columns = leaf.target.shape
        if rows * columns > 1 << 32:
            raise EditError(f"{leaf.site}: {rows} x {columns} weights, and the hash tells 2^32 positions "
                            "apart; leave it out")
        count = max(1, round(self.ratio * rows * columns))
        layout = Hashed(torch.zeros(count), self.seed, (rows, columns))
        values, empty = _means(leaf, layout)
        notes = [unseen(leaf), f"{empty} of {count} buckets hold no weight" if empty else ""]
        return Edited(Hashed(stored(leaf.site, values, self.dtype), self.seed, (rows, columns)),
                      "; ".join(note for note in notes if note))


def _means(leaf: Leaf, layout: Hashed) -> tuple[Tensor, int]:
    """The best number of every bucket, and how many buckets there are no weights for."""
    target, columns = finite(leaf), leaf.target.shape[1]
    h = energy(leaf)
    # dead inputs count a little, so that a bucket of none but those has a mean, too
    h = h.clamp_min(float(h.max()) * 1e-9).double()
    held, moment = (torch.zeros(layout.buckets.numel(), dtype=torch.float64) for _ in range(2))
    for rows in torch.arange(target.shape[0]).split(max(1, CHUNK // columns)):
        place, sign = layout.places(rows)
        mass = h.expand(len(rows), columns)
        if leaf.keep is not None:
            mass = mass * leaf.keep[rows]
        held.index_add_(0, place.reshape(-1), mass.reshape(-1))
        moment.index_add_(0, place.reshape(-1), (mass * sign * target[rows]).reshape(-1))
    return torch.where(held > 0, moment / held.clamp_min(1e-300), 0.0), int((held == 0).sum())
