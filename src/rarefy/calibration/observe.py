"""Evidence for any network: what arrives at every weight, and what its outputs do to the answer.

Samples stream through the whole network in batches. At each weight ``y = W x`` the gram of the inputs is
summed over positions: tokens of a text (padding left out), or places of an image, where the input of a
convolution is its unfolded patch (averaged over groups: each has inputs of its own).

What a change does to the answer z is measured by a divergence D(z, z + dz) = 1/2 dz^T F dz to second order:
the KL of a classifier, with ``F = diag(p) - p p^T``, or 1 - cosine of an embedding, with
``F = (I - u u^T) / |z|^2`` and u = z / |z|. For a random vector v of covariance F,

    E_v[ (v^T dz)^2 ] = dz^T F dz,         v = sqrt(p) r - p (sqrt(p) r)^T 1,   or   v = (r - u u^T r) / |z|,

with signs r drawn at random, so one gradient of ``v^T z`` per sample does what sampling labels does (Martens
& Grosse 2015, "K-FAC"), with less noise where the network is sure. With its gradients g at the outputs,

    fisher_i = mean over samples of sum over positions of g_i^2,

so that ``1/2 sum_i fisher_i dW_i (gram/tokens) dW_i^T`` predicts D per sample (derivatives at different
positions taken as uncorrelated: Grosse & Martens 2016, "KFC", section 3). As for language models, positions
are weighted by their squared gradients where damage is to be predicted, and not where weights are to be
fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.calibration.evidence import Seen, tied
from rarefy.calibration.examples import Examples
from rarefy.core.nouns import Evidence
from rarefy.models.form import MASK, Form
from rarefy.models.map import Site
from rarefy.models.network import Network, Watch

BATCH = 32            # samples that pass through the network at once
GRAMS = 1 << 27       # numbers of grams that are summed in one pass: 512 MB
PATCHES = 1 << 24     # numbers of unfolded patches that exist at once
Advance = Callable[[int, int], None]


def survey(network: Network, examples: Examples, generator: torch.Generator,
           advance: Advance = lambda done, total: None) -> Iterator[Seen]:
    """Evidence with Fisher for every site that the samples reach, as many in a pass as memory allows."""
    examples, parts = examples.by_length(), list(_parts(network.map.sites))
    done, total = 0, len(parts) * len(examples)
    for part in parts:
        tallies = {site.path: _Tally(site) for site in part}
        for inputs in examples.batches(BATCH):
            _gradients(network, inputs, tallies, generator)
            done += len(next(iter(inputs.values())))
            advance(done, total)
        for tally in tallies.values():
            if (evidence := tally.surveyed(len(examples))) is not None:
                yield Seen(tally.site, evidence)


@torch.no_grad()
def inputs(network: Network, examples: Examples, paths: Iterable[str], tensors: Mapping[str, Tensor]
           ) -> dict[str, Evidence]:
    """Evidence (gram and tokens) at some sites, behind the weights that ``tensors`` puts in."""
    examples, found = examples.by_length(), dict[str, Evidence]()
    for part in _parts([network.map.by_path[path] for path in paths]):
        tallies = {site.path: _Tally(site) for site in part}
        for batch in examples.batches(BATCH):
            with network.watched({site.path: site for site in part}, _forward(tallies, batch.get(MASK))):
                network.run(batch, tensors)
        found |= {path: Evidence(tally.gram, tally.tokens) for path, tally in tallies.items()
                  if tally.gram is not None}
    return found


def _forward(tallies: Mapping[str, _Tally], mask: Tensor | None) -> Watch:
    def watch(site: Site, module: nn.Module, x: Tensor, y: Tensor) -> None:
        tallies[site.path].add(module, x, None, mask)

    return watch


def direction(answer: Tensor, form: Form, generator: torch.Generator) -> Tensor:
    """The random vector v of every sample: its covariance is the Hessian of the divergence."""
    signs = torch.empty_like(answer).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
    if form.gives == "classes":
        p = answer.softmax(-1)
        pulled = p.sqrt() * signs
        return pulled - p * pulled.sum(-1, keepdim=True)
    length = answer.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    unit = answer / length
    return (signs - unit * (unit * signs).sum(-1, keepdim=True)) / length


def _parts(sites: Iterable[Site]) -> Iterator[list[Site]]:
    """The sites in order, as many together as ``GRAMS`` allows."""
    part: list[Site] = []
    for site in sites:
        if part and sum(_gram_size(each) for each in [*part, site]) > GRAMS:
            yield part
            part = []
        part.append(site)
    if part:
        yield part


def _gram_size(site: Site) -> int:
    return site.shape[1] ** 2


def _gradients(network: Network, inputs: Mapping[str, Tensor], tallies: Mapping[str, _Tally],
               generator: torch.Generator) -> None:
    """One batch there and back: every tally gets the inputs of its weight and the gradients behind it."""
    anchor, mask = torch.zeros((), requires_grad=True), inputs.get(MASK)

    def watch(site: Site, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        kept = x.detach().clone()  # what follows may work in place

        def take(gradient: Tensor) -> None:
            tallies[site.path].add(module, kept, gradient, mask)

        done: Tensor = _Tap.apply(y, anchor, take)
        return done

    with torch.enable_grad(), network.watched({path: t.site for path, t in tallies.items()}, watch):
        answer = network.run(inputs)
        if answer.requires_grad:
            torch.autograd.grad(answer, anchor, direction(answer.detach(), network.form, generator))


class _Tap(torch.autograd.Function):
    """Passes a tensor on, and its gradient to ``take`` on the way back. The anchor asks for a gradient, so
    that the tap is visited even where nothing before it does."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor, take: Callable[[Tensor], None]) -> Tensor:
        ctx.take = take
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.take(gradients[0])
        return gradients[0], torch.zeros(()), None


class _Tally:
    """The running sums of one site. A site that is used several times in a pass counts every time.

    table: of lookups, squared gradients of the columns, and how often each row was read.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self.gram: Tensor | None = None
        self.fisher = torch.zeros(site.shape[0])
        self.weights, self.tokens = 0.0, 0
        self.table: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def add(self, module: nn.Module, x: Tensor, gradient: Tensor | None, mask: Tensor | None) -> None:
        """One call of one module that uses the site: its input, and the gradient at its output."""
        match module:
            case nn.Embedding():
                if gradient is not None:
                    self._lookups(x, gradient, mask)
            case nn.Conv1d() | nn.Conv2d():
                self._convolution(module, x, gradient)
            case _:
                self._sum(positions(x, mask), None if gradient is None else positions(gradient, mask))

    def _sum(self, x: Tensor, gradient: Tensor | None, groups: int = 1) -> None:
        """Rows of inputs (``groups`` of them for every position), and of gradients where there are some."""
        weighted = x
        if gradient is not None:
            square = gradient.square()
            self.fisher += square.sum(0)
            weight = square.mean(1)
            self.weights += float(weight.sum())
            weighted = x * weight.repeat_interleave(groups)[:, None]
        if self.gram is None:
            self.gram = torch.zeros(x.shape[1], x.shape[1])
        self.gram.addmm_(weighted.T, x, alpha=1 / groups)
        self.tokens += len(x) // groups

    def _convolution(self, module: nn.Conv1d | nn.Conv2d, x: Tensor, gradient: Tensor | None) -> None:
        step = max(1, PATCHES // max(1, prod(x.shape[1:]) * prod(module.kernel_size)))
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            pulled = None if gradient is None else gradient[part].movedim(1, -1).flatten(0, -2)
            self._sum(unfolded(module, x[part]).flatten(0, 1), pulled, module.groups)

    def _lookups(self, ids: Tensor, gradient: Tensor, mask: Tensor | None) -> None:
        real = mask.bool() if mask is not None and mask.shape == ids.shape else torch.ones_like(ids).bool()
        columns = gradient[real].square().sum(0)
        rows = torch.bincount(ids[real], minlength=self.site.shape[0]).float()
        before = self.table or (0.0, 0.0)
        self.table = before[0] + columns, before[1] + rows

    def surveyed(self, samples: int) -> Evidence | None:
        """What predicts damage per sample; None when no sample came by."""
        lookup, product = self._looked_up(samples), None
        if self.gram is not None:
            scale = self.tokens / self.weights if self.weights > 0 else 1.0
            product = Evidence(self.gram * scale, self.tokens, self.fisher / samples)
        return lookup if product is None else product if lookup is None else tied(product, lookup)

    def _looked_up(self, samples: int) -> Evidence | None:
        """Row v is read once per occurrence of v: a weight with one-hot inputs, its axes in swapped roles.

        The gram is a diagonal over the columns (squared gradients), the fisher says how often a row occurs.
        Rows that were never read count as if read once in as many lookups: unseen is not unused.
        """
        if self.table is None:
            return None
        columns, rows = self.table
        count = int(rows.sum())
        seen = (rows + 1 / len(rows)) / (count + 1)
        return Evidence(torch.diag(columns) * (count / samples), count, seen)


def positions(values: Tensor, mask: Tensor | None) -> Tensor:
    """Rows of positions, [positions, width], those of padding left out where there is an axis of tokens."""
    if mask is not None and values.ndim == 3 and values.shape[:2] == mask.shape:
        return values[mask.bool()]
    return values.reshape(-1, values.shape[-1])


def unfolded(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """The patches that a convolution multiplies, [samples * places, groups, in / groups * kernel]."""
    padding = module._reversed_padding_repeated_twice
    if any(padding):
        x = F.pad(x, padding) if module.padding_mode == "zeros" else F.pad(x, padding, module.padding_mode)
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    if x.ndim == 3:  # a line is an image of height 1
        x, kernel, stride, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
    patches = F.unfold(x, kernel, dilation, 0, stride)  # [samples, in * kernel, places]
    patches = patches.view(len(x), module.groups, -1, patches.shape[-1])
    return patches.permute(0, 3, 1, 2).flatten(0, 1)
