"""Evidence: what calibration text shows about every weight, gathered one block at a time.

Two passes, both streaming. ``survey`` runs the float model forward, keeps the input of every block, and
walks back through the blocks with the gradient of the log-likelihood of tokens drawn from the model's
own predictions. At each weight ``y = W x`` it sees inputs and output gradients together, and yields

    gram = sum_t s_t x_t x_t^T,      fisher_i = mean_t g_ti^2,      s_t ~ |g_t|^2,  mean_t s_t = 1,

so that ``1/2 sum_i fisher_i dW_i (gram/tokens) dW_i^T`` predicts the KL that a change dW causes
(the Fisher information is the Hessian of the KL; Martens & Grosse 2015, "K-FAC", section 2). The
weights s_t keep what K-FAC's independence of x and g throws away: a token whose output nobody reads
(the attention sink at BOS, with by far the largest activations) should not decide the rounding
(GuidedQuant, Kim et al. 2025, averages the same weights over groups of outputs).
Only predictions use these weights: rounding itself does better on plain sums, because few tokens carry
most of the weight, and error feedback fits them too closely.

``inputs`` runs forward only, through blocks that are already compressed, so that the next weights are
rounded for the activations they will really meet.

At any time one block's weights and a batch's activations are in memory, besides the hidden states
between blocks, [tokens, width] each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from rarefy.core.nouns import Evidence
from rarefy.models.map import Site
from rarefy.models.runner import Context, Runner

BATCH = 4  # windows that pass through a block at once
SLAB = 256  # positions whose logits exist at once: the head is decoded anew for each slab
Advance = Callable[[int, int], None]
Visit = Callable[[Site, Tensor, Tensor], None]


@dataclass(frozen=True, eq=False)
class Seen:
    """One site and what the survey saw there."""

    site: Site
    evidence: Evidence


class Stream:
    """The hidden states of all windows between two blocks, [windows, length, width]."""

    def __init__(self, runner: Runner, tokens: Int64[Tensor, "windows length"]) -> None:
        self.runner = runner
        self.batches = tokens.split(BATCH)
        stems = [runner.stem(batch) for batch in self.batches]
        self.hidden: list[Tensor] = [hidden for hidden, _ in stems]
        # the same call serves every batch of the same size; only the last one may be smaller
        self.contexts: list[Context] = [context for _, context in stems]

    @property
    def tokens(self) -> int:
        return sum(batch.numel() for batch in self.batches)

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Move every window through block ``index`` as the runner's weights now are."""
        tensors = self.runner.load(index)
        self.hidden = [self.runner.block(index, hidden, context, tensors=tensors)
                       for hidden, context in zip(self.hidden, self.contexts, strict=True)]

    @torch.no_grad()
    def inputs(self, index: int, paths: set[str]) -> dict[str, Evidence]:
        """Evidence (gram and tokens) at the named sites of block ``index``."""
        tensors = self.runner.load(index)
        grams: dict[str, Tensor] = {}
        for hidden, context in zip(self.hidden, self.contexts, strict=True):
            seen = _Watch()
            self.runner.block(index, hidden, context, seen, tensors)
            for path, (x, _) in seen.pairs.items():
                if path in paths:
                    _accumulate(grams, path, x)
        return {path: Evidence(gram, self.tokens) for path, gram in grams.items()}


class _Watch:
    """What arrived at every matrix of a block and what left it, during one call."""

    def __init__(self) -> None:
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, path: str, x: Tensor, y: Tensor) -> None:
        self.pairs[path] = x, y


def _accumulate(grams: dict[str, Tensor], path: str, x: Tensor, weight: Tensor | None = None) -> None:
    rows = x.reshape(-1, x.shape[-1])
    scaled = rows if weight is None else rows * weight.unsqueeze(1)
    if path in grams:
        grams[path].addmm_(scaled.T, rows)
    else:
        grams[path] = scaled.T @ rows


def survey(runner: Runner, tokens: Int64[Tensor, "windows length"], generator: torch.Generator,
           advance: Advance = lambda done, total: None, visit: Visit = lambda site, x, pull: None
           ) -> Iterator[Seen]:
    """Evidence with Fisher and saliency for every site, from the head back to the embedding.

    visit: told of every site of a block, batch by batch, what arrived at it and the gradient at its output.
    """
    stream, total = Stream(runner, tokens), 2 * runner.blocks + 2
    inputs = [stream.hidden]
    for index in range(runner.blocks):
        stream.advance(index)
        inputs.append(stream.hidden)
        advance(index + 1, total)
    head, gradients = _head(runner, inputs.pop(), generator)
    advance(runner.blocks + 1, total)
    shared = runner.model.map.tied
    if not shared:
        yield head
    for index in reversed(range(runner.blocks)):
        seen, gradients = _backward(runner, index, inputs.pop(), stream.contexts, gradients, visit)
        yield from seen
        advance(2 * runner.blocks + 1 - index, total)
    lookup = _lookup(runner, tokens, gradients)
    yield Seen(head.site, tied(head.evidence, lookup.evidence)) if shared else lookup
    advance(total, total)


def _head(runner: Runner, hidden: list[Tensor], generator: torch.Generator) -> tuple[Seen, list[Tensor]]:
    """The output head, and the gradient of -log p(sample) at the last block's output."""
    site = runner.model.map.head
    gram = torch.zeros(site.shape[1], site.shape[1])
    fisher, gradients = torch.zeros(site.shape[0]), []
    for batch in hidden:
        leaf = batch.detach().requires_grad_()
        with torch.enable_grad():
            normed = runner.norm(leaf)
        pieces = []
        for part in normed.detach().flatten(0, -2).split(SLAB):
            with torch.no_grad():
                pull, spread = _sampled_gradient(runner, part, generator)
            pieces.append(pull)
            fisher += spread
            gram.addmm_(part.T, part)
        gradients.append(torch.autograd.grad(normed, leaf, torch.cat(pieces).view_as(normed))[0])
    count = sum(batch.shape[0] * batch.shape[1] for batch in hidden)
    return Seen(site, Evidence(gram, count, fisher / count)), gradients


def _sampled_gradient(runner: Runner, normed: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """d(-log p(sample))/d(normed) [positions, width], and the sum over positions of p (1 - p)."""
    logits = runner.logits(normed)
    p = logits.softmax(-1)
    spread = (p - p.square()).sum(0)
    total = p.cumsum(-1)
    draw = torch.rand(p.shape[0], 1, generator=generator) * total[:, -1:]
    sample = torch.searchsorted(total, draw).clamp_max(p.shape[1] - 1)
    p.scatter_add_(-1, sample, torch.full_like(draw, -1.0))
    return runner.pull_logits(p, logits), spread


def _backward(runner: Runner, index: int, hidden: list[Tensor], contexts: list[Context],
              gradients: list[Tensor], visit: Visit) -> tuple[list[Seen], list[Tensor]]:
    """One block backwards: the evidence at its sites, and the gradients at its input."""
    tensors = runner.load(index)
    sites = {site.path: site for site in runner.model.map.in_block(index)}
    grams: dict[str, Tensor] = {}
    fishers = {path: torch.zeros(site.shape[0]) for path, site in sites.items()}
    weights = dict.fromkeys(sites, 0.0)
    below = []
    for batch, context, gradient in zip(hidden, contexts, gradients, strict=True):
        seen = _Watch()
        leaf = batch.detach().requires_grad_()
        with torch.enable_grad():
            out = runner.block(index, leaf, context, seen, tensors)
        pulls = torch.autograd.grad(out, [leaf, *(y for _, y in seen.pairs.values())], gradient)
        below.append(pulls[0])
        for (path, (x, _)), pull in zip(seen.pairs.items(), pulls[1:], strict=True):
            square = pull.flatten(0, -2).square()
            fishers[path] += square.sum(0)
            weights[path] += float(square.mean(1).sum())
            _accumulate(grams, path, x.detach(), square.mean(1))
            visit(sites[path], x.detach(), pull)
    count = sum(batch.shape[0] * batch.shape[1] for batch in hidden)
    return [Seen(sites[path], _normalised(grams[path], fishers[path], weights[path], count))
            for path in seen.pairs], below


def _normalised(gram: Tensor, fisher: Tensor, weights: float, count: int) -> Evidence:
    """Fisher per token, and grams whose tokens weigh 1 on average (as they are where no gradient arrives)."""
    return Evidence(gram * (count / weights) if weights > 0 else gram, count, fisher / count)


def _lookup(runner: Runner, tokens: Tensor, gradients: list[Tensor]) -> Seen:
    """The input embedding: row v is read once per occurrence of token v, all columns as they are.

    As a weight whose input is the one-hot token the roles are swapped, so the evidence is written with a
    diagonal gram over columns (the mean squared gradient) and the fisher over rows (how often v occurs).
    Tokens the text does not hold count as if seen once in as many tokens as there were: unseen is not
    unused.
    """
    site = next(site for site in runner.model.map.sites if site.role == "embed")
    count = tokens.numel()
    columns = sum((g.flatten(0, -2).square().sum(0) for g in gradients), torch.zeros(site.shape[1]))
    columns = columns * runner.embedding_scale**2 / count
    seen = torch.bincount(tokens.flatten(), minlength=site.shape[0]).float()
    rows = (seen + 1 / site.shape[0]) / (count + 1)
    return Seen(site, Evidence(torch.diag(columns) * count, count, rows))


def tied(head: Evidence, lookup: Evidence) -> Evidence:
    """One matrix with two uses: row weights p_v of both nearly agree, so their grams add up.

    ``sum_v [f_v dW_v G dW_v + r_v dW_v C dW_v]`` is kept in one form by taking the head's row weights f
    for both and scaling C by the ratio of the totals.
    """
    assert head.fisher is not None and lookup.fisher is not None
    ratio = float(lookup.fisher.sum() / head.fisher.sum().clamp_min(1e-12)) * (head.tokens / lookup.tokens)
    return Evidence(head.gram + lookup.gram * ratio, head.tokens, head.fisher)
