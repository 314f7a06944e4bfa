"""A whole model as one GGUF file, the way llama.cpp wants it.

The file is metadata (copied when the model came from a GGUF file, else written from its config and
tokenizer), then every tensor under llama.cpp's name. Rows of q and k change their order in Llama-type
files (codes and scales follow, since only whole rows move), Gemma's norms are stored as ``1 + w``, and
norms and biases stay in F32. Everything that decides the size is known before any weight is read, so
``gguf_bytes`` is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rarefy.core.errors import TargetError, did_you_mean
from rarefy.core.nodes import Dense, Masked, Node, Quantized
from rarefy.core.nouns import Target
from rarefy.export.metadata import architecture_metadata, extra_tensors
from rarefy.export.tokenizer import safe_name, tokenizer_metadata
from rarefy.formats.ggml import CODECS, Codec
from rarefy.formats.gguf import ALIGNMENT, Entry, GgufFile, Lazy, ValueType, gguf_size, write_gguf
from rarefy.models.families import block_widths
from rarefy.models.map import Site
from rarefy.models.model import Model
from rarefy.models.rewritten import is_shrunk, original
from rarefy.models.sources import ROPE_TENSORS, GgufSource

# From the fastest kernels on, within a size; all of them load for any weight whose rows they fit,
# the token embedding and a tied head included.
LLAMA_CPP = Target(
    "llama.cpp",
    ("Q4_0", "IQ4_NL", "Q4_K", "Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q5_1", "Q4_1", "MXFP4", "IQ4_XS", "Q3_K",
     "Q2_K", "Q2_0", "TQ2_0", "TQ1_0", "F16", "BF16", "F32"),
    ".gguf",
    description="GGUF files for llama.cpp and everything built on it: block formats of 2 to 8 bits")

# What describes the source file rather than the model.
NOT_COPIED = ("general.architecture", "general.file_type", "general.quantization_version",
              "general.alignment", "quantize.", "split.")


@dataclass(frozen=True, eq=False)
class PlannedTensor:
    """One tensor of the file: its name there, its state-dict path, the shape it has in the file."""

    name: str
    path: str
    shape: tuple[int, ...]
    codec: Codec


def loadable(model: Model, site: Site) -> tuple[str, ...]:
    """The formats that llama.cpp loads for this site, in the target's order."""
    return tuple(name for name in LLAMA_CPP.formats if CODECS[name].fits(held(model, site).shape[1]))


def metadata(model: Model) -> list[Entry]:
    """The metadata of the exported file, ``general.architecture`` first. No choice of formats changes it.

    It is made once per model: a large vocabulary takes seconds.
    """
    if model not in _MADE:
        _MADE[model] = _metadata(model)
    return list(_MADE[model])


_MADE: WeakKeyDictionary[Model, list[Entry]] = WeakKeyDictionary()


def _metadata(model: Model) -> list[Entry]:
    family = model.map.family
    entries: list[Entry] = [("general.architecture", family.gguf, ValueType.STRING)]
    source = _gguf_file(model)
    if source is not None:
        entries += [(_renamed(entry.key, source, family.gguf), *tuple(entry)[1:]) for entry in source.entries
                    if not entry.key.startswith(NOT_COPIED)]
        if is_shrunk(model.source):  # the sizes are no longer those of the file
            rows = next(site.shape[0] for site in model.map.sites if site.role == "embed")
            sizes = {entry[0]: entry for entry in architecture_metadata(family, model.config, rows)}
            copied = {entry[0] for entry in entries}
            entries = [sizes.get(entry[0], entry) for entry in entries] + [
                entry for key, entry in sizes.items() if key not in copied]  # what no longer follows
            if rows != len(source.metadata.get("tokenizer.ggml.tokens", ())):  # nor are the tokens
                entries = [entry for entry in entries if not entry[0].startswith("tokenizer.ggml.")]
                entries += [entry for entry in tokenizer_metadata(model.tokenizer, rows, _end(model))
                            if entry[0].startswith("tokenizer.ggml.")]
    else:
        rows = next(site.shape[0] for site in model.map.sites if site.role == "embed")
        vocabulary = tokenizer_metadata(model.tokenizer, rows, _end(model))
        tokens = next(entry[1] for entry in vocabulary if entry[0] == "tokenizer.ggml.tokens")
        entries += [("general.type", "model", ValueType.STRING),
                    ("general.name", safe_name(model.name, tokens), ValueType.STRING)]
        entries += architecture_metadata(family, model.config, rows) + vocabulary
    return [*entries, ("general.quantization_version", 2, ValueType.UINT32)]


def _renamed(key: str, source: GgufFile, architecture: str) -> str:
    """A key of the source's architecture as one of the file's."""
    before = f"{source.metadata.get('general.architecture')}."
    return f"{architecture}.{key.removeprefix(before)}" if key.startswith(before) else key


def held(model: Model, site: Site) -> Site:
    """The site as the file holds it: where blocks differ in width, without the zeros of the narrower."""
    widths = block_widths(model.config)
    if widths is None or site.block is None or site.role not in ("gate", "up", "down"):
        return site
    rows, columns = site.shape
    own = widths[site.block]
    return replace(site, shape=(rows, own) if site.role == "down" else (own, columns))


def plan_tensors(model: Model, formats: Mapping[str, str]) -> list[PlannedTensor]:
    """Every tensor of the file in the order in which it is written, block by block.

    formats: the codec of every site, by path. Everything else is F32.
    """
    unknown = [path for path in formats if path not in model.map.by_path]
    if unknown:
        raise TargetError(f"{unknown[0]}: no such weight{did_you_mean(unknown[0], list(model.map.by_path))}")
    sites = []
    for site in model.map.sites:
        if site.path not in formats:
            raise TargetError(f"{site.path}: no format was chosen for it; choose one of "
                              f"{', '.join(loadable(model, site))}")
        sites.append(PlannedTensor(_name(model, site.path), site.path, held(model, site).shape,
                                   _codec(model, site, formats[site.path])))
    plain = CODECS["F32"]
    params = [PlannedTensor(_name(model, param.path), param.path, param.shape, plain)
              for param in model.map.params]
    extras = [PlannedTensor(name, "", tuple(values.shape), plain)
              for name, values in _extras(model).items()]
    family = model.map.family
    first = {family.embed, *dict(family.tables)}

    def place(tensor: PlannedTensor) -> tuple[int, int]:
        inside = family.inside(tensor.path)
        if inside is not None:
            return 1, inside[0]
        return (0 if not tensor.path or tensor.path.rpartition(".")[0] in first else 2), 0

    return sorted([*extras, *sites, *params], key=place)


def site_bytes(site: Site, name: str) -> int:
    """Bytes that a site takes in the file when it is stored in the format ``name``."""
    size = site.shape[0] * CODECS[name].row_bytes(site.shape[1])
    return size + -size % ALIGNMENT


def fixed_bytes(model: Model) -> int:
    """Bytes of the file that no choice of formats changes: metadata, tokenizer, norms, biases.

    The whole file is exactly this plus ``site_bytes`` of every site.
    """
    formats = {site.path: "F32" for site in model.map.sites}
    return gguf_bytes(model, formats) - sum(site_bytes(held(model, site), "F32") for site in model.map.sites)


def gguf_bytes(model: Model, formats: Mapping[str, str]) -> int:
    """Bytes of the whole file that ``export_gguf`` will write."""
    planned = [(tensor.name, tensor.shape, tensor.codec) for tensor in plan_tensors(model, formats)]
    return gguf_size(metadata(model), planned)


def export_gguf(model: Model, trees: Mapping[str, Node], formats: Mapping[str, str], path: Path | str, *,
                params: Mapping[str, Tensor] | None = None) -> int:
    """Write the file and return its bytes. One tensor is held in memory at a time.

    trees: what to store for each site; a site without a tree is stored as it is in the model, which its
    format must be able to hold (F32, F16, BF16). params: norms or biases to store in place of the model's.
    """
    changed = dict(params or {})
    for key, known in (*((key, list(model.map.by_path)) for key in trees),
                       *((key, [param.path for param in model.map.params]) for key in changed)):
        if key not in known:
            raise TargetError(f"{key}: no such weight{did_you_mean(key, known)}")
    extras = _extras(model)
    tensors = []
    for planned in plan_tensors(model, formats):
        if not planned.path:
            read = partial(_as_is, extras[planned.name])
        elif planned.path in model.map.by_path:
            read = partial(_site, model, trees.get(planned.path), planned)
        else:
            read = partial(_param, model, changed.get(planned.path), planned)
        tensors.append((planned.name, planned.codec, Lazy(planned.shape, read)))
    return write_gguf(path, model.map.family.gguf, metadata(model), tensors)


def _site(model: Model, tree: Node | None, planned: PlannedTensor) -> Node:
    """The weight of a site as its format stores it, rows in the file's order."""
    if tree is None:
        tree = Dense(model.weight(planned.path))
    if planned.codec.grid is None and not isinstance(tree, Dense):
        tree = Dense(tree.dense())
    if isinstance(tree, Masked):
        tree = _zeroed(tree)
    for axis, size in enumerate(planned.shape):
        if size < tree.shape[axis]:
            tree = tree.select(axis, torch.arange(size))
    order = model.map.family.row_order(planned.path, model.config)
    return tree if order is None else tree.select(0, torch.tensor(order))


def _zeroed(tree: Masked) -> Node:
    """A mask over codes as codes: what was dropped takes the level of zero, where the grid has one."""
    match tree.inner:
        case Quantized(codes=codes, zero=None, grid=grid) as inner if 0.0 in grid.levels:
            zero = torch.tensor(grid.levels.index(0.0), dtype=codes.dtype)
            return replace(inner, codes=torch.where(tree.keep, codes, zero))
        case Quantized(grid=grid):
            raise TargetError(f"{grid.name} has no code for zero, so it cannot store what was pruned; choose "
                              "Q4_0, Q5_0 or Q8_0")
        case _:
            return tree


def _param(model: Model, values: Tensor | None, planned: PlannedTensor) -> Node:
    values = model.param(planned.path) if values is None else values.float()
    family = model.map.family
    if family.norm_offset and family.is_norm(planned.path):
        values = values + family.norm_offset
    order = family.row_order(planned.path, model.config)
    return Dense(values if order is None else values[torch.tensor(order)])


def _as_is(values: Tensor) -> Node:
    return Dense(values)


def _codec(model: Model, site: Site, name: str) -> Codec:
    possible = loadable(model, site)
    if name not in possible:
        if name in LLAMA_CPP.formats:
            raise TargetError(f"{site.path}: rows of {site.shape[1]} weights do not fit the blocks of "
                              f"{CODECS[name].block} that {name} has; choose one of {', '.join(possible)}")
        raise TargetError(f"{site.path}: llama.cpp has no format {name!r}"
                          f"{did_you_mean(name, list(LLAMA_CPP.formats))} (known: {', '.join(possible)})")
    return CODECS[name]


def _name(model: Model, path: str) -> str:
    return model.map.family.gguf_name(path)


def _gguf_file(model: Model) -> GgufFile | None:
    match original(model.source):
        case GgufSource(file=file):
            return file
        case _:
            return None


def _extras(model: Model) -> dict[str, Tensor]:
    """Tensors that llama.cpp reads and transformers computes."""
    source = _gguf_file(model)
    if source is not None:
        return {name: source.tensor(name).dense().view(-1) for name in ROPE_TENSORS if name in source.tensors}
    return extra_tensors(model.map.family, model.config)


def _end(model: Model) -> int | None:
    """The config's end-of-text token; some name several."""
    end = getattr(model.config, "eos_token_id", None)
    return end[0] if isinstance(end, list) else end
