"""The native format: any tree of any node, every number at the bits that it is counted with.

A folder of three things and the files that came with the model:

    tree.json            which node stands where, its shape and grid; the hash of the weights
    rarefy.safetensors   one tensor per stream of a leaf: codes at the grid's bits, masks and indices coded
    config.json          the model's configuration

n codes of b bits take ceil(n * b / 8) bytes: code i sits at bits i*b .. i*b + b - 1 of the stream, lowest
bit first. Masks, the indices of codebooks, and codes of which a tree says so are coded, as ``numerics.masks``
and ``numerics.coding`` say.
Under a mask only what is kept is stored, in the order of its places: values, codes, indices; scales and
codebooks stay whole.

A stream's name is the path of the weight and the way down its tree, as in
``model.norm.weight`` or ``lm_head.weight:scale.codes``, so tree.json cannot point anywhere else. Shared
weights are stored once, where they belong. Reading is strict: nothing missing, nothing over, no code
beyond its grid, and the hash must agree, so that what an interrupted copy left behind is refused; and
weights cannot be more than ``WEIGHTS_PER_BYTE`` times as many as the bytes of the file, so a small file
cannot fill the memory.
transformers must not find weights that it would misread, hence the unusual file name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rarefy.core.codebooks import Clustered, Hashed
from rarefy.core.errors import ModelError, OutputError, TargetError
from rarefy.core.nodes import Dense, Masked, Node, Product, Quantized, Shared, Sum
from rarefy.core.tensors import CP, TensorTrain, Tucker
from rarefy.formats.native_tree import (
    ClusteredSpec,
    CPSpec,
    DenseSpec,
    GridSpec,
    HashedSpec,
    MaskedSpec,
    ProductSpec,
    QuantizedSpec,
    SharedSpec,
    StoredSpec,
    SumSpec,
    TensorTrainSpec,
    TreeFile,
    TuckerSpec,
)
from rarefy.numerics.coding import (
    LARGEST,
    code_symbols,
    decode_symbols,
    pack_bits,
    packed_size,
    unpack_bits,
)
from rarefy.numerics.grids import Grid, Stored
from rarefy.numerics.masks import code_mask, decode_mask

TREE, WEIGHTS, CONFIG = "tree.json", "rarefy.safetensors", "config.json"
CHUNK = 1 << 20  # codes packed at once; a multiple of 8, so that chunks end on whole bytes
WEIGHTS_PER_BYTE = 256  # no compression of use comes near it
FREE = 1 << 24  # weights that any file may hold: a folder of a fully pruned layer is read, too

# torch's dtype -> safetensors' name of it; what safetensors has no word for is stored as its bytes
_KINDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
          torch.float8_e8m0fnu: "U8"}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _KINDS}


@dataclass(frozen=True, eq=False)
class Native:
    """What a native folder holds. ``files``: the tokenizer's and other files beside the weights."""

    trees: dict[str, Node]
    params: dict[str, Tensor]
    config: dict[str, Any]
    files: tuple[Path, ...]


# ---- writing

@dataclass(frozen=True, eq=False)
class _Stream:
    """One tensor of the safetensors file: its header entry and its bytes, in chunks."""

    name: str
    kind: str
    shape: tuple[int, ...]
    size: int
    width: int
    chunks: Callable[[], Iterator[np.ndarray]]


def save_native(folder: str | Path, trees: Mapping[str, Node], params: Mapping[str, Tensor],
                config: Mapping[str, Any], files: Iterable[str | Path] = ()) -> int:
    """Write the folder, whole or not at all; returns the bytes of streams, that is, without any header.

    files are copied beside it under their own names. The folder must not exist, or be empty.
    """
    folder, copied = Path(folder), [Path(file) for file in files]
    names = [file.name for file in copied]
    if len(set(names)) < len(names) or {TREE, WEIGHTS, CONFIG} & set(names):
        raise OutputError(f"{folder}: the files to copy repeat a name, or one of {TREE}, {WEIGHTS}, {CONFIG}")
    writer = _Writer(trees)
    specs = {path: writer.node(node, f"{path}:") for path, node in trees.items()}
    dense = {path: writer.dense(value, path) for path, value in params.items()}
    part = folder.with_name(folder.name + ".part")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(f"{folder}: exists and is not empty; choose another name or remove it")
        part.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{part}: cannot be made: {error.strerror or error}; remove it, or choose another "
                          "output folder") from None
    try:
        digest = _write_streams(part / WEIGHTS, writer.streams)
        (part / CONFIG).write_text(json.dumps(dict(config), indent=1, sort_keys=True), encoding="utf-8")
        for file in copied:
            shutil.copyfile(file, part / file.name)
        tree = TreeFile(sha256=digest, grids=tuple(map(_grid_spec, writer.grids)), trees=specs, params=dense,
                        files=tuple(names))
        (part / TREE).write_text(tree.model_dump_json(), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        os.replace(part, folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror or error}; free some space or "
                          "choose another output folder") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return sum(stream.size for stream in writer.streams)


class _Writer:
    """Walks the trees and gathers their streams and grids."""

    def __init__(self, trees: Mapping[str, Node]) -> None:
        self.trees = trees
        self.streams: list[_Stream] = []
        self.grids: dict[Grid, int] = {}
        self.taken: set[str] = set()

    def node(self, node: Node, at: str, keep: Tensor | None = None) -> Any:
        """What tree.json says of a node; its streams are added. ``keep``: where masks let it through."""
        match node:
            case Dense(values=values):
                return self.dense(values, f"{at}values", keep)
            case Quantized():
                return self.quantized(node, at, keep)
            case Masked(keep=own, inner=inner):
                self.coded(code_mask(own), f"{at}keep")
                both = own if keep is None else own & keep
                return MaskedSpec(shape=tuple(own.shape), inner=self.node(inner, f"{at}inner.", both))
            case Clustered(codebook=codebook, index=index):
                used = index if keep is None else index[node.used(keep)]
                self.coded(code_symbols(used, codebook.shape[1]), f"{at}index")
                return ClusteredSpec(shape=(index.shape[0], index.shape[1]),
                                     codebook=self.dense(codebook, f"{at}codebook"))
            case Shared(path=path, of=of):
                if path not in self.trees or self.trees[path].shape != of.shape:
                    raise TargetError(f"{at[:-1]}: shares {path!r}, which is not among the weights to save")
                return SharedSpec(path=path)
            case _:
                return self.factors(node, at)

    def factors(self, node: Node, at: str) -> Any:
        """Nodes whose entries are no single numbers: all of them is stored, whatever a mask keeps."""
        match node:
            case Product(left=left, right=right):
                return ProductSpec(left=self.node(left, f"{at}left."), right=self.node(right, f"{at}right."))
            case Sum(terms=terms):
                return SumSpec(terms=self.several(terms, at))
            case Hashed(buckets=buckets, seed=seed, size=size):
                return HashedSpec(shape=size, seed=seed, buckets=self.dense(buckets, f"{at}buckets"))
            case Tucker(left=left, core=core, right=right, window=window):
                return TuckerSpec(window=window, left=self.node(left, f"{at}left."),
                                  core=self.node(core, f"{at}core."), right=self.node(right, f"{at}right."))
            case CP(factors=factors):
                return CPSpec(factors=self.several(factors, at))
            case TensorTrain(cores=cores, row_digits=rows, column_digits=columns):
                return TensorTrainSpec(rows=rows, columns=columns, cores=self.several(cores, at))
            case _:
                raise TargetError(f"{at[:-1]}: the native format cannot store a {type(node).__name__}")

    def several(self, nodes: tuple[Node, ...], at: str) -> tuple[Any, ...]:
        return tuple(self.node(node, f"{at}{k}.") for k, node in enumerate(nodes))

    def quantized(self, node: Quantized, at: str, keep: Tensor | None) -> QuantizedSpec:
        codes, grid = node.codes, node.grid
        held = codes if keep is None else codes[keep]
        if node.coded:
            self.coded(code_symbols(held, len(grid.levels)), f"{at}codes")
        else:
            self.packed(held, grid.code_bits, f"{at}codes")
        return QuantizedSpec(
            shape=(codes.shape[0], codes.shape[1]), grid=self.grids.setdefault(grid, len(self.grids)),
            coded=node.coded, scale=self.node(node.scale, f"{at}scale."),
            zero=None if node.zero is None else self.node(node.zero, f"{at}zero."))

    def dense(self, values: Tensor, name: str, keep: Tensor | None = None) -> DenseSpec:
        if values.dtype not in _KINDS:
            raise TargetError(f"{name}: the native format cannot store {values.dtype}; convert it to float32")
        kept = tuple(values.shape) if keep is None else (int(keep.sum()),)
        width = values.element_size()

        def chunks() -> Iterator[np.ndarray]:
            raw = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            yield (raw if keep is None else raw.view(-1, width)[keep.reshape(-1)].view(-1)).numpy()

        size = prod(kept) * width
        if size or not values.numel():  # of a fully dropped weight nothing is stored
            self.add(_Stream(name, _KINDS[values.dtype], kept, size, width, chunks))
        return DenseSpec(shape=tuple(values.shape), dtype=str(values.dtype).removeprefix("torch."))

    def packed(self, codes: Tensor, bits: int, name: str) -> None:
        size = packed_size(codes.numel(), bits)

        def chunks() -> Iterator[np.ndarray]:
            for part in torch.split(codes.detach().cpu().reshape(-1), CHUNK):
                yield pack_bits(part.contiguous().view(torch.uint8).numpy(), bits)

        if size:
            self.add(_Stream(name, "U8", (size,), size, 1, chunks))

    def coded(self, data: bytes, name: str) -> None:
        if data:
            array = np.frombuffer(data, np.uint8)
            self.add(_Stream(name, "U8", (len(data),), len(data), 1, lambda: iter((array,))))

    def add(self, stream: _Stream) -> None:
        if not stream.size:
            raise TargetError(f"{stream.name}: is empty; remove it from the model")
        if stream.name in self.taken:
            raise TargetError(f"{stream.name}: two weights or parameters have this name")
        self.taken.add(stream.name)
        self.streams.append(stream)


def _grid_spec(grid: Grid) -> GridSpec:
    def stored(how: Stored) -> StoredSpec:
        return StoredSpec(dtype=str(how.dtype).removeprefix("torch."), bits=how.bits, low=how.low,
                          over=how.over, relative=how.relative)

    return GridSpec(name=grid.name, levels=grid.levels, group=grid.group, scale=stored(grid.scale),
                    zero=None if grid.zero is None else stored(grid.zero))


def _write_streams(path: Path, streams: list[_Stream]) -> str:
    """A safetensors file, one chunk in memory at a time; wide numbers first, so that all are aligned."""
    streams = sorted(streams, key=lambda stream: -stream.width)
    header, end = {}, 0
    for stream in streams:
        header[stream.name] = {"dtype": stream.kind, "shape": stream.shape,
                               "data_offsets": (end, end + stream.size)}
        end += stream.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(len(text) + -len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as out:
        for piece in (len(text).to_bytes(8, "little"), text):
            out.write(piece)
            digest.update(piece)
        for stream in streams:
            for chunk in stream.chunks():
                out.write(chunk.data)
                digest.update(chunk.data)
    assert path.stat().st_size == 8 + len(text) + end
    return digest.hexdigest()


# ---- reading

def load_native(folder: str | Path) -> Native:
    """Read a native folder back, bit for bit, or raise ModelError."""
    folder = Path(folder)
    try:
        tree = TreeFile.model_validate_json((folder / TREE).read_bytes())
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with (folder / WEIGHTS).open("rb") as weights:
            digest = hashlib.file_digest(weights, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{error.filename}: cannot be read: {error.strerror}; a native folder holds {TREE}, "
                         f"{WEIGHTS} and {CONFIG}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its text"
        raise ModelError(f"{folder / TREE}: {where}: {first['msg']}; the file is damaged or of another "
                         "version") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{folder / CONFIG}: {error}; the file is damaged") from None
    if not isinstance(config, dict):
        raise ModelError(f"{folder / CONFIG}: expected an object of settings")
    if digest != tree.sha256:
        raise ModelError(f"{folder}: {WEIGHTS} is not the one that {TREE} was written with (SHA-256 "
                         f"{digest[:12]} instead of {tree.sha256[:12]}); copy the folder again")
    files = tuple(folder / name for name in tree.files)
    for file in files:
        if file.parent != folder or not file.is_file():
            raise ModelError(f"{folder}: {TREE} names the file {str(file)!r}, which is not in the folder")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as opened:
            reader = _Reader(folder, tree, opened)
            trees = {path: reader.tree(path) for path in tree.trees}
            params = {path: reader.dense(spec, path) for path, spec in tree.params.items()}
            reader.finish()
    except SafetensorError as error:
        raise ModelError(f"{folder / WEIGHTS}: {error}; copy the folder again") from None
    except RecursionError:
        raise ModelError(f"{folder}: {TREE} is nested too deeply to be a model") from None
    return Native(trees, params, config, files)


class _Reader:
    """Builds the trees; every stream is taken exactly once."""

    def __init__(self, folder: Path, tree: TreeFile, opened: Any) -> None:
        self.folder, self.spec, self.opened = folder, tree, opened
        self.left = set(opened.keys())
        self.room = FREE + WEIGHTS_PER_BYTE * (folder / WEIGHTS).stat().st_size
        self.built: dict[str, Node | None] = {}
        self.grids = [self.grid(spec) for spec in tree.grids]

    def fail(self, where: str, what: str) -> ModelError:
        return ModelError(f"{self.folder}: {where}: {what}; the folder is damaged, write it again")

    def tree(self, path: str) -> Node:
        if path not in self.spec.trees:
            raise self.fail(path, "shared, but no such weight is stored")
        if path not in self.built:
            self.built[path] = None
            self.built[path] = self.node(self.spec.trees[path], f"{path}:")
        node = self.built[path]
        if node is None:
            raise self.fail(path, "a weight that shares itself")
        return node

    def node(self, spec: Any, at: str, keep: Tensor | None = None) -> Node:
        """The node that a spec tells of; ``keep``: where masks let it through, which is what is stored."""
        match spec:
            case DenseSpec():
                return Dense(self.dense(spec, f"{at}values", keep))
            case QuantizedSpec():
                return self.quantized(spec, at, keep)
            case MaskedSpec(shape=shape):
                own = self.mask(f"{at}keep", shape)
                self.expect(at, keep is None or keep.shape == own.shape, f"a mask of {shape} under another")
                inner = self.node(spec.inner, f"{at}inner.", own if keep is None else own & keep)
                self.expect(at, inner.shape == shape, f"a mask of {shape} over a weight of {inner.shape}")
                return Masked(own, inner)
            case ClusteredSpec():
                return self.clustered(spec, at, keep)
            case SharedSpec(path=path):
                return Shared(path, self.tree(path))
            case _:
                return self.factors(spec, at)

    def factors(self, spec: Any, at: str) -> Node:
        match spec:
            case ProductSpec():
                left, right = self.matrices((spec.left, spec.right), at, ("left", "right"))
                self.expect(at, left.shape[1] == right.shape[0],
                            f"a product of {left.shape} and {right.shape}")
                return Product(left, right)
            case SumSpec():
                terms = tuple(self.node(term, f"{at}{k}.") for k, term in enumerate(spec.terms))
                shapes = {term.shape for term in terms}
                self.expect(at, len(shapes) == 1, f"a sum of {sorted(shapes)}")
                return Sum(terms)
            case HashedSpec():
                buckets = self.dense(spec.buckets, f"{at}buckets")
                self.expect(at, buckets.ndim == 1 and buckets.is_floating_point(),
                            f"buckets of {tuple(buckets.shape)}, {buckets.dtype}")
                return Hashed(buckets, spec.seed, spec.shape)
            case TuckerSpec():
                left, core, right = self.matrices((spec.left, spec.core, spec.right), at,
                                                  ("left", "core", "right"))
                self.expect(at, core.shape == (left.shape[1], right.shape[1] * prod(spec.window)),
                            f"a core of {core.shape} between {left.shape} and {right.shape}")
                return Tucker(left, core, right, spec.window)
            case CPSpec():
                factors = self.matrices(spec.factors, at)
                self.expect(at, len({factor.shape[1] for factor in factors}) == 1, "factors of several ranks")
                return CP(factors)
            case TensorTrainSpec():
                return self.train(spec, at)
            case _:
                raise TypeError(type(spec).__name__)

    def matrices(self, specs: tuple[Any, ...], at: str, names: tuple[str, ...] = ()) -> tuple[Node, ...]:
        nodes = tuple(self.node(spec, f"{at}{name}.")
                      for spec, name in zip(specs, names or range(len(specs)), strict=True))
        self.expect(at, all(len(node.shape) == 2 for node in nodes),
                    f"factors of {', '.join(str(node.shape) for node in nodes)}")
        return nodes

    def train(self, spec: TensorTrainSpec, at: str) -> TensorTrain:
        cores, rank = self.matrices(spec.cores, at), 1
        self.expect(at, len(cores) == len(spec.rows) == len(spec.columns), f"{len(cores)} cores")
        for core, rows, columns in zip(cores, spec.rows, spec.columns, strict=True):
            self.expect(at, core.shape[0] == rank * rows and core.shape[1] % columns == 0,
                        f"a core of {core.shape} after rank {rank}")
            rank = core.shape[1] // columns
        self.expect(at, rank == 1, f"a last rank of {rank}")
        return TensorTrain(cores, spec.rows, spec.columns)

    def clustered(self, spec: ClusteredSpec, at: str, keep: Tensor | None) -> Clustered:
        codebook = self.dense(spec.codebook, f"{at}codebook")
        self.expect(at, codebook.ndim == 3 and codebook.shape[0] in (1, spec.shape[1])
                    and codebook.is_floating_point() and codebook.shape[1] <= LARGEST,
                    f"a codebook of {tuple(codebook.shape)} for {spec.shape[1]} places")
        _, values, d = codebook.shape
        self.expect(at, keep is None or tuple(keep.shape) == (spec.shape[0], spec.shape[1] * d),
                    f"an index of {spec.shape} under another mask")
        self.afford(at, prod(spec.shape))
        index = torch.zeros(spec.shape, dtype=torch.uint8 if values <= 256 else torch.int32)
        node = Clustered(codebook, index)
        used = torch.ones(spec.shape, dtype=torch.bool) if keep is None else node.used(keep)
        with self.failing(f"{at}index"):
            count = int(used.sum())
            index[used] = decode_symbols(self.coded(f"{at}index", count), count, values)
        return node

    def mask(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self.afford(name, prod(shape))
        with self.failing(name):
            return decode_mask(self.coded(name, prod(shape)), shape)

    def coded(self, name: str, count: int) -> np.ndarray:
        """The bytes of a coded stream: of any length, so whoever decodes it must use them all up."""
        if not count:
            return np.zeros(0, np.uint8)
        if name not in self.left:
            raise self.fail(name, "missing, or used twice")
        shape = self.opened.get_slice(name).get_shape()
        array: np.ndarray = self.stream(name, "U8", (prod(shape),)).numpy()
        return array

    def afford(self, at: str, weights: int) -> None:
        """Codings can be arbitrarily short, so what they stand for is held to a multiple of the file."""
        self.room -= weights
        self.expect(at, self.room >= 0, f"more than {WEIGHTS_PER_BYTE} weights per byte")

    @contextmanager
    def failing(self, name: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise self.fail(name, str(error)) from None

    def expect(self, at: str, holds: bool, what: str) -> None:
        if not holds:
            raise self.fail(at, what)

    def quantized(self, spec: QuantizedSpec, at: str, keep: Tensor | None) -> Quantized:
        self.expect(at, spec.grid < len(self.grids), f"grid {spec.grid} of {len(self.grids)}")
        grid, (rows, columns) = self.grids[spec.grid], spec.shape
        group = grid.group or columns
        self.expect(at, columns % group == 0, f"{columns} columns in groups of {group}")
        codes = (self.decoded(f"{at}codes", len(grid.levels), spec.shape, keep) if spec.coded
                 else self.packed(f"{at}codes", grid.code_bits, spec.shape, keep))
        self.expect(at, not codes.numel() or int(codes.max()) < len(grid.levels),
                    f"a code beyond the {len(grid.levels)} levels of {grid.name!r}")
        self.expect(at, (spec.zero is None) == (grid.zero is None), f"the zero that {grid.name!r} tells of")
        scale = self.number(spec.scale, f"{at}scale.", (rows, columns // group))
        zero = None if spec.zero is None else self.number(spec.zero, f"{at}zero.", (rows, columns // group))
        return Quantized(codes, scale, zero, grid, spec.coded)

    def number(self, spec: Any, at: str, shape: tuple[int, int]) -> Node:
        """The scales or zeros of a weight, one for every group."""
        node = self.node(spec, at)
        self.expect(at, node.shape == shape, f"{node.shape} numbers for {shape} groups")
        return node

    def grid(self, spec: GridSpec) -> Grid:
        def stored(how: StoredSpec) -> Stored:
            return Stored(self.dtype(how.dtype, spec.name), how.bits, how.low, how.over, how.relative)

        try:
            return Grid(spec.name, spec.levels, spec.group, stored(spec.scale),
                        None if spec.zero is None else stored(spec.zero))
        except (ValueError, OverflowError) as error:
            raise self.fail(f"grid {spec.name!r}", str(error)) from None

    def dtype(self, name: str, where: str) -> torch.dtype:
        if name not in _DTYPES:
            raise self.fail(where, f"numbers of type {name!r}")
        return _DTYPES[name]

    def dense(self, spec: DenseSpec, name: str, keep: Tensor | None = None) -> Tensor:
        dtype = self.dtype(spec.dtype, name)
        if keep is None:  # not the mapped file itself
            return self.stream(name, _KINDS[dtype], spec.shape).clone().view(dtype)
        self.expect(name, tuple(keep.shape) == spec.shape, f"values of {spec.shape} under another mask")
        count, width = int(keep.sum()), dtype.itemsize
        raw = torch.zeros(prod(spec.shape), width, dtype=torch.uint8)
        if count:
            kept = self.stream(name, _KINDS[dtype], (count,)).view(torch.uint8)
            raw[keep.reshape(-1)] = kept.view(count, width)
        return raw.view(-1).view(dtype).view(spec.shape)

    def decoded(self, name: str, alphabet: int, shape: tuple[int, ...], keep: Tensor | None) -> Tensor:
        """Codes that are coded by how often each occurs."""
        self.expect(name, keep is None or tuple(keep.shape) == shape, f"codes of {shape} under another mask")
        self.afford(name, prod(shape))
        count = prod(shape) if keep is None else int(keep.sum())
        with self.failing(name):
            codes = decode_symbols(self.coded(name, count), count, alphabet)
        return self.placed(codes, shape, keep)

    def placed(self, codes: Tensor, shape: tuple[int, ...], keep: Tensor | None) -> Tensor:
        """Codes in their places; zero where a mask keeps none."""
        if keep is None:
            return codes.view(shape)
        whole = torch.zeros(shape, dtype=torch.uint8)
        whole[keep] = codes
        return whole

    def packed(self, name: str, bits: int, shape: tuple[int, ...], keep: Tensor | None) -> Tensor:
        self.expect(name, keep is None or tuple(keep.shape) == shape, f"codes of {shape} under another mask")
        count = prod(shape) if keep is None else int(keep.sum())
        raw = self.stream(name, "U8", (packed_size(count, bits),)).numpy() if count else np.empty(0, np.uint8)
        codes = np.empty(count, np.uint8)
        with self.failing(name):
            for start in range(0, count, CHUNK):
                size = min(CHUNK, count - start)
                first = start * bits // 8
                piece = raw[first:first + packed_size(size, bits)]
                codes[start:start + size] = unpack_bits(piece, bits, size)
        return self.placed(torch.from_numpy(codes), shape, keep)

    def stream(self, name: str, kind: str, shape: tuple[int, ...]) -> Tensor:
        """One stream, which must have exactly this type and shape in the file's header."""
        if name not in self.left:
            raise self.fail(name, "missing, or used twice")
        self.left.remove(name)
        there = self.opened.get_slice(name)
        if there.get_dtype() != kind or tuple(there.get_shape()) != shape:
            raise self.fail(name, f"expected {kind} {shape}, found {there.get_dtype()} {there.get_shape()}")
        values: Tensor = self.opened.get_tensor(name)
        return values

    def finish(self) -> None:
        if self.left:
            raise self.fail(min(self.left), f"stored but part of no weight ({len(self.left)} such streams)")
