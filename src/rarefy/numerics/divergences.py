"""Distances between what two networks say: distributions, states, attention. One number per row.

All of them are differentiable in the second argument, the student's.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

HALF = math.log(0.5)


def kl(logp: Float[Tensor, "*rows classes"], logq: Float[Tensor, "*rows classes"]) -> Float[Tensor, "*rows"]:
    """``sum p (log p - log q)``; outcomes of no probability add nothing."""
    return torch.where(logp > -torch.inf, logp.exp() * (logp - logq), 0.0).sum(-1)


def jensen_shannon(logp: Float[Tensor, "rows classes"], logq: Float[Tensor, "rows classes"],
                   beta: float) -> Float[Tensor, " rows"]:
    """``beta KL(p | m) + (1 - beta) KL(q | m)`` with ``m = beta p + (1 - beta) q``."""
    logm = torch.logaddexp(logp + math.log(beta), logq + math.log1p(-beta))
    return beta * kl(logp, logm) + (1 - beta) * kl(logq, logm)


def cross_entropy(logits: Float[Tensor, "rows classes"],
                  labels: Int64[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """``-log q(label)``."""
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def top(logits: Float[Tensor, "rows classes"],
        k: int) -> tuple[Float[Tensor, "rows k"], Int64[Tensor, "rows k"]]:
    """Log-probabilities of the k most likely classes, and which they are."""
    values, index = logits.log_softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
    return values, index


def with_rest(logp: Float[Tensor, "rows k"]) -> Float[Tensor, "rows more"]:
    """The same with one outcome more: any other class. Nothing of the tail's mass is thrown away."""
    mass = logp.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
    # log(1 - e^mass), by whichever of the two forms is exact there
    rest = torch.where(mass > HALF, torch.log(-torch.expm1(mass)), torch.log1p(-mass.exp().clamp(max=0.75)))
    return torch.cat([logp, rest], -1)


def cosine(a: Float[Tensor, "*rows width"], b: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows"]:
    """One minus the cosine of the angle."""
    return 1 - nn.functional.cosine_similarity(a, b, dim=-1)


def mean_square(a: Float[Tensor, "*rows width"], b: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows"]:
    """The mean squared difference."""
    return (a - b).square().mean(-1)


def split_heads(x: Float[Tensor, "batch length width"],
                heads: int) -> Float[Tensor, "batch heads length each"]:
    """Channels cut into heads; any number that divides the width."""
    batch, length, width = x.shape
    return x.view(batch, length, heads, width // heads).transpose(1, 2)


def scores(a: Float[Tensor, "batch heads length each"],
           b: Float[Tensor, "batch heads length each"]) -> Float[Tensor, "batch heads length length"]:
    """``a b^T / sqrt(each)``: attention of queries to keys, or relations of one kind of vectors."""
    products: Tensor = a @ b.transpose(-1, -2)
    return products / math.sqrt(a.shape[-1])


def scores_difference(a: Float[Tensor, "batch heads length length"],
                      b: Float[Tensor, "batch heads length length"],
                      real: Bool[Tensor, "batch length"]) -> Float[Tensor, "batch length"]:
    """The mean squared difference of two tables of scores, over heads and real keys, for each query."""
    weight = real[:, None, None, :].to(a.dtype)
    return (((a - b).square() * weight).sum(-1) / weight.sum(-1)).mean(1)


def scores_kl(a: Float[Tensor, "batch heads length length"], b: Float[Tensor, "batch heads length length"],
              real: Bool[Tensor, "batch length"]) -> Float[Tensor, "batch length"]:
    """KL between the softmaxes of two tables of scores over real keys, mean over heads, for each query."""
    hidden = ~real[:, None, None, :]
    logs = [x.masked_fill(hidden, -1e9).log_softmax(-1) for x in (a, b)]
    return kl(logs[0], logs[1]).mean(1)
