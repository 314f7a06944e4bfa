"""Coupled axes: channels that one part of a network writes and others read, seen as one.

Between a writer ``x = P(..)`` and its readers ``y = W x`` any invertible change of the channels may be
slipped in without changing what the network computes,

    x' = M^-1 x,      W' = W M,

as long as the writer can take M^-1 over. A norm's gain, or a matrix whose output is multiplied by something
else, can take a diagonal M (``scales``); matrices alone can take an orthogonal one within runs of channels
(``turns``). A technique of scope ``axes`` is handed each group and says which M; what that means for the
tensors of a model is known to ``models.axes``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rarefy.core.nouns import Evidence
from rarefy.numerics.grids import Grid
from rarefy.numerics.hadamard import Rotation


@dataclass(frozen=True, eq=False)
class Inputs:
    """What calibration saw arriving at a weight: its evidence, and mean and largest |x| of every column."""

    evidence: Evidence
    mean: Float[Tensor, " in_"]
    peak: Float[Tensor, " in_"]


@dataclass(frozen=True, eq=False)
class Reader:
    """One matrix that reads the channels of a group.

    channel: which channel each column carries (grouped heads: one channel feeds several columns). grid: what
    the matrix will be rounded to (None: it stays in floats).
    """

    site: str
    weight: Float[Tensor, "out in_"]
    channel: Int64[Tensor, " in_"]
    inputs: Inputs
    grid: Grid | None = None


@dataclass(frozen=True, eq=False)
class AxisGroup:
    """One group as a technique sees it.

    role: norm, values (of attention), hidden (of the feed-forward part) or residual. size: how many channels.
    scales: whether each channel may have a factor of its own. turns: how many neighbouring channels may be
    rotated among themselves (0: none). barrier: why not. readers: the matrices behind; empty for techniques
    that need no inputs.
    """

    site: str
    role: str
    size: int
    scales: bool
    turns: int
    barrier: str = ""
    readers: tuple[Reader, ...] = ()

    @property
    def barred(self) -> bool:
        """Whether ``barrier`` keeps channels from being scaled; those of the residual stream never are."""
        return not self.scales and self.role != "residual"

    def pooled(self, columns: list[Float[Tensor, " in_"]], reduce: str) -> Float[Tensor, " channels"]:
        """One number per channel from one per column of every reader; ``reduce``: "mean" or "amax"."""
        channel = torch.cat([reader.channel for reader in self.readers])
        zeros = torch.zeros(self.size)
        return zeros.scatter_reduce(0, channel, torch.cat(columns), reduce, include_self=False)


@dataclass(frozen=True, eq=False)
class Change:
    """What a technique decides for a group: M = diag(factors), or a rotation per run; both None: nothing.

    note: goes to the receipt.
    """

    factors: Float[Tensor, " channels"] | None = None
    rotation: Rotation | None = None
    note: str = ""

    @property
    def empty(self) -> bool:
        """Whether the group stays as it is."""
        return self.factors is None and self.rotation is None


@runtime_checkable
class Transform(Protocol):
    """A technique of scope ``axes``: a frozen dataclass whose fields are its settings.

    needs: {"inputs"} or nothing. unties: whether a head that is tied to the embedding is to become a matrix
    of its own first.
    """

    scope: ClassVar[str]
    edits: ClassVar[tuple[type[AxisGroup], ...]]
    needs: ClassVar[frozenset[str]]

    @property
    def unties(self) -> bool: ...

    def transform(self, group: AxisGroup, generator: torch.Generator) -> Change: ...
