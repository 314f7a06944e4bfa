"""Move the outliers of the activations into the weights, where they are easier to round.

A runtime that rounds activations to 8 bits loses most where a few channels are far larger than the others.
A factor s_j per channel,

    W x = (W diag(s)) (diag(s)^-1 x),      s_j = max_t |x_tj|^alpha / max_i |W_ij|^(1 - alpha),

shares the difficulty: with alpha = 1/2 the largest activation and the largest weight of every channel become
equal, sqrt(max|x_j| max|W_j|) both. What divides the inputs is folded into whatever writes them (a norm's
gain, the rows of v or up). Matrices that read the same channels share the factors, so the maximum runs over
all of them.

Paper: Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", section 4, eq. 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rarefy.core.axes import AxisGroup, Change
from rarefy.core.errors import EditError


@dataclass(frozen=True)
class SmoothQuant:
    """Scaling of channels for runtimes that round activations.

    Shapes: factors [channels] for every group; no weight changes its shape. alpha: how much of the difficulty
    moves into the weights, between 0 and 1; 0.5 suits most networks, 0.75 those with extreme activations.
    """

    alpha: float = 0.5

    scope: ClassVar[str] = "axes"
    edits: ClassVar[tuple[type[AxisGroup], ...]] = (AxisGroup,)
    needs: ClassVar[frozenset[str]] = frozenset({"inputs"})
    beats: ClassVar[str] = "rtn"
    unties: ClassVar[bool] = False

    def transform(self, group: AxisGroup, generator: torch.Generator) -> Change:
        if not 0 <= self.alpha <= 1:
            raise EditError(f"{group.site}: alpha={self.alpha} must lie between 0 and 1; 0.5 suits most "
                            "networks")
        if group.barred:
            return Change(note=f"left as it is: {group.barrier}")
        if not group.scales:
            return Change()
        x = group.pooled([reader.inputs.peak for reader in group.readers], "amax")
        w = group.pooled([reader.weight.abs().amax(0) for reader in group.readers], "amax")
        seen = (x > 0) & (w > 0)
        factors = torch.where(seen, x, 1.0).pow(self.alpha) / torch.where(seen, w, 1.0).pow(1 - self.alpha)
        dead = int((~seen).sum())
        return Change(factors=factors, note=f"{dead} channels carry nothing and stay" if dead else "")
