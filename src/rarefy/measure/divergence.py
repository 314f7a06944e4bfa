"""How far a network's answers moved: KL divergence, agreement and perplexity against the original.

At every position t of every window the original predicts p_t and the candidate q_t; then

    KL_t = sum_v p_t(v) (log p_t(v) - log q_t(v))      nats,

and the table that people compare is its mean, its median, its 99.9th percentile, how often both have
the same most likely token, and both perplexities. Positions of one window are not independent, so the
standard error is clustered: that of the windows' means (Miller 2024, "Adding Error Bars to Evals",
section 2.2).

The original is run once and kept as its final hidden states, [positions, width]. Logits exist for a tile
of positions and tokens at a time: both heads are walked once, in slabs of rows, and every tile adds to
running sums that are rescaled when a larger logit appears (the online softmax of Milakov & Gimelshein
2018). With a = z - max z, b likewise for the candidate, and A, B the sums of e^a and e^b,

    KL = sum_v e^a (a - b) / A - log A + log B,

exact in any order of the tokens, and exactly zero for equal logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rarefy.core.errors import DataError, ModelError
from rarefy.models.model import Model
from rarefy.models.runner import Runner

BATCH = 4          # windows that pass through a block at once
TILE = 1 << 23     # logits of one model that exist at once (32 MB), and numbers of a slab of its head
CACHED = 1 << 18   # logits that stay in the processor's cache while they are worked on
FLOOR = 1e-9       # probability below which a runtime's leftover mass counts as this
Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class Summary:
    """The distance between two models on one text. KL in nats per token.

    kl_stderr: by window; when there is one window only, by token, which ``stderr_by`` then says (and which
    is too small, since neighbours resemble each other). tokens: positions that were compared.
    """

    kl_mean: float
    kl_stderr: float
    kl_median: float
    kl_p999: float
    top1: float
    perplexity: float
    perplexity_original: float
    tokens: int
    windows: int
    stderr_by: str = "window"


@dataclass(frozen=True, eq=False)
class Positions:
    """What was measured at each position that counts: KL, whether the most likely token is the same, minus
    the log-likelihood of the next token (NaN where the text ends) by both, and the window it is in."""

    kl: Float[Tensor, " n"]
    same: Bool[Tensor, " n"]
    loss: Float[Tensor, " n"]
    loss_original: Float[Tensor, " n"]
    window: Int64[Tensor, " n"]

    def summary(self) -> Summary:
        """The figures that a report gives."""
        error, by = clustered_error(self.kl, self.window)
        return Summary(float(self.kl.double().mean()), error, float(self.kl.median()),
                       float(self.kl.quantile(0.999)), float(self.same.double().mean()),
                       _perplexity(self.loss), _perplexity(self.loss_original),
                       self.kl.numel(), len(torch.unique(self.window)), by)


class Reference:
    """The original's predictions on some windows of tokens, [windows, length].

    mask: True where a token is real, for windows that are padded. skip: positions at the beginning of each
    window that only give context (half a window is customary with llama.cpp). progress: told (blocks done,
    blocks in all).
    """

    def __init__(self, model: Model, tokens: Int64[Tensor, "windows length"],
                 mask: Bool[Tensor, "windows length"] | None = None, *, skip: int = 0,
                 progress: Advance | None = None) -> None:
        if tokens.ndim != 2 or not tokens.shape[0] or not 0 <= skip < tokens.shape[1] - 1:
            raise DataError(f"evaluation text of shape {list(tokens.shape)}, the first {skip} positions "
                            "skipped: nothing is left to compare; pass longer windows")
        self.runner, self.tokens, self.mask = Runner(model), tokens, mask
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        counts = real.clone()
        counts[:, :skip] = False
        self.places = counts.flatten().nonzero().squeeze(1)
        after = torch.full_like(tokens, -1)  # the last token of a text is followed by nothing
        after[:, :-1] = torch.where(real[:, 1:], tokens[:, 1:], -1)
        self.after = after.flatten()[self.places]
        self.states = final_states(self.runner, tokens, mask, progress).flatten(0, 1)[self.places]

    def compare(self, candidate: Runner, progress: Advance | None = None) -> Summary:
        """Measure ``candidate`` on the same windows. ModelError when it computes NaN or infinity."""
        return self.positions(candidate, progress).summary()

    @torch.no_grad()
    def positions(self, candidate: Runner, progress: Advance | None = None) -> Positions:
        """The same, position by position."""
        states = final_states(candidate, self.tokens, self.mask, progress).flatten(0, 1)[self.places]
        sums = _Sums(self.after)
        heads = _Head(self.runner), _Head(candidate)
        rows = min(head.rows for head in heads)  # heads may be padded to different lengths
        slab = max(1, min(8192, rows, TILE // max(head.width for head in heads)))
        block = min(TILE // slab, len(self.places))
        tiles = [torch.empty(block, slab) for _ in heads]
        for start in range(0, rows, slab):
            stop = min(start + slab, rows)
            matrices = [head.slab(start, stop) for head in heads]
            for first in range(0, len(self.places), block):
                here = slice(first, min(first + block, len(self.places)))
                pair = [head.logits(state[here], matrix, tile[:here.stop - first, :stop - start])
                        for head, state, matrix, tile in
                        zip(heads, (self.states, states), matrices, tiles, strict=True)]
                sums.add(pair[0], pair[1], first, start)
        found = sums.finish(self.places // self.tokens.shape[1])
        bad = (~torch.isfinite(found.kl)).nonzero()
        if len(bad):
            raise ModelError(f"{candidate.model.name}: computes NaN or infinity in window "
                             f"{int(found.window[bad[0]])}; it is damaged, or its scales overflow")
        return found


class _Head:
    """The matrix that makes the logits, a slab of rows at a time, whatever stands in for it."""

    def __init__(self, runner: Runner) -> None:
        self.runner, site = runner, runner.model.map.head
        self.path, (self.rows, self.width) = site.path, site.shape
        self.cap = getattr(runner.model.config, "final_logit_softcapping", None)
        self.override = runner._weight(site.path)  # asked once: answering may mean decoding the matrix

    def slab(self, start: int, stop: int) -> Float[Tensor, "rows width"]:
        return self.runner._rows(self.path, slice(start, stop), self.override)

    def logits(self, states: Float[Tensor, "n width"], slab: Float[Tensor, "rows width"],
               out: Float[Tensor, "n rows"]) -> Float[Tensor, "n rows"]:
        if not out.is_contiguous():  # the last slab is narrower
            out = torch.empty(out.shape)
        torch.mm(states, slab.T, out=out)
        return out if self.cap is None else out.div_(self.cap).tanh_().mul_(self.cap)


class _Sums:
    """The running sums of every position: peaks, masses A and B, the cross term, best and wanted tokens."""

    def __init__(self, wanted: Int64[Tensor, " n"]) -> None:
        n = len(wanted)
        self.wanted = wanted
        self.peak = torch.full((2, n), -1e30)
        self.mass = torch.zeros(2, n, dtype=torch.float64)
        self.cross = torch.zeros(n, dtype=torch.float64)
        self.best = torch.full((2, n), -1)
        self.at = torch.full((2, n), float("nan"), dtype=torch.float64)  # the logits of the wanted tokens

    def add(self, p: Float[Tensor, "n rows"], q: Float[Tensor, "n rows"], first: int, start: int) -> None:
        """Take in the logits of positions from ``first`` and tokens from ``start``; overwrites them."""
        wanted = self.wanted[first:first + len(p)] - start
        inside = ((wanted >= 0) & (wanted < p.shape[1])).nonzero().squeeze(1)
        for k, logits in enumerate((p, q)):
            self.at[k, first + inside] = logits[inside, wanted[inside]].double()
        step = max(1, CACHED // p.shape[1])
        for k in range(0, len(p), step):
            self._add(p[k:k + step], q[k:k + step], slice(first + k, first + min(k + step, len(p))), start)

    def _add(self, p: Tensor, q: Tensor, here: slice, start: int) -> None:
        old = self.peak[:, here]
        top = torch.stack([p.amax(1), q.amax(1)])
        for k, logits in enumerate((p, q)):  # a new peak is rare: only there look where it is
            rows = (top[k] > old[k]).nonzero().squeeze(1)
            if len(rows):
                self.best[k, here.start + rows] = logits[rows].argmax(1) + start
        new = torch.maximum(old, top)
        shift = (old - new).double()
        decay = shift.exp()
        p.sub_(new[0].unsqueeze(1))
        q.sub_(new[1].unsqueeze(1))
        apart = p - q
        p.exp_()
        q.exp_()
        mass = self.mass[:, here]
        self.cross[here] = (decay[0] * (self.cross[here] + mass[0] * (shift[0] - shift[1]))
                            + torch.linalg.vecdot(p, apart).double())
        self.mass[:, here] = mass * decay + torch.stack([p.sum(1), q.sum(1)]).double()
        self.peak[:, here] = new

    def finish(self, window: Int64[Tensor, " n"]) -> Positions:
        log = self.mass.log()
        kl = (self.cross / self.mass[0] - log[0] + log[1]).clamp_min(0.0)  # below zero is rounding
        loss = self.peak.double() + log - self.at
        return Positions(kl.float(), self.best[0] == self.best[1], loss[1].float(), loss[0].float(), window)


@torch.no_grad()
def final_states(runner: Runner, tokens: Int64[Tensor, "windows length"],
                 mask: Bool[Tensor, "windows length"] | None = None, progress: Advance | None = None
                 ) -> Float[Tensor, "windows length width"]:
    """The final-normed hidden states, block by block: one block's weights in memory at a time."""
    cuts = [slice(at, at + BATCH) for at in range(0, len(tokens), BATCH)]
    stems = [runner.stem(tokens[cut], None if mask is None else mask[cut]) for cut in cuts]
    hidden, contexts = [hidden for hidden, _ in stems], [context for _, context in stems]
    for index in range(runner.blocks):
        tensors = runner.load(index)
        hidden = [runner.block(index, h, context, tensors=tensors)
                  for h, context in zip(hidden, contexts, strict=True)]
        if progress is not None:
            progress(index + 1, runner.blocks)
    return runner.norm(torch.cat(hidden))


def clustered_error(values: Float[Tensor, " n"], window: Int64[Tensor, " n"]) -> tuple[float, str]:
    """The standard error of the mean of ``values``, and what it is by: ``window`` or ``token``.

    Windows are the independent draws; with one window only, its tokens have to pass for such.
    """
    centred = values.double() - values.double().mean()
    groups, index = torch.unique(window, return_inverse=True)
    count, by = len(groups), "window"
    if count == 1:
        index, count, by = torch.arange(len(values)), len(values), "token"
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, index, centred)
    return float((sums.square().sum() * count / max(count - 1, 1)).sqrt() / len(values)), by


def _perplexity(loss: Tensor) -> float:
    mean = loss[~loss.isnan()].double().mean()
    return float(mean.clamp_max(700.0).exp())  # JSON knows no infinity


# ---- distributions from elsewhere ----------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """How a runtime's distributions compare with a reference's, position by position.

    log_prob_rms, log_prob_max: differences of log-probabilities, the first weighted by probability, the
    second over tokens to which the reference gives at least 0.0001. unlisted: mean probability that the
    runtime left to tokens it did not list.
    """

    kl_mean: float
    kl_stderr: float
    kl_max: float
    top1: float
    log_prob_rms: float
    log_prob_max: float
    unlisted: float
    positions: int
    stderr_by: str


def compare_tables(reference: Float[Tensor, "positions vocabulary"],
                   candidate: Float[Tensor, "positions vocabulary"], *,
                   tail: Float[Tensor, " positions"] | None = None,
                   window: Int64[Tensor, " positions"] | None = None) -> Agreement:
    """Compare two tables of log-probabilities; the candidate's may be incomplete.

    candidate: -inf where the runtime listed nothing. tail: the probability of all those tokens together
    (default: what the listed ones leave); they are compared as one, so the KL is a lower bound, tight when
    the tail is small. window: which window each position is from, for the standard error.
    """
    listed = torch.isfinite(candidate)
    if bool(torch.isnan(candidate).any()) or not bool(torch.isfinite(reference).all()):
        raise ModelError("a table of log-probabilities holds NaN; the runtime or the model is damaged")
    p = reference.double().exp()
    apart = torch.where(listed, reference - candidate, 0.0).double()
    ours = (p * ~listed).sum(1)
    theirs = (1 - candidate.double().exp().sum(1)).clamp_min(0.0) if tail is None else tail.double()
    rest = torch.where(ours > 0, ours * (ours.clamp_min(1e-300) / theirs.clamp_min(FLOOR)).log(), 0.0)
    kl = (p * apart).sum(1) + rest
    error, by = clustered_error(kl.float(), torch.zeros(len(kl)).long() if window is None else window)
    likely = listed & (p >= 1e-4)
    return Agreement(float(kl.mean()), error, float(kl.max()),
                     float((reference.argmax(1) == candidate.argmax(1)).double().mean()),
                     float((p * apart.square()).sum(1).mean().sqrt()),
                     float((apart.abs() * likely).max()), float(theirs.mean()), len(kl), by)


@torch.no_grad()
def log_probs(runner: Runner, tokens: Int64[Tensor, "windows length"], places: Int64[Tensor, " places"]
              ) -> Float[Tensor, "windows places vocabulary"]:
    """Log-probabilities of the token after each of ``places``: a large table, so for a few of them."""
    logits = runner.logits(final_states(runner, tokens)[:, places])
    return logits.sub_(logits.logsumexp(-1, keepdim=True))
