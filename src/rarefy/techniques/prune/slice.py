"""Rotate the stream between the blocks onto its principal directions and leave out the weakest.

What a norm passes on, x with second moment G over tokens and norms, mostly lies in fewer directions than it
has channels. With G = U S U^T and Q the first columns of U,

    W' = Q^T W  for what writes the stream,      W' = W Q  for what reads it,

is the narrower network closest to the whole in the mean square of what is passed on. It has the standard
architecture at a smaller width: fewer numbers in every matrix, the embedding and the head among them.

One Q serves all blocks here. The paper has one for each, and multiplies the stream by Q_l^T Q_(l+1) between
blocks, for which no standard architecture has a place; what is lost is that each block's own directions are
left out best. Norms must have gains that matrices can take over, so Gemma (norms behind its blocks) and GPT-2
(norms that subtract the mean) are refused, and so is every encoder; a tied head becomes a matrix of its own.

Measured on small Llamas that were trained for tests, and on no model in use yet: the one that the benchmarks
have is a Gemma.

Paper: Ashkboos et al. 2024, "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", section
3.3 and theorem 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.core.errors import EditError, RecipeError
from rarefy.core.structure import Residual


@dataclass(frozen=True)
class Slice:
    """Leave out a share of the stream's channels.

    Shapes: basis [width, kept]. ratio: the share that goes. multiple: what stays is rounded up to a multiple
    of this many channels, because block formats need whole blocks.
    """

    ratio: float = 0.2
    multiple: int = 32

    scope: ClassVar[str] = "structure"
    edits: ClassVar[tuple[type[Residual], ...]] = (Residual,)
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    beats: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise RecipeError(f"ratio {self.ratio}: must be a share above 0 and below 1")
        if self.multiple < 1:
            raise RecipeError(f"multiple {self.multiple}: must be 1 or more")

    def basis(self, stream: Residual) -> Float[Tensor, "width kept"]:
        """The principal directions that stay."""
        width = stream.moment.shape[0]
        kept = max(1, -(-round(width * (1 - self.ratio)) // self.multiple)) * self.multiple
        if kept >= width:
            raise EditError(f"{stream.site}: a ratio of {self.ratio:g} of {width} channels leaves none to "
                            f"take out in steps of {self.multiple}; raise ratio or lower "
                            f"multiple={self.multiple}")
        if not bool(torch.isfinite(stream.moment).all()):
            raise EditError(f"{stream.site}: what its norms pass on is not finite; check the model")
        directions = torch.linalg.eigh(stream.moment.double()).eigenvectors
        return directions.flip(1)[:, :kept].float().contiguous()
