"""The runner: a network one block at a time, in float32, with any weight replaced on the way.

Compression looks at one block, changes it, and moves on with what the changed block computes; the whole
network in float32 never needs to exist. Blocks are transformers' own modules laid out on the meta device
and called with real tensors (``torch.func.functional_call``); their masks, rotary embeddings and scales
are recorded from transformers' own forward pass (``stem``), so every family is numerically itself.

The embedding lookup reads only the rows of the tokens at hand, and ``logits`` goes through the head in
slabs of rows: at no time is the vocabulary's matrix converted whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rarefy.core.errors import ModelError
from rarefy.core.nodes import Node
from rarefy.models.hooks import hooked
from rarefy.models.model import Model, skeleton

Override = Callable[[str], "Tensor | Node | None"]
Observer = Callable[[str, Tensor, Tensor], None]
_SLAB = 1 << 20  # numbers of the head that are float32 at a time: what a core keeps in its cache


@dataclass(frozen=True, eq=False)
class Context:
    """What each block is called with besides the hidden state: masks, positions, rotary embeddings."""

    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]


class Runner:
    """Runs ``model`` block by block.

    weight: asked for every site and param; a tensor or node (sites as [out, in]) replaces the model's own,
    None leaves it. It is asked again at every call, so what it answers may change between calls; only
    the model's own tensors are remembered, for one block.
    """

    def __init__(self, model: Model, weight: Override | None = None) -> None:
        self.model = model
        self._weight: Override = weight if weight is not None else lambda path: None
        family = model.map.family
        network = skeleton(model.config)
        self._body = network.get_submodule(family.body)
        self._layers = list(network.get_submodule(family.blocks))
        self._norm = network.get_submodule(family.norm)
        self._embed = network.get_submodule(family.embed)
        self._embed.padding_idx = None  # matters to gradients only, and must be below the rows of the lookup
        self._recorders = [_Recorder() for _ in self._layers]
        _replace(network, family.blocks, nn.ModuleList(self._recorders))
        _replace(network, family.norm, nn.Identity())
        _replace(network, family.embed, nn.Identity())
        self._held: tuple[int, dict[str, Tensor]] = (-1, {})

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self._layers)

    @property
    def embedding_scale(self) -> float:
        """What a row of the embedding is multiplied by on the way in (Gemma: the root of the width)."""
        one = functional_call(self._embed, {"weight": torch.ones(1, 1)}, (torch.zeros(1, dtype=torch.int64),))
        return float(one)

    def stem(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Context]:
        """Tokens [batch, length] (mask: True where they are real) to the first block's input."""
        site = next(site for site in self.model.map.sites if site.role == "embed")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= site.shape[0]:
            token = low if low < 0 else high
            raise ModelError(f"{self.model.name}: token {token} has no row in the embedding of "
                             f"{site.shape[0]}; these tokens come from another tokenizer")
        used, compact = torch.unique(tokens, return_inverse=True)
        embedded = functional_call(self._embed, {"weight": self._rows(site.path, used)}, (compact,))
        prefix = self.model.map.family.body + "."
        own = {name: self._tensor(prefix + name) for name, _ in self._body.named_parameters()}
        for recorder in self._recorders:
            recorder.call = None
        attention = None if mask is None else mask.to(torch.int64)
        out = functional_call(self._body, own, (), {
            "inputs_embeds": embedded, "attention_mask": attention, "use_cache": False})
        calls = tuple(recorder.call for recorder in self._recorders if recorder.call is not None)
        return out.last_hidden_state, Context(calls)

    def load(self, index: int) -> dict[str, Tensor]:
        """The tensors of one block, overrides applied, by their names inside the block.

        Pass them to ``block`` to ask the overrides once for many batches.
        """
        held, own = self._held
        if held != index:
            own = {}
        prefix = f"{self.model.map.family.blocks}.{index}."
        tensors = {}
        for name, _ in self._layers[index].named_parameters():
            override = self._override(prefix + name)
            if override is None:
                if name not in own:
                    own[name] = self._own(prefix + name)
                override = own[name]
            tensors[name] = override
        self._held = (index, own)
        return tensors

    def block(self, index: int, hidden: Tensor, context: Context, observe: Observer | None = None,
              tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """One block. ``observe`` is called with (path, input, output) of every site in it."""
        tensors = self.load(index) if tensors is None else tensors
        args, kwargs = context.calls[index]
        with self._observed(index, observe):
            out = functional_call(self._layers[index], dict(tensors), (hidden, *args), kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm."""
        prefix = self.model.map.family.norm + "."
        own = {name: self._tensor(prefix + name) for name, _ in self._norm.named_parameters()}
        normed: Tensor = functional_call(self._norm, own, (hidden,))
        return normed

    def logits(self, normed: Tensor) -> Tensor:
        """Logits over the vocabulary, [.., vocabulary] float32, from final-normed hidden states."""
        site = self.model.map.head
        step = max(1, _SLAB // site.shape[1])
        override = self._weight(site.path)
        slabs = [slice(start, min(start + step, site.shape[0])) for start in range(0, site.shape[0], step)]
        if torch.is_grad_enabled():
            logits = torch.cat([normed @ self._rows(site.path, slab, override).T for slab in slabs], -1)
        else:  # the same, without holding the logits twice
            logits = normed.new_empty(*normed.shape[:-1], site.shape[0])
            for slab in slabs:
                logits[..., slab] = normed @ self._rows(site.path, slab, override).T
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def pull_logits(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient at the final-normed states, [.., width], of a gradient at their ``logits``.

        What autograd would compute, without keeping the head in float32 for its backward pass.
        """
        site = self.model.map.head
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        if cap is not None:
            gradient = gradient * (1 - (logits / cap).square())
        step = max(1, _SLAB // site.shape[1])
        override = self._weight(site.path)
        pull = gradient.new_zeros(*gradient.shape[:-1], site.shape[1])
        for start in range(0, site.shape[0], step):
            slab = slice(start, min(start + step, site.shape[0]))
            pull += gradient[..., slab] @ self._rows(site.path, slab, override)
        return pull

    def _override(self, path: str) -> Tensor | None:
        """What replaces ``path``, as the file orders it."""
        value = self._weight(path)
        if value is None:
            return None
        values = value.dense() if isinstance(value, Node) else value
        site = self.model.map.by_path.get(path)
        return values.T if site is not None and site.transposed else values

    def _own(self, path: str) -> Tensor:
        return self.model.source.read(path).float()

    def _tensor(self, path: str) -> Tensor:
        override = self._override(path)
        return self._own(path) if override is None else override

    def _rows(self, path: str, index: slice | Tensor, override: Tensor | Node | None = None) -> Tensor:
        """Rows of the embedding or head, float32, converting no others."""
        override = self._weight(path) if override is None else override
        match override:
            case None:
                return self.model.rows(path, index)
            case Node():
                rows = torch.arange(override.shape[0])[index] if isinstance(index, slice) else index
                return override.rows(rows)
            case _:
                return override[index].float()

    @contextmanager
    def _observed(self, index: int, observe: Observer | None) -> Iterator[None]:
        """Temporary hooks on the matrices of a block; none is left behind."""
        if observe is None:
            yield
            return
        block, prefix = self._layers[index], f"{self.model.map.family.blocks}.{index}."
        names = {site.path: site.path.removeprefix(prefix).removesuffix(".weight")
                 for site in self.model.map.in_block(index)}
        with hooked((block.get_submodule(name), _hook(observe, path)) for path, name in names.items()):
            yield


class _Recorder(nn.Module):
    """Stands where a block stood and keeps what it is called with."""

    call: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.call = (args, kwargs)
        return hidden


def _hook(observe: Observer, path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def call(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        observe(path, inputs[0], output)

    return call


def _replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)
