"""Sum keys and values first and ask the sum: attention through a kernel, linear in the text, for encoders.

Where the softmax's exp(s q k^T) is replaced by phi(q) phi(k)^T, the sum over keys no longer knows the query,

    y_i = phi(q_i) (sum_j phi(k_j)^T v_j) / (phi(q_i) sum_j phi(k_j)^T).

phi(x) = elu(x) + 1 is cheap and another function, which the network has to learn. Random features are the
same function up to noise: with w_1 .. w_m orthogonal, of lengths as of Gaussian vectors, and x = sqrt(s) q,

    phi(x) = exp(W x - |x|^2 / 2) / sqrt(m),        E phi(q) phi(k)^T = exp(s q k^T).

Paper: Katharopoulos et al. 2020, "Transformers are RNNs", eq. 5 and 7 (elu); Choromanski et al. 2021,
"Rethinking Attention with Performers", lemma 1 and section 2.4 (random).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from rarefy.core.attention import Attention
from rarefy.core.errors import RecipeError, did_you_mean

FEATURES = ("random", "elu")


@dataclass(frozen=True)
class LinearAttention:
    """Kernel attention. Shapes: queries [batch, heads, n, width] to the same; project [count, width].

    features: random or elu. count: of random features. blocks: which blocks (empty: all).
    """

    features: str = "random"
    count: int = 128
    blocks: tuple[int, ...] = ()

    scope: ClassVar[str] = "attention"
    edits: ClassVar[tuple[type[Attention], ...]] = (Attention,)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""
    both: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.features not in FEATURES:
            raise RecipeError(f"features {self.features!r}: choose one of {', '.join(FEATURES)}"
                              f"{did_you_mean(self.features, list(FEATURES))}")
        if self.count < 1:
            raise RecipeError(f"count={self.count}: must be 1 or more")

    def learned(self, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        if self.features == "elu":
            return {}
        parts = [torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
                 for _ in range(-(-self.count // width))]
        lengths = torch.randn(self.count, width, generator=generator).norm(dim=1, keepdim=True)
        return {"project": torch.cat(parts)[:self.count] * lengths}

    def attend(self, call: Attention, learned: Mapping[str, Tensor]) -> Float[Tensor, "batch heads n width"]:
        shared = call.query.shape[1] // call.key.shape[1]
        key, value = (each.repeat_interleave(shared, 1) for each in (call.key, call.value))
        root = call.scale**0.5
        if self.features == "elu":
            asks, answers = F.elu(root * call.query) + 1, F.elu(root * key) + 1
        else:
            asks = _exponents(root * call.query, learned["project"])
            answers = _exponents(root * key, learned["project"])
            if call.real is not None:
                answers = answers.masked_fill(~call.real[:, None, :, None], -torch.inf)
            # what is common to all features of a query, or to all keys, cancels
            asks = (asks - asks.detach().amax(-1, keepdim=True)).exp()
            answers = (answers - answers.detach().amax((-2, -1), keepdim=True)).exp()
        if call.real is not None:
            answers = answers * call.real[:, None, :, None].to(answers.dtype)
        total = asks @ answers.sum(-2)[..., None]
        return asks @ (answers.transpose(-1, -2) @ value) / total.clamp_min(1e-9)

    def keys(self, length: int, causal: bool) -> float:
        return float(self.count)


def _exponents(x: Tensor, project: Tensor) -> Tensor:
    return x @ project.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2
