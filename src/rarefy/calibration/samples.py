"""``self``: text that the model writes itself, for calibration without any data.

Tokens are drawn one by one from the model's own distribution at temperature 1 (data-free calibration,
Liu et al. 2023, LLM-QAT), many windows side by side over a cache of keys and values. Such text needs no
download, looks like what the model was trained on, and is exactly what the Fisher information averages
over. Special tokens are left out (the distribution is that of text that goes on), so BOS stands at the
front alone and no window falls apart at an end of text.

One uniform number per window and step picks the token by inverse transform: the draw is the seed's, and
costs one pass over the vocabulary. On CPUs with bfloat16 arithmetic (AMX, AVX512-BF16) the model runs in
bfloat16, elsewhere in float32; ``affordable`` says how many windows fit into a time on either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from rarefy.core.errors import DataError
from rarefy.models.model import Model, skeleton

SELF = "self"
RATE = {torch.bfloat16: 200e9, torch.float32: 90e9}  # useful operations per second and two cores, measured
CACHE_BYTES = 1 << 29  # keys and values of the windows that are written side by side


def sample_windows(model: Model, *, count: int, length: int, seed: int, dtype: torch.dtype | None = None,
                   progress: Callable[[int, int], None] | None = None) -> Int64[Tensor, "count length"]:
    """``count`` windows of ``length`` tokens that ``model`` writes; the same ones for the same seed on the
    same kind of CPU.

    dtype: what to compute in (default: ``arithmetic(model)``). progress: told (tokens done, tokens in all).
    """
    if count < 1 or length < 2:
        raise DataError(f"{count} samples of {length} tokens: ask for at least 1 of 2")
    room = getattr(model.config, "max_position_embeddings", length)
    if length > room:
        raise DataError(f"samples of {length} tokens: {model.name} has room for {room}; ask for shorter ones")
    dtype = arithmetic(model) if dtype is None else dtype
    generator = torch.Generator().manual_seed(seed)
    network, rows = materialize(model, dtype), batch_size(model, length, dtype)
    done: list[Tensor] = []

    def advance(tokens: int) -> None:
        if progress is not None:
            progress(sum(part.numel() for part in done) + tokens, count * length)

    for start in range(0, count, rows):
        done.append(_write(network, model, min(rows, count - start), length, generator, advance))
    tokens = torch.cat(done)
    if len(torch.unique(tokens, dim=0)) < count:
        raise DataError(f"{model.name}: its own samples are copies of one another, the model may be damaged; "
                        "pass calibration text instead")
    return tokens


def arithmetic(model: Model) -> torch.dtype:
    """bfloat16 where this CPU computes in it, or where float32 weights would take more than 4 GB."""
    return torch.bfloat16 if fast_bfloat16() or 4 * model.parameters > 4e9 else torch.float32


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies matrices in bfloat16 faster than in float32."""
    flags: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # older releases cannot tell
    return bool(flags.get("amx_bf16") or flags.get("avx512_bf16"))


def affordable(model: Model, *, count: int, length: int, seconds: float) -> int:
    """How many of ``count`` windows this kind of CPU writes in about ``seconds``; at least one.

    Reckoned, not timed, so that the same machine always answers the same.
    """
    rate = RATE[torch.bfloat16 if fast_bfloat16() else torch.float32] * min(torch.get_num_threads(), 16) / 2
    embed = 0 if model.map.tied else math.prod(model.map.sites[0].shape)
    return max(1, min(count, int(seconds * rate / (2 * (model.parameters - embed) * length))))


def batch_size(model: Model, length: int, dtype: torch.dtype) -> int:
    """How many windows to write side by side, by the memory that their keys and values take."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each: int = 2 * model.map.blocks * heads * width * length * dtype.itemsize
    return max(1, CACHE_BYTES // each)


def materialize(model: Model, dtype: torch.dtype) -> Any:
    """The transformers network of ``model``, every weight from the model, none initialised."""
    network = skeleton(model.config)
    own = {site.path: site.transposed for site in model.map.sites}
    state = {}
    for name, _ in network.named_parameters():  # names a tied matrix once
        whole = model.weight(name) if name in own else model.param(name)
        values = (whole.T if own.get(name) else whole).to(dtype)
        state[name] = values.contiguous()
    for name, values in state.items():
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, nn.Parameter(values, requires_grad=False))
    network.tie_weights()
    return network


def opening_token(model: Model, generator: torch.Generator, rows: int) -> Int64[Tensor, " rows"]:
    """What each sample begins with: BOS; else the token that separates texts; else any ordinary token."""
    tokenizer = model.tokenizer
    for token in (tokenizer.bos_token_id, model.config.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return torch.full((rows,), int(token))
    ordinary = torch.tensor(sorted(set(range(_vocabulary(model))) - set(_forbidden(model))))
    return ordinary[torch.randint(len(ordinary), (rows,), generator=generator)]


@torch.inference_mode()
def _write(network: Any, model: Model, rows: int, length: int, generator: torch.Generator,
           advance: Callable[[int], None]) -> Int64[Tensor, "rows length"]:
    body, head = network.base_model, network.get_output_embeddings().weight
    cap = getattr(model.config, "final_logit_softcapping", None)
    cache = Cache(layers=[_Slots(length) for _ in range(model.map.blocks)])
    tokens = torch.empty(rows, length, dtype=torch.int64)
    tokens[:, 0] = opening_token(model, generator, rows)
    draw = _Draw(rows, head.shape[0], torch.tensor(_forbidden(model), dtype=torch.int64))
    for at in range(1, length):
        hidden = body(input_ids=tokens[:, at - 1:at], past_key_values=cache, use_cache=True)[0]
        logits = head @ hidden[:, 0].T  # this way round the large matrix needs no repacking: a third faster
        uniform = torch.rand(rows, dtype=torch.float64, generator=generator)
        tokens[:, at] = draw(logits if cap is None else torch.tanh(logits / cap) * cap, uniform)
        advance(rows * (at + 1))
    return tokens


class _Draw:
    """Tokens by inverse transform over two levels: blocks of the vocabulary, then tokens in the block."""

    def __init__(self, rows: int, vocabulary: int, forbidden: Tensor) -> None:
        self.side = math.isqrt(vocabulary - 1) + 1
        self.vocabulary, self.forbidden = vocabulary, forbidden
        self.mass = torch.empty(self.side * self.side, rows)

    def __call__(self, logits: Float[Tensor, "vocabulary rows"], uniform: Float64[Tensor, " rows"]
                 ) -> Int64[Tensor, " rows"]:
        self.mass[:self.vocabulary] = logits
        self.mass[self.vocabulary:] = -math.inf
        self.mass.index_fill_(0, self.forbidden, -math.inf)
        blocks = self.mass.view(self.side, self.side, -1)
        self.mass.sub_(blocks.amax(0).amax(0)).exp_()
        upto = blocks.sum(1).T.double().cumsum(1)
        goal = uniform[:, None] * upto[:, -1:]
        block = _first_above(upto, goal)
        before = torch.where(block > 0, upto.gather(1, (block - 1).clamp_(min=0)), 0.0)
        inside = blocks[block[:, 0], :, torch.arange(len(uniform))].double().cumsum(1)
        return (block * self.side + _first_above(inside, goal - before))[:, 0]


def _first_above(sums: Float64[Tensor, "rows n"], goal: Float64[Tensor, "rows 1"]) -> Int64[Tensor, "rows 1"]:
    """The first entry whose running sum exceeds the goal, and never one of no mass: rounding may carry the
    goal to the very end."""
    last = (sums < sums[:, -1:]).sum(1, keepdim=True)
    return torch.minimum(torch.searchsorted(sums, goal, right=True), last)


class _Slots(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer in memory set aside once: growing by concatenation copies them all
    at every token. Sliding windows keep every position and leave the mask to forget."""

    is_sliding = False

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.filled = length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, width = key_states.shape
        self.keys = key_states.new_empty(batch, heads, self.length, width)
        self.values = value_states.new_empty(batch, heads, self.length, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
               ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        start, self.filled = self.filled, self.filled + key_states.shape[-2]
        self.keys[:, :, start:self.filled] = key_states
        self.values[:, :, start:self.filled] = value_states
        return self.keys[:, :, :self.filled], self.values[:, :, :self.filled]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled + query_length, 0

    def get_seq_length(self) -> int:
        return self.filled

    def get_max_length(self) -> int:
        return self.length


def _vocabulary(model: Model) -> int:
    """Tokens that both the tokenizer and the embedding know."""
    return min(len(model.tokenizer), model.map.sites[0].shape[0])


def _forbidden(model: Model) -> list[int]:
    """Special tokens, and rows of the head that stand for no token."""
    tokenizer = model.tokenizer
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    rows = model.map.head.shape[0]
    return sorted({index for index in special if index < rows} | set(range(len(tokenizer), rows)))
