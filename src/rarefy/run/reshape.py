"""Techniques of scope ``structure``: a model in, a smaller model of the same kind out, as a view.

What a technique needs to see is gathered on the float model as it is, block by block. Units are chosen
block by block, as many in each; the readers are then refitted to what calibration saw. The view takes the
model's place in the survey, the sweep and the export; the proof compares with the original.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from rarefy.calibration.channels import head_inputs
from rarefy.calibration.evidence import Advance, Stream, survey
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nouns import Evidence, Receipt, Recipe
from rarefy.core.structure import (
    Damage,
    KeyValues,
    Merging,
    Narrowing,
    Passage,
    Remembering,
    Residual,
    Shortening,
    Slicing,
    Thinning,
    Trimming,
    UnitGroup,
)
from rarefy.measure.divergence import Reference
from rarefy.models.latent import Factors, key_values, with_latents
from rarefy.models.map import Site
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.models.rewritten import Plus, collapsed, rewritten
from rarefy.models.runner import Runner
from rarefy.models.shrunk import (
    GROUPS,
    Units,
    key_heads,
    with_merged_heads,
    without_blocks,
    without_units,
    written,
)
from rarefy.models.sliced import sliced, without_gains
from rarefy.run.planning import build_structure, structures
from rarefy.run.recipe import split

WINDOWS = 8  # windows whose gradients or KL are looked at


@dataclass(frozen=True, eq=False)
class Reshaped:
    """The view, and one receipt per block that changed: bits count every weight at 16."""

    model: Model
    receipts: tuple[Receipt, ...]


def reshaped(model: Model, recipe: Recipe, tokens: Tensor | None,
             advance: Advance = lambda done, total: None) -> Reshaped:
    """``model`` after every step of scope ``structure`` of a recipe, in their order.

    tokens: calibration windows [windows, length] (None: only steps that need none).
    """
    receipts: tuple[Receipt, ...] = ()
    for step in split(recipe.steps)[0]:
        if step.technique not in structures():
            continue
        if step.where != ("*",):
            raise RecipeError(f"{step.technique}: takes out parts of every block alike; leave 'where' out")
        technique = build_structure(step)
        if isinstance(technique, Trimming):
            continue  # done before text was cut into tokens
        if technique.needs and tokens is None:
            raise EditError(f"{model.name}: {step.technique} needs calibration text; pass data")
        if isinstance(technique, Shortening):
            assert tokens is not None
            done = shortened(model, technique, tokens, name=step.technique, advance=advance)
        elif isinstance(technique, Merging):
            done = merged(model, technique, name=step.technique)
        elif isinstance(technique, Remembering):
            assert tokens is not None
            done = latent(model, technique, tokens, name=step.technique, seed=recipe.seed, advance=advance)
        elif isinstance(technique, Slicing):
            assert tokens is not None
            done = narrower(model, technique, tokens, name=step.technique, advance=advance)
        elif isinstance(technique, Narrowing):
            raise RecipeError(f"{step.technique}: takes channels out of networks that are no language "
                              "models; use units")
        else:
            if technique.spread == "global" and recipe.target not in ("auto", "llama.cpp"):
                raise RecipeError(f"{step.technique}: {recipe.target} loads one width for all blocks, so "
                                  "spread global would save nothing there; use uniform")
            done = thinned(model, technique, tokens, name=step.technique, seed=recipe.seed, advance=advance)
        model, receipts = done.model, receipts + done.receipts
    return Reshaped(model, receipts)


# ---- units

def thinned(model: Model, technique: Thinning, tokens: Tensor | None, *, name: str = "", seed: int = 0,
            advance: Advance = lambda done, total: None) -> Reshaped:
    """The model without the units that cost least, as many in every block."""
    kept: dict[int, Tensor] = {}
    refits: dict[int, Tensor] = {}
    receipts = []
    if technique.spread == "global":  # grams are looked at twice, so that one at a time is in memory
        counts = technique.counts(tuple(_scores(group, technique) for group in
                                        _groups(model, technique, tokens, seed, advance)))
    else:
        every = [GROUPS[technique.units](model, block) for block in range(model.map.blocks)]
        counts = (max(technique.count(group_of(model, units)) for units in every),) * len(every)
    for group in _groups(model, technique, tokens, seed, advance):
        started = time.perf_counter()
        index = group.dearest(_scores(group, technique), counts[group.block])
        refit = technique.refit(group, index)
        if refit is not None:
            refits[group.block] = refit
        kept[group.block] = index
        receipts.append(_receipt(group, name, index, refit, time.perf_counter() - started))
    return Reshaped(without_units(model, kept, technique.units, refits), tuple(receipts))


def _scores(group: UnitGroup, technique: Thinning) -> Tensor:
    scores = technique.scores(group)
    if not bool(torch.isfinite(scores).all()):
        raise EditError(f"{group.site}: the cost of its {group.role} is not finite; check the model")
    return scores


def _groups(model: Model, technique: Thinning, tokens: Tensor | None, seed: int,
            advance: Advance) -> Iterator[UnitGroup]:
    """Every block's units, with evidence at their reader as far as the technique needs it."""
    units = [GROUPS[technique.units](model, block) for block in range(model.map.blocks)]
    readers = {each.reader.path: each for each in units}
    if not technique.needs:
        yield from (group_of(model, each) for each in units)
        return
    assert tokens is not None
    # plain sums of inputs refit best; the survey adds what errors cost
    fishers: dict[str, Tensor | None] = {}
    removal: dict[str, Tensor] = {}
    if technique.needs & {"fisher", "removal"}:
        fishers, removal = _priced(model, readers, tokens[:WINDOWS], seed, advance)
    stream = Stream(Runner(model), tokens) if "gram" in technique.needs else None
    for each in units:
        path = each.reader.path
        if stream is None:
            yield group_of(model, each, None, removal.get(path))
            continue
        evidence = stream.inputs(each.block, {path})[path]
        yield group_of(model, each, replace(evidence, fisher=fishers.get(path)), removal.get(path))
        if each.block + 1 < model.map.blocks:
            stream.advance(each.block)
        advance(each.block + 1, model.map.blocks)


def _priced(model: Model, readers: Mapping[str, Units], tokens: Tensor, seed: int, advance: Advance
            ) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """What an error of each reader's outputs costs, and what it costs when a unit goes, in nats per token."""
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(b"structure"))
    removal = {path: torch.zeros(each.count) for path, each in readers.items()}

    def visit(site: Site, x: Tensor, pull: Tensor) -> None:
        if site.path in readers:
            lost = (x * (pull @ model.weight(site.path))).flatten(0, -2)
            units = torch.zeros(len(lost), readers[site.path].count)
            units.index_add_(1, readers[site.path].reader.unit, lost)
            removal[site.path] += units.square().sum(0) / (2 * tokens.numel())

    seen = survey(Runner(model), tokens, generator, advance, visit)
    return {each.site.path: each.evidence.fisher for each in seen if each.site.path in readers}, removal


def group_of(opened: Model | Network, units: Units, evidence: Evidence | None = None,
             removal: Tensor | None = None) -> UnitGroup:
    """Units as a technique sees them."""
    reader = units.reader
    return UnitGroup(reader.path, units.role, units.block, reader.unit, opened.weight(reader.path),
                     written(opened, units), evidence, removal, units.runs)


def _receipt(group: UnitGroup, name: str, kept: Tensor, refit: Tensor | None, seconds: float) -> Receipt:
    """What one block lost: bits of its reader, and the error of what it gives where inputs are known."""
    before = group.reader.numel() * 16
    columns = torch.isin(group.unit, kept)
    error = float("nan")
    if group.evidence is not None:
        change = torch.where(columns, 0.0, group.reader)
        if refit is not None:
            change[:, columns] = group.reader[:, columns] - group.reader @ refit.T
        error = group.evidence.error(change) / max(group.evidence.error(group.reader), 1e-30)
    note = f"{group.units - kept.numel()} of {group.units} {group.role} left out"
    return Receipt(group.site, name, before, before * kept.numel() // group.units, error, seconds, note=note)


# ---- heads

def merged(model: Model, technique: Merging, *, name: str = "") -> Reshaped:
    """The model in which groups of key and value heads are one head each."""
    merges, receipts = {}, []
    for block in range(model.map.blocks):
        started = time.perf_counter()
        heads = key_heads(model, block)
        matrix = technique.merge(heads)
        merges[block] = matrix
        serves = (matrix.T > 0).float()  # [heads, groups]
        served = torch.einsum("hg,gk,kwi->hwi", serves, matrix, heads.key)
        error = float((heads.key - served).square().sum() / heads.key.square().sum())
        before = (heads.key.numel() + heads.value.numel()) * 16
        receipts.append(Receipt(heads.site, name, before, before * matrix.shape[0] // matrix.shape[1], error,
                                time.perf_counter() - started,
                                note=f"{matrix.shape[1]} heads of keys and values became {matrix.shape[0]}"))
    return Reshaped(with_merged_heads(model, merges), tuple(receipts))


# ---- keys and values

def latent(model: Model, technique: Remembering, tokens: Tensor, *, name: str = "", seed: int = 0,
           advance: Advance = lambda done, total: None) -> Reshaped:
    """The model whose keys and values are made of one latent a token."""
    fishers: dict[str, Tensor] = {}
    if "fisher" in technique.needs:
        generator = torch.Generator().manual_seed(seed ^ zlib.crc32(b"latent"))
        fishers = {each.site.path: each.evidence.fisher
                   for each in survey(Runner(model), tokens[:WINDOWS], generator, advance)
                   if each.site.role in ("k", "v") and each.evidence.fisher is not None}
    # grams are looked at twice, so that one at a time is in memory
    energies = tuple(technique.energies(each) for each in _key_values(model, tokens, fishers, advance))
    ranks = technique.ranks(model.name, len(key_values(model, 0).weight), energies)
    factors: dict[int, Factors] = {}
    receipts = []
    for each in _key_values(model, tokens, fishers, advance):
        started, rank = time.perf_counter(), ranks[each.block]
        up, down = technique.factors(each, rank)
        factors[each.block] = (up, down)
        assert each.evidence is not None
        error = each.evidence.error(each.weight - up @ down) / max(each.evidence.error(each.weight), 1e-30)
        receipts.append(Receipt(each.site, name, each.weight.numel() * 16, (up.numel() + down.numel()) * 16,
                                error, time.perf_counter() - started,
                                note=f"{rank} numbers a token in the place of {len(each.weight)}"))
    return Reshaped(with_latents(model, factors), tuple(receipts))


def _key_values(model: Model, tokens: Tensor, fishers: Mapping[str, Tensor], advance: Advance
                ) -> Iterator[KeyValues]:
    """What makes keys and values in every block, with plain sums of what arrives, which refit best."""
    stream = Stream(Runner(model), tokens)
    for block in range(model.map.blocks):
        found = key_values(model, block)
        seen = stream.inputs(block, {found.site})[found.site]
        if fishers:
            value = next(site.path for site in model.map.in_block(block) if site.role == "v")
            seen = replace(seen, fisher=torch.cat([fishers[found.site], fishers[value]]))
        yield replace(found, evidence=seen)
        if block + 1 < model.map.blocks:
            stream.advance(block)
        advance(block + 1, model.map.blocks)


# ---- the stream between the blocks

def narrower(model: Model, technique: Slicing, tokens: Tensor, *, name: str = "",
             advance: Advance = lambda done, total: None) -> Reshaped:
    """The model whose stream has fewer channels, a basis of the technique's."""
    started = time.perf_counter()
    plain = without_gains(model)
    site = f"{model.map.family.body} (stream)"
    stream = Residual(site, _moment(plain, tokens, advance))
    basis = technique.basis(stream)
    done = sliced(plain, basis, stream.moment)
    held = float((basis.T @ stream.moment @ basis).trace() / stream.moment.trace())
    note = (f"{basis.shape[0] - basis.shape[1]} of {basis.shape[0]} channels left out, "
            f"{held:.2%} of the energy stays")
    return Reshaped(done, (Receipt(site, name, plain.parameters * 16, done.parameters * 16, 1 - held,
                                   time.perf_counter() - started, note=note),))


@torch.no_grad()
def _moment(model: Model, tokens: Tensor, advance: Advance) -> Tensor:
    """Second moment of what norms without gains pass on, all norms alike."""
    stream, total = Stream(Runner(model), tokens), torch.zeros(())
    for block in range(model.map.blocks):
        first = {site.role: site.path for site in model.map.in_block(block)}
        paths = {next(first[role] for role in roles if role in first)
                 for roles in (("q", "qkv"), ("gate", "gate_up"))}
        for seen in stream.inputs(block, paths).values():
            total = total + seen.gram / seen.tokens
        stream.advance(block)
        advance(block + 1, model.map.blocks)
    last = head_inputs(stream).evidence
    return (total + last.gram / last.tokens) / (2 * model.map.blocks + 1)


# ---- blocks

def shortened(model: Model, technique: Shortening, tokens: Tensor, *, name: str = "",
              advance: Advance = lambda done, total: None) -> Reshaped:
    """The model without the blocks that the technique names."""
    started = time.perf_counter()
    passages = _passages(model, tokens, advance)
    reference = cache(lambda: Reference(model, tokens[:WINDOWS]))
    damage = Damages(lambda dropped: reference().compare(Runner(without_blocks(model, dropped))).kl_mean,
                     advance)
    dropped = technique.drop(passages, damage)
    seconds = time.perf_counter() - started
    receipts = []
    for block in dropped:
        bits = sum(site.shape[0] * site.shape[1] for site in model.map.in_block(block)) * 16
        receipts.append(Receipt(f"{model.map.family.blocks}.{block}", name, bits, 0, float("nan"),
                                seconds / len(dropped),
                                note=damage.said(dropped, passages[block].influence)))
    if technique.fold == "merge":
        model = collapsed(model, dropped)
    elif technique.fold == "bridge":
        model = rewritten(model, _bridged(model, technique, dropped, tokens).items())
    return Reshaped(without_blocks(model, frozenset(dropped)), tuple(receipts))


class Damages:
    """What choices of blocks cost when they are left out, each measured once."""

    def __init__(self, measure: Damage, advance: Advance) -> None:
        self.found: dict[frozenset[int], float] = {}
        self._measure, self._advance = measure, advance

    def __call__(self, dropped: frozenset[int]) -> float:
        if dropped not in self.found:
            self.found[dropped] = self._measure(dropped)
            self._advance(len(self.found), len(self.found))
        return self.found[dropped]

    def said(self, dropped: tuple[int, ...], influence: float) -> str:
        """What a receipt says of a block that went."""
        if not self.found:
            return f"left out at an influence of {influence:.3g}"
        together = f" for all {len(dropped)} that went" if len(dropped) > 1 else ""
        return f"left out at a KL of {self(frozenset(dropped)):.3g}{together}"


@torch.no_grad()
def _bridged(model: Model, technique: Shortening, dropped: tuple[int, ...], tokens: Tensor
             ) -> dict[str, Plus]:
    """For every block before some that went, what is added to the matrix that it writes with."""
    if any(stem == "post_ffw_norm" for _, stem in model.map.family.vectors):
        raise EditError(f"{model.name}: between a block's last matrix and what it puts out stands a norm, so "
                        "no matrix can take dropped blocks over; use fold: merge")
    changes: dict[str, Plus] = {}
    whole = Stream(Runner(model), tokens)
    ours = Stream(Runner(model, lambda path: None if path not in changes
                         else model.weight(path) + changes[path].values), tokens)
    for block in range(model.map.blocks):
        if block in dropped:
            continue
        whole.advance(block)
        last = block
        while last + 1 in dropped:
            last += 1
            whole.advance(last)
        if last > block:
            path = next(site.path for site in model.map.in_block(block) if site.role == "down")
            changes[path] = Plus(technique.bridge(*_missing(ours, whole, block, path)))
        ours.advance(block)
    return changes


def _missing(ours: Stream, whole: Stream, block: int, path: str) -> tuple[Tensor, Tensor]:
    """The moment of what the matrix reads, and of that with what is missing; tokens weighed by 1 / |h|^2."""
    moment, missing = torch.zeros(()), torch.zeros(())
    seen: dict[str, Tensor] = {}

    def observe(site: str, x: Tensor, y: Tensor) -> None:
        seen[site] = x

    for hidden, wanted, context in zip(ours.hidden, whole.hidden, ours.contexts, strict=True):
        out = ours.runner.block(block, hidden, context, observe)
        x, h = seen[path].flatten(0, 1), wanted.flatten(0, 1)
        weighed = x / h.square().sum(1, keepdim=True).clamp_min(1e-12)
        moment = moment + weighed.T @ x
        missing = missing + (h - out.flatten(0, 1)).T @ weighed
    return moment, missing


@torch.no_grad()
def _passages(model: Model, tokens: Tensor, advance: Advance) -> tuple[Passage, ...]:
    """Every block's influence; the first position of a window, which is no text, aside."""
    stream = Stream(Runner(model), tokens)
    found = []
    for block in range(model.map.blocks):
        before = stream.hidden
        stream.advance(block)
        cosines = [torch.cosine_similarity(a[:, 1:], b[:, 1:], dim=-1).flatten()
                   for a, b in zip(before, stream.hidden, strict=True)]
        found.append(Passage(block, 1.0 - float(torch.cat(cosines).mean())))
        advance(block + 1, model.map.blocks)
    return tuple(found)
