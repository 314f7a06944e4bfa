"""Which axes of a network that is no language model belong together: looked for, and tried before believed.

    norm      gain and bias of a norm   ->  columns of the linears that read what it gives
    values    rows of v, and its bias   ->  columns of o

What a norm gives may go elsewhere as well. Encoders whose norms stand behind the addition (BERT, RoBERTa,
DistilBERT, MiniLM) put it back onto the residual stream, which no factor survives; where the norm stands in
front of the linears (ViT), nothing else reads it. Names do not tell the two apart, so every group is scaled
at random once: one that changes the answer is refused, and says why (``barrier``). Between feed-forward
matrices lies a GELU, which no factor passes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from rarefy.core.axes import Change
from rarefy.models.axes import Coupling, Member, alterations
from rarefy.models.hooks import hooked
from rarefy.models.map import Site
from rarefy.models.network import Network
from rarefy.numerics.hadamard import orthogonal_rotation

UNCHANGED = 1e-3  # of the answer's length: a group that may be scaled moves it by rounding alone
ELSEWHERE = ("what it gives is read by more than these matrices: a residual connection adds it to the "
             "stream, which no factor survives")
STREAM = "which matrices write and read the residual stream is known for causal language models alone"
WIDTH = "how wide a head of attention is, is not known"


def network_couplings(network: Network, inputs: Mapping[str, Tensor]) -> tuple[Coupling, ...]:
    """Every group of channels of a network; those that cannot be scaled say so.

    inputs: a sample or two, to look at who reads what and to try the groups on.
    """
    found = [_tried(network, coupling, inputs) for coupling in (*_norms(network, inputs), *_values(network))]
    order = {site.path: place for place, site in enumerate(network.map.sites)}
    found.sort(key=lambda coupling: order[coupling.readers[0].path])
    width = network.map.sites[-1].shape[1]
    return (*found, Coupling(network.name, "residual", None, width, (), (), scales=False, barrier=STREAM))


@torch.no_grad()
def _norms(network: Network, inputs: Mapping[str, Tensor]) -> Iterator[Coupling]:
    """Norms of channels whose output, the very tensor, is the input of linears."""
    made: dict[int, str] = {}
    kept: list[Tensor] = []  # no two tensors of one pass may have the same id
    readers: dict[str, dict[str, Site]] = defaultdict(dict)
    norms = {name: part for name, part in network.module.named_modules() if _is_norm(part)}

    def read(site: Site, module: nn.Module, x: Tensor, y: Tensor) -> None:
        if id(x) in made and isinstance(module, nn.Linear):
            readers[made[id(x)]][site.path] = site

    def gave(name: str, y: Tensor) -> None:
        made[id(y)] = name
        kept.append(y)

    behind = [(part, lambda part, args, y, name=name: gave(name, y)) for name, part in norms.items()]
    with hooked(behind), network.watched(network.map.by_path, read):
        network.run(inputs)
    for name, sites in readers.items():
        width = norms[name].get_parameter("weight").shape[0]
        every = torch.arange(width)
        writers = [Member(path, 0, every) for path, _ in _own(network, name)]
        block = next(iter(sites.values())).block
        yield Coupling(name, "norm", block, width, tuple(writers),
                       tuple(Member(path, 1, every) for path in sites), scales=True)


def _is_norm(part: nn.Module) -> bool:
    """A norm over channels with a gain for each: LayerNorm, and what transformers calls RMSNorm."""
    weight = part._parameters.get("weight")
    return type(part).__name__.endswith(("LayerNorm", "RMSNorm")) and weight is not None and weight.ndim == 1


def _own(network: Network, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Gain and bias of a module, by the paths under which the network stores them."""
    for key, values in network.module.get_submodule(name).named_parameters(recurse=False):
        path = f"{name}.{key}"
        yield network.map.shared.get(path, path), values


def _values(network: Network) -> Iterator[Coupling]:
    """The values of attention: what v writes, weighted by the attention, is what o reads."""
    config = network.config or getattr(network.module, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    for index in range(network.map.blocks):
        sites = {site.role: site for site in network.map.in_block(index)}
        if not {"v", "o"} <= set(sites):
            continue
        source, o = sites["v"], sites["o"]
        size, columns = source.shape[0], o.shape[1]
        width = 0 if heads is None or columns % heads else columns // heads
        if columns % size or (columns > size and (not width or size % width)):
            continue
        # every kept head feeds several heads of o, side by side
        channel = torch.arange(size) if columns == size else torch.arange(size).view(-1, 1, width).expand(
            size // width, columns // size, width).reshape(-1)
        name = source.path.removesuffix(".weight")
        writers = tuple(Member(path, 0, torch.arange(size)) for path, _ in _own(network, name))
        yield Coupling(name, "values", index, size, writers, (Member(o.path, 1, channel),), scales=True,
                       turns=width, barrier="" if width else WIDTH)


@torch.no_grad()
def _tried(network: Network, coupling: Coupling, inputs: Mapping[str, Tensor]) -> Coupling:
    """The group with what the network itself says of it."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.rand(coupling.size, generator=generator).mul(2).sub(1).exp2()
    if not _keeps(network, coupling, Change(factors), inputs):
        return replace(coupling, scales=False, turns=0, barrier=ELSEWHERE)
    turn = Change(rotation=orthogonal_rotation(coupling.turns, generator)) if coupling.turns else Change()
    return coupling if _keeps(network, coupling, turn, inputs) else replace(coupling, turns=0, barrier=WIDTH)


def _keeps(network: Network, coupling: Coupling, change: Change, inputs: Mapping[str, Tensor]) -> bool:
    """Whether the answer stays what it was."""
    altered: dict[str, Tensor] = {}
    for path, alteration in alterations(coupling, change):
        site = network.map.by_path.get(path)
        held = altered.get(path, network.param(path) if site is None else network.weight(path))
        altered[path] = alteration.applied(held)
    named = {path: network.map.by_path[path].stored(values) if path in network.map.by_path else values
             for path, values in altered.items()}
    before = network.run(inputs)
    moved = (network.run(inputs, named) - before).norm() / before.norm().clamp_min(1e-12)
    return bool(moved < UNCHANGED)
