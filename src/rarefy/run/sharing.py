"""Techniques of scope ``stack``: layers of a network that share their matrices.

What comes out are trees, ``Shared`` where a layer uses another's matrix: the native format stores that
matrix once, and ``tune`` trains it once, for all layers that use it. Which layers could is said in
``models.stacks``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from rarefy.calibration import observe
from rarefy.calibration.evidence import Stream
from rarefy.calibration.examples import Examples
from rarefy.core.edit import leaves, relative_error
from rarefy.core.errors import EditError, RecipeError, TargetError
from rarefy.core.nodes import Dense, Node, Product, Shared, Sum
from rarefy.core.nouns import Evidence, Receipt, Recipe
from rarefy.core.structure import Sharing, Stack
from rarefy.models.map import Site
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.models.runner import Runner
from rarefy.models.stacks import Place, alike, places
from rarefy.run.planning import sharings


@dataclass(frozen=True, eq=False)
class SharedLayers:
    """The trees of all sites that share or are shared, and a receipt for each."""

    trees: dict[str, Node]
    receipts: tuple[Receipt, ...]


def share_layers(model: Model | Network, technique: Sharing, data: Tensor | Examples | None = None, *,
                 dtype: torch.dtype = torch.float16) -> SharedLayers:
    """Let layers of ``model`` share matrices as ``technique`` says.

    data: windows of tokens or examples, where the technique looks at what arrives. dtype: of what is stored.
    """
    found = places(model)
    if not found:
        raise EditError(f"{model.name}: no two layers of one list have a weight of the same shape; sharing "
                        "takes two")
    chosen = [place for place in found if technique.chosen(place[0].role)]
    if not chosen:
        roles = ", ".join(dict.fromkeys(place[0].role for place in found))
        raise EditError(f"{model.name}: its layers have no weights of that kind to share, only {roles}; use "
                        "what: all")
    evidence = _evidence(model, [site for place in chosen for site in place], data) if technique.needs else {}
    trees: dict[str, Node] = {}
    receipts: list[Receipt] = []
    for place in chosen:
        for group in alike(place):
            for index in technique.groups(len(group)):
                _share(model, technique, [group[each] for each in index], evidence, dtype, trees, receipts)
        receipts += [_alone(site, place) for site in place if site.path not in trees]
    return SharedLayers(trees, tuple(receipts))


def check_sharing(recipe: Recipe, target: str) -> None:
    """Refuse targets that store every layer's weights."""
    step = next((step for step in recipe.steps if step.technique in sharings()), None)
    if step is None:
        return
    if target != "torch":
        raise TargetError(f"{step.technique}: {target} stores the weights of every layer, so sharing would "
                          "save nothing there; use --for torch")
    if step.where != ("*",):
        raise RecipeError(f"{step.technique}: shares whole roles (what: attention, ffn or all); leave "
                          "'where' out")


def follows(tree: Node) -> bool:
    """Whether a tree uses a matrix that is stored at another site."""
    return any(isinstance(leaf, Shared) for leaf in leaves(tree))


def relinked(tree: Node, owner: Callable[[str], Node | None]) -> Node:
    """``tree`` with what is shared in it as it is now. owner: the tree at a site; None: as it was."""
    if isinstance(tree, Shared):
        held = owner(tree.path)
        return tree if held is None else Shared(tree.path, held)
    below = tree.children()
    return tree.rebuilt(tuple(relinked(child, owner) for child in below)) if below else tree


def _alone(site: Site, place: Place) -> Receipt:
    """What is said of a weight that no other layer shares."""
    bits = 16 * prod(site.shape)
    others = [other for other in place if other.path != site.path and other.shape == site.shape]
    why = "left over behind the last group" if others else "no other layer has one of its shape"
    return Receipt(site.path, "layers", bits, bits, 0.0, 0.0, note=f"stays alone: {why}")


def _share(model: Model | Network, technique: Sharing, sites: list[Site], evidence: dict[str, Evidence],
           dtype: torch.dtype, trees: dict[str, Node], receipts: list[Receipt]) -> None:
    """One group of weights of one shape."""
    started, first = time.perf_counter(), sites[0]
    paths = tuple(site.path for site in sites)
    weights = torch.stack([model.weight(path) for path in paths])
    matrix, corrections = technique.share(Stack(first.role, paths, weights,
                                                tuple(evidence.get(path) for path in paths)))
    owner = Dense(_stored(matrix, dtype, first.path))
    trees[first.path] = owner
    for path, correction in zip(paths[1:], corrections, strict=True):
        shared = Shared(first.path, owner)
        trees[path] = shared if correction is None else Sum((shared, Product(
            *(Dense(_stored(factor, dtype, path)) for factor in correction))))
    seconds = (time.perf_counter() - started) / len(paths)
    for path, weight in zip(paths, weights, strict=True):
        seen = evidence.get(path) or Evidence(torch.eye(weight.shape[1]), weight.shape[1])
        receipts.append(Receipt(path, "layers", weight.numel() * 16, trees[path].bits(),
                                relative_error(weight, trees[path], seen), seconds,
                                note="stored for all" if path == paths[0] else f"uses {paths[0]}"))


def _stored(values: Tensor, dtype: torch.dtype, path: str) -> Tensor:
    done = values.to(dtype)
    if not bool(torch.isfinite(done).all()):
        raise EditError(f"{path}: the shared matrix overflows {str(dtype).removeprefix('torch.')}; pass "
                        "dtype=torch.bfloat16")
    return done


def _evidence(model: Model | Network, sites: Iterable[Site], data: Tensor | Examples | None
              ) -> dict[str, Evidence]:
    """What arrives at every site in the model as it is."""
    paths = {site.path for site in sites}
    if isinstance(model, Network):
        if not isinstance(data, Examples):
            raise EditError(f"{model.name}: sharing that fits what arrives needs examples; pass data, or "
                            "start='average' and rank=0")
        return observe.inputs(model, data, paths, {})
    if not isinstance(data, Tensor):
        raise EditError(f"{model.name}: sharing that fits what arrives needs windows of tokens; pass data, "
                        "or start='average' and rank=0")
    stream, found = Stream(Runner(model), data), dict[str, Evidence]()
    for block in range(model.map.blocks):
        inside = {site.path for site in model.map.in_block(block)} & paths
        found |= stream.inputs(block, inside)
        if block + 1 < model.map.blocks:
            stream.advance(block)
    return found
