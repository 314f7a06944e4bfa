"""Move biases by what compression adds to a channel on average.

Rounding or pruning a weight moves the outputs of its layer, and the mean of that move over all positions is
one vector that a bias takes back for nothing:

    b' = b + E[y] - E[y'],       y: in the original, y': in the compressed network.

What is taken out is what hurts most: errors of single tokens or pixels average out where answers are pooled,
an error that all of them share does not. Biases are corrected at the normalizations, where several layers and
what passed by them come together, and at the layers behind the last one, in the order of the data, each
behind those that are right already. The correction stays where it brings the answers to the calibration
samples nearer to the original's, and is left out where it does not. A plan for an encoder or a CNN ends with
it; a recipe names it.

Paper: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section
4.2 and appendix D (empirical correction); Finkelstein et al. 2019, "Fighting Quantization Bias With Bias".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rarefy.core.errors import RecipeError
from rarefy.core.means import Means


@dataclass(frozen=True)
class BiasCorrection:
    """Means as they were. Shapes: bias [channels] -> [channels].

    share: of the difference that is taken out, above 0 and at most 1; less than all of it where calibration
    samples are few.
    """

    share: float = 1.0

    edits: ClassVar[tuple[type[Means], ...]] = (Means,)
    needs: ClassVar[frozenset[str]] = frozenset({"means"})
    beats: ClassVar[str] = ""
    scope: ClassVar[str] = "means"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise RecipeError(f"bias_correction: share={self.share} must be above 0 and at most 1")

    def corrected(self, means: Means) -> Tensor:
        return means.bias + self.share * (means.wanted - means.found)
