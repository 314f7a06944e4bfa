"""The container: the bytes that the gguf package writes, sizes known beforehand, hostile files refused."""

from __future__ import annotations

import errno
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rarefy.core.errors import ModelError, OutputError, TargetError
from rarefy.core.nodes import Dense, Node, Quantized
from rarefy.formats.ggml import CODECS
from rarefy.formats.gguf import Lazy, Meta, ValueType, gguf_size, read_gguf, write_gguf

V = ValueType
METADATA: list[Any] = [
    ("general.architecture", "llama", V.STRING),
    ("u8", 200, V.UINT8), ("i8", -3, V.INT8), ("u16", 60000, V.UINT16), ("i16", -300, V.INT16),
    ("u32", 4_000_000_000, V.UINT32), ("i32", -7, V.INT32), ("f32", 1e-5, V.FLOAT32), ("yes", True, V.BOOL),
    ("u64", 2**63, V.UINT64), ("i64", -2**40, V.INT64), ("f64", 0.1, V.FLOAT64), ("text", "Gruß", V.STRING),
    ("tokens", ["<s>", "", "ä", "▁the"], V.ARRAY, V.STRING), ("kinds", [1, 3, 1], V.ARRAY, V.INT32),
    ("scores", [0.5, -1.25], V.ARRAY, V.FLOAT32), ("flags", [True, False], V.ARRAY, V.BOOL),
]
SHAPES = {"Q4_0": (3, 64), "Q4_K": (2, 512), "F16": (5, 7), "F32": (9,), "Q8_0": (1, 32), "Q6_K": (2, 256)}
quick = settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def tensors(on_grid: Any) -> list[tuple[str, Any, Any]]:
    """One tensor of every kind, in its node, its plain tensor, or not made yet."""
    generator = torch.Generator().manual_seed(0)
    made: list[tuple[str, Any, Any]] = []
    for name, shape in SHAPES.items():
        codec = CODECS[name]
        weight = on_grid(codec.grid, *shape) if codec.grid else torch.randn(shape, generator=generator)
        made.append((f"blk.0.{name}.weight", codec, weight))
    name, codec, weight = made[1]
    made[1] = (name, codec, Lazy(weight.shape, lambda: weight))
    return made


def plan(tensors: list[tuple[str, Any, Any]]) -> list[tuple[str, tuple[int, ...], Any]]:
    return [(name, tuple(weight.shape), codec) for name, codec, weight in tensors]


def node(weight: Node | torch.Tensor | Lazy) -> Node:
    made = weight.read() if isinstance(weight, Lazy) else weight
    return made if isinstance(made, Node) else Dense(made)


def written_by_gguf(path: Path, tensors: list[tuple[str, Any, Any]]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value, kind, *item in METADATA[1:]:
        writer.add_key_value(key, value, gguf.GGUFValueType(kind),
                             sub_type=gguf.GGUFValueType(item[0]) if item else None)
    for name, codec, weight in tensors:
        kind = gguf.GGMLQuantizationType[codec.name]
        packed = codec.pack(node(weight))
        if codec.grid is None:
            packed = packed.view({"F16": np.float16, "F32": np.float32}[codec.name])
            packed = packed.reshape(tuple(weight.shape))
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_same_bytes_as_the_gguf_package(tmp_path: Path, tensors: Any) -> None:
    written = write_gguf(tmp_path / "ours.gguf", "llama", METADATA, tensors)
    written_by_gguf(tmp_path / "theirs.gguf", tensors)
    ours = (tmp_path / "ours.gguf").read_bytes()
    assert ours == (tmp_path / "theirs.gguf").read_bytes()
    assert len(ours) == written == gguf_size(METADATA, plan(tensors), "llama")
    assert [file.name for file in tmp_path.iterdir() if "part" in file.name] == []


def test_the_gguf_package_reads_ours(tmp_path: Path, tensors: Any) -> None:
    write_gguf(tmp_path / "a.gguf", "llama", METADATA, tensors)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    for key, value, *_ in METADATA:
        assert reader.fields[key].contents() == (pytest.approx(value) if key[0] in "fs" else value)
    assert [tensor.name for tensor in reader.tensors] == [name for name, *_ in tensors]
    for tensor, (_, codec, weight) in zip(reader.tensors, tensors, strict=True):
        assert tensor.tensor_type.name == codec.name
        assert tuple(int(size) for size in tensor.shape[::-1]) == tuple(weight.shape)
        values = gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)
        expected = node(weight).dense() if codec.name != "F16" else node(weight).dense().half().float()
        assert np.array_equal(values.reshape(expected.shape), expected.numpy())


def test_what_is_written_is_read(tmp_path: Path, tensors: Any) -> None:
    write_gguf(tmp_path / "a.gguf", "", METADATA, tensors)
    file = read_gguf(tmp_path / "a.gguf")
    assert [entry[:3] for entry in file.entries if entry.type != V.FLOAT32] == \
        [tuple(entry[:3]) for entry in METADATA if entry[2] != V.FLOAT32]
    assert file.entries[13] == Meta("tokens", METADATA[13][1], V.ARRAY, V.STRING)
    assert file.metadata["f32"] == float(np.float32(1e-5))
    assert {name: tensor.type for name, tensor in file.tensors.items()} == \
        {name: codec.name for name, codec, _ in tensors}
    for name, codec, weight in tensors:
        read = file.tensor(name)
        assert read.shape == tuple(weight.shape)
        assert np.array_equal(codec.pack(read), codec.pack(node(weight)))
    again = [(tensor.name, CODECS[tensor.type], Lazy(tensor.shape, tensor.node))
             for tensor in file.tensors.values()]
    write_gguf(tmp_path / "b.gguf", "llama", file.entries, again)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_architecture_comes_first_and_tokens_may_be_any_bytes(tmp_path: Path) -> None:
    tokens = [b"\xff\xfe".decode("utf-8", "surrogateescape"), "a"]
    entries: list[Any] = [("tokens", tokens, V.ARRAY, V.STRING)]
    size = write_gguf(tmp_path / "a.gguf", "gpt2", entries, [])
    assert size == gguf_size(entries, [], "gpt2")
    file = read_gguf(tmp_path / "a.gguf")
    assert list(file.metadata) == ["general.architecture", "tokens"]
    assert file.metadata["tokens"] == tokens
    assert b"\xff\xfe" in (tmp_path / "a.gguf").read_bytes()


scalars = st.one_of(
    st.tuples(st.text(max_size=8), st.just(V.STRING)), st.tuples(st.booleans(), st.just(V.BOOL)),
    st.tuples(st.integers(-2**31, 2**31 - 1), st.just(V.INT32)),
    st.tuples(st.integers(0, 2**64 - 1), st.just(V.UINT64)),
    st.tuples(st.floats(width=32, allow_nan=False), st.just(V.FLOAT32)))
arrays = st.one_of(
    st.tuples(st.lists(st.text(max_size=5), max_size=5), st.just(V.STRING)),
    st.tuples(st.lists(st.integers(-2**15, 2**15 - 1), max_size=5), st.just(V.INT16)),
    st.tuples(st.lists(st.floats(allow_nan=False), max_size=5), st.just(V.FLOAT64)))


@given(values=st.lists(scalars, max_size=6), lists=st.lists(arrays, max_size=3),
       rows=st.lists(st.integers(1, 5), max_size=4),
       kind=st.sampled_from(["Q4_0", "Q5_1", "F16", "F32", "Q2_K"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_metadata_comes_back_and_the_size_is_known(tmp_path: Path, on_grid: Any, values: Any, lists: Any,
                                                       rows: Any, kind: str) -> None:
    entries: list[Any] = [("general.architecture", "x", V.STRING)]
    entries += [(f"k{i}", value, of) for i, (value, of) in enumerate(values)]
    entries += [(f"l{i}", value, V.ARRAY, of) for i, (value, of) in enumerate(lists)]
    codec = CODECS[kind]
    weights = [(f"t{i}", codec, on_grid(codec.grid, r, 256) if codec.grid else torch.ones(r, 3))
               for i, r in enumerate(rows)]
    size = write_gguf(tmp_path / "a.gguf", "x", entries, weights)
    assert size == (tmp_path / "a.gguf").stat().st_size == gguf_size(entries, plan(weights))
    file = read_gguf(tmp_path / "a.gguf")
    assert file.metadata == {entry[0]: entry[1] for entry in entries}
    assert list(file.entries) == [Meta(*entry) for entry in entries]


# ---- what cannot be written

@pytest.mark.parametrize(("entries", "message"), [
    ([], "general.architecture is missing"),
    ([("general.architecture", "gpt2", V.STRING), ("a", 1, V.UINT8), ("a", 2, V.UINT8)], "a: occurs twice"),
    ([("general.architecture", "x", V.STRING), ("a", 256, V.UINT8)], "between 0 and 255"),
    ([("general.architecture", "x", V.STRING), ("a", 1.5, V.INT32)], "cannot be stored as INT32"),
    ([("general.architecture", "x", V.STRING), ("a", "b", V.FLOAT32)], "cannot be stored as FLOAT32"),
    ([("general.architecture", "x", V.STRING), ("a", 3, V.STRING)], "cannot be stored as STRING"),
    ([("general.architecture", "x", V.STRING), ("a", [1], V.ARRAY)], "type of the array's items"),
    ([("general.architecture", "x", V.STRING), ("a", [[1]], V.ARRAY, V.ARRAY)], "arrays of arrays"),
    ([("general.architecture", "x", V.STRING), ("general.alignment", 64, V.UINT32)], "alignment is 64"),
])
def test_metadata_that_cannot_be_written(tmp_path: Path, entries: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        write_gguf(tmp_path / "a.gguf", "", entries, [])
    assert list(tmp_path.iterdir()) == []


def fails(error: BaseException) -> Any:
    def read() -> Node:
        raise error
    return read


@pytest.mark.parametrize(("tensor", "error", "message"), [
    (("w", CODECS["Q4_K"], torch.zeros(2, 640)), TargetError, "w: rows of 640 .* Q4_K"),
    (("w" * 64, CODECS["F32"], torch.zeros(2)), TargetError, "names of at most 63"),
    (("w", CODECS["Q4_0"], torch.zeros(2, 32)), TargetError, "w: Q4_0: cannot store a Dense"),
    (("w", CODECS["F32"], Lazy((3,), lambda: torch.zeros(2))), TargetError, "was announced"),
    (("w", CODECS["F32"], torch.tensor([float("inf")])), TargetError, "w: F32: cannot store NaN or infinite"),
    (("w", CODECS["F32"], Lazy((3,), fails(OSError(errno.EIO, "I/O error")))), ModelError, "cannot be read"),
    (("w", CODECS["F32"], Lazy((3,), fails(KeyboardInterrupt("stop")))), KeyboardInterrupt, "stop"),
])
def test_tensors_that_cannot_be_written_leave_nothing(tmp_path: Path, tensor: Any, error: Any,
                                                      message: str) -> None:
    with pytest.raises(error, match=message):
        write_gguf(tmp_path / "a.gguf", "x", [], [tensor])
    assert list(tmp_path.iterdir()) == []


def test_no_room_and_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="No such file or directory"):
        write_gguf(tmp_path / "nowhere" / "a.gguf", "x", [], [])
    monkeypatch.setattr("os.replace", fails_call)
    with pytest.raises(OutputError, match="No space left on device; free some space"):
        write_gguf(tmp_path / "a.gguf", "x", [], [("w", CODECS["F32"], torch.zeros(4))])
    assert list(tmp_path.iterdir()) == []


def fails_call(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# ---- what cannot be read

def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def info(name: bytes = b"w", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def raw(keys: tuple[bytes, ...] = (), infos: tuple[bytes, ...] = (), data: int = 128, version: int = 3,
        counts: tuple[int, int] | None = None, magic: bytes = b"GGUF") -> bytes:
    counts = counts or (len(infos), len(keys))
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(infos)
    return head + bytes(-len(head) % 32 + data)


HOSTILE = {
    "empty": (b"", "0 bytes are no GGUF"),
    "other": (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
    "version": (raw(version=1), "version 1 is not supported"),
    "big-endian": (raw(version=0x03000000), "big-endian"),
    "tensor count": (raw(counts=(2**62, 0)), "4611686018427387904 tensors do not fit"),
    "key count": (raw(counts=(0, 2**63)), "9223372036854775808 keys do not fit"),
    # the gguf package loops over such a count for ever
    "array count": (raw((key(b"a", 9, struct.pack("<IQ", 8, 2**60)),)), "values of 'a' do not fit"),
    "array of bytes": (raw((key(b"a", 9, struct.pack("<IQ", 0, 2**60)),)), "values of 'a' do not fit"),
    "array of arrays": (raw((key(b"a", 9, struct.pack("<IQ", 9, 1)),)), "array of arrays"),
    "string length": (raw((key(b"a", 8, struct.pack("<Q", 2**63)),)), "beyond the end of the file"),
    "key length": (raw((struct.pack("<Q", 2**63) + bytes(20),)), "a key needs 9223372036854775808 bytes"),
    "key bytes": (raw((key(b"\xff\xff", 4, bytes(4)),)), "a key is not UTF-8"),
    "value type": (raw((key(b"a", 13, bytes(8)),)), "13, which is no type"),
    "truth": (raw((key(b"a", 7, b"\x02"),)), "neither 0 nor 1"),
    "key twice": (raw((key(b"a", 0, b"\1"), key(b"a", 0, b"\1"))), "'a' occurs twice"),
    "alignment": (raw((key(b"general.alignment", 4, struct.pack("<I", 24)),)), "not a power of two"),
    "no alignment": (raw((key(b"general.alignment", 4, bytes(4)),)), "not a power of two"),
    "split": (raw((key(b"split.count", 2, struct.pack("<H", 3)),)), "one of 3 parts of a split"),
    "tensor twice": (raw((), (info(), info(offset=128)), 256), "'w' occurs twice"),
    "overlap": (raw((), (info(), info(b"v", offset=64)), 256), "'w' and 'v' overlap"),
    "unaligned": (raw((), (info(offset=4),), 256), "not a multiple of 32"),
    "cut off": (raw((), (info(),), 127), "cut off"),
    "far away": (raw((), (info(offset=2**62),)), "cut off"),
    "huge": (raw((), (info(shape=(32, 2**60)),)), "larger than the file"),
    "overflowing": (raw((), (info(shape=(2**63, 2**63, 2, 2)),)), "larger than the file"),
    "no rows": (raw((), (info(shape=(32, 0)),)), "whole blocks"),
    "no axes": (raw((), (info(shape=()), bytes(40))), "0 axes"),
    "many axes": (raw((), (info(shape=(1,) * 5),)), "5 axes"),
    "half a block": (raw((), (info(shape=(48,), kind=2),)), "whole blocks of 32"),
    "tensor type": (raw((), (info(kind=31),)), "type 31"),
    "no name": (raw((), (info(b""),)), "0 bytes instead of"),
    "long name": (raw((), (info(b"w" * 64),)), "64 bytes instead of"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_cost_one_message(tmp_path: Path, case: str) -> None:
    data, message = HOSTILE[case]
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(ModelError, match=message) as caught:
        read_gguf(tmp_path / "a.gguf")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(ModelError, match=r"cannot be read|no GGUF file"):
            read_gguf(path)


@given(data=st.data())
@quick
def test_damaged_files_are_read_or_refused(tmp_path: Path, tensors: Any, data: st.DataObject) -> None:
    """Whatever bytes change, vanish or appear: a result or a ModelError, at once."""
    path = tmp_path / "a.gguf"
    if not path.exists():
        write_gguf(path, "llama", METADATA, tensors)
    whole = bytearray(path.read_bytes())
    head = len(whole) if data.draw(st.booleans()) else 900  # most of what can go wrong is in the header
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, head - 1))
        match data.draw(st.sampled_from(["set", "set", "set", "cut", "insert", "count"])):
            case "set":
                whole[at:at + 1] = bytes([data.draw(st.integers(0, 255))])
            case "cut":
                del whole[at:at + data.draw(st.integers(1, 200))]
            case "insert":
                whole[at:at] = data.draw(st.binary(min_size=1, max_size=20))
            case "count":
                count = data.draw(st.sampled_from([0, 1, 2**31, 2**62, 2**64 - 1]))
                whole[at:at + 8] = struct.pack("<Q", count)
    damaged = tmp_path / "b.gguf"
    damaged.write_bytes(whole)
    with suppress(ModelError):
        file = read_gguf(damaged)
        for name in file.tensors:
            file.tensor(name)


def test_other_types(tmp_path: Path) -> None:
    """Types that we never write are read through the gguf package, or refused by name."""
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (1, 66), dtype=np.uint8)
    blocks[0, 1] &= 0x3F
    data = blocks.tobytes() + bytes(30) + np.arange(8, dtype=np.int32).tobytes() + bytes(18)
    infos = (info(b"iq", (256,), 16, 0), info(b"int", (8,), 26, 96), info(b"one", (128,), 41, 128))
    (tmp_path / "a.gguf").write_bytes(raw((), infos, 0) + data)
    file = read_gguf(tmp_path / "a.gguf")
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.IQ2_XXS)
    assert np.array_equal(file.tensor("iq").dense().numpy(), theirs[0])
    assert torch.equal(file.tensor("int").dense(), torch.arange(8.0))
    with pytest.raises(ModelError, match=r"one: storage type Q1_0 cannot be read here; convert"):
        file.tensor("one")
    with pytest.raises(ModelError, match=r"no tensor 'in'; did you mean 'int'"):
        file.tensor("in")


def test_nodes_keep_what_the_file_holds(tmp_path: Path, on_grid: Any) -> None:
    """A tensor of three axes reads as its rows; codes are held, not floats."""
    codec = CODECS["Q4_K"]
    node = on_grid(codec.grid, 6, 256)
    write_gguf(tmp_path / "a.gguf", "x", [], [("w", codec, node)])
    read = read_gguf(tmp_path / "a.gguf").tensor("w")
    assert isinstance(read, Quantized)
    assert read.grid == codec.grid
    assert torch.equal(read.codes, node.codes)
