"""Networks whose attention a technique computes: the configuration says it, and laying out obeys.

``rarefy_attention`` in a configuration names a technique, its settings and the blocks; every network that
is laid out from such a configuration has a part ``attending`` in the attention of these blocks, which
computes it and holds what it learns. So a folder of the native format keeps it, and runners, surveys and
training need not know. transformers hands queries, keys and values to whatever function a configuration names
(``AttentionInterface``), and only says which tokens are padding: masks of length squared are never made.

Blocks with a sliding window of their own (Gemma, Mistral) keep it, by the kernel that skips what is outside.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy.techniques.attention as attentions
from rarefy.core.attention import Attending, Attention
from rarefy.core.errors import ModelError
from rarefy.models.families import head_width, window_of
from rarefy.models.sources import ModuleSource
from rarefy.numerics.attention import softmax_attention
from rarefy.techniques.attention.window import Window

if TYPE_CHECKING:
    from rarefy.models.model import Model
    from rarefy.models.network import Network

NAME = "rarefy"             # of our function among transformers'
KEY = "rarefy_attention"    # in a configuration
LATENT = "rarefy_latent"    # ... that makes keys and values of one latent a token (models.latent)
SEED = 0                    # of what random features start as


class Attends(nn.Module):
    """The attention of one block: a technique, and the block's own tensors for it."""

    def __init__(self, technique: Attending, width: int, block: int) -> None:
        super().__init__()
        self.technique = technique
        made = technique.learned(width, torch.Generator().manual_seed(SEED + block))
        for name, values in made.items():
            self.register_parameter(name, nn.Parameter(values, requires_grad=False))

    def forward(self, call: Attention) -> Tensor:
        return self.technique.attend(call, dict(self.named_parameters()))


def saying(config: Any, name: str, technique: Attending) -> Any:
    """A configuration that says it. name: the technique's file."""
    found = copy.deepcopy(config)
    setattr(found, KEY, {"technique": name, "settings": asdict(technique)})  # type: ignore[call-overload]
    return found


def said(config: Any) -> str:
    """What makes the attention of a configuration no ordinary one; empty: nothing."""
    return _named(config) or ("latent" if getattr(config, LATENT, None) is not None else "")


def _named(config: Any) -> str:
    """The technique that a configuration names; empty: none."""
    found = getattr(config, KEY, None)
    return str(found["technique"]) if isinstance(found, Mapping) and "technique" in found else ""


def obeyed(network: Any) -> Any:
    """The network, with the attention that its configuration names; changed in place."""
    if not _named(network.config):
        return network
    technique = _technique(network.config)
    parts = attention_parts(network)
    chosen = technique.blocks or tuple(block for block in range(len(parts))
                                       if window_of(network.config, block) is None)
    if not chosen:
        raise ModelError(f"{said(network.config)}: every block has a window of its own already; name blocks")
    wrong = [block for block in chosen if not 0 <= block < len(parts)]
    if wrong:
        raise ModelError(f"blocks {wrong}: there are only 0 to {len(parts) - 1}")
    for block in chosen:
        if parts[block].is_causal and not technique.both:
            raise ModelError(f"{said(network.config)}: is for encoders; its sums know no order, and this "
                             "network writes text from left to right")
        parts[block].attending = Attends(technique, head_width(network.config), block)
    _register()
    for part in parts:
        part.config._attn_implementation = NAME
    network.config._attn_implementation = NAME
    return network


def attention_parts(network: nn.Module) -> list[Any]:
    """The modules that compute attention, one for each block, or ModelError."""
    parts: list[Any] = [part for part in network.modules()
                        if isinstance(getattr(part, "is_causal", None), bool) and hasattr(part, "config")
                        and hasattr(part, "scaling")]
    config: Any = getattr(network, "config", None)
    if len(parts) != getattr(config, "num_hidden_layers", -1):
        raise ModelError(f"{type(network).__name__}: its attention cannot be exchanged: {len(parts)} parts "
                         f"compute it in {getattr(config, 'num_hidden_layers', 'no')} blocks")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ModelError(f"{type(network).__name__}: caps its attention scores, which no other attention "
                         "does")
    return parts


def attending(model: Model | Network, name: str, technique: Attending) -> Model | Network:
    """The same weights with that attention. name: the technique's file."""
    from rarefy.models.model import Model  # which lay out by what stands here
    from rarefy.models.network import Network

    config = saying(model.config, name, technique)
    if isinstance(model, Model):
        return Model(model.name, model.map.family, config, model.source, lambda: model.tokenizer)
    if model.config is None:
        raise ModelError(f"{model.name}: only transformers' networks say which attention they have")
    module: Any = copy.deepcopy(model.module)
    setattr(module.config, KEY, getattr(config, KEY))
    module = obeyed(module).eval().requires_grad_(False)
    return Network(model.name, module, ModuleSource(module), model.form, config=module.config,
                   files=model.files, tokenizer=lambda: model.tokenizer)


def _technique(config: Any) -> Attending:
    """The technique that a configuration names: one of our own files, whatever a folder says."""
    plain = getattr(config, KEY)
    name, settings = plain["technique"], plain.get("settings", {})
    if name not in {info.name for info in pkgutil.iter_modules(attentions.__path__)}:
        raise ModelError(f"{KEY}: technique {name!r} is unknown; the folder is damaged or of another version")
    module = importlib.import_module(f"{attentions.__name__}.{name}")
    kinds: list[Any] = [value for value in vars(module).values() if isinstance(value, type)
                        and value.__module__ == module.__name__ and hasattr(value, "attend")]
    try:
        found: Attending = kinds[0](**{key: tuple(value) if isinstance(value, list) else value
                                       for key, value in settings.items()})
    except (TypeError, IndexError) as error:
        raise ModelError(f"{KEY}: settings of {name} are wrong ({error}); the folder is damaged or of "
                         "another version") from None
    return found


# ---- what transformers calls

def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _padding)


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
               scaling: float | None = None, sliding_window: int | None = None, **rest: Any
               ) -> tuple[Tensor, None]:
    """In transformers' way: queries [batch, heads, n, width] to [batch, n, heads, width]."""
    scale = query.shape[-1]**-0.5 if scaling is None else scaling
    call = Attention(query, key, value, scale, bool(module.is_causal), _real(attention_mask))
    own = getattr(module, "attending", None)
    if own is not None:
        out = own(call)
    elif sliding_window is not None:
        out = Window(sliding_window, sinks=0).attend(call, {})
    else:
        out = whole(call)
    return out.transpose(1, 2).contiguous(), None


def whole(call: Attention) -> Tensor:
    """Attention to everything."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    if call.real is None and (queries == 1 or not call.offset):  # then no mask is needed
        return F.scaled_dot_product_attention(call.query, call.key, call.value, scale=call.scale,
                                              is_causal=call.causal and queries > 1, enable_gqa=True)
    seen = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    if call.causal:
        seen = seen.tril(call.offset)
    if call.real is not None:
        seen = seen & call.real[:, None, None]
    return softmax_attention(call.query, call.key, call.value, seen, call.scale)


def _padding(*args: Any, kv_length: int, attention_mask: Tensor | None = None, **rest: Any) -> Tensor | None:
    """Which tokens are real, [batch, keys]; None: all."""
    if attention_mask is None:
        return None
    real = attention_mask[:, -kv_length:].bool()
    return None if bool(real.all()) else real


def _real(mask: Tensor | None) -> Tensor | None:
    """The same from whatever mask a block was called with: what no query sees is padding."""
    if mask is None or mask.ndim == 2:
        return mask if mask is None else mask.bool()
    seen = mask if mask.dtype == torch.bool else mask == 0
    return seen.any(2).any(1)
