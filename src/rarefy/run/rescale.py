"""Techniques of scope ``axes``: a model in, a view of it that computes the same and compresses better out.

What a technique needs to see is gathered block by block, from the model as it is: the change of a group
leaves the inputs of all others as they were, so one pass over the text serves every group. The view is an
ordinary model; surveys, sweeps and exports take it in place of the original, which stays what the result is
measured against.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from rarefy.calibration.channels import block_inputs, head_inputs, network_inputs
from rarefy.calibration.evidence import Advance, Stream
from rarefy.calibration.examples import Examples
from rarefy.core.axes import AxisGroup, Change, Inputs, Reader, Transform
from rarefy.core.edit import Technique
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nouns import Receipt, Recipe, Step
from rarefy.models.axes import Coupling, alterations, changes, couplings
from rarefy.models.encoder_axes import network_couplings
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.models.rewritten import rewritten, rewritten_network, untied
from rarefy.models.runner import Runner
from rarefy.numerics.grids import Grid
from rarefy.run.effort import Effort
from rarefy.run.planning import build_transform, chain, transforms
from rarefy.run.recipe import chains, format_of, matching, split

Opened = TypeVar("Opened", Model, Network)
TRIED = 2  # samples that tell whether a group of channels may be scaled


@dataclass(frozen=True, eq=False)
class Rescaled(Generic[Opened]):
    """The view, and one receipt per group that was changed or had something to say (their bits are 0: no
    number of the file is added or saved)."""

    model: Opened
    receipts: tuple[Receipt, ...]


@torch.no_grad()
def transformed(model: Model, technique: Transform, tokens: Tensor | None = None, *, name: str = "",
                grids: Mapping[str, Grid] | None = None, where: Sequence[str] = ("*",), seed: int = 0,
                advance: Advance = lambda done, total: None) -> Rescaled[Model]:
    """``model`` after ``technique``, computing what it computed before.

    tokens: calibration windows [windows, length], for techniques that need inputs. name: of the technique,
    for messages. grids: what each site will be rounded to afterwards. where: patterns of sites; a group
    takes part when all of its readers match.
    """
    name = name or type(technique).__name__.lower()
    if technique.needs and tokens is None:
        raise EditError(f"{model.name}: {name} needs calibration text; pass data")
    receipts: tuple[Receipt, ...] = ()
    if technique.unties and model.map.tied:
        model = untied(model)
        receipts = (Receipt(model.map.head.path, name, 0, 0, float("nan"), 0.0,
                            note="untied: the head is a matrix of its own"),)
    chosen = _chosen(model, couplings(model), where, name)
    seen = _seen(model, chosen, tokens if technique.needs else None, advance)
    done, said = _decided(model, technique, seen, name, grids or {}, seed)
    return Rescaled(rewritten(model, (each for coupling, change in done
                                      for each in changes(model, coupling, change))), receipts + said)


@torch.no_grad()
def transformed_network(network: Network, technique: Transform, examples: Examples | None, *, name: str = "",
                        grids: Mapping[str, Grid] | None = None, where: Sequence[str] = ("*",), seed: int = 0
                        ) -> Rescaled[Network]:
    """The same for a network that is no language model; arguments as for ``transformed``.

    Which channels may change is found out on samples, so there must always be some. A group that the network
    does not allow to change stays, and its receipt says why.
    """
    name = name or type(technique).__name__.lower()
    if examples is None or not len(examples):
        raise EditError(f"{network.name}: {name} needs calibration samples; pass data")
    few = examples.select(torch.arange(min(TRIED, len(examples)))).inputs
    chosen = _chosen(network, network_couplings(network, few), where, name)
    if not any(each.scales for each in chosen):
        reason = next((f"{each.site}: {each.barrier}" for each in chosen if each.readers),
                      "neither a norm nor attention feeds its matrices")
        raise EditError(f"{network.name}: {name} can change none of its channels: {reason}; leave the step "
                        "out")
    inputs: dict[str, Inputs] = {}
    if technique.needs:
        inputs = network_inputs(network, examples, {each.readers[0].path for each in chosen if each.scales})
    seen = ((each, inputs.get(each.readers[0].path) if each.scales else None) for each in chosen)
    done, receipts = _decided(network, technique, seen, name, grids or {}, seed)
    return Rescaled(rewritten_network(network, (each for coupling, change in done
                                                for each in alterations(coupling, change))), receipts)


def _decided(opened: Opened, technique: Transform, seen: Iterable[tuple[Coupling, Inputs | None]], name: str,
             grids: Mapping[str, Grid], seed: int
             ) -> tuple[list[tuple[Coupling, Change]], tuple[Receipt, ...]]:
    """What the technique says of every group; EditError when it changes none and says nothing."""
    done, receipts = list[tuple[Coupling, Change]](), list[Receipt]()
    for coupling, inputs in seen:
        started = time.perf_counter()
        own_seed = seed ^ zlib.crc32(f"{coupling.role} {coupling.site}".encode())
        change = technique.transform(_group(opened, coupling, inputs, grids),
                                     torch.Generator().manual_seed(own_seed))
        if not change.empty or change.note:
            done.append((coupling, change))
            receipts.append(Receipt(coupling.site, name, 0, 0, float("nan"), time.perf_counter() - started,
                                    note=change.note))
    if not done:
        raise EditError(f"{opened.name}: {name} found no channels to change; if it weighs the rounding that "
                        "follows (awq), give later steps a format, or the technique a grid")
    return done, tuple(receipts)


def rescaled(model: Model, recipe: Recipe, effort: Effort, tokens: Tensor | None,
             advance: Advance = lambda done, total: None) -> Rescaled[Model]:
    """``model`` after every step of scope ``axes`` of a recipe, in their order."""
    def apply(view: Model, technique: Transform, step: Step, grids: Mapping[str, Grid]) -> Rescaled[Model]:
        return transformed(view, technique, tokens, name=step.technique, grids=grids, where=step.where,
                           seed=recipe.seed, advance=advance)

    made = _made(recipe)
    planned = untied(model) if any(technique.unties for _, technique in made) else model
    return _one_by_one(model, planned, recipe, effort, made, apply)


def rescaled_network(network: Network, recipe: Recipe, effort: Effort, examples: Examples | None
                     ) -> Rescaled[Network]:
    """``network`` after every step of scope ``axes`` of a recipe, in their order."""
    def apply(view: Network, technique: Transform, step: Step, grids: Mapping[str, Grid]
              ) -> Rescaled[Network]:
        return transformed_network(view, technique, examples, name=step.technique, grids=grids,
                                   where=step.where, seed=recipe.seed)

    return _one_by_one(network, network, recipe, effort, _made(recipe), apply)


def _made(recipe: Recipe) -> list[tuple[Step, Transform]]:
    known = transforms()
    return [(step, build_transform(step)) for step in split(recipe.steps)[0] if step.technique in known]


def _one_by_one(opened: Opened, planned: Opened, recipe: Recipe, effort: Effort,
                made: list[tuple[Step, Transform]],
                apply: Callable[[Opened, Transform, Step, Mapping[str, Grid]], Rescaled[Opened]]
                ) -> Rescaled[Opened]:
    """planned: the model whose sites the recipe's other steps will meet."""
    grids: dict[str, Grid] = {}
    if made:
        grids = {path: grid for path, steps in chains(planned.map.sites, recipe).items()
                 if (grid := _grid(chain(steps, format_of(steps), effort))) is not None}
    receipts: tuple[Receipt, ...] = ()
    for step, technique in made:
        done = apply(opened, technique, step, grids)
        opened, receipts = done.model, receipts + done.receipts
    return Rescaled(opened, receipts)


def _grid(made: Sequence[tuple[str, Technique]]) -> Grid | None:
    """The grid that the last technique of a chain leaves the weight on."""
    found = (getattr(technique, "grid", None) for _, technique in reversed(made))
    return next((grid for grid in found if isinstance(grid, Grid)), None)


def _chosen(opened: Model | Network, found: Iterable[Coupling], where: Sequence[str], name: str
            ) -> list[Coupling]:
    matched = {site.path for site in matching(opened.map.sites, where)}
    chosen = [each for each in found if all(reader.path in matched for reader in each.readers)]
    if not chosen:
        raise RecipeError(f"{name}: the patterns {', '.join(where)} match no group of channels whole; those "
                          "that read the same channels (q, k and v; gate and up; o; down) belong together")
    return chosen


def _seen(model: Model, chosen: list[Coupling], tokens: Tensor | None,
          advance: Advance) -> Iterator[tuple[Coupling, Inputs | None]]:
    """Every coupling with what arrives behind it; without tokens nothing is looked at."""
    if tokens is None:
        yield from ((coupling, None) for coupling in chosen)
        return
    stream = Stream(Runner(model), tokens)
    last = [coupling for coupling in chosen if coupling.block is None and coupling.scales]
    for index in range(model.map.blocks):
        inside = [coupling for coupling in chosen if coupling.block == index]
        # all readers of a coupling have the same input
        inputs = block_inputs(stream, index, {coupling.readers[0].path for coupling in inside})
        for coupling in inside:
            yield coupling, inputs[coupling.readers[0].path]
        if index + 1 < model.map.blocks or last:
            stream.advance(index)
        advance(index + 1, model.map.blocks)
    for coupling in last:
        yield coupling, head_inputs(stream)


def _group(opened: Model | Network, coupling: Coupling, inputs: Inputs | None, grids: Mapping[str, Grid]
           ) -> AxisGroup:
    readers = () if inputs is None else tuple(
        Reader(member.path, opened.weight(member.path), member.channel, inputs, grids.get(member.path))
        for member in coupling.readers)
    return AxisGroup(coupling.site, coupling.role, coupling.size, coupling.scales, coupling.turns,
                     coupling.barrier, readers)
