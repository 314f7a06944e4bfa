"""What every technique of weight sharing asks of its leaf, and how shared numbers are stored."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.core.edit import Leaf
from rarefy.core.errors import EditError, RecipeError, did_you_mean

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def choose(name: str, value: str, known: Iterable[str]) -> None:
    """Refuse a setting that is none of those known."""
    known = list(known)
    if value not in known:
        raise RecipeError(f"{name}={value!r}: choose one of {', '.join(known)}{did_you_mean(value, known)}")


def finite(leaf: Leaf) -> Float[Tensor, "out in_"]:
    """The leaf's target; NaN and infinity have no mean, so they are refused by name."""
    if not bool(torch.isfinite(leaf.target).all()):
        raise EditError(f"{leaf.site}: the weight holds NaN or infinity, which no shared number is near to; "
                        "repair the model's file")
    return leaf.target


def energy(leaf: Leaf) -> Float[Tensor, " in_"]:
    """Mean square of every input; 1 without evidence, and where no input was ever anything but zero."""
    if leaf.evidence is None:
        return torch.ones(leaf.target.shape[1])
    h = leaf.evidence.gram.diagonal().clamp_min(0) / max(leaf.evidence.tokens, 1)
    return h if bool(h.any()) else torch.ones_like(h)


def unseen(leaf: Leaf) -> str:
    """The note of a weight whose inputs nobody saw."""
    if leaf.evidence is None:
        return "no calibration evidence: all inputs count alike"
    return "" if bool(leaf.evidence.gram.diagonal().any()) else "all inputs are dead: they count alike"


def stored(site: str, values: Tensor, dtype: str) -> Tensor:
    """Shared numbers in their stored type; what overflows it is refused by name."""
    kept = values.to(DTYPES[dtype])
    if not bool(torch.isfinite(kept).all()):
        raise EditError(f"{site}: {float(values.abs().max()):g} does not fit {dtype}; "
                        "use dtype=bfloat16 or float32")
    return kept
