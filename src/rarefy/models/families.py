"""Families: where each architecture keeps its matrices, as data.

A decoder-only transformer is an embedding, a list of blocks, a final norm and a head. Families differ
in the names of these parts, in the role each matrix plays, and in how llama.cpp's GGUF files name and
store them; nothing here computes. Two facts of GGUF are worth a word. Llama-type files hold the rows
of q and k in the order of interleaved rotary pairs (``row_order``), Hugging Face in halves. Gemma's
norms multiply by ``1 + w``, and its GGUF files hold ``1 + w`` (``norm_offset``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from rarefy.core.errors import ModelError, did_you_mean


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of a block: its module inside the block, its role, and its stem in GGUF."""

    module: str
    role: str
    gguf: str


@dataclass(frozen=True)
class Family:
    """One row of the table.

    blocks, embed, norm, head: module paths of the causal language model in transformers. vectors: the
    modules of a block (norms) that hold no matrix, with their GGUF stems. tables: further lookup tables
    outside the blocks (learnt positions). transposed: matrices are stored [in, out] (``Conv1D``).
    wrapper: the model type whose config holds this family's as ``text_config`` (language and vision).
    prefixes: how names found in checkpoints become the names of transformers, first match wins.
    ignored: names in checkpoints that are no weights of the language model (old buffers, vision towers).
    """

    name: str
    model_types: tuple[str, ...]
    gguf: str
    matrices: tuple[Matrix, ...]
    vectors: tuple[tuple[str, str], ...]
    blocks: str = "model.layers"
    embed: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    tables: tuple[tuple[str, str], ...] = ()
    transposed: bool = False
    permuted: bool = False
    norm_offset: float = 0.0
    wrapper: str = ""
    prefixes: tuple[tuple[str, str], ...] = (("", ""),)
    ignored: str = r".*\.rotary_emb\.inv_freq"

    @property
    def body(self) -> str:
        """Module path of the network without its head (``model`` or ``transformer``)."""
        return self.blocks.rpartition(".")[0]

    def matrix(self, path: str) -> Matrix | None:
        """The row of the matrix at state-dict name ``path``, if it is a matrix of a block."""
        inside = self.inside(path)
        if inside is None or not inside[1].endswith(".weight"):
            return None
        module = inside[1].removesuffix(".weight")
        return next((m for m in self.matrices if m.module == module), None)

    def inside(self, path: str) -> tuple[int, str] | None:
        """``model.layers.3.mlp.up_proj.weight`` -> ``(3, "mlp.up_proj.weight")``; None outside the blocks."""
        match = re.fullmatch(re.escape(self.blocks) + r"\.(\d+)\.(.+)", path)
        return (int(match[1]), match[2]) if match else None

    def canonical(self, name: str) -> str | None:
        """The transformers name of a checkpoint's ``name``; None when it is to be ignored."""
        if re.fullmatch(self.ignored, name):
            return None
        for old, new in self.prefixes:
            if name.startswith(old):
                return new + name[len(old):]
        return name

    def gguf_name(self, path: str) -> str:
        """The GGUF tensor name of the state-dict name ``path``."""
        module, _, kind = path.rpartition(".")
        inside = self.inside(path)
        if inside is None:
            return f"{dict(self._outside())[module]}.{kind}"
        stems = {m.module: m.gguf for m in self.matrices} | dict(self.vectors)
        return f"blk.{inside[0]}.{stems[inside[1].rpartition('.')[0]]}.{kind}"

    def path_of(self, name: str) -> str | None:
        """The state-dict name of the GGUF tensor ``name``; None when this family has no such tensor."""
        stem, _, kind = name.rpartition(".")
        modules = {gguf: module for module, gguf in self._outside()}
        block = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
        if block:
            inside = {m.gguf: m.module for m in self.matrices} | {stem: name for name, stem in self.vectors}
            return f"{self.blocks}.{block[1]}.{inside[block[2]]}.{kind}" if block[2] in inside else None
        return f"{modules[stem]}.{kind}" if stem in modules else None

    def _outside(self) -> tuple[tuple[str, str], ...]:
        return ((self.embed, "token_embd"), (self.norm, "output_norm"), (self.head, "output"), *self.tables)

    def is_norm(self, path: str) -> bool:
        """Whether ``path`` is the gain of a norm (what ``norm_offset`` applies to)."""
        module = path.removesuffix(".weight")
        inside = self.inside(path)
        return path.endswith(".weight") and (module == self.norm or (
            inside is not None and inside[1].removesuffix(".weight") in dict(self.vectors)))

    def row_order(self, path: str, config: Any) -> list[int] | None:
        """``order`` such that GGUF row i of ``path`` is Hugging Face row ``order[i]``; None: the same order.

        Within each head of width d, Hugging Face rotates the pair (j, j + d/2), Llama-type GGUF (2j, 2j+1).
        """
        inside = self.inside(path)
        if not self.permuted or inside is None:
            return None
        role = {m.module: m.role for m in self.matrices}.get(inside[1].rpartition(".")[0])
        if role not in ("q", "k"):
            return None
        heads = config.num_attention_heads if role == "q" else config.num_key_value_heads
        half = head_width(config) // 2
        return [head * 2 * half + part * half + j
                for head in range(heads) for j in range(half) for part in range(2)]


def block_widths(config: Any) -> list[int] | None:
    """Neurons of every block, where they differ; the network then has as many in each as the widest, the
    others zero."""
    widths: list[int] | None = getattr(config, "block_neurons", None)
    return widths


def head_width(config: Any) -> int:
    """Channels of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def window_of(config: Any, block: int) -> int | None:
    """How many tokens a block looks back (None: to the beginning)."""
    kinds = getattr(config, "layer_types", None)
    window: int | None = getattr(config, "sliding_window", None)
    return None if kinds is not None and kinds[block] != "sliding_attention" else window


_ATTENTION = (Matrix("self_attn.q_proj", "q", "attn_q"), Matrix("self_attn.k_proj", "k", "attn_k"),
              Matrix("self_attn.v_proj", "v", "attn_v"), Matrix("self_attn.o_proj", "o", "attn_output"),
              Matrix("self_attn.kv_proj", "kv", "attn_kv"))  # the latent, where they have one
_MLP = (Matrix("mlp.gate_proj", "gate", "ffn_gate"), Matrix("mlp.up_proj", "up", "ffn_up"),
        Matrix("mlp.down_proj", "down", "ffn_down"))
_NORMS = (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"))
_HEAD_NORMS = (("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm"))
_GEMMA_NORMS = (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "post_attention_norm"),
                ("pre_feedforward_layernorm", "ffn_norm"), ("post_feedforward_layernorm", "post_ffw_norm"))

FAMILIES = (
    Family("llama", ("llama",), "llama", _ATTENTION + _MLP, _NORMS, permuted=True),
    Family("mistral", ("mistral",), "llama", _ATTENTION + _MLP, _NORMS, permuted=True),
    Family("qwen2", ("qwen2",), "qwen2", _ATTENTION + _MLP, _NORMS),
    Family("qwen3", ("qwen3",), "qwen3", _ATTENTION + _MLP, _NORMS + _HEAD_NORMS),
    Family("gemma2", ("gemma2",), "gemma2", _ATTENTION + _MLP, _GEMMA_NORMS, norm_offset=1.0),
    Family("gemma3", ("gemma3_text", "gemma3"), "gemma3", _ATTENTION + _MLP, _GEMMA_NORMS + _HEAD_NORMS,
           norm_offset=1.0, wrapper="gemma3",
           prefixes=(("language_model.", ""), ("model.language_model.", "model."), ("", "")),
           ignored=r".*\.rotary_emb\.inv_freq|(model\.)?(vision_tower|multi_modal_projector)\..*"),
    Family("phi3", ("phi3",), "phi3",
           (Matrix("self_attn.qkv_proj", "qkv", "attn_qkv"), Matrix("self_attn.o_proj", "o", "attn_output"),
            Matrix("mlp.gate_up_proj", "gate_up", "ffn_up"), Matrix("mlp.down_proj", "down", "ffn_down")),
           _NORMS),
    Family("smollm3", ("smollm3",), "smollm3", _ATTENTION + _MLP, _NORMS, permuted=True),
    Family("gpt2", ("gpt2",), "gpt2",
           (Matrix("attn.c_attn", "qkv", "attn_qkv"), Matrix("attn.c_proj", "o", "attn_output"),
            Matrix("mlp.c_fc", "up", "ffn_up"), Matrix("mlp.c_proj", "down", "ffn_down")),
           (("ln_1", "attn_norm"), ("ln_2", "ffn_norm")),
           blocks="transformer.h", embed="transformer.wte", norm="transformer.ln_f",
           tables=(("transformer.wpe", "position_embd"),), transposed=True,
           prefixes=(("transformer.", "transformer."), ("lm_head.", "lm_head."), ("", "transformer.")),
           ignored=r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"),
    # Llama whose blocks have widths of their own: a view or a file, no model type of transformers
    Family("deci", (), "deci", _ATTENTION + _MLP, _NORMS, permuted=True),
)
PER_BLOCK_WIDTHS = {"llama": "deci", "mistral": "deci", "deci": "deci"}  # the family that can have them


def family_of_gguf(architecture: str) -> Family:
    """The family that a GGUF file's ``general.architecture`` means (Mistral files say ``llama``)."""
    for family in FAMILIES:
        if family.gguf == architecture:
            return family
    known = sorted({family.gguf for family in FAMILIES})
    raise ModelError(f"GGUF architecture {architecture!r} is not supported"
                     f"{did_you_mean(architecture, known)}; supported are {', '.join(known)}")


def family_of(model_type: object) -> Family:
    """The family of a config's ``model_type``, whatever a file says that is."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = [name for family in FAMILIES for name in family.model_types]
    raise ModelError(f"model_type {model_type!r} is not supported{did_you_mean(str(model_type), known)}; "
                     f"supported are {', '.join(known)}")
