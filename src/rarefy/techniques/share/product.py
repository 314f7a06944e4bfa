"""Product quantization: short pieces of a row share vectors, as k-means shares single values.

A row is cut into pieces of ``length`` weights; each piece stores which vector of a codebook stands for it:

    sum_j sum_t h_jt (w_jt - c[a_j]_t)^2  is lowered over the codebook c and the indices a.

An index of 8 bits for 4 weights is 2 bits per weight, and vectors can lie where pieces are, which grids of
single values cannot. Starts are k-means++ seeds. The codebook is the price: 256 vectors of 4 in float16 are
16384 bits, little beside a large weight and much beside a small one. ``books="each"`` gives every place in
the row its own codebook, as the paper does; that pays for tables with many rows. The planner is offered it
at embeddings: there rows are many, and no error of one column can be made up for by another (GPTQ).

Paper: Jegou et al. 2011, "Product Quantization for Nearest Neighbor Search"; Gong et al. 2014, "Compressing
Deep Convolutional Networks using Vector Quantization", section 3.2.3.
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
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nodes import Dense, Node, Quantized
from rarefy.core.nouns import Choice, Option, Step
from rarefy.core.sharing import DTYPES, choose, energy, finite, stored, unseen
from rarefy.numerics.clusters import nearest_center, vector_centers

BOOKS = ("one", "each")
PLANNED = (2, 3, 4)  # weights to an index of 8 bits, for the planner


@dataclass(frozen=True)
class ProductQuantization:
    """Codebooks of ``values`` vectors of ``length`` weights.

    Shapes: leaf target [out, in] float32 -> Clustered [out, in] with a codebook [books, values, length].
    ``in`` must be divisible by length.

    values: vectors in a codebook, 2 to 65536. length: weights of a row that one index stands for. books: one
    for the whole leaf, or each place in a row its own. dtype: of the codebooks: float16, bfloat16 or float32.
    rounds: at most so many rounds of Lloyd's alternation.
    """

    values: int = 256
    length: int = 4
    books: str = "one"
    dtype: str = "float16"
    rounds: int = 25

    edits: ClassVar[tuple[type[Node], ...]] = (Dense, Quantized, Clustered)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not 2 <= self.values <= 1 << 16:
            raise RecipeError(f"values={self.values}: a codebook holds 2 to 65536 vectors")
        for name, value in (("length", self.length), ("rounds", self.rounds)):
            if value < 1:
                raise RecipeError(f"{name}={value}: must be 1 or more")
        choose("books", self.books, BOOKS)
        choose("dtype", self.dtype, DTYPES)

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        rows, columns = leaf.target.shape
        if columns % self.length:
            fitting = next(n for n in range(min(self.length, columns), 0, -1) if columns % n == 0)
            raise EditError(f"{leaf.site}: {columns} columns not divisible by length={self.length}; "
                            f"pass length={fitting}")
        pieces, h = finite(leaf).view(rows, -1, self.length), energy(leaf)
        if leaf.keep is not None and bool((h * leaf.keep).any()):
            h = h * leaf.keep
        weights = h.expand(rows, columns).reshape(pieces.shape)
        if self.books == "one":
            groups = [slice(None)]
        else:
            groups = [slice(place, place + 1) for place in range(pieces.shape[1])]
        books, index = [], torch.empty(pieces.shape[:2], dtype=torch.int64)
        for group in groups:
            part, mass = (each[:, group].reshape(-1, self.length) for each in (pieces, weights))
            book, found = self._fit(leaf.site, part, mass, generator)
            books.append(book)
            index[:, group] = found.view(rows, -1)
        return self._edited(books, index, unseen(leaf))

    @classmethod
    def options(cls, leaf: Leaf, choices: Mapping[str, Choice]) -> Iterator[Option]:
        """Tables in 2 to 4 bits, where the target holds any tree. Centers are fitted to the sample, which is
        large enough for 256 of them."""
        assert leaf.evidence is not None
        rows, columns = leaf.sampled_from or leaf.target.shape[0], leaf.target.shape[1]
        if all(choice.stored is not None for choice in choices.values()) or not leaf.evidence.separate:
            return
        for length in (each for each in PLANNED if columns % each == 0):
            node = cls(length=length).rewrite(leaf, torch.Generator().manual_seed(0)).node
            assert isinstance(node, Clustered)
            bits = 8 * rows * columns // length + 16 * node.codebook.numel()
            damage = leaf.evidence.damage(node.dense() - leaf.target)
            steps = (Step("product", (leaf.site,), {"length": length}),)
            yield Option(leaf.site, "tree", math.ceil(bits / 8), damage, steps)

    def _fit(self, site: str, part: Tensor, mass: Tensor,
             generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One codebook as it is stored, frequent vectors first, and the indices into it."""
        centers = vector_centers(part, mass, self.values, self.rounds, generator)
        book = stored(site, centers, self.dtype)
        index, _ = nearest_center(part, mass, book.float())
        often = torch.bincount(index, minlength=book.shape[0])
        order = often.argsort(descending=True, stable=True)
        return book[order[:int((often > 0).sum())]], order.argsort()[index]

    def _edited(self, books: list[Tensor], index: Tensor, note: str) -> Edited:
        largest = max(book.shape[0] for book in books)
        padded = [torch.cat([book, book.new_zeros(largest - book.shape[0], self.length)]) for book in books]
        node = Clustered(torch.stack(padded), index.to(torch.uint8 if largest <= 256 else torch.int32))
        notes = [note] if note else []
        share = node.codebook.numel() * node.codebook.element_size() * 8 / node.bits()
        if share > 0.25:
            notes.append(f"codebooks take {share:.0%} of the bits: fewer values or one book would cost less")
        return Edited(node, "; ".join(notes))
