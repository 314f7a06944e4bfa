"""Which axes of a model belong together: the groups of channels of every transformer family, as data.

A *coupling* is a set of channels with everything that writes them and everything that reads them:

    norm       a norm's gain (and bias)         ->  the matrices behind it, or the head
    values     rows of v                        ->  columns of o; with grouped heads one row feeds several
    hidden     rows of up, times act(gate)      ->  columns of down (not where up itself is activated)
    residual   embedding, o and down            ->  every matrix behind a norm, and the head

Which norm feeds what is said by its stem in GGUF, which means the same in all families. ``changes`` turns
what a technique decided for a coupling into changes of single tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from rarefy.core.axes import Change
from rarefy.core.errors import ModelError
from rarefy.models.families import head_width
from rarefy.models.map import ModelMap, Site
from rarefy.models.model import Model
from rarefy.models.rewritten import Fill, Scale, Turn

NORMS = {"attn_norm": ("q", "k", "v", "qkv", "kv"), "ffn_norm": ("gate", "up", "gate_up")}
GATED = ("llama", "mistral", "deci", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3")
UNGATED = ("gpt2",)
_SANDWICH = "its norms behind attention and feed-forward part have gains that no matrix can take over"
BARRIERS = {"gemma2": _SANDWICH, "gemma3": _SANDWICH,
            "gpt2": "its norms subtract the mean of the channels, which a rotation does not keep"}
_TIED = "its head is tied to the embedding, and the last norm's gain can be folded into only one of them"


@dataclass(frozen=True, eq=False)
class Member:
    """Where the channels of a coupling lie in one tensor: ``channel[i]`` stands at position i of the axis.

    channel: -1 where the position belongs to something else (q and k above v in a fused matrix). axis: of
    the matrix [out, in]; 0 for vectors. offset: what the network adds to a stored gain (Gemma: 1 + w).
    """

    path: str
    axis: int
    channel: Int64[Tensor, " positions"]
    offset: float = 0.0


@dataclass(frozen=True, eq=False)
class Coupling:
    """Channels that change together. ``role``, ``scales``, ``turns``, ``barrier`` as in ``core.axes``."""

    site: str
    role: str
    block: int | None
    size: int
    writers: tuple[Member, ...]
    readers: tuple[Member, ...]
    scales: bool
    turns: int = 0
    barrier: str = ""


def couplings(model: Model) -> tuple[Coupling, ...]:
    """Every coupling of a model, block by block, then the head's, then the residual stream.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=6, num_hidden_layers=1,
    ...                      num_attention_heads=4, num_key_value_heads=2)
    >>> found = couplings(Model.from_module(LlamaForCausalLM(config), None))
    >>> [(each.role, each.size) for each in found]
    [('norm', 8), ('norm', 8), ('values', 4), ('hidden', 6), ('norm', 8), ('residual', 8)]
    >>> [member.path for member in (*found[3].writers, *found[3].readers)]
    ['model.layers.0.mlp.up_proj.weight', 'model.layers.0.mlp.down_proj.weight']
    """
    family = model.map.family.name
    if family not in GATED + UNGATED:
        raise ModelError(f"{model.name}: which channels of the {family} family belong together is not known; "
                         f"known are {', '.join(GATED + UNGATED)}")
    found: list[Coupling] = []
    for index in range(model.map.blocks):
        found += _norms(model, index)
        found += _between(model, index)
    found += _head(model)
    found.append(_residual(model, found))
    return tuple(found)


def changes(model: Model, coupling: Coupling, change: Change) -> Iterator[tuple[str, Scale | Turn | Fill]]:
    """What a change of a coupling's channels does to each tensor of a language model, in the order in which
    it is to be done: before its residual stream is rotated, the gains of the norms go into their readers."""
    rotated = change.rotation is not None and coupling.turns == change.rotation.width
    if rotated and coupling.role == "residual":
        yield from folded(model)
    yield from alterations(coupling, change)


def alterations(coupling: Coupling, change: Change) -> Iterator[tuple[str, Scale | Turn | Fill]]:
    """What a change of a coupling's channels does to its writers and readers."""
    if change.factors is not None:
        if not coupling.scales:
            raise ModelError(f"{coupling.site}: channels of this group cannot have factors of their own"
                             f"{coupling.barrier and f' ({coupling.barrier})'}")
        yield from _scaled(coupling, change.factors)
    if change.rotation is not None:
        if coupling.turns != change.rotation.width:
            raise ModelError(f"{coupling.site}: a rotation of {change.rotation.width} channels does not fit "
                             f"({coupling.barrier or f'{coupling.turns} may be rotated'})")
        for member in (*coupling.writers, *coupling.readers):
            held = (member.channel >= 0).nonzero()[:, 0]
            yield member.path, Turn(member.axis, int(held[0]), int(held[-1]) + 1, change.rotation)


def _scaled(coupling: Coupling, factors: Tensor) -> Iterator[tuple[str, Scale]]:
    for members, factor in ((coupling.writers, 1 / factors), (coupling.readers, factors)):
        for member in members:
            full = torch.where(member.channel >= 0, factor[member.channel.clamp_min(0)], 1.0)
            yield member.path, Scale(member.axis, full, member.offset)


def folded(model: Model) -> Iterator[tuple[str, Scale | Fill]]:
    """Every norm's gain into its readers; then the norms commute with rotations."""
    for coupling in couplings(model):
        if coupling.role == "norm":
            gain = coupling.writers[0]
            values = model.param(gain.path) + gain.offset
            for member in coupling.readers:
                yield member.path, Scale(member.axis, values[member.channel])
            yield gain.path, Fill(1.0 - gain.offset)


# ---- the kinds of couplings

def _norms(model: Model, index: int) -> Iterator[Coupling]:
    """The norms of a block that feed matrices."""
    family, width = model.map.family, model.config.hidden_size
    for module, stem in family.vectors:
        if stem in NORMS:
            readers = [site for site in model.map.in_block(index) if site.role in NORMS[stem]]
            if any(site.role == "kv" for site in readers):  # keys and values read that, and not the norm
                readers = [site for site in readers if site.role not in ("k", "v")]
            path = f"{family.blocks}.{index}.{module}.weight"
            yield _norm(model, path, readers, index, width)


def _norm(model: Model, path: str, readers: list[Site], block: int | None, width: int) -> Coupling:
    family, all_of_it = model.map.family, torch.arange(width)
    offset = family.norm_offset if family.is_norm(path) else 0.0
    writers = [Member(path, 0, all_of_it, offset), *_bias(model.map, path, all_of_it)]
    return Coupling(path.removesuffix(".weight"), "norm", block, width, tuple(writers),
                    tuple(Member(site.path, 1, all_of_it) for site in readers), scales=True)


def _head(model: Model) -> Iterator[Coupling]:
    """The last norm and the head, unless the head is the embedding."""
    if not model.map.tied:
        path, width = f"{model.map.family.norm}.weight", model.config.hidden_size
        yield _norm(model, path, [model.map.head], None, width)


def _between(model: Model, index: int) -> Iterator[Coupling]:
    """Inside attention and inside the feed-forward part of a block."""
    sites = {site.role: site for site in model.map.in_block(index)}
    width, heads = head_width(model.config), model.config.num_attention_heads
    kept = getattr(model.config, "num_key_value_heads", None) or heads
    source = sites.get("v") or sites["qkv"]
    written = _rows(source, kept * width, first=0 if source.role == "v" else (heads + kept) * width)
    # every kept head feeds heads/kept heads of o, side by side
    read = torch.arange(kept * width).view(kept, 1, width).expand(kept, heads // kept, width).reshape(-1)
    yield Coupling(source.path.removesuffix(".weight"), "values", index, kept * width,
                   (Member(source.path, 0, written), *_bias(model.map, source.path, written)),
                   (Member(sites["o"].path, 1, read),), scales=True, turns=width)
    if model.map.family.name in GATED:
        down = sites["down"]
        size = down.shape[1]
        source = sites.get("up") or sites["gate_up"]
        written = _rows(source, size, first=source.shape[0] - size)  # fused: gate above, up below
        yield Coupling(source.path.removesuffix(".weight"), "hidden", index, size,
                       (Member(source.path, 0, written), *_bias(model.map, source.path, written)),
                       (Member(down.path, 1, torch.arange(size)),), scales=True,
                       barrier="its channels are multiplied by those of the gate one by one")


def _residual(model: Model, others: list[Coupling]) -> Coupling:
    """Everything that writes or reads the stream between the blocks."""
    family, width = model.map.family, model.config.hidden_size
    all_of_it = torch.arange(width)
    writers = [Member(site.path, 1, all_of_it) for site in model.map.sites if site.role == "embed"]
    for site in model.map.sites:
        if site.role in ("o", "down"):
            writers += [Member(site.path, 0, all_of_it), *_bias(model.map, site.path, all_of_it)]
    readers = [member for coupling in others if coupling.role == "norm" for member in coupling.readers]
    barrier = BARRIERS.get(family.name) or (_TIED + "; pass untie: true to give the head a matrix of its own"
                                            if model.map.tied else "")
    return Coupling(family.body, "residual", None, width, tuple(writers), tuple(readers), scales=False,
                    turns=0 if barrier else width, barrier=barrier)


def _rows(site: Site, size: int, first: int) -> Tensor:
    """Channels 0 .. size - 1 at the rows from ``first`` on, -1 elsewhere."""
    channel = torch.full((site.shape[0],), -1, dtype=torch.int64)
    channel[first:first + size] = torch.arange(size)
    return channel


def _bias(map: ModelMap, path: str, channel: Tensor) -> Iterator[Member]:
    """The bias that is added to what ``path`` writes, if there is one."""
    bias = path.removesuffix("weight") + "bias"
    if any(param.path == bias for param in map.params):
        yield Member(bias, 0, channel)
