"""QuantEase: coordinate descent on the codes and scales of a weight that is already quantized.

With target T, quantized weight Q and Gram H the loss is ``tr((T - Q) H (T - Q)^T)``. With everything
else fixed, the best value of column j is

    q_j <- nearest( q_j + [(T - Q) H]_j / H_jj ),

and the best change of a group's scale, moving along its levels L, is
``ds = L . [(T - Q) H]_group / (L H_group L)``. Each move lowers the loss or is not made, so sweeps can
only improve on where they start (GPTQ visits each column once, before it knows how the later ones
round). The gradient ``(T - Q) H`` is kept per panel of columns, so most of the arithmetic is products
of matrices.

Paper: Behdin et al. 2023, "QuantEase: Optimization-based Quantization for Language Models",
algorithm 1 and eq. 8; the move of the scale is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rarefy.core.edit import Edited, Leaf
from rarefy.core.nodes import Node, Quantized
from rarefy.numerics.grids import Stored
from rarefy.numerics.linear import damped
from rarefy.numerics.rounding import TINY, Fit, Number, cast, inverse, join, level_of, nearest, restep

CHUNK = 1 << 21  # weights swept at once; rows are independent, so this only bounds memory


@dataclass(frozen=True)
class QuantEase:
    """Coordinate descent on the grid that the leaf already has.

    Shapes: leaf Quantized [out, in] -> Quantized [out, in], same grid. damping: as in GPTQ.
    """

    sweeps: int = 2
    damping: float = 0.1
    move_scales: bool = True

    edits: ClassVar[tuple[type[Node], ...]] = (Quantized,)
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    beats: ClassVar[str] = "gptq"

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        assert leaf.evidence is not None and isinstance(leaf.node, Quantized)
        rows, columns = leaf.target.shape
        H = damped(leaf.evidence.gram / max(leaf.evidence.tokens, 1), self.damping).float()
        codes, fits = torch.empty((rows, columns), dtype=torch.uint8), []
        step = max(1, CHUNK // columns)
        for start in range(0, rows, step):
            index = torch.arange(start, min(start + step, rows))
            node = leaf.node.select(0, index)
            keep = None if leaf.keep is None else leaf.keep[index]
            descent = _Descent(node, leaf.target[index], keep, H)
            for _ in range(self.sweeps):
                descent.sweep(self.move_scales)
            codes[index] = descent.codes.T.to(torch.uint8)
            fits.append(descent.fit())
        return Edited(Quantized.of(codes, join(fits, axis=0)))


class _Descent:
    """The state of one chunk of rows. Columns are stored as rows, so that each is contiguous."""

    def __init__(self, node: Quantized, target: Tensor, keep: Tensor | None, H: Tensor) -> None:
        self.grid, self.H = node.grid, H
        self.codes = node.codes.T.to(torch.float32).contiguous()
        self.keep = None if keep is None else keep.T
        fit = node.fit()
        self.stored_scale, self.stored_zero = fit.scale, fit.zero
        scale, zero = fit.values()
        self.scale, self.zero = scale.T.contiguous(), None if zero is None else zero.T.contiguous()
        self.residual = (target - (node.dense() if keep is None else node.dense() * keep)).T.contiguous()

    def fit(self) -> Fit:
        return Fit(self.stored_scale, self.stored_zero, self.grid)

    def sweep(self, move_scales: bool) -> None:
        columns = self.H.shape[0]
        group = self.grid.group or columns
        for g in range(columns // group):
            P = slice(g * group, (g + 1) * group)
            gradient = self.H[P] @ self.residual
            if move_scales and not self._tied_zero():
                self._move_scale(g, P, gradient)
                if self.zero is not None:
                    self._move_zero(g, P, gradient)
            self._move_codes(g, P, gradient)
        self._settle()

    def _levels(self, P: slice) -> Tensor:
        levels = level_of(self.codes[P], self.grid)
        return levels if self.keep is None else levels * self.keep[P]

    def _move_scale(self, g: int, P: slice, gradient: Tensor) -> None:
        """Best step of one group's scale along its levels, rounded to what the format can store."""
        levels = self._levels(P)
        bent = self.H[P, P] @ levels
        slope, curvature = (levels * gradient).sum(0), (levels * bent).sum(0)
        wanted = self.scale[g] + slope / curvature.clamp_min(TINY)
        new = _storable(wanted, self.stored_scale, self.grid.scale, g)
        change = new - self.scale[g]
        better = (curvature > 0) & (change * (change * curvature - 2 * slope) < 0)
        if self.grid.scale.low >= 0 and self.grid.scale.bits:
            better &= new > 0
        change = torch.where(better, change, 0.0)
        self.scale[g] += change
        self.residual[P] -= levels * change
        gradient -= bent * change

    def _move_zero(self, g: int, P: slice, gradient: Tensor) -> None:
        """Best step of one group's zero, likewise."""
        assert self.zero is not None and self.stored_zero is not None and self.grid.zero is not None
        ones = (torch.ones_like(gradient) if self.keep is None
                else self.keep[P].to(torch.float32))
        bent = self.H[P, P] @ ones
        slope, curvature = (ones * gradient).sum(0), (ones * bent).sum(0)
        wanted = self.zero[g] + slope / curvature.clamp_min(TINY)
        new = _storable(wanted, self.stored_zero, self.grid.zero, g)
        change = new - self.zero[g]
        change = torch.where((curvature > 0) & (change * (change * curvature - 2 * slope) < 0), change, 0.0)
        self.zero[g] += change
        self.residual[P] -= ones * change
        gradient -= bent * change

    def _move_codes(self, g: int, P: slice, gradient: Tensor) -> None:
        """Every column of the group in turn to its nearest level, given all others."""
        scale, per_scale = self.scale[g], inverse(self.scale[g])
        H = self.H[P, P]
        for k, j in enumerate(range(P.start, P.stop)):
            old = self.codes[j]
            # in units of the scale: where the column is, plus where the gradient sends it
            at = level_of(old, self.grid) + gradient[k] * per_scale / float(H[k, k])
            new = nearest(at, self.grid)
            change = (level_of(new, self.grid) - level_of(old, self.grid)) * scale
            if self.keep is not None:
                change = change * self.keep[j]
            self.codes[j] = new
            self.residual[j] -= change
            gradient.addr_(H[:, k], change, alpha=-1)

    def _settle(self) -> None:
        """Write the scales and zeros that moved back into their stored form."""
        self.stored_scale = _stored(self.scale.T, self.stored_scale, self.grid.scale)
        if self.stored_zero is not None and self.zero is not None and not self._tied_zero():
            assert self.grid.zero is not None
            self.stored_zero = _stored(self.zero.T, self.stored_zero, self.grid.zero)

    def _tied_zero(self) -> bool:
        """An integer zero point moves with the scale: then both stay, and codes alone descend."""
        return self.grid.zero is not None and self.grid.zero.relative


def _storable(wanted: Tensor, number: Number, stored: Stored, group: int) -> Tensor:
    """The storable numbers nearest to ``wanted`` [rows] for one group; coarse numbers stay as they are."""
    if number.codes is None:
        return cast(wanted, number.plain.dtype).to(torch.float32)
    coarse = Number(number.plain[:, group // stored.over:group // stored.over + 1], None)
    single = Stored(stored.dtype, stored.bits, stored.low, 1)
    return restep(wanted.unsqueeze(1), coarse, single).value(single)[:, 0]


def _stored(values: Tensor, number: Number, stored: Stored) -> Number:
    if number.codes is None:
        return Number(values.contiguous().to(number.plain.dtype), None)
    return restep(values.contiguous(), Number(number.plain, None), stored)

