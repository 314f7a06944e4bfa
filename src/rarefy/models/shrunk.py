"""A smaller model seen in a larger one: without some neurons, heads, blocks or tokens, as an ordinary model.

The view has a configuration of its own, which says the smaller sizes, and a source that leaves rows,
columns or whole blocks out as it is read. Names and shapes are checked against the configuration as for any
model, and what reads models (surveys, exports, runners) cannot tell it from one trained at that size.
All blocks keep the same sizes, which every runtime loads, but for neurons of families that llama.cpp loads
with a width for each block: the view is then as wide as the widest, with zeros behind the others' own, and
the export leaves these out.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rarefy.core.errors import ModelError
from rarefy.core.structure import KeyHeads
from rarefy.models.attending import LATENT
from rarefy.models.families import FAMILIES, PER_BLOCK_WIDTHS, Family, head_width
from rarefy.models.map import Site
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.models.sources import Source
from rarefy.models.tokens import without_tokens

# settings of a configuration with one entry per block
PER_BLOCK = ("layer_types", "no_rope_layers", "block_neurons", LATENT)


@dataclass(frozen=True, eq=False)
class Place:
    """Where units lie in one tensor: ``unit[i]`` stands at position i of ``axis``; -1: not theirs, stays.

    Three heads of two channels are six columns of the matrix behind them; without head 1:

    >>> Place("o_proj.weight", 1, torch.tensor([0, 0, 1, 1, 2, 2])).kept(torch.tensor([0, 2]))
    tensor([0, 1, 4, 5])
    """

    path: str
    axis: int
    unit: Int64[Tensor, " positions"]

    def kept(self, units: Int64[Tensor, " kept"]) -> Int64[Tensor, " positions"]:
        """The positions that stay when only ``units`` do."""
        return torch.isin(self.unit, torch.cat([units, torch.tensor([-1])])).nonzero()[:, 0]


@dataclass(frozen=True, eq=False)
class Units:
    """All neurons, heads or queries of one block: who writes them and the matrix whose columns read them.

    runs: as ``UnitGroup``'s. A Llama whose four heads of two channels share two of keys and values:

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=6, num_hidden_layers=1,
    ...                      num_attention_heads=4, num_key_value_heads=2)
    >>> model = Model.from_module(LlamaForCausalLM(config), None)
    >>> found = heads(model, 0)
    >>> for place in (*found.writers, found.reader):
    ...     print(place.path.removeprefix("model.layers.0.self_attn."), place.axis, place.unit.tolist())
    q_proj.weight 0 [0, 0, 0, 0, 1, 1, 1, 1]
    k_proj.weight 0 [0, 0, 1, 1]
    v_proj.weight 0 [0, 0, 1, 1]
    o_proj.weight 1 [0, 0, 0, 0, 1, 1, 1, 1]

    Without the first of them every member is half as large, and the configuration says so:

    >>> smaller = without_units(model, {0: torch.tensor([1])}, "heads", {})
    >>> smaller.weight("model.layers.0.self_attn.q_proj.weight").shape
    torch.Size([4, 8])
    >>> smaller.config.num_attention_heads, smaller.config.num_key_value_heads
    (2, 1)
    """

    role: str
    block: int
    count: int
    writers: tuple[Place, ...]
    reader: Place
    runs: int = 1


def neurons(model: Model, block: int) -> Units:
    """The neurons of a block's feed-forward part: rows of gate and up, columns of down.

    In a fused matrix of gate and up, neuron 2 of 6 is rows 2 and 8; without neurons 0 and 1:

    >>> Place("gate_up_proj.weight", 0, torch.arange(12) % 6).kept(torch.arange(2, 6))
    tensor([ 2,  3,  4,  5,  8,  9, 10, 11])
    """
    sites = _sites(model, block)
    down = sites["down"]
    size = down.shape[1]
    names = [sites[role] for role in ("gate", "up", "gate_up") if role in sites]
    writers = [place for site in names
               for place in row_places(model, site, torch.arange(site.shape[0]) % size)]
    return Units("neurons", block, size, tuple(writers), Place(down.path, 1, torch.arange(size)))


def heads(model: Model, block: int) -> Units:
    """Heads with their keys and values: a unit is one key-value head and all queries that share it."""
    count, shared, width = _attention(model)
    query = torch.arange(count).repeat_interleave(shared * width)
    key = torch.arange(count).repeat_interleave(width)
    sites = _sites(model, block)
    layout = {"q": query, "k": key, "v": key, "qkv": torch.cat([query, key, key])}
    writers = [place for role, unit in layout.items() if role in sites
               for place in row_places(model, sites[role], unit)]
    return Units("heads", block, count, tuple(writers), Place(sites["o"].path, 1, query))


def queries(model: Model, block: int) -> Units:
    """Heads of queries alone: a unit is one of those that share keys and values, which all stay.

    Where queries, keys and values are one matrix (two queries of two channels, one head of keys and values),
    the rows of the latter belong to no unit:

    >>> Place("qkv_proj.weight", 0, torch.tensor([0, 0, 1, 1, -1, -1, -1, -1])).kept(torch.tensor([1]))
    tensor([2, 3, 4, 5, 6, 7])
    """
    count, shared, width = _attention(model)
    query, rest = torch.arange(count * shared).repeat_interleave(width), torch.full((count * width,), -1)
    sites = _sites(model, block)
    layout = {"q": query, "qkv": torch.cat([query, rest, rest])}
    writers = [place for role, unit in layout.items() if role in sites
               for place in row_places(model, sites[role], unit)]
    return Units("queries", block, count * shared, tuple(writers), Place(sites["o"].path, 1, query), count)


def _attention(model: Model) -> tuple[int, int, int]:
    """Heads of keys and values, queries that share each, and channels of a head."""
    config = model.config
    if model.map.family.name == "gpt2":
        raise ModelError(f"{model.name}: GPT-2's width of a head follows from their number, so none can "
                         "be left out; leave out neurons or blocks")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ModelError(f"{model.name}: {config.num_attention_heads} heads of queries cannot share "
                         f"{config.num_key_value_heads} of keys and values evenly; leave out neurons or "
                         "blocks")
    return (config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads,
            head_width(config))


GROUPS = {"neurons": neurons, "heads": heads, "queries": queries}


def written(model: Model | Network, units: Units) -> Float[Tensor, " units"]:
    """Root of the summed squares of all rows that write each unit."""
    total = torch.zeros(units.count)
    for place in units.writers:
        if place.path in model.map.by_path:
            theirs = place.unit >= 0
            total.index_add_(0, place.unit[theirs], model.weight(place.path).square().sum(1)[theirs])
    return total.sqrt()


def without_units(model: Model, kept: Mapping[int, Tensor], role: str,
                  refits: Mapping[int, Tensor]) -> Model:
    """The model in which block b keeps the units ``kept[b]`` (sorted) of a role, as many in every block but
    for neurons of a family whose blocks may differ.

    refits: by block, the matrix [kept columns, columns] that the reader is multiplied with; without one its
    columns are only left out.
    """
    sizes = [kept[block].numel() for block in sorted(kept)]
    if len(sizes) != model.map.blocks or 0 in sizes:
        raise ModelError(f"{model.name}: every block must keep {role}, at least one")
    family = model.map.family
    if len(set(sizes)) > 1:
        family = _uneven(model, role)
    cuts: dict[str, list[Cut]] = {}
    for block, index in kept.items():
        units, zeros = GROUPS[role](model, block), max(sizes) - index.numel()
        for place in units.writers:
            cuts.setdefault(place.path, []).append(Cut(place.axis, place.kept(index), None, zeros))
        reader = units.reader
        cuts.setdefault(reader.path, []).append(Cut(1, reader.kept(index), refits.get(block), zeros))
    config = copy.deepcopy(model.config)
    _resize(config, role, max(sizes))
    if role == "neurons":
        config.block_neurons = sizes if len(set(sizes)) > 1 else None
    source = ShrunkSource(model.source, cuts, model.map.by_path, {})
    return Model(model.name, family, config, source, lambda: model.tokenizer)


def _uneven(model: Model, role: str) -> Family:
    """The family in which blocks may differ."""
    name = PER_BLOCK_WIDTHS.get(model.map.family.name)
    if role != "neurons" or name is None:
        raise ModelError(f"{model.name}: every block must keep the same number of {role}; only neurons of "
                         "Llama and Mistral may differ, for llama.cpp")
    if any(re.search(r"(gate|up)_proj\.bias$", param.path) for param in model.map.params):
        raise ModelError(f"{model.name}: its feed-forward parts have biases, which llama.cpp's files with a "
                         "width for each block have not; keep the same number of neurons everywhere")
    return next(family for family in FAMILIES if family.name == name)


def key_heads(model: Model, block: int) -> KeyHeads:
    """The key and value heads of a block as their rows."""
    kept = model.config.num_key_value_heads if model.map.family.name != "gpt2" else 0
    sites = _sites(model, block)
    if not kept or "k" not in sites:
        raise ModelError(f"{model.name}: the {model.map.family.name} family keeps queries, keys and values "
                         "in one matrix; its heads cannot be merged")
    key, value = (_with_bias(model, sites[role]).unflatten(0, (kept, -1)) for role in ("k", "v"))
    return KeyHeads(sites["k"].path, block, key, value)


def with_merged_heads(model: Model, merges: Mapping[int, Tensor]) -> Model:
    """The model in which block b has ``merges[b]`` [groups, heads] applied to its heads of keys and values.

    Queries stay in their order, so group g must stand for heads g * n to (g + 1) * n - 1.
    """
    counts = {matrix.shape[0] for matrix in merges.values()}
    if len(counts) != 1 or len(merges) != model.map.blocks:
        raise ModelError(f"{model.name}: every block must end with the same number of heads")
    width = head_width(model.config)
    cuts: dict[str, list[Cut]] = {}
    for block, matrix in merges.items():
        sites = _sites(model, block)
        spread = torch.kron(matrix, torch.eye(width))
        for role in ("k", "v"):
            for place in row_places(model, sites[role], torch.arange(sites[role].shape[0])):
                cuts[place.path] = [Cut(0, torch.arange(spread.shape[0]), spread)]
    config = copy.deepcopy(model.config)
    config.head_dim = width
    config.num_key_value_heads = counts.pop()
    return _view(model, config, ShrunkSource(model.source, cuts, model.map.by_path, {}))


def without_blocks(model: Model, dropped: frozenset[int]) -> Model:
    """The model without some of its blocks; those that stay move up."""
    stay = [block for block in range(model.map.blocks) if block not in dropped]
    if not stay or not dropped <= set(range(model.map.blocks)):
        raise ModelError(f"{model.name}: of blocks 0 to {model.map.blocks - 1} at least one must stay")
    config = copy.deepcopy(model.config)
    for name in PER_BLOCK:
        values = getattr(config, name, None)
        if values is not None:
            setattr(config, name, [values[block] for block in stay])
    config.num_hidden_layers = len(stay)
    prefix = model.map.family.blocks
    names = {}
    for name in model.source.names():
        inside = model.map.family.inside(name)
        if inside is None:
            names[name] = name
        elif inside[0] in stay:
            names[f"{prefix}.{stay.index(inside[0])}.{inside[1]}"] = name
    return _view(model, config, ShrunkSource(model.source, {}, {}, names))


def with_tokens(model: Model, kept: Int64[Tensor, " kept"]) -> Model:
    """The model that knows the tokens ``kept`` alone (sorted), renumbered; its tokenizer too."""
    cuts = {site.path: [Cut(0, kept, None)] for site in model.map.sites if site.role in ("embed", "head")}
    source = ShrunkSource(model.source, cuts, model.map.by_path, {})
    return Model(model.name, model.map.family, renumbered(model.config, kept), source,
                 lambda: without_tokens(model.tokenizer, kept))


def renumbered(config: Any, kept: Int64[Tensor, " kept"]) -> Any:
    """The configuration of a network that knows the tokens ``kept`` alone."""
    place = {old: new for new, old in enumerate(kept.tolist())}
    done = copy.deepcopy(config)
    for name, value in vars(config).items():
        if name.endswith("_token_id") and value is not None:
            setattr(done, name, [place[each] for each in value] if isinstance(value, list)
                    else place.get(value, value))
    done.vocab_size = kept.numel()
    return done


def _view(model: Model, config: Any, source: ShrunkSource) -> Model:
    return Model(model.name, model.map.family, config, source, lambda: model.tokenizer)


def _sites(model: Model, block: int) -> dict[str, Site]:
    return {site.role: site for site in model.map.in_block(block)}


def row_places(model: Model | Network, site: Site, unit: Tensor) -> Iterator[Place]:
    """The rows of a matrix, and of its bias where it has one."""
    yield Place(site.path, 0, unit)
    bias = re.sub("weight$", "bias", site.path)
    if any(param.path == bias for param in model.map.params):
        yield Place(bias, 0, unit)


def _resize(config: Any, role: str, count: int) -> None:
    if role == "neurons":
        name = "n_inner" if config.model_type == "gpt2" else "intermediate_size"
        setattr(config, name, count)
        return
    config.head_dim = head_width(config)  # it can no longer be told from the number of heads
    if role == "queries":
        config.num_attention_heads = count
        return
    config.num_attention_heads = config.num_attention_heads // config.num_key_value_heads * count
    config.num_key_value_heads = count


def _with_bias(model: Model, site: Site) -> Tensor:
    bias = re.sub("weight$", "bias", site.path)
    weight = model.weight(site.path)
    if any(param.path == bias for param in model.map.params):
        return torch.cat([weight, model.param(bias)[:, None]], 1)
    return weight


@dataclass(frozen=True, eq=False)
class Cut:
    """Positions of one axis that stay; ``refit``: or the matrix [kept, all] that makes them of all.

    zeros: how many are put behind.
    """

    axis: int
    kept: Tensor
    refit: Tensor | None
    zeros: int = 0

    def applied(self, values: Tensor) -> Tensor:
        if self.refit is not None:
            values = self.refit @ values if self.axis == 0 else values @ self.refit.T
        else:
            values = values.index_select(self.axis, self.kept)
        if not self.zeros:
            return values
        shape = list(values.shape)
        shape[self.axis] = self.zeros
        return torch.cat([values, values.new_zeros(shape)], self.axis)


class ShrunkSource(Source):
    """The tensors of another source with positions left out, or some of them under other names.

    sites: says which matrices the file holds transposed. names: what each tensor is called inside; empty:
    the same.
    """

    def __init__(self, inner: Source, cuts: Mapping[str, list[Cut]], sites: Mapping[str, Site],
                 names: Mapping[str, str]) -> None:
        super().__init__()
        self.inner, self._cuts, self._sites, self._names = inner, cuts, sites, names

    def names(self) -> tuple[str, ...]:
        return tuple(self._names) or self.inner.names()

    def shape(self, name: str) -> tuple[int, ...]:
        shape = list(self.inner.shape(self._inside(name)))
        for cut in self._cuts.get(name, ()):
            axis = len(shape) - 1 - cut.axis if self._flipped(name) else cut.axis
            shape[axis] = cut.kept.numel() + cut.zeros
        return tuple(shape)

    def dtype(self, name: str) -> str:
        plain = name not in self._cuts or self._picked(name) is not None
        return self.inner.dtype(self._inside(name)) if plain else "float32"

    def files(self) -> tuple[Path, ...]:
        return self.inner.files()

    def check(self, name: str) -> None:
        """What is left of something finite is finite."""
        self.inner.check(self._inside(name))

    def rows(self, name: str, index: slice | Tensor) -> Tensor:
        """Some rows; of a matrix of which more than rows was cut, all are read."""
        inside = self._inside(name)
        if name not in self._cuts:
            return self.inner.rows(inside, index)
        picked = self._picked(name)
        if picked is not None:
            return self.inner.rows(inside, picked[index])
        values = self.inner.rows(inside, slice(None))
        flipped = self._flipped(name)
        values = values.T if flipped else values
        for cut in self._cuts[name]:
            values = cut.applied(values.float())
        return (values.T if flipped else values)[index]

    def _rows(self, name: str, index: slice | Tensor) -> Tensor:
        return self.rows(name, index)

    def _picked(self, name: str) -> Tensor | None:
        """The rows of a tensor of which nothing but rows was left out."""
        match self._cuts[name]:
            case [Cut(axis=0, kept=kept, refit=None, zeros=0)] if not self._flipped(name):
                return kept
            case _:
                return None

    def _inside(self, name: str) -> str:
        return self._names.get(name, name)

    def _flipped(self, name: str) -> bool:
        site = self._sites.get(name)
        return site is not None and site.transposed
