"""What a technique of scope ``means`` is handed: a bias, and what its channels come to on average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Means:
    """One bias. wanted: the mean output of its module in the original; found: in the compressed network."""

    path: str
    bias: Float[Tensor, " channels"]
    wanted: Float[Tensor, " channels"]
    found: Float[Tensor, " channels"]


@runtime_checkable
class Correcting(Protocol):
    """A technique that moves biases when weights are what they will be.

    ``corrected``: the bias that is used instead, [channels].
    """

    scope: ClassVar[str]
    edits: ClassVar[tuple[type[Means], ...]]
    needs: ClassVar[frozenset[str]]

    def corrected(self, means: Means) -> Tensor: ...
