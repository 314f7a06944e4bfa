"""How far a network's answers moved: KL divergence, agreement and perplexity against the original.

At every position t of every window the original predicts p_t and the candidate q_t; then

    KL_t = sum_v p_t(v) (log p_t(v) - log q_t(v))      nats,

and the table that people compare is its mean, its median, its 99.9th percentile, how often both have
the same most likely token, and both perplexities. Positions of one window are not independent, so the
standard error is that of the windows' means (Miller 2024, "Adding Error Bars to Evals", section 2.2).

The original is run once and kept as its final hidden states, [windows, length, width]; logits over the
vocabulary exist for a few hundred positions at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rarefy.core.errors import DataError, ModelError
from rarefy.models.model import Model
from rarefy.models.runner import Runner

LOGITS = 1 << 26  # logits of one model that exist at once (256 MB)
BATCH = 4         # windows that pass through a block at once


@dataclass(frozen=True)
class Summary:
    """The distance between two models on one text. KL in nats per token, standard error by window."""

    kl_mean: float
    kl_stderr: float
    kl_median: float
    kl_p999: float
    top1: float
    perplexity: float
    perplexity_original: float
    tokens: int
    windows: int


class Reference:
    """The original's predictions on some windows of tokens, [windows, length]."""

    def __init__(self, model: Model, tokens: Int64[Tensor, "windows length"]) -> None:
        if tokens.ndim != 2 or not tokens.shape[0] or tokens.shape[1] < 2:
            raise DataError(f"evaluation text of shape {list(tokens.shape)}: expected windows of tokens")
        self.runner, self.tokens = Runner(model), tokens
        self.final = final_states(self.runner, tokens)

    @torch.no_grad()
    def compare(self, candidate: Runner) -> Summary:
        """Measure ``candidate`` on the same windows. ModelError when it computes NaN or infinity."""
        final = final_states(candidate, self.tokens)
        windows, length = self.tokens.shape
        step = max(1, LOGITS // self.runner.model.map.head.shape[0])
        after = torch.cat([self.tokens[:, 1:], self.tokens[:, :1]], 1)  # the last position predicts nothing
        pieces = [position_table(self.runner.logits(p), candidate.logits(q), wanted)
                  for p, q, wanted in zip(self.final.flatten(0, 1).split(step), final.flatten(0, 1).split(step),
                                          after.flatten().split(step), strict=True)]
        kl, same, ours, theirs = torch.cat(pieces, 1).view(4, windows, length)
        if not bool(torch.isfinite(kl).all()):
            raise ModelError(f"{candidate.model.name}: computes NaN or infinity; it is damaged")
        return _summary(kl, same, ours[:, :-1], theirs[:, :-1])


def _summary(kl: Tensor, same: Tensor, ours: Tensor, theirs: Tensor) -> Summary:
    """kl, same: [windows, length]; ours, theirs: log-likelihoods of the text, one position fewer."""
    windows = kl.shape[0]
    means = kl.mean(1)
    # one window has no spread of its own to estimate from: its positions are all there is
    error = means.std() / windows**0.5 if windows > 1 else kl.std() / kl.numel() ** 0.5
    return Summary(float(kl.mean()), float(error), float(kl.median()), float(kl.flatten().quantile(0.999)),
                   float(same.mean()), float((-theirs.mean()).exp()), float((-ours.mean()).exp()),
                   kl.numel(), windows)


def position_table(p: Float[Tensor, "positions vocabulary"], q: Float[Tensor, "positions vocabulary"],
                   wanted: Int64[Tensor, " positions"]) -> Float[Tensor, "4 positions"]:
    """KL(p || q), same top token, log p and log q of ``wanted``, from logits. Overwrites both."""
    same = (p.argmax(-1) == q.argmax(-1)).float()
    shift_p, shift_q = p.logsumexp(-1, keepdim=True), q.logsumexp(-1, keepdim=True)
    likelihood = [(x.gather(-1, wanted.unsqueeze(-1)) - shift).squeeze(-1)
                  for x, shift in ((p, shift_p), (q, shift_q))]
    p -= shift_p
    q -= shift_q
    kl = torch.linalg.vecdot(p.exp(), p.sub(q))
    return torch.stack([kl, same, *likelihood])


@torch.no_grad()
def final_states(runner: Runner, tokens: Int64[Tensor, "windows length"]) -> Float[Tensor, "windows length width"]:
    """The final-normed hidden states, block by block: one block's weights in memory at a time."""
    stems = [runner.stem(batch) for batch in tokens.split(BATCH)]
    hidden, contexts = [hidden for hidden, _ in stems], [context for _, context in stems]
    for index in range(runner.blocks):
        tensors = runner.load(index)
        hidden = [runner.block(index, h, context, tensors=tensors)
                  for h, context in zip(hidden, contexts, strict=True)]
    return runner.norm(torch.cat(hidden))
