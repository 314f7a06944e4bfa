"""Attention whose keys and values are made of one latent a token, which is all that a cache holds.

With R [rank, in] (``kv_proj``) and U_k, U_v [heads * width, rank] (``k_proj``, ``v_proj``),

    c_t = R x_t,    k_t = turn_t(norm(U_k c_t + b_k)),    v_t = U_v c_t + b_v.

``rarefy_latent`` in a configuration lists the rank of every block; networks that are laid out from it have
attention as it stands here, whatever the family, and every other part as transformers makes it. A cache is
any of transformers', or ``runtimes.memory``'s: it is handed the latent in two halves, as keys and values, and
rounds or forgets them as it would those. Keys of what it remembers are made anew at every call. Values need
not be: sum_t a_t (U_v c_t + b_v) = U_v (sum_t a_t c_t) + b_v, so where fewer queries than tokens are at hand,
attention sums latents, and U_v comes behind it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rarefy.core.errors import ModelError
from rarefy.core.structure import KeyValues
from rarefy.models.attending import LATENT, NAME, attention_parts
from rarefy.models.sources import Source

if TYPE_CHECKING:
    from rarefy.models.model import Model

Factors = tuple[Float[Tensor, "rows rank"], Float[Tensor, "rank in_"]]


@runtime_checkable
class Forgetting(Protocol):
    """A cache that may have forgotten tokens in between, and tells the positions of those it has."""

    def places(self, block: int) -> Tensor: ...


class LatentAttention(nn.Module):
    """In the place of a block's attention. What it keeps of that has the names that it had."""

    def __init__(self, part: Any, rank: int, rotary: nn.Module) -> None:
        super().__init__()
        self.config, self.layer_idx = part.config, part.layer_idx
        self.head_dim, self.scaling, self.is_causal = part.head_dim, part.scaling, part.is_causal
        self.num_key_value_groups, self.dropout = part.num_key_value_groups, part.attention_dropout
        self.sliding_window = getattr(part, "sliding_window", None)
        self.turns = getattr(part, "use_rope", True)
        self.kind = (part.layer_type,) if isinstance(getattr(rotary, "rope_type", ""), dict) else ()
        home = sys.modules[type(part).__module__]
        self._turn, self._eager = home.apply_rotary_pos_emb, home.eager_attention_forward
        self.rotary = rotary
        self.q_proj, self.o_proj = part.q_proj, part.o_proj
        self.q_norm, self.k_norm = (getattr(part, name, nn.Identity()) for name in ("q_norm", "k_norm"))
        like: Any = {"device": part.k_proj.weight.device, "dtype": part.k_proj.weight.dtype}
        self.kv_proj = nn.Linear(part.k_proj.in_features, rank, bias=False, **like)
        self.k_proj, self.v_proj = (
            nn.Linear(rank, old.out_features, bias=old.bias is not None, **like)
            for old in (part.k_proj, part.v_proj))

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor],
                attention_mask: Tensor | None = None, past_key_values: Any = None,
                position_ids: Tensor | None = None, **rest: Any) -> tuple[Tensor, Tensor | None]:
        """As transformers calls it: states [batch, n, in] to the same, and where attention went."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        latent, turns = self.kv_proj(hidden_states), position_embeddings
        if past_key_values is not None:
            latent, turns = self._remembered(latent, turns, past_key_values, position_ids)
        query = self.q_norm(self._heads(self.q_proj(hidden_states)))
        key = self.k_norm(self._heads(self.k_proj(latent)))
        behind = self._values_behind(query, key)
        value = (latent[:, None].expand(-1, key.shape[1], -1, -1) if behind
                 else self._heads(self.v_proj(latent)))
        if self.turns:
            query = self._turn(query, query, *position_embeddings)[0]
            key = self._turn(key, key, *turns)[0]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self._eager)
        out, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling,
                              dropout=self.dropout if self.training else 0.0,
                              sliding_window=self.sliding_window, **rest)
        return self.o_proj((self._values(out) if behind else out).flatten(2)), weights

    def _remembered(self, latent: Tensor, turns: tuple[Tensor, Tensor], past: Any,
                    positions: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The latents of all tokens that the cache has, these among them, and their rotary embeddings."""
        new, half = latent.shape[1], latent.shape[2] // 2
        old = past.places(self.layer_idx) if isinstance(past, Forgetting) else None
        found = past.update(latent[:, None, :, :half], latent[:, None, :, half:], self.layer_idx)
        latent = torch.cat([each[:, 0] for each in found], -1)
        if latent.shape[1] == new:
            return latent, turns
        assert positions is not None  # transformers' models tell their blocks
        if old is None:
            places = positions[:, -1:] - torch.arange(latent.shape[1] - 1, -1, -1)
        else:
            places = torch.cat([old.expand(len(positions), -1), positions], 1)
        return latent, self.rotary(latent, places, *self.kind)

    def _values_behind(self, query: Tensor, key: Tensor) -> bool:
        """Whether U_v is cheaper behind the sum; our own attention wants values as wide as keys."""
        fewer = query.shape[1] * query.shape[2] < key.shape[1] * key.shape[2]
        return fewer and type(self.v_proj) is nn.Linear and self.config._attn_implementation != NAME

    def _values(self, sums: Tensor) -> Tensor:
        """Sums of latents [batch, n, heads, rank] as sums of values [batch, n, heads, width]."""
        up = self.v_proj.weight.unflatten(0, (-1, self.head_dim))  # [groups, width, rank]
        values = torch.einsum("bngsr,gwr->bngsw", sums.unflatten(2, (len(up), -1)), up)
        if self.v_proj.bias is not None:
            values = values + self.v_proj.bias.unflatten(0, (len(up), 1, -1))
        return values.flatten(2, 3)

    def _heads(self, values: Tensor) -> Tensor:
        return values.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def remembering(network: Any) -> Any:
    """The network, with the latents that its configuration asks for; changed in place."""
    ranks = getattr(network.config, LATENT, None)
    if ranks is None:
        return network
    parts = attention_parts(network)
    if len(ranks) != len(parts) or not all(isinstance(rank, int) and rank > 1 and rank % 2 == 0
                                           for rank in ranks):
        raise ModelError(f"{LATENT} {ranks}: must be an even number for each of {len(parts)} blocks; the "
                         "folder is damaged or of another version")
    rotary = next((part for part in network.modules()
                   if type(part).__name__.endswith("RotaryEmbedding")), None)
    if rotary is None or not all(hasattr(part, "k_proj") for part in parts):
        raise ModelError(f"{type(network).__name__}: keeps queries, keys and values in one matrix; its keys "
                         "and values have no latent")
    made = {id(part): LatentAttention(part, rank, rotary) for part, rank in zip(parts, ranks, strict=True)}
    for owner in list(network.modules()):
        for name, part in list(owner.named_children()):
            if id(part) in made:
                setattr(owner, name, made[id(part)])
    return network


def key_values(model: Model, block: int) -> KeyValues:
    """The rows of keys and values of a block; ModelError where there are none of their own."""
    sites = {site.role: site for site in model.map.in_block(block)}
    if "k" not in sites or model.map.family.transposed:
        raise ModelError(f"{model.name}: the {model.map.family.name} family keeps queries, keys and values "
                         "in one matrix; its keys and values have no latent")
    if "kv" in sites:
        raise ModelError(f"{model.name}: its keys and values are made of a latent already; start from the "
                         "original")
    weight = torch.cat([model.weight(sites[role].path) for role in ("k", "v")])
    return KeyValues(sites["k"].path, block, weight)


def with_latents(model: Model, factors: Mapping[int, Factors]) -> Model:
    """The model whose keys and values are these factors, one pair for every block."""
    from rarefy.models.model import Model  # which lays out by what stands here

    replaced: dict[str, Tensor] = {}
    for block, (up, down) in factors.items():
        sites = {site.role: site for site in model.map.in_block(block)}
        key, value = sites["k"].path, sites["v"].path
        replaced[key], replaced[value] = up.split([sites["k"].shape[0], sites["v"].shape[0]])
        replaced[key.replace("k_proj", "kv_proj")] = down
    config = copy.deepcopy(model.config)
    setattr(config, LATENT, [factors[block][1].shape[0] for block in range(model.map.blocks)])
    return Model(model.name, model.map.family, config, LatentSource(model.source, replaced),
                 lambda: model.tokenizer)


class LatentSource(Source):
    """The tensors of another source, and in the place of some of them, or beside them, others."""

    def __init__(self, inner: Source, replaced: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.inner, self._replaced = inner, dict(replaced)

    def names(self) -> tuple[str, ...]:
        return (*self.inner.names(), *(name for name in self._replaced if name not in self.inner.names()))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._replaced[name].shape) if name in self._replaced else self.inner.shape(name)

    def dtype(self, name: str) -> str:
        return "float32" if name in self._replaced else self.inner.dtype(name)

    def files(self) -> tuple[Path, ...]:
        return self.inner.files()

    def _rows(self, name: str, index: slice | Tensor) -> Tensor:
        return self._replaced[name][index] if name in self._replaced else self.inner.rows(name, index)
