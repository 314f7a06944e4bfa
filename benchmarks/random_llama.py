"""A Llama of a chosen size with random weights and a small real tokenizer, as a Hugging Face folder.

    python benchmarks/random_llama.py OUT --size 1b

It answers nothing; it costs what a model of its size costs. The weights are bfloat16 in shards, the
tokenizer a byte-level BPE trained on the text that every Python carries.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SEED = 11
VOCABULARY = 16_384
SPECIAL = ("<s>", "</s>")


@dataclass(frozen=True)
class Shape:
    """The numbers that decide a Llama's size."""

    hidden: int
    inner: int
    blocks: int
    heads: int
    kv_heads: int


SHAPES = {
    "0.1b": Shape(hidden=768, inner=2048, blocks=12, heads=12, kv_heads=4),
    "1b": Shape(hidden=2048, inner=8192, blocks=16, heads=32, kv_heads=8),
}


def texts() -> Iterator[str]:
    """Prose and code that every Python has."""
    import sysconfig
    from pydoc_data.topics import topics

    yield from topics.values()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="ignore")


def write_tokenizer(folder: Path) -> int:
    """Train a byte-level BPE, save it, return how many tokens it has."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts(), vocab_size=VOCABULARY, show_progress=False, special_tokens=list(SPECIAL))
    begin, end = SPECIAL
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=begin, eos_token=end)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_model(folder: Path, shape: Shape, vocabulary: int) -> int:
    """Initialise the network as transformers does, save it in bfloat16, return its parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=shape.hidden, intermediate_size=shape.inner,
                         num_hidden_layers=shape.blocks, num_attention_heads=shape.heads,
                         num_key_value_heads=shape.kv_heads, tie_word_embeddings=True,
                         max_position_embeddings=4096, bos_token_id=0, eos_token_id=1, dtype="bfloat16")
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="500MB")
    return int(model.num_parameters())


def main() -> None:
    """Write the folder under a temporary name, then in place."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SHAPES, default="1b")
    options = parser.parse_args()
    part = options.out.with_name(options.out.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(part)
    parameters = write_model(part, SHAPES[options.size], vocabulary)
    part.rename(options.out)
    print(f"{options.out}: {parameters / 1e6:.0f}M parameters, {vocabulary} tokens")


if __name__ == "__main__":
    main()
