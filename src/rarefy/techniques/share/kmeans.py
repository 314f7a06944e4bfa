"""k-means: the weights of a layer share few values, and each stores only which one is its own.

Lloyd's alternation lowers

    sum_ij h_j f_i (w_ij - c[a_ij])^2,      h_j = mean of x_j^2 over calibration tokens,

over the codebook c and the assignment a. f_i = 1, or the Fisher of output i. The values lie where the
weights are, not on a grid, and one codebook serves the whole layer. In a file the indices are entropy-coded,
so frequent values cost less than rare ones, and k need be no power of two: 64 values take about 4.2 bits.

First centers are spaced linearly between the least and the largest weight: large weights are few but matter,
and a start by density or at random leaves them to far-away centers (section 3.1 of the paper). It also ends
with centers as far apart in the middle as outside, which under entropy coding is close to the best there is.
Centers that end without weights are not stored. Weights that a mask drops do not count and are not stored.

Paper: Han et al. 2016, "Deep Compression", section 3 (shared weights) and 4 (entropy coding of the indices).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rarefy.core.codebooks import Clustered
from rarefy.core.edit import Edited, Leaf
from rarefy.core.errors import RecipeError
from rarefy.core.nodes import Dense, Node, Quantized
from rarefy.core.nouns import Choice, Option, Step
from rarefy.core.sharing import DTYPES, choose, energy, finite, stored, unseen
from rarefy.numerics.clusters import assigned, points, settle, starts
from rarefy.numerics.coding import counted, estimated_bits

STARTS = ("linear", "density", "random")
COUNTS = ("inputs", "fisher", "nothing")
PLANNED = (4, 8, 16, 32, 64, 128, 256)  # codebooks that the planner may choose from: 2 to 6 bits when coded


@dataclass(frozen=True)
class KMeans:
    """One codebook of ``values`` numbers for the whole leaf.

    Shapes: leaf target [out, in] float32 -> Clustered [out, in] with a codebook [1, values, 1].

    values: numbers in the codebook, 2 to 65536; fewer are stored where fewer are in use. start: linear,
    density or random. counts: what an error weighs: inputs (the Gram's diagonal), fisher (that times the
    Fisher of the outputs) or nothing. dtype: of the codebook: float16, bfloat16 or float32. rounds: at most
    so many rounds of Lloyd's alternation.
    """

    values: int = 64
    start: str = "linear"
    counts: str = "inputs"
    dtype: str = "float16"
    rounds: int = 300

    edits: ClassVar[tuple[type[Node], ...]] = (Dense, Quantized, Clustered)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = "rtn"

    def __post_init__(self) -> None:
        if not 2 <= self.values <= 1 << 16:
            raise RecipeError(f"values={self.values}: a codebook holds 2 to 65536 values")
        if self.rounds < 1:
            raise RecipeError(f"rounds={self.rounds}: must be 1 or more")
        choose("start", self.start, STARTS)
        choose("counts", self.counts, COUNTS)
        choose("dtype", self.dtype, DTYPES)

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        target, notes = finite(leaf), [unseen(leaf)] if self.counts != "nothing" else []
        columns, rows = energy(leaf), None
        if self.counts == "nothing":
            columns = torch.ones_like(columns)
        elif self.counts == "fisher":
            rows = None if leaf.evidence is None else leaf.evidence.fisher
            notes.append("no Fisher in the evidence: outputs count alike" if rows is None else "")
        values, mass = points(target, columns, rows, leaf.keep)
        if not values.numel():  # whatever is kept meets inputs that are dead
            values, mass = points(target, torch.ones_like(columns), None, leaf.keep)
            notes.append("no weight that is kept counts: all alike" if values.numel() else "nothing is kept")
        book = self._book(leaf.site, values, mass, generator)
        node = Clustered(book.view(1, -1, 1), assigned(target, book.float()))
        return Edited(node, "; ".join(note for note in notes if note))

    def _book(self, site: str, values: Tensor, mass: Tensor, generator: torch.Generator) -> Tensor:
        """The codebook, ascending and without repetition, as it is stored."""
        if not values.numel():
            return torch.zeros(1, dtype=DTYPES[self.dtype])
        centers = values.unique_consecutive()
        if centers.numel() > self.values:
            first = starts(values, mass, self.values, self.start, generator)
            centers = settle(values, mass, first, self.rounds)
        book = stored(site, centers, self.dtype)
        return book.float().unique().to(book.dtype)

    @classmethod
    def options(cls, leaf: Leaf, choices: Mapping[str, Choice]) -> Iterator[Option]:
        """Codebooks of 2 to 6 bits where the target keeps any tree; bytes from how often a value occurs."""
        if not any(choice.stored is None for choice in choices.values()):
            return
        assert leaf.evidence is not None
        scale = (leaf.sampled_from or leaf.target.shape[0]) / leaf.target.shape[0]
        for count in PLANNED:
            node = cls(values=count).rewrite(leaf, torch.Generator()).node
            assert isinstance(node, Clustered)
            often = counted(node.index.reshape(-1), node.codebook.shape[1]) * scale
            bits = estimated_bits(often) + 16 * node.codebook.numel()
            damage = leaf.evidence.damage(node.dense() - leaf.target)
            steps = (Step("kmeans", (leaf.site,), {"values": count}),)
            yield Option(leaf.site, "tree", math.ceil(bits / 8), damage, steps)
