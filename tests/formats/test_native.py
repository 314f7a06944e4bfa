"""The native format: every bit counted is a bit written, and what is read back is the same tree."""

from __future__ import annotations

import errno
import hashlib
import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from rarefy.core.codebooks import Clustered, Hashed
from rarefy.core.errors import ModelError, OutputError, TargetError
from rarefy.core.nodes import Dense, Masked, Node, Product, Quantized, Shared, Sum
from rarefy.core.tensors import CP, TensorTrain, Tucker
from rarefy.formats.ggml import CODECS
from rarefy.formats.native import CHUNK, CONFIG, TREE, WEIGHTS, load_native, save_native
from rarefy.numerics.grids import Grid, integer_grid

GRIDS = [*(codec.grid for codec in CODECS.values() if codec.grid),
         *(integer_grid(bits, group, symmetric=symmetric)
           for bits in range(2, 9) for group, symmetric in ((32, True), (0, False)))]
FIXTURES = [HealthCheck.function_scoped_fixture]


@st.composite
def shapes(draw: Any) -> tuple[int, int]:
    return draw(st.integers(1, 4)), draw(st.sampled_from([256, 512]))


def mask(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.4


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 9).to(dtype)


def clustered(shape: tuple[int, int], values: int, d: int, several: bool, seed: int) -> Clustered:
    """Skewed indices, so that entropy coding has something to do."""
    places = shape[1] // d
    uniform = torch.rand((shape[0], places), generator=torch.Generator().manual_seed(seed))
    index = (uniform**3 * values).to(torch.uint8 if values <= 256 else torch.int32)
    return Clustered(normal((places if several else 1, values, d), seed, torch.float16), index)


def random_tree(draw: Any, on_grid: Any, shape: tuple[int, int], depth: int) -> Node:
    """Any node over any nodes, of that shape; its columns are a multiple of 256."""
    kinds = ["dense", "quantized", "clustered", "hashed"]
    if depth:
        kinds += ["masked", "masked", "product", "sum", "tucker", "cp", "train"]
    seed, (rows, columns) = draw(st.integers(0, 9999)), shape

    def matrix(*size: int) -> Dense:
        return Dense(normal(size, seed))

    match draw(st.sampled_from(kinds)):
        case "dense":
            dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int8]))
            return Dense(normal(shape, seed, dtype))
        case "quantized":
            fitting = [grid for grid in GRIDS if grid.block == 0 or columns % grid.block == 0]
            return on_grid(draw(st.sampled_from(fitting)), *shape, seed)
        case "clustered":
            values, d = draw(st.sampled_from([1, 2, 13, 256, 300])), draw(st.sampled_from([1, 2, 4]))
            return clustered(shape, values, d, draw(st.booleans()), seed)
        case "hashed":
            return Hashed(normal((draw(st.integers(1, 40)),), seed, torch.float16), seed, shape)
        case "masked":
            return Masked(drawn_mask(draw, shape, seed), random_tree(draw, on_grid, shape, depth - 1))
        case "product":
            return Product(random_tree(draw, on_grid, (rows, 256), 0),
                           random_tree(draw, on_grid, (256, columns), 0))
        case "tucker":
            return Tucker(matrix(rows, 2), matrix(2, 3 * 4), matrix(columns // 4, 3), (2, 2))
        case "cp":
            return CP((matrix(rows, 3), matrix(columns // 4, 3), matrix(2, 3), matrix(2, 3)))
        case "train":
            cores = (matrix(rows, 16 * 3), matrix(3, columns // 16))
            return TensorTrain(cores, (rows, 1), (16, columns // 16))
        case _:
            count = draw(st.integers(1, 3))
            return Sum(tuple(random_tree(draw, on_grid, shape, depth - 1) for _ in range(count)))


def drawn_mask(draw: Any, shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Nothing, all, rows, columns, 2:4, or here and there."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(shape, generator=generator)
    match draw(st.sampled_from(["none", "all", "rows", "columns", "2:4", "few", "many"])):
        case "none" | "all" as how:
            return torch.full(shape, how == "all")
        case "rows":
            return (noise[:, :1] > 0.5).expand(shape).contiguous()
        case "columns":
            return (noise[:1] > 0.5).expand(shape).contiguous()
        case "2:4":
            return (noise.view(-1, 4).argsort(1).argsort(1) < 2).view(shape)
        case how:
            return noise < (0.03 if how == "few" else 0.6)


def same(one: Node, other: Node, keep: torch.Tensor | None = None) -> bool:
    """The same tree: classes, grids, and every stored tensor bit for bit where masks let it through."""
    match one, other:
        case Dense(), Dense():
            return identical(one.values, other.values, keep)
        case Quantized(), Quantized():
            zeros = (one.zero is None and other.zero is None) or (
                one.zero is not None and other.zero is not None and same(one.zero, other.zero))
            return (zeros and one.grid == other.grid and identical(one.codes, other.codes, keep)
                    and same(one.scale, other.scale))
        case Masked(), Masked():
            both = one.keep if keep is None else one.keep & keep
            return identical(one.keep, other.keep) and same(one.inner, other.inner, both)
        case Clustered(), Clustered():
            return (identical(one.codebook, other.codebook)
                    and identical(one.index, other.index, None if keep is None else one.used(keep)))
        case Hashed(), Hashed():
            return identical(one.buckets, other.buckets) and (one.seed, one.size) == (other.seed, other.size)
        case Shared(), Shared():
            return one.path == other.path and same(one.of, other.of)
        case _:
            below = list(zip(one.children(), other.children(), strict=True))
            plain = {name: value for name, value in vars(one).items() if isinstance(value, tuple | int)
                     and not name.startswith("_") and value != one.children()}
            return (type(one) is type(other) and bool(below) and all(same(a, b) for a, b in below)
                    and all(getattr(other, name) == value for name, value in plain.items()))


def identical(one: torch.Tensor, other: torch.Tensor, keep: torch.Tensor | None = None) -> bool:
    alike = one.dtype == other.dtype and one.shape == other.shape
    one, other = (each.reshape(-1).view(torch.uint8).view(-1, each.element_size()) for each in (one, other))
    if keep is not None:
        one, other = one[keep.reshape(-1)], other[keep.reshape(-1)]
    return alike and torch.equal(one, other)


def stream_bits(node: Node, keep: torch.Tensor | None = None) -> list[int]:
    """The bits of each stream of a tree, counted by the nodes themselves; ``keep``: by the masks above."""
    bits = node.bits() if keep is None else node.kept_bits(keep)
    match node:
        case Quantized(scale=scale, zero=zero):
            rest = stream_bits(scale) + ([] if zero is None else stream_bits(zero))
            return [bits - sum(rest), *rest]
        case Masked(inner=inner):
            both = node.keep if keep is None else node.keep & keep
            return [bits - inner.kept_bits(both), *stream_bits(inner, both)]
        case _ if node.children():
            return [bits for child in node.children() for bits in stream_bits(child)]
        case _:
            return [bits]


def data_bytes(path: Path) -> int:
    """Bytes of a safetensors file behind its header."""
    with path.open("rb") as file:
        head, = struct.unpack("<Q", file.read(8))
    return path.stat().st_size - 8 - head


@given(data=st.data(), shape=shapes())
@settings(max_examples=40, deadline=None, suppress_health_check=FIXTURES)
def test_bits_counted_are_bytes_written_and_the_tree_comes_back(
        tmp_path_factory: pytest.TempPathFactory, on_grid: Any, data: st.DataObject, shape: Any) -> None:
    """Laws 2 and 7 over any tree: header aside, bits() rounded up to bytes, stream by stream."""
    folder = tmp_path_factory.mktemp("native") / "out"
    tree = random_tree(data.draw, on_grid, shape, 2)
    written = save_native(folder, {"w": tree}, {}, {})
    bits = stream_bits(tree)
    assert sum(bits) == tree.bits()
    assert written == data_bytes(folder / WEIGHTS) == sum(-(-count // 8) for count in bits)
    read = load_native(folder).trees["w"]
    assert same(tree, read)
    assert read.bits() == tree.bits()
    assert np.array_equal(read.dense().numpy(), tree.dense().numpy(), equal_nan=True)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_every_grid(tmp_path: Path, on_grid: Any, grid: Grid) -> None:
    """Whole bytes everywhere here, so bits() is exact, not only to the byte."""
    node = on_grid(grid, 8, 512, 5)
    assert save_native(tmp_path / "out", {"w": node}, {}, {}) * 8 == node.bits()
    assert same(load_native(tmp_path / "out").trees["w"], node)


def test_long_streams_cross_chunks(tmp_path: Path, on_grid: Any) -> None:
    grid = integer_grid(3, 0)
    node = on_grid(grid, 3, CHUNK // 2 + 1, 1)
    written = save_native(tmp_path / "out", {"w": node}, {}, {})
    assert written == -(-node.codes.numel() * 3 // 8) + 3 * 2
    assert same(load_native(tmp_path / "out").trees["w"], node)


@pytest.fixture
def model(on_grid: Any) -> dict[str, Any]:
    """Trees with a tied head, parameters of several types, a config: what ``save_native`` takes."""
    repair = Product(Dense(torch.randn(4, 2)), Dense(torch.randn(2, 256)))
    embed = Sum((on_grid(CODECS["Q4_K"].grid, 4, 256), repair))
    return {
        "trees": {"lm_head.weight": Shared("embed.weight", embed), "embed.weight": embed,
                  "up.weight": Masked(mask((3, 64), 1), on_grid(CODECS["MXFP4"].grid, 3, 64)),
                  "down.weight": on_grid(integer_grid(5, 32, symmetric=False), 3, 64),
                  "book.weight": clustered((3, 64), 13, 1, False, 1),
                  "many.weight": clustered((3, 64), 4, 4, True, 1),
                  "hashed.weight": Hashed(torch.randn(10).half(), 7, (3, 64)),
                  "tucker.weight": Tucker(*(Dense(torch.randn(size)) for size in ((5, 2), (2, 12), (7, 3))),
                                          (2, 2)),
                  "cp.weight": CP(tuple(Dense(torch.randn(s, 3)) for s in (3, 7, 2))),
                  "train.weight": TensorTrain((Dense(torch.randn(3, 8)), Dense(torch.randn(2 * 2, 5))),
                                              (3, 2), (4, 5))},
        "params": {"norm.weight": torch.randn(7).bfloat16(), "step": torch.tensor(3),
                   "bias": torch.randn(2, 3)},
        "config": {"model_type": "llama", "nested": {"rope": [1.0, None]}},
    }


def test_a_model_comes_back(tmp_path: Path, model: dict[str, Any]) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    written = save_native(tmp_path / "out", **model, files=[tmp_path / "tokenizer.json"])
    read = load_native(tmp_path / "out")
    assert all(same(read.trees[path], tree) for path, tree in model["trees"].items())
    assert list(read.trees) == list(model["trees"])
    assert all(identical(read.params[path], value) for path, value in model["params"].items())
    assert read.config == model["config"]
    assert [file.read_text() for file in read.files] == ["{}"]
    head = read.trees["lm_head.weight"]
    assert isinstance(head, Shared)
    assert head.of is read.trees["embed.weight"]
    # what is shared is stored once
    bits = sum(sum(-(-b // 8) for b in stream_bits(tree)) for tree in model["trees"].values()
               if not isinstance(tree, Shared))
    assert written == bits + sum(value.numel() * value.element_size() for value in model["params"].values())
    assert {file.name for file in (tmp_path / "out").iterdir()} == {TREE, WEIGHTS, CONFIG, "tokenizer.json"}
    with safe_open(tmp_path / "out" / WEIGHTS, framework="pt") as file:
        assert torch.equal(file.get_tensor("bias"), model["params"]["bias"])


def test_the_same_model_gives_the_same_bytes(tmp_path: Path, model: dict[str, Any]) -> None:
    for name in ("a", "b"):
        save_native(tmp_path / name, **model)
    for file in (TREE, WEIGHTS, CONFIG):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, model: dict[str, Any],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    stranger, one = Shared("nowhere", Dense(torch.ones(2))), torch.ones(1)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TargetError, "shares 'nowhere', which is not", {"trees": {"a": stranger}}),
        (TargetError, "a:values: two weights or", {"trees": {"a": Dense(one)}, "params": {"a:values": one}}),
        (TargetError, "cannot store torch.complex64", {"params": {"a": one.to(torch.complex64)}}),
        (TargetError, "a: is empty", {"params": {"a": torch.ones(0)}}),
        (OutputError, "repeat a name", {"files": [tmp_path / CONFIG]}),
        (OutputError, "No such file", {"files": [tmp_path / "missing.json"]}),
    ]
    for error, message, change in cases:
        with pytest.raises(error, match=message):
            save_native(out, **{**model, **change})
        assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OutputError, match="No space left on device; free some space"):
        save_native(out, **model)
    assert list(tmp_path.iterdir()) == []


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_other_folders_are_left_alone(tmp_path: Path, model: dict[str, Any]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    save_native(out, **model)  # an empty folder is as good as none
    with pytest.raises(OutputError, match="exists and is not empty"):
        save_native(out, **model)
    load_native(out)


# ---- damaged folders

def rewrite(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tree = json.loads((out / TREE).read_text())
    change(tree)
    (out / TREE).write_text(json.dumps(tree))


def rehash(out: Path) -> None:
    digest = hashlib.sha256((out / WEIGHTS).read_bytes()).hexdigest()
    rewrite(out, lambda tree: tree.update(sha256=digest))


def edit_weights(out: Path, stream: str, at: int, value: int) -> None:
    """Change one byte of a stream and make the hash agree again."""
    whole = bytearray((out / WEIGHTS).read_bytes())
    head, = struct.unpack("<Q", whole[:8])
    first = json.loads(whole[8:8 + head])[stream]["data_offsets"]
    whole[8 + head + (first[0] + at if at >= 0 else first[1] + at)] = value
    (out / WEIGHTS).write_bytes(whole)
    rehash(out)


def shared_chain(tree: dict[str, Any]) -> None:
    tree["trees"] |= {f"s{i}": {"node": "shared", "path": f"s{i + 1}"} for i in range(3000)}
    tree["trees"]["s3000"] = {"node": "shared", "path": "embed.weight"}


def deep(out: Path) -> None:
    """Nested further than json itself would write."""
    node = '{"node":"sum","terms":[' * 800 + '{"node":"shared","path":"embed.weight"}' + "]}" * 800
    text = (out / TREE).read_text()
    (out / TREE).write_text(text.replace('"trees":{', f'"trees":{{"deep":{node},'))


def put(*way: Any, **fields: Any) -> Callable[[Path], None]:
    """Damage that sets fields of tree.json, ``way`` down from its top."""
    def change(tree: dict[str, Any]) -> None:
        for step in way:
            tree = tree.setdefault(step, {}) if isinstance(step, str) else tree[step]
        tree.update(fields)

    return lambda out: rewrite(out, change)


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda out: [(out / name).write_bytes(content), name == WEIGHTS and content[0] and rehash(out)][1]


DOWN, HEAD, BIAS = ("trees", "down.weight"), ("trees", "lm_head.weight"), ("params", "bias")
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no tree": (lambda out: (out / TREE).unlink(), "tree.json: cannot be read"),
    "no weights": (lambda out: (out / WEIGHTS).unlink(), "rarefy.safetensors: cannot be read"),
    "no config": (lambda out: (out / CONFIG).unlink(), "config.json: cannot be read"),
    "text": (write(TREE, b"{"), "damaged"),
    "bytes": (write(TREE, b"\xff\xfe"), "damaged"),
    "config": (write(CONFIG, b"[1]"), "expected an object"),
    "config text": (write(CONFIG, b"\xff"), "config.json: .*damaged"),
    "version": (put(version=3), "version: .*of another version"),
    "extra": (put(code="import os"), "code: Extra inputs"),
    "kind": (put("trees", "x", node="pickle"), "trees.x"),
    "blend": (write(WEIGHTS, bytes(99)), "is not the one that tree.json was written with"),
    "header": (write(WEIGHTS, b"\xff" * 99), "rarefy.safetensors: "),
    "file": (put(files=["../tokenizer.json"]), "not in the folder"),
    "absolute": (put(files=["/etc/hostname"]), "not in the folder"),
    "missing": (put("params", "x", node="dense", shape=[2], dtype="float32"), "x: missing, or used twice"),
    "unused": (lambda out: rewrite(out, lambda tree: tree["params"].pop("bias")), "bias: .*of no weight"),
    "shape": (put(*BIAS, shape=[3, 2]), "bias: expected F32"),
    "huge": (put(*DOWN, shape=[2**40, 2**40]), "codes: expected U8"),
    "dtype": (put(*BIAS, dtype="complex64"), "'complex64'"),
    "grid": (put(*DOWN, grid=99), "grid 99 of"),
    "levels": (put("grids", 0, levels=[1.0, 0.0]), "ascending"),
    "infinite": (put("grids", 0, levels=[0.0, 1e999]), "grid 'Q4_K'"),
    "zero": (put(*DOWN, zero=None), "the zero that 'int5z"),
    "groups": (put("grids", -1, group=16), "groups"),
    "itself": (put(*HEAD, path="lm_head.weight"), "shares itself"),
    "nowhere": (put(*HEAD, path="x"), "no such weight"),
    "chain": (lambda out: rewrite(out, shared_chain), "nested too deeply"),
    "deep": (deep, "damaged|nested too deeply"),
    "code": (lambda out: edit_weights(out, "up.weight:inner.codes", 0, 0xFF), "beyond the 15 levels"),
    "bits": (lambda out: edit_weights(out, "odd:keep", -1, 0xFF), "bits are set behind the last entry"),
    "mask": (lambda out: edit_weights(out, "odd:keep", 0, 0xFF), "odd:keep: no coding of a mask"),
    "index": (lambda out: edit_weights(out, "book.weight:index", 0, 0xFF), "no coding of symbols"),
    "books": (put("trees", "book.weight", "codebook", shape=[13, 1, 1]), "codebook: expected F16"),
    "book": (put("trees", "many.weight", shape=[3, 8]), "a codebook of .16, 4, 4. for 8 places"),
    "places": (put("trees", "book.weight", shape=[3, 128]), "not exactly 384 symbols"),
    "fewer": (put("trees", "book.weight", shape=[2, 64]), "not exactly 128 symbols"),
    "bomb": (put("trees", "odd", shape=[2**20, 2**20]), "more than 256 weights per byte"),
    "buckets": (put("trees", "hashed.weight", "buckets", shape=[5, 2]), "buckets: expected F16"),
    "window": (put("trees", "tucker.weight", window=[3, 1]), "a core of .2, 12. between"),
    "ranks": (put("trees", "cp.weight", "factors", 0, shape=[3, 4]), "factors of several ranks|expected F32"),
    "digits": (put("trees", "train.weight", rows=[2, 3]), "a core of"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders_are_refused(tmp_path: Path, model: dict[str, Any], case: str) -> None:
    out = tmp_path / "out"
    model["trees"]["odd"] = Masked(mask((3, 5), 2), Dense(torch.randn(3, 5)))
    save_native(out, **model)
    damage, message = DAMAGE[case]
    damage(out)
    with pytest.raises(ModelError, match=message) as caught:
        load_native(out)
    assert "\n" not in str(caught.value)


@given(data=st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=FIXTURES)
def test_mutated_folders_are_read_or_refused(tmp_path: Path, model: dict[str, Any],
                                             data: st.DataObject) -> None:
    out = tmp_path / "out"
    if not out.exists():
        save_native(out, **model)
        (tmp_path / TREE).write_bytes((out / TREE).read_bytes())
        (tmp_path / WEIGHTS).write_bytes((out / WEIGHTS).read_bytes())
    tree, weights = bytearray((tmp_path / TREE).read_bytes()), bytearray((tmp_path / WEIGHTS).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole = tree if data.draw(st.booleans()) else weights
        at = data.draw(st.integers(0, min(len(whole), 2500) - 1))
        whole[at:at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    (out / TREE).write_bytes(tree)
    (out / WEIGHTS).write_bytes(weights)
    with suppress(json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError):
        rehash(out)  # so that more than the hash is tried
    with suppress(ModelError):
        load_native(out)
