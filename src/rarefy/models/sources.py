"""Sources: where the tensors of a model lie, read one at a time and never trusted.

A source lists tensors under their names in transformers, gives shapes and dtypes without reading, and
maps files into memory, so that looking up a few rows of an embedding costs a few rows. Reading is
strict: safetensors only (a pickle can run code), no shard outside the folder, every tensor exactly
where the index says, and no NaN or infinity (checked once per tensor, at the first read).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.errors import ModelError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
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
        """Some rows of a tensor, without reading the others (after the first visit)."""
        if name not in self._sound:
            self._check(name)
            self._sound.add(name)
        return self._rows(name, index)

    def _check(self, name: str) -> None:
        shape = self.shape(name)
        step = max(1, _CHUNK // max(1, torch.Size(shape[1:]).numel()))
        for start in range(0, shape[0] if shape else 1, step):
            part = self._rows(name, slice(start, start + step))
            # one pass, no temporary: NaN and infinity both survive a minimum or a maximum
            if part.numel() and not all(bool(torch.isfinite(bound)) for bound in torch.aminmax(part)):
                kind = "NaN" if bool(torch.isnan(part).any()) else "an infinite value"
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
            for stored in handle.keys():
                name = canonical(stored)
                if name is None:
                    continue
                if name in self._handles:
                    raise ModelError(f"{path}: tensor {stored!r} is stored twice; delete the stale copy")
                self._handles[name], self._stored[name] = handle, stored

    def names(self) -> tuple[str, ...]:
        return tuple(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handles[name].get_slice(self._stored[name]).get_shape())

    def dtype(self, name: str) -> str:
        stored = self._handles[name].get_slice(self._stored[name]).get_dtype()
        return _SAFETENSORS_DTYPES.get(stored, stored)

    def files(self) -> tuple[Path, ...]:
        return self._files

    def _rows(self, name: str, index: slice | Tensor) -> Tensor:
        whole = self._handles[name].get_tensor(self._stored[name])  # a view of the mapped file
        return whole[index] if whole.ndim else whole


_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


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
        whole = self._tensors[name].detach().cpu()
        return whole[index] if whole.ndim else whole


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a ModelError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; a model folder holds config.json, *.safetensors and a tokenizer") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({_first_line(error)}); download it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}")
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
    raise ModelError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def _shards(folder: Path, index: Path) -> tuple[Path, ...]:
    """The shards of an index, every tensor checked to lie in the file that the index says."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
        raise ModelError(f"{index}: has no usable weight_map; download it again")
    for shard in dict.fromkeys(places.values()):
        if shard != Path(shard).name or "\\" in shard or not shard.endswith(".safetensors"):
            raise ModelError(f"{index}: shard {shard!r} is not a plain .safetensors file name inside the folder; "
                             "the index is unsafe, do not use this model")
        if not (folder / shard).is_file():
            raise ModelError(f"{folder / shard}: missing shard, named by {index.name}; download it again")
    shards = tuple(folder / shard for shard in sorted(set(places.values())))
    for path in shards:
        held = set(_open_safetensors(path).keys())
        said = {name for name, shard in places.items() if shard == path.name}
        if held != said:
            name = sorted(held ^ said)[0]
            fault = "is in the shard but not in" if name in held else "is missing from the shard, against"
            raise ModelError(f"{path}: tensor {name!r} {fault} {index.name}; the files belong to different saves")
    return shards


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: not a complete safetensors file ({_first_line(error)}); download it again") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def finite_parts(source: Source) -> Iterator[str]:
    """Every tensor's name, after it was read once and found free of NaN and infinity."""
    for name in source.names():
        source.rows(name, slice(0, 0))
        yield name
