"""Taylor: drop the weights whose loss changes the network's answers least, to first order.

Setting w to zero changes the loss of a token by about g w, g being the loss's gradient at w. Changes of
different tokens cancel in the mean but not in the answers, so what counts is the mean of their squares,

    cost_ij = E[(g_ij w_ij)^2],      g_ij = d_i x_j   for  y = W x,  d = dL/dy,

which, inputs and output gradients taken as independent (K-FAC), is ``fisher_i * w_ij^2 * H_jj / tokens``.
With the network's own answers as labels the mean of squared gradients is the Fisher information, which is
the Hessian of the KL to the original network: half the cost is also the second-order damage of "Optimal
Brain Damage", in nats. Costs of all outputs and of all layers are thus in one unit, and rows compete: an
output that nobody listens to is thinned first.

Paper: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", eq. 8; LeCun et al. 1989,
"Optimal Brain Damage", eq. 5; Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher
pruning", section 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rarefy.core.codebooks import Clustered
from rarefy.core.edit import Edited, Leaf
from rarefy.core.nodes import Dense, Node, Quantized
from rarefy.core.pruning import Rule, masked


@dataclass(frozen=True)
class Taylor:
    """Pruning by the squared first-order change of the loss.

    Shapes: leaf [out, in] -> Masked [out, in]. What stays is stored as it was.

    sparsity: share of the weights that is dropped, what masks above dropped included; 0.5, or what n:m says.
    pattern: ``unstructured`` (per layer, or ``unstructured per row``), ``2:4`` or any n:m (n of m neighbours
    in a row stay), ``block 16x16``, ``row``, ``column``, ``row 8`` (eight at a time).
    """

    sparsity: float | None = None
    pattern: str = "unstructured"

    edits: ClassVar[tuple[type[Node], ...]] = (Dense, Quantized, Clustered)
    needs: ClassVar[frozenset[str]] = frozenset({"gram", "fisher"})
    beats: ClassVar[str] = "magnitude"

    def __post_init__(self) -> None:
        self._rule()

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        assert leaf.evidence is not None
        energy = leaf.evidence.gram.diagonal()[None] / max(leaf.evidence.tokens, 1)
        if leaf.evidence.fisher is None:  # a factor inside a tensor decomposition
            return masked(leaf, self._rule(), energy, "no Fisher arrives here: outputs weigh alike")
        return masked(leaf, self._rule(), leaf.evidence.fisher[:, None] * energy)

    def _rule(self) -> Rule:
        return Rule.of(self.pattern, self.sparsity, "layer")
