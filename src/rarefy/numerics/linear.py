"""Linear algebra on Grams: damping that climbs until the factorization holds, dead columns made safe.

Grams are float32; factorizations run in float64, where a Gram of correlated activations that float32
calls indefinite still has a Cholesky factor.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

LADDER = (1.0, 10.0, 100.0)


def damped(gram: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """``gram + damping * mean(diagonal) * I`` in float64; dead columns get a diagonal of the mean."""
    h = gram.double()
    diagonal = h.diagonal()
    dead = diagonal <= 0
    alive = diagonal[~dead]
    mean = alive.mean() if alive.numel() else torch.ones((), dtype=h.dtype)
    return h + torch.diag(torch.where(dead, mean, 0.0) + damping * mean)


def inverse_factor(gram: Float[Tensor, "n n"],
                   damping: float) -> tuple[Float[Tensor, "n n"] | None, float]:
    """Upper triangular U with ``U^T U = (gram + damping)^-1``, and the damping that was needed.

    The damping climbs a ladder of 1x, 10x, 100x; None when even the last rung is not positive definite.
    """
    lower, needed = _reversed_factor(gram, damping)
    if lower is None:
        return None, needed
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    return upper.float(), needed


def unabsorbed(gram: Float[Tensor, "n n"], damping: float) -> Float[Tensor, " n"] | None:
    """``1 / U_jj^2``: what an error of column j costs once the later columns have absorbed their share."""
    lower, _ = _reversed_factor(gram, damping)
    return None if lower is None else lower.diagonal().flip(0).square().float()


def _reversed_factor(gram: Tensor, damping: float) -> tuple[Tensor | None, float]:
    """M, lower triangular: ``M M^T`` is gram + damping, both axes reversed; then U is M^-1 reversed."""
    for rung in LADDER:
        lower, failed = torch.linalg.cholesky_ex(damped(gram, damping * rung).flip(0, 1))
        if not failed and bool(torch.isfinite(lower).all()):
            return lower, damping * rung
    return None, damping * LADDER[-1]
