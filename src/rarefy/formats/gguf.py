"""GGUF: the file that llama.cpp loads. A strict reader, a streaming writer, and the exact size beforehand.

    "GGUF" version tensors keys | key type value ... | name dims type offset ... | padding | data ...

Everything is little-endian; a string is its length in 8 bytes and its UTF-8; data begins at, and every
tensor is padded to, a multiple of ``general.alignment`` (32). The reader trusts nothing: every count and
every length is checked against the bytes that are left *before* anything of that size is made, so damaged
or malicious files cost one message. The writer knows every offset from the shapes alone, so it holds one
piece of one tensor at a time, and ``gguf_size`` needs no tensor at all.

Source: the specification, docs/gguf.md of ggml.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from rarefy.core.errors import ModelError, OutputError, TargetError, did_you_mean
from rarefy.core.nodes import Dense, Node
from rarefy.formats.ggml import CODECS, Codec

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
LONGEST_NAME = 63  # bytes of a tensor's name; llama.cpp refuses more
LARGEST_METADATA = 1 << 28  # real models stay below 20 MB


class ValueType(IntEnum):
    """The types of metadata values, numbered as in the file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_NUMBERS = {
    ValueType.UINT8: "<u1", ValueType.INT8: "<i1", ValueType.UINT16: "<u2", ValueType.INT16: "<i2",
    ValueType.UINT32: "<u4", ValueType.INT32: "<i4", ValueType.FLOAT32: "<f4", ValueType.BOOL: "|b1",
    ValueType.UINT64: "<u8", ValueType.INT64: "<i8", ValueType.FLOAT64: "<f8",
}

# Types that we read but do not write: name -> (number, weights and bytes of a block).
_READ_ONLY = {
    "IQ2_XXS": (16, 256, 66), "IQ2_XS": (17, 256, 74), "IQ3_XXS": (18, 256, 98), "IQ1_S": (19, 256, 50),
    "IQ3_S": (21, 256, 110), "IQ2_S": (22, 256, 82), "IQ1_M": (29, 256, 56), "NVFP4": (40, 64, 36),
    "Q1_0": (41, 128, 18), "I8": (24, 1, 1), "I16": (25, 1, 2), "I32": (26, 1, 4), "I64": (27, 1, 8),
    "F64": (28, 1, 8),
}
_PLAIN = {"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "F64": torch.float64}
_TYPES = {number: (name, block, size) for name, (number, block, size) in _READ_ONLY.items()}
_TYPES |= {codec.type_id: (codec.name, codec.block, codec.block_bytes) for codec in CODECS.values()}


class Meta(NamedTuple):
    """One metadata entry. ``item`` is the type of an array's items, None for anything else."""

    key: str
    value: Any
    type: ValueType
    item: ValueType | None = None


@dataclass(frozen=True, eq=False)
class GgufTensor:
    """One tensor of a file, still in its bytes.

    shape: rows first, as numpy writes it (the file has it the other way round). type: ggml's name of the
    storage type. data: [rows, bytes of a row], a view of the mapped file.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    data: np.ndarray

    def node(self) -> Node:
        """The weight: a Node of [rows, columns], plain values of ``shape`` for floats."""
        if self.type in CODECS:
            node = CODECS[self.type].unpack(self.data, self.shape[-1])
            return Dense(node.values.view(self.shape)) if isinstance(node, Dense) else node
        if self.type in _PLAIN:
            copy = torch.from_numpy(np.array(self.data, order="C"))
            return Dense(copy.view(_PLAIN[self.type]).view(self.shape))
        from gguf import GGMLQuantizationType, dequantize

        try:
            values = dequantize(np.array(self.data, order="C"), GGMLQuantizationType[self.type])
        except (KeyError, NotImplementedError):
            raise ModelError(f"{self.name}: storage type {self.type} cannot be read here; convert the file "
                             "with llama-quantize, or start from the original model") from None
        return Dense(torch.from_numpy(values).view(self.shape))


@dataclass(frozen=True, eq=False)
class GgufFile:
    """A parsed file: ``metadata`` by key, ``tensors`` by name, ``entries`` with the types for copying."""

    path: Path
    entries: tuple[Meta, ...]
    tensors: dict[str, GgufTensor]
    alignment: int = ALIGNMENT
    metadata: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "metadata", {entry.key: entry.value for entry in self.entries})

    def tensor(self, name: str) -> Node:
        """The weight called ``name``."""
        if name not in self.tensors:
            raise ModelError(f"{self.path.name}: no tensor {name!r}{did_you_mean(name, list(self.tensors))}")
        return self.tensors[name].node()


# ---- reading

def read_gguf(path: str | Path) -> GgufFile:
    """Parse a file's header and map its tensors; nothing of the weights is read yet."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size < 24:
            raise ModelError(f"{path.name}: {size} bytes are no GGUF file; download it again")
        mapped = np.memmap(path, np.uint8, mode="r")
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
    cursor = _Cursor(path.name, mapped.data)
    if bytes(cursor.take(4, "the magic number")) != MAGIC:
        raise ModelError(f"{path.name}: not a GGUF file: it begins with {bytes(mapped[:4])!r}")
    version = cursor.integer(4, "the version")
    if version not in (2, 3):
        big = int.from_bytes(version.to_bytes(4, "big"), "little") in (2, 3)
        raise ModelError(f"{path.name}: GGUF {'for big-endian machines' if big else f'version {version}'} "
                         "is not supported; convert the model again with a current llama.cpp")
    tensors, keys = cursor.integer(8, "the tensor count"), cursor.integer(8, "the key count")
    cursor.expect(tensors, 33, "tensors")
    cursor.expect(keys, 13, "keys")
    entries = tuple(cursor.entry() for _ in range(keys))
    repeated = _repeated([entry.key for entry in entries])
    if repeated is not None:
        cursor.fail(f"the key {repeated!r} occurs twice")
    alignment = _alignment(cursor, entries)
    infos = [cursor.info() for _ in range(tensors)]
    start = cursor.position + -cursor.position % alignment
    return GgufFile(path, entries, _place(cursor, infos, start, alignment, mapped), alignment)


def _alignment(cursor: _Cursor, entries: tuple[Meta, ...]) -> int:
    found = {entry.key: entry for entry in entries}
    parts = found.get("split.count")
    if parts is not None and isinstance(parts.value, int) and parts.value > 1:
        raise ModelError(f"{cursor.name}: one of {parts.value} parts of a split model; join them with "
                         "llama-gguf-split --merge first")
    if "general.alignment" not in found:
        return ALIGNMENT
    alignment = found["general.alignment"]
    if alignment.type != ValueType.UINT32 or alignment.value < 1 or alignment.value & (alignment.value - 1):
        cursor.fail(f"general.alignment is {alignment.value!r}, not a power of two")
    return int(alignment.value)


class _Info(NamedTuple):
    name: str
    shape: tuple[int, ...]
    type: str
    row_bytes: int
    offset: int

    @property
    def bytes(self) -> int:
        return prod(self.shape[:-1]) * self.row_bytes


def _place(cursor: _Cursor, infos: list[_Info], start: int, alignment: int,
           mapped: np.ndarray) -> dict[str, GgufTensor]:
    """Cut the tensors out of the mapped file; none may lie outside it, overlap, or share a name."""
    repeated = _repeated([info.name for info in infos])
    if repeated is not None:
        cursor.fail(f"the tensor {repeated!r} occurs twice")
    end, before = 0, ""
    for info in sorted(infos, key=lambda info: info.offset):
        if info.offset % alignment:
            cursor.fail(f"{info.name} begins at {info.offset}, which is not a multiple of {alignment}")
        if info.offset < end:
            cursor.fail(f"the tensors {before!r} and {info.name!r} overlap")
        end, before = info.offset + info.bytes, info.name
        if start + end > cursor.size:
            cursor.fail(f"{info.name} ends at byte {start + end}, the file at {cursor.size}: it is cut off")
    return {info.name: GgufTensor(
        info.name, info.shape, info.type,
        np.asarray(mapped[start + info.offset:start + info.offset + info.bytes]).reshape(-1, info.row_bytes))
        for info in infos}


def _repeated(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


class _Cursor:
    """A position in the bytes of a file, and what may be read there."""

    def __init__(self, name: str, view: memoryview) -> None:
        self.name, self.view, self.position, self.size = name, view, 0, len(view)

    def fail(self, what: str) -> NoReturn:
        raise ModelError(f"{self.name}: byte {self.position}: {what}; the file is damaged, download it again")

    def expect(self, count: int, smallest: int, what: str) -> None:
        """There must be room for ``count`` things of at least ``smallest`` bytes."""
        if count * smallest > self.size - self.position:
            self.fail(f"{count} {what} do not fit into the {self.size - self.position} bytes left")

    def take(self, count: int, what: str) -> memoryview:
        if count > self.size - self.position:
            self.fail(f"{what} needs {count} bytes and {self.size - self.position} are left")
        self.position += count
        return self.view[self.position - count:self.position]

    def integer(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what), "little")

    def string(self, what: str) -> str:
        """A name. Names must be text; values of metadata may be any bytes."""
        raw = bytes(self.take(self.integer(8, what), what))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8: {raw[:40]!r}")

    def kind(self, what: str) -> ValueType:
        number = self.integer(4, what)
        try:
            return ValueType(number)
        except ValueError:
            self.fail(f"{what} is {number}, which is no type of value")

    def entry(self) -> Meta:
        key = self.string("a key")
        kind = self.kind(f"the type of {key!r}")
        if kind != ValueType.ARRAY:
            return Meta(key, self.values(key, kind, 1)[0], kind)
        item = self.kind(f"the item type of {key!r}")
        if item == ValueType.ARRAY:
            self.fail(f"{key!r} is an array of arrays, which no model has")
        return Meta(key, self.values(key, item, self.integer(8, f"the length of {key!r}")), kind, item)

    def values(self, key: str, kind: ValueType, count: int) -> list[Any]:
        width = 8 if kind == ValueType.STRING else np.dtype(_NUMBERS[kind]).itemsize
        self.expect(count, width, f"values of {key!r}")
        if self.position + count * width > LARGEST_METADATA:
            self.fail(f"{key!r} would make the metadata larger than {LARGEST_METADATA >> 20} MiB")
        if kind == ValueType.STRING:
            return self._strings(key, count)
        raw = self.take(count * width, key)
        if kind == ValueType.BOOL and any(byte > 1 for byte in raw):
            self.fail(f"{key!r} holds a truth value that is neither 0 nor 1")
        numbers: list[Any] = np.frombuffer(raw, _NUMBERS[kind]).tolist()
        return numbers

    def _strings(self, key: str, count: int) -> list[str]:
        """Written out in one loop: a vocabulary has a quarter of a million of them.

        Tokens need not be UTF-8; surrogate escapes carry such bytes through and back.
        """
        view, size, position = self.view, self.size, self.position
        found, length_at = [], struct.Struct("<Q").unpack_from
        for _ in range(count):
            if size - position < 8:
                self.fail(f"the strings of {key!r} are cut off")
            end = position + 8 + length_at(view, position)[0]
            if end > size:
                self.fail(f"a string of {key!r} reaches {end - size} bytes beyond the end of the file")
            found.append(str(view[position + 8:end], "utf-8", "surrogateescape"))
            position = end
        self.position = position
        return found

    def info(self) -> _Info:
        name = self.string("a tensor's name")
        if not 1 <= len(name.encode()) <= LONGEST_NAME:
            self.fail(f"a tensor's name has {len(name.encode())} bytes instead of 1 to {LONGEST_NAME}")
        axes = self.integer(4, f"the number of axes of {name!r}")
        if not 1 <= axes <= 4:
            self.fail(f"{name} has {axes} axes instead of 1 to 4")
        shape = tuple(self.integer(8, f"the shape of {name!r}") for _ in range(axes))[::-1]
        number = self.integer(4, f"the type of {name!r}")
        if number not in _TYPES:
            self.fail(f"{name} has the storage type {number}, which is not known here")
        kind, block, block_bytes = _TYPES[number]
        if min(shape) < 1 or shape[-1] % block:
            self.fail(f"{name} has the shape {shape}, whose rows are not whole blocks of {block} ({kind})")
        row_bytes = shape[-1] // block * block_bytes
        if prod(shape[:-1]) * row_bytes > self.size:
            self.fail(f"{name} with the shape {shape} ({kind}) is larger than the file")
        return _Info(name, shape, kind, row_bytes, self.integer(8, f"the offset of {name!r}"))


# ---- writing

@dataclass(frozen=True, eq=False)
class Lazy:
    """A weight that is made when its turn to be written comes: its shape, and how to get it."""

    shape: tuple[int, ...]
    read: Callable[[], Node | Tensor]


Entry = tuple[str, Any, ValueType] | tuple[str, Any, ValueType, ValueType | None]
Weight = Node | Tensor | Lazy
Planned = tuple[str, tuple[int, ...], Codec]


def gguf_size(metadata: Sequence[Entry], tensors: Sequence[Planned], architecture: str = "") -> int:
    """Bytes of the file that ``write_gguf`` makes of (name, shape, codec), without making it."""
    header, offsets = _header(architecture, metadata, tensors)
    last = _bytes(*tensors[-1][1:]) if tensors else 0
    return len(header) + (_padded(offsets[-1] + last) if tensors else 0)


def write_gguf(path: str | Path, architecture: str, metadata: Sequence[Entry],
               tensors: Iterable[tuple[str, Codec, Weight]]) -> int:
    """Write a file and return its size. ``general.architecture`` goes first if ``metadata`` lacks it.

    The file appears under its name only when it is whole.
    """
    path, listed = Path(path), list(tensors)
    planned: list[Planned] = [(name, tuple(weight.shape), codec) for name, codec, weight in listed]
    header, offsets = _header(architecture, metadata, planned)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as out:
            out.write(header)
            for (name, codec, weight), (_, shape, _), offset in zip(listed, planned, offsets, strict=True):
                assert out.tell() == len(header) + offset
                _write_tensor(out, name, shape, codec, weight)
            size = out.tell()
        os.replace(part, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}; free some space or "
                          "choose another output folder") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return size


def _write_tensor(out: BinaryIO, name: str, shape: tuple[int, ...], codec: Codec, weight: Weight) -> None:
    try:
        made = weight.read() if isinstance(weight, Lazy) else weight
    except OSError as error:
        raise ModelError(f"{name}: cannot be read: {error.strerror or error}") from None
    node = made if isinstance(made, Node) else Dense(made)
    if tuple(node.shape) != shape:
        raise TargetError(f"{name}: the shape {tuple(node.shape)} is not the {shape} that was announced")
    written = 0
    try:
        for piece in codec.stream(node):
            written += out.write(piece.data)
    except TargetError as error:
        raise TargetError(f"{name}: {error}") from None
    assert written == _bytes(shape, codec), f"{name}: {written} bytes instead of {_bytes(shape, codec)}"
    out.write(bytes(_padded(written) - written))


def _bytes(shape: tuple[int, ...], codec: Codec) -> int:
    return prod(shape[:-1]) * codec.row_bytes(shape[-1])


def _padded(size: int) -> int:
    return size + -size % ALIGNMENT


def _header(architecture: str, metadata: Sequence[Entry],
            tensors: Sequence[Planned]) -> tuple[bytes, list[int]]:
    """Everything before the data, padded, and where each tensor's data begins behind it."""
    entries = [Meta(*entry) for entry in metadata]
    named = [entry.value for entry in entries if entry.key == "general.architecture"]
    if not named and not architecture:
        raise TargetError("metadata: general.architecture is missing; llama.cpp cannot load such a file")
    if architecture and named and named != [architecture]:
        raise TargetError(f"metadata: general.architecture is {named[0]!r}, not {architecture!r}")
    if not named:
        entries.insert(0, Meta("general.architecture", architecture, ValueType.STRING))
    aligned = [entry.value for entry in entries if entry.key == "general.alignment"]
    if aligned and aligned != [ALIGNMENT]:
        raise TargetError(f"metadata: general.alignment is {aligned[0]}; leave it out, files are written "
                          f"with {ALIGNMENT}")
    repeated = _repeated([entry.key for entry in entries]) or _repeated([name for name, *_ in tensors])
    if repeated is not None:
        raise TargetError(f"{repeated}: occurs twice")
    pieces = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(entries))]
    pieces += [_encode_entry(entry) for entry in entries]
    offsets, end = [], 0
    for name, shape, codec in tensors:
        offsets.append(end)
        pieces.append(_encode_info(name, shape, codec, end))
        end = _padded(end + _bytes(shape, codec))
    header = b"".join(pieces)
    return header.ljust(_padded(len(header)), b"\0"), offsets


def _encode_info(name: str, shape: tuple[int, ...], codec: Codec, offset: int) -> bytes:
    if not 1 <= len(name.encode()) <= LONGEST_NAME or not 1 <= len(shape) <= 4 or min(shape) < 1:
        raise TargetError(f"{name}: llama.cpp loads names of at most {LONGEST_NAME} bytes and 1 to 4 "
                          f"non-empty axes, got the shape {shape}")
    if not codec.fits(shape[-1]):
        raise TargetError(f"{name}: rows of {shape[-1]} weights cannot be stored as {codec.name}, whose "
                          f"blocks have {codec.block}; choose a format with smaller blocks")
    axes = len(shape)
    return _encode_string(name) + struct.pack(f"<I{axes}QIQ", axes, *shape[::-1], codec.type_id, offset)


def _encode_string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _encode_entry(entry: Meta) -> bytes:
    kind = ValueType(entry.type)
    head = _encode_string(entry.key) + struct.pack("<I", kind)
    try:
        if kind != ValueType.ARRAY:
            return head + _encode_values(kind, [entry.value])
        if entry.item is None:
            raise TypeError("the type of the array's items is not given")
        item = ValueType(entry.item)
        return head + struct.pack("<IQ", item, len(entry.value)) + _encode_values(item, entry.value)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise TargetError(f"metadata {entry.key}: {repr(entry.value)[:60]} cannot be stored as {kind.name}: "
                          f"{error}") from None


def _encode_values(kind: ValueType, values: Sequence[Any]) -> bytes:
    if kind == ValueType.STRING:
        return b"".join(map(_encode_string, values))
    if kind == ValueType.ARRAY:
        raise TypeError("arrays of arrays do not load")
    array, dtype = np.asarray(values), np.dtype(_NUMBERS[kind])
    kinds = {"u": "iu", "i": "iu", "f": "iuf", "b": "b"}[dtype.kind]
    if array.size and (array.ndim != 1 or array.dtype.kind not in kinds):
        raise TypeError(f"expected numbers of type {kind.name}")
    if dtype.kind in "iu" and array.size:
        info = np.iinfo(dtype)
        if int(array.min()) < info.min or int(array.max()) > info.max:
            raise OverflowError(f"values must lie between {info.min} and {info.max}")
    return array.astype(dtype).tobytes()
