"""Rotate the channels, so that no channel and no weight stands out.

An orthogonal Q slipped between everything that writes the residual stream and everything that reads it
changes nothing, because an RMS norm without gains commutes with it:

    W_read <- W_read diag(g) Q,      W_write <- Q^T W_write,      E <- E Q,      g <- 1,

with the gains g of the norms folded into their readers first. Inside every head of attention the rows of v
and the columns of o take another Q likewise. With Q = diag(+-1) H / sqrt(n), H a Hadamard matrix, every new
channel is a sum of all old ones with random signs: outliers are spread evenly, weights look Gaussian, and
the scale of a group no longer serves one large value at the cost of the others.

Not every network has such a stream. A head tied to the embedding cannot have the last norm's gain folded in;
norms that subtract a mean (GPT-2), or that stand behind the writers with gains of their own (Gemma 2 and 3),
do not commute with Q. Those are refused by name; the heads of attention can be rotated in all of them.

Paper: Ashkboos et al. 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", sections 3 and 4 (stages
1a and 1c; rotations that a runtime would have to apply are left out); Tseng et al. 2024, "QuIP#", section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rarefy.core.axes import AxisGroup, Change
from rarefy.core.errors import EditError, did_you_mean
from rarefy.numerics.hadamard import hadamard_rotation, orthogonal_rotation

KINDS = {"hadamard": hadamard_rotation, "random": orthogonal_rotation}


@dataclass(frozen=True)
class Rotate:
    """Rotation of the residual stream and of the values inside every head.

    Shapes: one rotation [channels, channels] per group; no weight changes its shape. kind: hadamard (with
    random signs) or random (any orthogonal matrix). residual: rotate the residual stream. heads: rotate the
    values of every head. untie: give a head that is tied to the embedding a matrix of its own, which costs
    its bytes.
    """

    kind: str = "hadamard"
    residual: bool = True
    heads: bool = True
    untie: bool = False

    scope: ClassVar[str] = "axes"
    edits: ClassVar[tuple[type[AxisGroup], ...]] = (AxisGroup,)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = "rtn"

    @property
    def unties(self) -> bool:
        return self.untie and self.residual

    def transform(self, group: AxisGroup, generator: torch.Generator) -> Change:
        if self.kind not in KINDS:
            raise EditError(f"{group.site}: kind={self.kind!r}: choose one of {', '.join(KINDS)}"
                            f"{did_you_mean(self.kind, list(KINDS))}")
        wanted = {"residual": self.residual, "values": self.heads}.get(group.role, False)
        if not wanted:
            return Change()
        if group.turns == 0:
            raise EditError(f"{group.site}: cannot be rotated: {group.barrier}; pass residual: false to "
                            "rotate within heads alone")
        rotation = KINDS[self.kind](group.turns, generator)
        if rotation.mixed == 1:
            raise EditError(f"{group.site}: no Hadamard matrix divides {group.turns} channels; use kind: "
                            "random")
        note = (f"no Hadamard matrix of order {group.turns}: channels mix in blocks of {rotation.mixed}"
                if rotation.mixed < group.turns else "")
        return Change(rotation=rotation, note=note)
