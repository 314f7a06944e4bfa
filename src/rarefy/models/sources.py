"""Sources: where the tensors of a model lie, read one at a time and never trusted.

A source lists tensors under their names in transformers, gives shapes and dtypes without reading, and
maps files into memory, so that looking up a few rows of an embedding costs a few rows. Reading is
strict: safetensors only (a pickle can run code), no shard outside the folder, every tensor exactly
where the index says, and no NaN or infinity (checked once per tensor, at the first read).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.errors import ModelError
from rarefy.core.nodes import Dense, Node, Quantized
from rarefy.formats.gguf import GgufFile
from rarefy.models.families import Family, block_widths

_CHUNK = 1 << 24  # numbers looked at together when searching for NaN


class Source:
    """Tensors by name, in the order and dtype in which they are stored. Abstract."""

    def __init__(self) -> None:
        self._sound: set[str] = set()

    def names(self) -> tuple[str, ...]:
        """Every tensor, under its name in transformers."""
        raise NotImplementedError

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading it."""
        raise NotImplementedError

    def dtype(self, name: str) -> str:
        """How its numbers are stored: ``bfloat16``, ``float32``, ``Q4_K``..."""
        raise NotImplementedError

    def files(self) -> tuple[Path, ...]:
        """The files that were opened, for checksums."""
        raise NotImplementedError

    def _rows(self, name: str, index: slice | Tensor) -> Tensor:
        """Rows of a tensor (its first axis), unchecked."""
        raise NotImplementedError

    def read(self, name: str) -> Tensor:
        """The whole tensor. It may be a view of a mapped file: never write into it."""
        return self.rows(name, slice(None))

    def rows(self, name: str, index: slice | Tensor) -> Tensor:
        """Some rows of a tensor; after the first visit, which looks at all, the others are not read."""
        if name in self._sound:
            return self._rows(name, index)
        if index == slice(None):
            values = self._rows(name, index)
            _refuse_infinite(name, values)
            self._sound.add(name)
            return values
        self.check(name)
        return self._rows(name, index)

    def check(self, name: str) -> None:
        """Refuse a tensor with NaN or infinity in it. What was found sound is not looked at again."""
        if name not in self._sound:
            self._check(name)
            self._sound.add(name)

    def _check(self, name: str) -> None:
        """Look at a whole tensor, a part at a time."""
        shape = self.shape(name)
        step = max(1, _CHUNK // max(1, torch.Size(shape[1:]).numel()))
        for start in range(0, shape[0] if shape else 1, step):
            _refuse_infinite(name, self._rows(name, slice(start, start + step)))


def _refuse_infinite(name: str, values: Tensor) -> None:
    # one pass, no temporary: NaN and infinity both survive a minimum or a maximum
    if values.numel() and not all(bool(torch.isfinite(bound)) for bound in torch.aminmax(values.detach())):
        kind = "NaN" if bool(torch.isnan(values).any()) else "an infinite value"
        raise ModelError(f"{name}: holds {kind}; the checkpoint is damaged, download or save it again")


class SafetensorsSource(Source):
    """A Hugging Face folder: ``model.safetensors``, or shards named by ``model.safetensors.index.json``."""

    def __init__(self, folder: Path, canonical: Callable[[str], str | None]) -> None:
        super().__init__()
        self._files = _weight_files(folder)
        self._handles: dict[str, Any] = {}
        self._stored: dict[str, str] = {}
        for path in self._files:
            handle = _open_safetensors(path)
            for stored in handle.keys():  # noqa: SIM118  it is no dict
                name = canonical(stored)
                if name is None:
                    continue
                if name in self._handles:
                    raise ModelError(f"{path}: tensor {stored!r} is stored twice; delete the stale copy")
                self._handles[name], self._stored[name] = handle, stored
        for name in self._handles:
            if self.dtype(name) not in _SAFETENSORS_DTYPES.values():
                raise ModelError(f"{name}: stored as {self.dtype(name)}, not as floats, so it is already "
                                 "quantized; start from the float original")

    def names(self) -> tuple[str, ...]:
        return tuple(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handles[name].get_slice(self._stored[name]).get_shape())

    def dtype(self, name: str) -> str:
        stored = self._handles[name].get_slice(self._stored[name]).get_dtype()
        return _SAFETENSORS_DTYPES.get(stored, str(stored))

    def files(self) -> tuple[Path, ...]:
        return self._files

    def _rows(self, name: str, index: slice | Tensor) -> Tensor:
        whole: Tensor = self._handles[name].get_tensor(self._stored[name])  # a view of the mapped file
        return whole[index] if whole.ndim else whole


_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64",
                       "I64": "int64"}  # nobody quantizes to these: counters


class GgufSource(Source):
    """A GGUF file, under the names, in the row order and with the norms of transformers.

    Values come as float32. The codes of quantized tensors outside the blocks (embedding, head), which are
    looked up again and again, are unpacked once and kept, one byte a weight.
    """

    def __init__(self, file: GgufFile, family: Family, config: Any) -> None:
        super().__init__()
        self.file, self._family, self._config = file, family, config
        self._places: dict[str, str] = {}
        self._kept: dict[str, Node] = {}
        for name in file.tensors:
            path = family.path_of(name)
            if path is not None:
                self._places[path] = name
            elif name not in ROPE_TENSORS:
                raise ModelError(f"{file.path.name}: tensor {name!r} is no part of the {family.name} family; "
                                 "this variant of the architecture is not supported")

    def names(self) -> tuple[str, ...]:
        return tuple(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.file.tensors[self._places[name]].shape
        if missing := self._missing(name):
            return shape[0] + missing[0], shape[1] + missing[1]
        return shape[::-1] if self._flipped(name) else shape

    def dtype(self, name: str) -> str:
        kind = self.file.tensors[self._places[name]].type
        return _GGUF_DTYPES.get(kind, kind)

    def files(self) -> tuple[Path, ...]:
        return (self.file.path,)

    def _missing(self, name: str) -> tuple[int, int] | None:
        """Rows and columns of zeros that a matrix needs to be as wide as that of the widest block."""
        widths, matrix = block_widths(self._config), self._family.matrix(name)
        if widths is None or matrix is None or matrix.role not in ("gate", "up", "down"):
            return None
        inside = self._family.inside(name)
        assert inside is not None
        count = max(widths) - widths[inside[0]]
        return (0, count) if matrix.role == "down" else (count, 0)

    def _flipped(self, name: str) -> bool:
        return self._family.transposed and self._family.matrix(name) is not None

    def _rows(self, name: str, index: slice | Tensor) -> Tensor:
        tensor = self.file.tensors[self._places[name]]
        if len(tensor.shape) == 1:
            values = tensor.node().dense().view(-1)
            order = self._family.row_order(name, self._config)
            if order is not None:
                values = values[torch.tensor(order).argsort()]
            return (values - self._family.norm_offset if self._family.is_norm(name) else values)[index]
        if missing := self._missing(name):
            return nn.functional.pad(tensor.node().dense(), (0, missing[1], 0, missing[0]))[index]
        if self._flipped(name):
            return tensor.node().dense().T[index]
        if name in self._kept:
            rows = torch.arange(tensor.shape[0])[index] if isinstance(index, slice) else index
            return self._kept[name].select(0, rows).dense()
        return self._decode(name, index).dense()

    def _decode(self, name: str, index: slice | Tensor) -> Node:
        """The node of some rows of a matrix, in the order of transformers."""
        tensor = self.file.tensors[self._places[name]]
        order = self._family.row_order(name, self._config)
        if order is not None:
            index = torch.tensor(order).argsort()[index]
        data = tensor.data[index if isinstance(index, slice) else index.numpy()]
        return replace(tensor, data=data, shape=(data.shape[0], tensor.shape[1])).node()

    def _check(self, name: str) -> None:
        if self.dtype(name) in _GGUF_DTYPES.values() or self._family.inside(name) is not None:
            super()._check(name)
            return
        self._kept[name] = self._decode(name, slice(None))
        for plain in _plain_numbers(self._kept[name]):
            _refuse_infinite(name, plain)


ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_GGUF_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def _plain_numbers(node: Node) -> list[Tensor]:
    """The floats at the leaves of a node: if they are finite, so is what it stands for (codes are)."""
    match node:
        case Dense(values=values):
            return [values.float()]
        case Quantized(scale=scale, zero=zero):
            return _plain_numbers(scale) + ([] if zero is None else _plain_numbers(zero))
        case _:
            return [node.dense()]


class ModuleSource(Source):
    """A network that is already in memory. Shared tensors appear under each of their names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._tensors = dict(module.state_dict())

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        return str(self._tensors[name].dtype).removeprefix("torch.")

    def files(self) -> tuple[Path, ...]:
        return ()

    def _rows(self, name: str, index: slice | Tensor) -> Tensor:
        whole: Tensor = self._tensors[name].detach().cpu()
        return whole[index] if whole.ndim else whole


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a ModelError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; a model folder holds config.json, *.safetensors and a "
                         "tokenizer") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON ({in_one_line(error)}); download it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a JSON {type(value).__name__} and should hold an object; download "
                         "it again")
    return value


def _weight_files(folder: Path) -> tuple[Path, ...]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() and index.exists():
        raise ModelError(f"{folder}: holds both model.safetensors and an index of shards; "
                         "delete the one that is stale, a mixture of two saves would load")
    if single.exists():
        return (single,)
    if index.exists():
        return _shards(folder, index)
    pickles = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(kind))
    if pickles:
        raise ModelError(f"{folder}: only pickled weights ({pickles[0]}), and unpickling can run any code; "
                         "take the safetensors version, or save_pretrained() it yourself if you trust it")
    raise ModelError(f"{folder}: no weights (model.safetensors or model.safetensors.index.json); download "
                     "the model's folder whole")


def _shards(folder: Path, index: Path) -> tuple[Path, ...]:
    """The shards of an index, every tensor checked to lie in the file that the index says."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
        raise ModelError(f"{index}: has no usable weight_map; download it again")
    for shard in dict.fromkeys(places.values()):
        if shard != Path(shard).name or "\\" in shard or not shard.endswith(".safetensors"):
            raise ModelError(f"{index}: shard {shard!r} is not a plain .safetensors file name inside the "
                             "folder; the index is unsafe, do not use this model")
        if not (folder / shard).is_file():
            raise ModelError(f"{folder / shard}: missing shard, named by {index.name}; download it again")
    shards = tuple(folder / shard for shard in sorted(set(places.values())))
    for path in shards:
        held = set(_open_safetensors(path).keys())
        said = {name for name, shard in places.items() if shard == path.name}
        if held != said:
            name = sorted(held ^ said)[0]
            fault = "is in the shard but not in" if name in held else "is missing from the shard, against"
            raise ModelError(f"{path}: tensor {name!r} {fault} {index.name}; the files belong to different "
                             "saves")
    return shards


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: not a complete safetensors file ({in_one_line(error)}); download it "
                         "again") from None


def in_one_line(error: Exception) -> str:
    """What an error of another library says, short enough to be quoted in ours."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 200 else words[:197] + "..."

