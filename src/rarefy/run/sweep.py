"""The sweep: compress a model block by block, each block for the activations that really reach it.

Inside a block, sites are rewritten in the order in which data flows through them (attention inputs,
attention output, feed-forward inputs, feed-forward output), and evidence for each group is gathered
behind what was already rewritten: later weights repair what earlier ones broke.

Finished sites go into a ``Store`` at once; a sweep that was interrupted takes them from there and
continues with the same bits, because every random draw is seeded by seed and site.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rarefy.calibration.evidence import Advance, Stream
from rarefy.core.edit import Technique, edit
from rarefy.core.errors import EditError
from rarefy.core.nodes import Dense, Node
from rarefy.core.nouns import Evidence, Receipt
from rarefy.models.map import Site
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.models.runner import Runner

ORDER = (("q", "k", "v", "qkv", "kv"), ("o",), ("gate", "up", "gate_up"), ("down",))

Store = MutableMapping[str, tuple[Node, tuple[Receipt, ...]]]


@dataclass(frozen=True, eq=False)
class Work:
    """What is to be done at one site: techniques in order, the name of the format they lead to, and the tree
    that they begin with (None: the plain weight)."""

    chain: tuple[tuple[str, Technique], ...]
    format: str = ""
    start: Node | None = None


def sweep(model: Model, work: Mapping[str, Work], tokens: Tensor, outside: Mapping[str, Evidence],
          store: Store, seed: int, *, sequential: bool, fishers: Mapping[str, Tensor] | None = None,
          advance: Advance = lambda done, total: None) -> None:
    """Do ``work`` at every site it names, and put trees and receipts into ``store``.

    tokens: calibration windows [windows, length]. outside: evidence for the embedding and the head, from
    the survey. sequential: gather evidence anew for each group of a block (four forward passes, not one).
    fishers: of every site, from the survey, for techniques that need them.
    """
    fishers = fishers or {}
    finished: set[str] = set()  # others see a group when all of it is done: a crash may leave half of one

    def current(path: str) -> Node | None:
        return store[path][0] if path in finished else None

    runner = Runner(model, current)
    for site in model.map.sites:
        if site.block is None and site.path in work:
            if site.path not in store:
                store[site.path] = rewrite(model, site, work[site.path], outside.get(site.path), seed)
            finished.add(site.path)
    advance(1, runner.blocks + 1)
    stream = Stream(runner, tokens)
    for index in range(runner.blocks):
        sites = [s for s in model.map.in_block(index) if s.path in work]
        for group in groups(sites, sequential):
            missing = [s for s in group if s.path not in store]
            evidence = stream.inputs(index, {s.path for s in missing}) if missing else {}
            for s in missing:
                store[s.path] = rewrite(model, s, work[s.path], evidence[s.path], seed, fishers.get(s.path))
            finished |= {s.path for s in group}
        if index + 1 < runner.blocks:
            stream.advance(index)
        advance(index + 2, runner.blocks + 1)


def groups(sites: list[Site], sequential: bool) -> list[list[Site]]:
    """The sites of a block in the order of the data, those with common inputs together."""
    if not sequential:
        return [sites]
    split = [[s for s in sites if s.role in roles] for roles in ORDER]
    split.append([s for s in sites if not any(s.role in roles for roles in ORDER)])
    return [group for group in split if group]


def rewrite(model: Model | Network, site: Site, work: Work, evidence: Evidence | None, seed: int,
            fisher: Tensor | None = None) -> tuple[Node, tuple[Receipt, ...]]:
    """Apply the chain of one site to its weight. fisher: what the evidence lacks of one."""
    if evidence is not None and evidence.fisher is None:
        evidence = replace(evidence, fisher=fisher)
    original = model.weight(site.path)
    tree: Node = Dense(original) if work.start is None else work.start
    receipts = []
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(site.path.encode()))
    for name, technique in work.chain:
        try:
            tree, receipt = edit(site.path, tree, original, technique, name, evidence, generator, site.kernel)
        except ValueError as error:  # numerics know no sites and no named errors: a grid that does not divide
            raise EditError(f"{error} ({name} at {site.path})" if site.path not in str(error)
                            else str(error)) from None
        receipts.append(replace(receipt, format=work.format))
    return tree, tuple(receipts)
