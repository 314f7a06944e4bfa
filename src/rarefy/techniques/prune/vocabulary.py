"""Leave out the tokens that a text of one's own does not use: rows of the embedding and of the head.

Of a small model most of the file is vocabulary: half of a MiniLM, nearly two thirds of a Gemma of 270 million
numbers. A text in one language, or of one trade, uses a small part of it. With n_v the number of times that
token v stands in the text,

    n_v >= least,      and of these the ``most`` most frequent

stay, with all that their merges are made of, bytes or characters, and special tokens. A text of kept tokens
is cut as before and answered as before, by a softmax over fewer tokens; other text is cut into smaller
tokens, which costs quality there: choose text that is like what the model will see.

Paper: Abdaoui et al. 2020, "Load What You Need: Smaller Versions of Multilingual BERT", section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int64
from torch import Tensor

from rarefy.core.errors import EditError, RecipeError
from rarefy.core.structure import Tokens


@dataclass(frozen=True)
class Vocabulary:
    """Leave out tokens that do not occur.

    Shapes: keep [kept]. text: files, folders or python-docs that show which tokens are used (empty: the data
    of the recipe). least: times a token must occur. most: tokens that stay at most, besides those that must
    (0: any number).
    """

    text: tuple[str, ...] = ()
    least: int = 1
    most: int = 0

    scope: ClassVar[str] = "structure"
    edits: ClassVar[tuple[type[Tokens], ...]] = (Tokens,)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.least < 1 or self.most < 0:
            raise RecipeError(f"least={self.least}, most={self.most}: least must be 1 or more, most not "
                              "negative")

    def keep(self, tokens: Tokens) -> Int64[Tensor, " kept"]:
        """The tokens that stay, before what they are merged from is added; sorted."""
        used = (tokens.counts >= self.least).nonzero()[:, 0]
        if not used.numel():
            raise EditError(f"{tokens.site}: no token occurs {self.least} times in the text; lower least or "
                            "pass more text")
        if self.most and used.numel() > self.most:
            order = tokens.counts[used].argsort(descending=True, stable=True)
            used = used[order[:self.most]]
        return torch.cat([used, tokens.fixed.nonzero()[:, 0]]).unique()
