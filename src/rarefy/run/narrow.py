"""Techniques of scope ``structure`` on networks that are no language models: a smaller network comes out.

Encoders lose neurons or blocks and stay ordinary folders of transformers. Any other network loses channels
and stays a module of its class with smaller layers. What a technique needs is gathered on the network as it
is; readers are refitted, BatchNorm is estimated anew, and then the next step looks at what is left.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from rarefy.calibration import observe
from rarefy.calibration.examples import Examples
from rarefy.calibration.observe import BATCH, Advance
from rarefy.calibration.removals import removals, work
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nouns import Evidence, Receipt, Recipe
from rarefy.core.structure import Channels, Narrowing, Passage, Shortening, Thinning, Trimming, UnitGroup
from rarefy.measure.task import Judge
from rarefy.measure.work import multiplications
from rarefy.models.hooks import hooked
from rarefy.models.narrowed import (
    ChannelGroup,
    channel_groups,
    columns,
    neurons,
    reestimated,
    refuse_heads,
    sums,
    without_channels,
    without_neurons,
)
from rarefy.models.network import Network
from rarefy.models.shrunk import Units
from rarefy.run.planning import build_structure, structures
from rarefy.run.recipe import split
from rarefy.run.reshape import Damages, group_of
from rarefy.training.students import shallower

JUDGED = 256  # samples on which the loss of a block is measured


@dataclass(frozen=True, eq=False)
class Narrowed:
    """The network, and one receipt for everything that changed: bits count every weight at 16."""

    network: Network
    receipts: tuple[Receipt, ...]


def narrowed(network: Network, recipe: Recipe, examples: Examples | None,
             advance: Advance = lambda done, total: None) -> Narrowed:
    """``network`` after every step of scope ``structure`` of a recipe, in their order.

    examples: what calibration looks at; channels are traced with them, so filters always need some.
    """
    receipts: tuple[Receipt, ...] = ()
    for step in split(recipe.steps)[0]:
        if step.technique not in structures():
            continue
        if step.where != ("*",):
            raise RecipeError(f"{step.technique}: takes out parts of the whole network; leave 'where' out")
        technique = build_structure(step)
        if isinstance(technique, Trimming):
            continue  # done before text was cut into tokens
        kind = technique.edits[0]
        if examples is None and (technique.needs or kind is Channels):
            raise EditError(f"{network.name}: {step.technique} needs calibration samples; pass data")
        if isinstance(technique, Narrowing):
            assert examples is not None
            done = filtered(network, technique, examples, name=step.technique, seed=recipe.seed)
        elif isinstance(technique, Shortening):
            assert examples is not None
            done = shortened(network, technique, examples, name=step.technique, advance=advance)
        elif isinstance(technique, Thinning):
            done = thinned(network, technique, examples, name=step.technique, seed=recipe.seed)
        else:
            raise RecipeError(f"{network.name}: {step.technique} works on language models only")
        network, receipts = done.network, receipts + done.receipts
    return Narrowed(network, receipts)


# ---- channels

def filtered(network: Network, technique: Narrowing, examples: Examples, *, name: str = "", seed: int = 0
             ) -> Narrowed:
    """The network without the channels that the technique lets go."""
    started = time.perf_counter()
    inputs = examples.select(torch.arange(min(2, len(examples)))).inputs
    found, _ = channel_groups(network, inputs)
    ignore = set(getattr(technique, "ignore", ()))
    wrong = ignore - {name for name, _ in network.module.named_modules()}
    if wrong:
        raise RecipeError(f"ignore: {network.name} has no module {sorted(wrong)[0]!r}")
    groups = [group for group in found if group.root not in ignore]
    if not groups:
        raise EditError(f"{network.name}: no channels can be taken out of it")
    seen = _channels(network, technique, groups, examples, inputs, seed)
    kept, refits = {}, {}
    for group, channels, index in zip(groups, seen, technique.keep(seen), strict=True):
        if index.numel() == group.count:
            continue
        kept[group.root] = index
        refit = technique.refit(channels, index)
        if refit is not None:
            refits[group.root] = refit
    done = reestimated(without_channels(network, inputs, kept, refits), examples.batches(BATCH))
    before, after = multiplications(network, inputs), multiplications(done, inputs)
    seconds = time.perf_counter() - started
    receipts = [_channel_receipt(channels, group, name, kept[group.root], seconds / len(kept))
                for group, channels in zip(groups, seen, strict=True) if group.root in kept]
    total = f"{before / 1e6:.3g} million multiplications per sample became {after / 1e6:.3g}"
    receipts.append(Receipt(network.name, name, network.parameters * 16, done.parameters * 16, float("nan"),
                            seconds, note=total))
    return Narrowed(done, tuple(receipts))


def _channels(network: Network, technique: Narrowing, groups: Sequence[ChannelGroup], examples: Examples,
              inputs: dict[str, Tensor], seed: int) -> tuple[Channels, ...]:
    """Every group as the technique sees it."""
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(b"structure"))
    costs = removals(network, groups, examples, generator) if "removal" in technique.needs else {}
    single = {group.root: group.readers[0] for group in groups if len(group.readers) == 1
              and len(network.users(group.readers[0].path)) == 1 and not _in_groups(network, group)}
    evidence: dict[str, Evidence] = {}
    if "gram" in technique.needs:
        evidence = observe.inputs(network, examples, [place.path for place in single.values()], {})
    works, seen = work(network, groups, inputs), []
    for group in groups:
        absolute, square = sums(network, group)
        each = Channels(group.site, absolute, square, works[group.root], costs.get(group.root))
        place = single.get(group.root)
        if place is not None:
            each = replace(each, reader=network.weight(place.path), evidence=evidence.get(place.path),
                           unit=columns(network.map.by_path[place.path], place))
        seen.append(each)
    return tuple(seen)


def _in_groups(network: Network, group: ChannelGroup) -> bool:
    part = network.module.get_submodule(group.readers[0].path.removesuffix(".weight"))
    return int(getattr(part, "groups", 1)) > 1


def _channel_receipt(channels: Channels, group: ChannelGroup, name: str, kept: Tensor, seconds: float
                     ) -> Receipt:
    before = sum(place.unit.numel() for place in (*group.writers, *group.readers)) * 16
    lost = float("nan")
    if channels.removal is not None:
        lost = float(channels.removal.sum() - channels.removal[kept].sum())
    note = f"{group.count - kept.numel()} of {group.count} channels left out"
    note += "" if lost != lost else f"; each alone would cost {lost:.3g} together"
    return Receipt(channels.site, name, before, before * kept.numel() // group.count, float("nan"), seconds,
                   note=note)


# ---- neurons of encoders

def thinned(network: Network, technique: Thinning, examples: Examples | None, *, name: str = "", seed: int = 0
            ) -> Narrowed:
    """The encoder without the neurons that cost least, as many in every block."""
    if technique.units != "neurons":
        raise refuse_heads(network)
    if not network.map.blocks or network.config is None:
        raise EditError(f"{network.name}: is no encoder of transformers; take channels out with filters")
    if technique.spread == "global":
        raise RecipeError(f"{network.name}: transformers' encoders have one width for all blocks; use "
                          "spread: uniform")
    units = [neurons(network, block) for block in range(network.map.blocks)]
    evidence = _evidence(network, technique, units, examples, seed)
    costs = _removals(network, technique, units, examples, seed)
    count = max(technique.count(group_of(network, each)) for each in units)
    kept, refits, receipts = {}, {}, []
    for each in units:
        started, path = time.perf_counter(), each.reader.path
        group = group_of(network, each, evidence.get(path), costs.get(path))
        kept[each.block] = index = group.dearest(technique.scores(group), count)
        refit = technique.refit(group, index)
        if refit is not None:
            refits[each.block] = refit
        bits = group.reader.numel() * 16
        receipts.append(Receipt(group.site, name, bits, bits * index.numel() // each.count,
                                _lost(group, index, refit), time.perf_counter() - started,
                                note=f"{each.count - index.numel()} of {each.count} neurons left out"))
    return Narrowed(without_neurons(network, kept, refits), tuple(receipts))


def _evidence(network: Network, technique: Thinning, units: Sequence[Units], examples: Examples | None,
              seed: int) -> dict[str, Evidence]:
    """Plain grams at every reader, with Fishers where errors are priced."""
    if "gram" not in technique.needs:
        return {}
    assert examples is not None
    paths = {each.reader.path for each in units}
    found = observe.inputs(network, examples, paths, {})
    if "fisher" in technique.needs:
        generator = torch.Generator().manual_seed(seed ^ zlib.crc32(b"structure"))
        fishers = {seen.site.path: seen.evidence.fisher
                   for seen in observe.survey(network, examples, generator) if seen.site.path in paths}
        found = {path: replace(each, fisher=fishers[path]) for path, each in found.items()}
    return found


def _removals(network: Network, technique: Thinning, units: Sequence[Units], examples: Examples | None,
              seed: int) -> dict[str, Tensor]:
    """What it costs per sample when a unit goes, by path of the reader."""
    if "removal" not in technique.needs:
        return {}
    assert examples is not None
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(b"structure"))
    roots = [each.reader.path.removesuffix(".weight") for each in units]
    groups = [ChannelGroup(root, each.count, each.writers, (each.reader,))
              for root, each in zip(roots, units, strict=True)]
    return {f"{root}.weight": cost for root, cost in removals(network, groups, examples, generator).items()}


def _lost(group: UnitGroup, kept: Tensor, refit: Tensor | None) -> float:
    """The share of the reader's output that is lost."""
    if group.evidence is None:
        return float("nan")
    stays = torch.isin(group.unit, kept)
    change = torch.where(stays, 0.0, group.reader)
    if refit is not None:
        change[:, stays] = group.reader[:, stays] - group.reader @ refit.T
    return group.evidence.error(change) / max(group.evidence.error(group.reader), 1e-30)


# ---- blocks of encoders

def shortened(network: Network, technique: Shortening, examples: Examples, *, name: str = "",
              advance: Advance = lambda done, total: None) -> Narrowed:
    """The encoder without the blocks that the technique names."""
    if technique.fold:
        raise EditError(f"{network.name}: an encoder's blocks end with a norm, so the block before cannot "
                        f"take over what was dropped; leave fold {technique.fold} out and distil")
    started, passages = time.perf_counter(), _passages(network, examples)
    few = examples.select(torch.arange(min(JUDGED, len(examples))))
    judge = cache(lambda: Judge(network, few))
    damage = Damages(lambda dropped: judge().compare(_without(network, set(dropped))).mean, advance)
    dropped = technique.drop(passages, damage)
    seconds, receipts = time.perf_counter() - started, []
    for block in dropped:
        bits = sum(site.shape[0] * site.shape[1] for site in network.map.in_block(block)) * 16
        receipts.append(Receipt(f"block {block}", name, bits, 0, float("nan"), seconds / len(dropped),
                                note=damage.said(dropped, passages[block].influence)))
    return Narrowed(_without(network, set(dropped)), tuple(receipts))


def _without(network: Network, dropped: set[int]) -> Network:
    done = shallower(network, tuple(b for b in range(network.map.blocks) if b not in dropped), network.name)
    assert isinstance(done, Network)
    return done


@torch.no_grad()
def _passages(network: Network, examples: Examples) -> tuple[Passage, ...]:
    """Every block's influence on the states of real tokens."""
    total = network.map.blocks
    lists = [part for part in network.module.modules() if isinstance(part, nn.ModuleList)
             and len(part) == total and total == getattr(network.config, "num_hidden_layers", -1)]
    if not lists:
        raise EditError(f"{network.name}: its blocks are no list that can be shortened")
    turned, count = torch.zeros(total), 0
    for inputs in examples.batches(BATCH):
        pairs: list[tuple[Tensor, Tensor]] = []
        with hooked((part, lambda part, args, out, pairs=pairs: pairs.append(
                (args[0], out[0] if isinstance(out, tuple) else out))) for part in lists[0]):
            network.run(inputs)
        mask = inputs.get("attention_mask")
        real = torch.ones(pairs[0][0].shape[:2]).bool() if mask is None else mask.bool()
        for block, (before, after) in enumerate(pairs):
            turned[block] += torch.cosine_similarity(before[real], after[real], dim=-1).sum()
        count += int(real.sum())
    return tuple(Passage(block, 1.0 - float(turned[block]) / count) for block in range(total))
