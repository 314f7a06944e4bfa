"""Weights that stand at one place in several layers: what layers could share.

In a language model a place is a role, and the layers are its blocks. In any other network the layers are the
members of a list (``Sequential``, ``ModuleList``, the layers of a recurrent one), and a place is the path
from the member to the weight: ``fc1``, ``attention.self.query``, ``hh``. Lists within lists are looked at
from outside inwards, and a weight belongs to the outermost list in which another is like it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from torch import nn

from rarefy.models.map import Site
from rarefy.models.model import Model
from rarefy.models.network import Network

Place = tuple[Site, ...]  # first layer to last; shapes may differ


def places(model: Model | Network) -> tuple[Place, ...]:
    """Every place at which at least two layers have weights that are alike."""
    match model:
        case Model():
            found: dict[str, list[Site]] = defaultdict(list)
            for block in range(model.map.blocks):
                for site in model.map.in_block(block):
                    found[site.role].append(site)
            return tuple(tuple(sites) for sites in found.values() if alike(sites))
        case Network():
            return tuple(_in_lists(model))


def alike(sites: Iterable[Site]) -> tuple[Place, ...]:
    """The sites in groups of one shape, two or more in each; those that are like no other are left out."""
    found: dict[object, list[Site]] = defaultdict(list)
    for site in sites:
        found[site.shape, site.kernel, site.transposed].append(site)
    return tuple(tuple(group) for group in found.values() if len(group) > 1)


def _in_lists(network: Network) -> Iterator[Place]:
    owner = {id(part): site for site in network.map.sites for part in network.users(site.path)}
    taken = set[str]()
    for part in network.module.modules():
        if not isinstance(part, nn.ModuleList | nn.Sequential):
            continue
        found: dict[tuple[str, type[nn.Module]], dict[str, Site]] = defaultdict(dict)
        for member in part.children():
            for name, below in member.named_modules():
                site = owner.get(id(below))
                if site is not None and site.path not in taken:
                    found[name, type(below)][site.path] = site
        for sites in found.values():
            if alike(sites.values()):
                taken |= set(sites)
                yield tuple(sites.values())
