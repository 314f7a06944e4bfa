"""A model's folder, and the checks that every kind of model shares.

A folder holds ``config.json``, safetensors and a tokenizer; the hub's snapshot of an id is such a folder.
Nothing in it is executed. The files must hold exactly the tensors that the configuration describes: one
missing, unexpected or of another shape is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rarefy.core.errors import ModelError
from rarefy.models.sources import Source, in_one_line

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WANTED = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
          "tokenizer*", "special_tokens_map.json", "vocab.json", "vocab.txt", "merges.txt", "*.jinja",
          "modules.json", "sentence_bert_config.json", "1_Pooling/config.json", "preprocessor_config.json")


def read_config(folder: Path, name: str) -> Any:
    """The transformers configuration in a folder, no code of the folder run."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  transformers raises whatever its field validators raise
        raise ModelError(f"{name}: config.json is not a valid configuration ({in_one_line(error)}); take the "
                         "one that came with the weights") from None


def read_tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer in a folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  a dozen kinds, from missing files to Rust panics wrapped as Exception
        raise ModelError(f"{name}: the tokenizer in {folder} cannot be loaded ({in_one_line(error)}); "
                         "it needs tokenizer.json and tokenizer_config.json") from None


def download(ref: str) -> Path:
    """The snapshot of a Hugging Face repository: configuration, tokenizer and safetensors, nothing else."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(ref, allow_patterns=list(WANTED)))
    except Exception as error:  # noqa: BLE001  network, authentication, no such repository, no space
        raise ModelError(f"{ref}: no folder of that name here, and the Hugging Face hub did not give it "
                         f"({in_one_line(error)}); check the name and the network") from None


def refuse_quantized(name: str, config: Mapping[str, Any]) -> None:
    """ModelError for a configuration that tells of quantized weights."""
    quantized = config.get("quantization_config") or config.get("compression_config")
    if quantized:
        method = quantized.get("quant_method", "unknown method") if isinstance(quantized, dict) else "unknown"
        raise ModelError(f"{name}: already quantized ({method}); compress the float original instead, "
                         "what rounding lost does not come back")


def check_names(name: str, source: Source, shapes: Mapping[str, tuple[int, ...]],
                found: set[str] | None = None) -> None:
    """Every expected tensor is there, with the config's shape, stored as floats; nothing else is.

    found: what counts of the source's names (default: all).
    """
    found = set(source.names()) if found is None else found
    missing = [path for path in shapes if path not in found]
    if missing:
        raise ModelError(f"{name}: weight {missing[0]} is missing{_others(missing)}; the files are "
                         "incomplete or belong to another config.json")
    unexpected = sorted(found - set(shapes))
    if unexpected:
        raise ModelError(f"{name}: unexpected weight {unexpected[0]}{_others(unexpected)}; "
                         "config.json disagrees with the weights, or this is another kind of model")
    for path, shape in shapes.items():
        if source.shape(path) != shape:
            raise ModelError(f"{path}: the file holds shape {source.shape(path)}, config.json says {shape}; "
                             "they belong to different models")


def check_tie(name: str, source: Source, alias: str, owner: str, remedy: str) -> None:
    """A file that stores a shared weight under both names must store the same numbers."""
    same = source.shape(alias) == source.shape(owner)
    step = 16384
    for start in range(0, source.shape(alias)[0] if same else 0, step):
        part = slice(start, start + step)
        same = same and source.rows(alias, part).equal(source.rows(owner, part))
    if not same:
        raise ModelError(f"{name}: {remedy.format(alias=alias, owner=owner)}")


def _others(paths: list[str]) -> str:
    return f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
