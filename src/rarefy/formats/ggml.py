"""ggml's block formats: how llama.cpp lays a row of weights out in bytes.

A row is cut into blocks of 32, 64 or 256 weights, and every block is a small struct: the plain numbers
(fp16 or e8m0 scale, fp16 minimum), the small integers that multiply them in the 256-wide types, and the
codes, whose bits are spread over the bytes in *planes*. All of ggml's types share one pattern: of a chunk
of ``stride * 8/bits`` codes, byte j holds codes j, j + stride, j + 2*stride ..., low bits first,

    byte[j] = sum_k  (code[j + k*stride] >> low & mask) << (bits * k).

So a type is a few lines of data: a grid (what the codes mean, which is all that a quantizer needs to know)
and the parts of its struct in order. ``pack`` and ``unpack`` are two functions over that data.

Source: the structs of ggml-common.h in llama.cpp, checked bit for bit against the gguf package.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from rarefy.core.errors import ModelError, TargetError
from rarefy.core.nodes import Dense, Node, Quantized, steps_grid
from rarefy.numerics.grids import Grid, Stored

CHUNK = 1 << 18  # weights handled at once: small enough for a core's own cache, large enough for numpy

Bytes = UInt8[np.ndarray, "blocks bytes"]
Fields = dict[str, np.ndarray]


@dataclass(frozen=True)
class Plane:
    """``bits`` bits of every number of one kind, from bit ``low`` up; ``flip`` is xored (signed bytes).

    of: "codes", or "scales" and "zeros" for the small integers of the 256-wide types.
    """

    of: str
    low: int
    bits: int
    stride: int
    flip: int = 0


@dataclass(frozen=True)
class Plain:
    """The plain numbers of a block, "scale" or "zero". ``negate``: fp16 that ggml subtracts.

    ``add`` is added to the byte of an e8m0 number, that is, to its exponent.
    """

    of: str
    negate: bool = False
    add: int = 0


@dataclass(frozen=True)
class FourBits:
    """The 16 bytes in which Q2_K keeps sixteen 4-bit scales (low halves) and sixteen 4-bit zeros."""


@dataclass(frozen=True)
class SixBits:
    """The 12 bytes in which Q4_K and Q5_K keep eight 6-bit scales and eight 6-bit zeros."""


@dataclass(frozen=True)
class Trits:
    """Ternary codes, ``digits`` to a byte as a fraction of 256; byte j holds j, j + stride, ..."""

    start: int
    bytes: int
    digits: int
    stride: int


Part = Plane | Plain | FourBits | SixBits | Trits


@dataclass(frozen=True)
class Codec:
    """One storage format of ggml.

    name, type_id: as llama.cpp calls it. block, block_bytes: weights and bytes of one struct. grid: what
    the codes mean (None: plain floats of ``dtype``). parts: the struct, in order. values: the level that
    each stored integer means, where that is not simply the level's index. wide: the grid for files that
    use a stored integer which ggml's own quantizer never writes.
    """

    name: str
    type_id: int
    block: int
    block_bytes: int
    grid: Grid | None = None
    dtype: torch.dtype = torch.float32
    parts: tuple[Part, ...] = ()
    values: tuple[float, ...] = ()
    wide: Grid | None = None

    def fits(self, columns: int) -> bool:
        """Whether a row of that many weights can be stored."""
        return columns > 0 and columns % self.block == 0

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of that many weights."""
        if not self.fits(columns):
            raise TargetError(f"{self.name}: rows of {columns} weights are not divisible by {self.block}; "
                              "choose a format with smaller blocks")
        return columns // self.block * self.block_bytes

    def pack(self, node: Node) -> UInt8[np.ndarray, "rows row_bytes"]:
        """The bytes of ``node``, row by row. Floats are rounded to the type; codes must be on ``grid``."""
        packed = np.empty((prod(node.shape[:-1]), self.row_bytes(node.shape[-1])), np.uint8)
        first = 0
        for piece in self.stream(node):
            packed[first:first + len(piece)] = piece
            first += len(piece)
        return packed

    def stream(self, node: Node) -> Iterator[UInt8[np.ndarray, "rows row_bytes"]]:
        """The bytes of ``node`` a few rows at a time, for writing without holding them all."""
        self.row_bytes(node.shape[-1])
        match node:
            case Dense(values=values) if self.grid is None:
                return _pack_floats(self, values)
            case Quantized(grid=grid) if self.grid is not None:
                if not _same(grid, self.grid) and not (self.wide and _same(grid, self.wide)):
                    raise TargetError(f"{self.name}: cannot store weights on the grid {grid.name!r}; "
                                      f"quantize onto CODECS[{self.name!r}].grid")
                return _pack_codes(self, node)
            case _:
                raise TargetError(f"{self.name}: cannot store a {type(node).__name__}; "
                                  f"expected {'Dense' if self.grid is None else 'Quantized'}")

    def unpack(self, data: UInt8[np.ndarray, "rows row_bytes"], columns: int) -> Node:
        """The node that these bytes stand for: Dense for plain floats, Quantized otherwise."""
        expected = (len(data), self.row_bytes(columns))
        if data.shape != expected or not data.size or data.dtype != np.uint8:
            raise ModelError(f"{self.name}: expected bytes [rows, {expected[1]}] for rows of {columns} "
                             f"weights, got {data.dtype} {list(data.shape)}")
        if self.grid is None:
            copy = torch.from_numpy(np.array(data, order="C"))  # the file may be a read-only mapping
            return Dense(copy.view(self.dtype).view(data.shape[0], columns))
        return _unpack_codes(self, data, columns)


def _same(one: Grid, other: Grid) -> bool:
    """Whether two grids agree in everything but the name."""
    return replace(one, name="") == replace(other, name="")


# ---- plain floats

def _pack_floats(codec: Codec, values: Tensor) -> Iterator[UInt8[np.ndarray, "rows row_bytes"]]:
    rows = values.reshape(-1, values.shape[-1])
    for source in torch.split(rows, _rows(rows.shape[1])):
        stored = source.detach().cpu().to(codec.dtype).contiguous()
        if not _finite(stored):
            if not _finite(source):
                raise TargetError(f"{codec.name}: cannot store NaN or infinite values; the weight is broken")
            raise TargetError(f"{codec.name}: cannot store values beyond {torch.finfo(codec.dtype).max:g}; "
                              "store this weight as F32 or BF16")
        yield stored.view(torch.uint8).numpy()


def _finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite: then neither is the sum, unless it overflows."""
    return bool(torch.isfinite(values.sum(dtype=torch.float32))) or bool(torch.isfinite(values).all())


# ---- codes

def _rows(columns: int) -> int:
    return max(1, CHUNK // columns)


def _pack_codes(codec: Codec, node: Quantized) -> Iterator[UInt8[np.ndarray, "rows row_bytes"]]:
    rows, columns = node.codes.shape
    _check_plain(codec, node)
    table = _stored_of(codec, node.grid)
    step = _rows(columns)
    for start in range(0, rows, step):
        fields: Fields = {}
        codes = _bytes_of(node.codes[start:start + step])
        if int(codes.max()) >= len(node.grid.levels):
            raise TargetError(f"{codec.name}: code {int(codes.max())} in rows {start} to "
                              f"{start + len(codes) - 1} lies beyond the {len(node.grid.levels)} levels")
        fields["codes"] = (codes if table is None else table[codes]).reshape(-1, codec.block)
        blocks = len(fields["codes"])
        for name, child in (("scale", node.scale), ("zero", node.zero)):
            if isinstance(child, Quantized):
                fields[f"{name}s"] = _bytes_of(child.codes[start:start + step]).reshape(blocks, -1)
                child = child.scale
            if isinstance(child, Dense):
                fields[name] = _bytes_of(child.values[start:start + step]).reshape(blocks, -1)
        yield _encode(codec.parts, fields).reshape(len(codes), -1)


def _check_plain(codec: Codec, node: Quantized) -> None:
    """Scales and zeros must be stored the way the grid says, be finite, and cover every group."""
    rows, columns = node.codes.shape
    assert codec.grid is not None
    scale, zero = codec.grid.scale, codec.grid.zero
    for name, child, stored in (("scale", node.scale, scale), ("zero", node.zero, zero)):
        if stored is None and child is None:
            continue
        shape, plain = (rows, columns // codec.grid.group), child
        if stored is not None and stored.bits and isinstance(child, Quantized):
            if not _same(child.grid, steps_grid(stored)) or tuple(child.codes.shape) != shape:
                raise TargetError(f"{codec.name}: the {name} is on the grid {child.grid.name!r} with "
                                  f"shape {child.shape}; expected {steps_grid(stored).name!r}, {shape}")
            if child.codes.numel() and int(child.codes.max()) >= len(child.grid.levels):
                raise TargetError(f"{codec.name}: a {name} has code {int(child.codes.max())}, beyond the "
                                  f"{len(child.grid.levels)} levels of {child.grid.name!r}")
            shape, plain = (rows, shape[1] // stored.over), child.scale
        elif stored is not None and stored.bits:
            plain = None
        if stored is None or not isinstance(plain, Dense) or plain.values.dtype != stored.dtype \
                or plain.shape != shape:
            raise TargetError(f"{codec.name}: the {name} is not stored as the grid says: expected "
                              f"{stored} over {shape}, got {_outline(child)}")
        if not _finite(plain.values.float()):
            raise TargetError(f"{codec.name}: a {name} is NaN or infinite; the weights or the "
                              "calibration behind it are broken")


def _outline(node: Node | None) -> str:
    match node:
        case Dense(values=values):
            return f"Dense {values.dtype} {tuple(values.shape)}"
        case Quantized(scale=scale):
            return f"Quantized {node.shape} of {_outline(scale)}"
        case _:
            return type(node).__name__


def _unpack_codes(codec: Codec, data: UInt8[np.ndarray, "rows row_bytes"], columns: int) -> Quantized:
    grid, rows = codec.wide or codec.grid, data.shape[0]
    assert grid is not None and codec.grid is not None
    whole = {name: np.empty((rows, size), np.uint8) for name, size in _sizes(grid, columns).items()}
    table = _index_of(codec, grid)
    step = _rows(columns)
    for start in range(0, rows, step):
        part = data[start:start + step]
        fields = _decode(codec, np.ascontiguousarray(part).reshape(-1, codec.block_bytes))
        if table is not None:
            fields["codes"] = table[fields["codes"]]
        _check_codes(codec, grid, fields, start)
        for name, values in whole.items():
            values[start:start + step] = fields[name].reshape(len(part), -1)
    codes = whole["codes"]
    if codec.wide is not None and int(codes.min()) > 0:
        codes, grid = codes - np.uint8(1), codec.grid  # the extra, lowest level is not used
    zero = None if grid.zero is None else _number(whole, "zero", grid.zero)
    return Quantized(torch.from_numpy(codes), _number(whole, "scale", grid.scale), zero, grid)


def _check_codes(codec: Codec, grid: Grid, fields: Fields, start: int) -> None:
    codes = fields["codes"]
    if int(codes.max()) >= len(grid.levels):
        raise ModelError(f"{codec.name}: a block after row {start} holds code {int(codes.max())}, which "
                         "means nothing in this format")
    if grid.scale.dtype == torch.float8_e8m0fnu:
        # ggml gives blocks of zeros the byte 0, half of e8m0's smallest number: any scale says the same
        smallest = fields["scale"][:, 0] == 0xFF
        if (codes[smallest] != grid.levels.index(0.0)).any():
            raise ModelError(f"{codec.name}: a block after row {start} has a scale of 2^-128, "
                             "too small to hold")
        fields["scale"][smallest] = 0


def _sizes(grid: Grid, columns: int) -> dict[str, int]:
    """Bytes in one row of each kind of number."""
    sizes, groups = {"codes": columns}, columns // grid.group
    for name, stored in (("scale", grid.scale), ("zero", grid.zero)):
        if stored is not None:
            sizes[name] = groups // max(stored.over, 1) * stored.dtype.itemsize
            if stored.bits:
                sizes[f"{name}s"] = groups
    return sizes


def _number(fields: Fields, name: str, stored: Stored) -> Node:
    """The node of a scale or zero: plain numbers, or small integers times plain numbers."""
    plain = Dense(torch.from_numpy(fields[name]).view(stored.dtype))
    if not stored.bits:
        return plain
    return Quantized(torch.from_numpy(fields[f"{name}s"]), plain, None, steps_grid(stored))


def _bytes_of(values: Tensor) -> np.ndarray:
    """A tensor's bytes, one row after the other."""
    return values.detach().cpu().contiguous().view(torch.uint8).numpy()


def _stored_of(codec: Codec, grid: Grid) -> np.ndarray | None:
    """For each level of the grid the integer that stands for it in the file; None: its index."""
    if not codec.values:
        return None
    return np.array([codec.values.index(level) for level in grid.levels], np.uint8)


def _index_of(codec: Codec, grid: Grid) -> np.ndarray | None:
    """For each stored integer the index of its level; None: the integer itself."""
    if not codec.values:
        return None
    return np.array([grid.levels.index(value) for value in codec.values], np.uint8)


# ---- the parts of a struct

def _encode(parts: tuple[Part, ...], fields: Fields) -> Bytes:
    """The structs of these fields, each [blocks, numbers of that kind in one block]."""
    pieces = []
    for part in parts:
        match part:
            case Plane():
                pieces.append(_pack_plane(part, fields[part.of]))
            case Plain(of=name, negate=negate, add=add):
                pieces.append(fields[name] ^ _SIGN if negate else fields[name] + np.uint8(add))
            case FourBits():
                pieces.append(fields["scales"] | fields["zeros"] << np.uint8(4))
            case SixBits():
                pieces.append(_pack_six(fields["scales"], fields["zeros"]))
            case Trits():
                pieces.append(_pack_trits(part, fields["codes"]))
    return np.concatenate(pieces, axis=1)


def _decode(codec: Codec, blocks: Bytes) -> Fields:
    """The fields of these structs; the reverse of ``_encode``."""
    fields: Fields = {}
    for part, first, size in _offsets(codec):
        piece = blocks[:, first:first + size]
        match part:
            case Plane(of=name):
                plane = _unpack_plane(part, piece)
                fields[name] = fields[name] | plane if name in fields else plane
            case Plain(of=name, negate=negate, add=add):
                fields[name] = piece ^ _SIGN if negate else piece - np.uint8(add)
            case FourBits():
                fields["scales"], fields["zeros"] = piece & np.uint8(15), piece >> np.uint8(4)
            case SixBits():
                fields["scales"], fields["zeros"] = _unpack_six(piece)
            case Trits():
                trits = _unpack_trits(part, piece)
                fields["codes"] = np.hstack([fields["codes"], trits]) if "codes" in fields else trits
    return fields


def _offsets(codec: Codec) -> Iterator[tuple[Part, int, int]]:
    """Every part of the struct with its first byte and its size."""
    grid, first = codec.grid, 0
    assert grid is not None
    groups = codec.block // grid.group
    for part in codec.parts:
        match part:
            case Plane(of=name, bits=bits):
                size = (codec.block if name == "codes" else groups) * bits // 8
            case Plain(of=name):
                stored = grid.scale if name == "scale" else grid.zero
                assert stored is not None
                size = groups // max(stored.over, 1) * stored.dtype.itemsize
            case FourBits():
                size = 16
            case SixBits():
                size = 12
            case Trits():
                size = part.bytes
        yield part, first, size
        first += size
    assert first == codec.block_bytes, f"{codec.name}: the parts take {first} bytes of {codec.block_bytes}"


_SIGN = np.array([0, 0x80], np.uint8)  # the sign bit of a little-endian fp16


def _pack_plane(plane: Plane, numbers: np.ndarray) -> Bytes:
    blocks, per_byte = len(numbers), 8 // plane.bits
    mask = np.uint8((1 << plane.bits) - 1)
    chunks = ((numbers >> np.uint8(plane.low)) & mask).reshape(blocks, -1, per_byte, plane.stride)
    out = chunks[:, :, 0].copy()
    for k in range(1, per_byte):
        out |= chunks[:, :, k] << np.uint8(plane.bits * k)
    return out.reshape(blocks, -1) ^ np.uint8(plane.flip)


def _unpack_plane(plane: Plane, piece: Bytes) -> np.ndarray:
    blocks, per_byte = len(piece), 8 // plane.bits
    mask = np.uint8((1 << plane.bits) - 1)
    source = (piece ^ np.uint8(plane.flip)).reshape(blocks, -1, plane.stride)
    out = np.empty((blocks, source.shape[1], per_byte, plane.stride), np.uint8)
    for k in range(per_byte):
        out[:, :, k] = ((source >> np.uint8(plane.bits * k)) & mask) << np.uint8(plane.low)
    return out.reshape(blocks, -1)


def _pack_six(scales: np.ndarray, zeros: np.ndarray) -> Bytes:
    """Scales 0-3, zeros 0-3, then the low halves of 4-7; the two high bits of 4-7 ride on 0-3."""
    rest = (scales[:, 4:] & np.uint8(15)) | zeros[:, 4:] << np.uint8(4)
    first = [six[:, :4] | (six[:, 4:] >> np.uint8(4)) << np.uint8(6) for six in (scales, zeros)]
    return np.hstack([*first, rest])


def _unpack_six(piece: Bytes) -> tuple[np.ndarray, np.ndarray]:
    scales, zeros, rest = piece[:, :4], piece[:, 4:8], piece[:, 8:]

    def whole(first: np.ndarray, halves: np.ndarray) -> np.ndarray:
        return np.hstack([first & np.uint8(63), halves | (first >> np.uint8(6)) << np.uint8(4)])

    return whole(scales, rest & np.uint8(15)), whole(zeros, rest >> np.uint8(4))


def _pack_trits(part: Trits, codes: np.ndarray) -> Bytes:
    """Base-3 digits, first digit highest, as the byte b with b/256 just above number/3^5."""
    mine = codes[:, part.start:part.start + part.bytes * part.digits]
    mine = mine.reshape(len(codes), -1, part.digits, part.stride)
    number = np.zeros((len(codes), mine.shape[1], part.stride), np.uint16)
    for k in range(part.digits):
        number += mine[:, :, k].astype(np.uint16) * np.uint16(3 ** (4 - k))
    fraction = (number * np.uint16(256) + np.uint16(242)) // np.uint16(243)
    return fraction.astype(np.uint8).reshape(len(codes), -1)


def _unpack_trits(part: Trits, piece: Bytes) -> np.ndarray:
    """Digit k is the whole part of 3 * fraction(b * 3^k / 256)."""
    source = piece.reshape(len(piece), -1, 1, part.stride)
    shifted = source * np.array([1, 3, 9, 27, 81][:part.digits], np.uint8).reshape(1, 1, -1, 1)
    digits = (shifted.astype(np.uint16) * np.uint16(3)) >> np.uint16(8)
    return digits.astype(np.uint8).reshape(len(piece), -1)


# ---- the formats

_HALF = Stored(dtype=torch.float16)
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)  # twice the magnitudes of a 4-bit float; bit 3 is the sign


def _levels(low: int, high: int) -> tuple[float, ...]:
    return tuple(float(level) for level in range(low, high + 1))


def _small(bits: int, low: int, over: int) -> Stored:
    return Stored(dtype=torch.float16, bits=bits, low=low, over=over)


def _quantized(name: str, type_id: int, block: int, block_bytes: int, levels: tuple[float, ...], *parts: Part,
               group: int = 0, scale: Stored = _HALF, zero: Stored | None = None,
               values: tuple[float, ...] = (), wide: tuple[float, ...] = ()) -> Codec:
    group = group or block
    return Codec(name, type_id, block, block_bytes, Grid(name, levels, group, scale, zero), parts=parts,
                 values=values, wide=Grid(f"{name} wide", wide, group, scale, zero) if wide else None)


_SCALE, _ZERO, _MINUS = Plain("scale"), Plain("zero"), Plain("zero", negate=True)

_ALL = (
    Codec("F32", 0, 1, 4, dtype=torch.float32),
    Codec("F16", 1, 1, 2, dtype=torch.float16),
    Codec("BF16", 30, 1, 2, dtype=torch.bfloat16),
    # 32 weights to a block, for any row that 32 divides
    _quantized("Q4_0", 2, 32, 18, _levels(-8, 7), _SCALE, Plane("codes", 0, 4, 16)),
    _quantized("Q4_1", 3, 32, 20, _levels(0, 15), _SCALE, _ZERO, Plane("codes", 0, 4, 16), zero=_HALF),
    _quantized("Q5_0", 6, 32, 22, _levels(-16, 15), _SCALE, Plane("codes", 4, 1, 1),
               Plane("codes", 0, 4, 16)),
    _quantized("Q5_1", 7, 32, 24, _levels(0, 31), _SCALE, _ZERO, Plane("codes", 4, 1, 1),
               Plane("codes", 0, 4, 16), zero=_HALF),
    _quantized("Q8_0", 8, 32, 34, _levels(-127, 127), _SCALE, Plane("codes", 0, 8, 1),
               values=_levels(0, 127) + _levels(-128, -1), wide=_levels(-128, 127)),
    _quantized("IQ4_NL", 20, 32, 18, tuple(float(v) for v in _IQ4), _SCALE, Plane("codes", 0, 4, 16)),
    # the levels are doubled, so the exponent that we hold is one less than the file's
    _quantized("MXFP4", 39, 32, 17, tuple(sorted({*_E2M1, *(-v for v in _E2M1)})), Plain("scale", add=1),
               Plane("codes", 0, 4, 16), scale=Stored(dtype=torch.float8_e8m0fnu),
               values=_E2M1 + tuple(-v for v in _E2M1)),
    # 64 to a block
    _quantized("Q2_0", 42, 64, 18, _levels(-1, 2), _SCALE, Plane("codes", 0, 2, 1)),
    # 256 to a block: integers times a plain scale, and the same for what is subtracted
    _quantized("Q2_K", 10, 256, 84, _levels(0, 3), FourBits(), Plane("codes", 0, 2, 32),
               _SCALE, _MINUS, group=16, scale=_small(4, 0, 16), zero=_small(4, 0, 16)),
    _quantized("Q3_K", 11, 256, 110, _levels(-4, 3), Plane("codes", 2, 1, 32), Plane("codes", 0, 2, 32),
               Plane("scales", 0, 4, 8), Plane("scales", 4, 2, 4), _SCALE, group=16,
               scale=_small(6, -32, 16)),
    _quantized("Q4_K", 12, 256, 144, _levels(0, 15), _SCALE, _MINUS, SixBits(), Plane("codes", 0, 4, 32),
               group=32, scale=_small(6, 0, 8), zero=_small(6, 0, 8)),
    _quantized("Q5_K", 13, 256, 176, _levels(0, 31), _SCALE, _MINUS, SixBits(), Plane("codes", 4, 1, 32),
               Plane("codes", 0, 4, 32), group=32, scale=_small(6, 0, 8), zero=_small(6, 0, 8)),
    _quantized("Q6_K", 14, 256, 210, _levels(-32, 31), Plane("codes", 0, 4, 64), Plane("codes", 4, 2, 32),
               Plane("scales", 0, 8, 1, flip=0x80), _SCALE, group=16, scale=_small(8, -128, 16)),
    _quantized("IQ4_XS", 23, 256, 136, tuple(float(v) for v in _IQ4), _SCALE, Plane("scales", 4, 2, 1),
               Plane("scales", 0, 4, 1), Plane("codes", 0, 4, 16), group=32, scale=_small(6, -32, 8)),
    # ternary, for models trained that way
    _quantized("TQ1_0", 34, 256, 54, _levels(-1, 1), Trits(0, 32, 5, 32), Trits(160, 16, 5, 16),
               Trits(240, 4, 4, 4), _SCALE),
    _quantized("TQ2_0", 35, 256, 66, _levels(-1, 1), Plane("codes", 0, 2, 32), _SCALE),
)

CODECS: dict[str, Codec] = {codec.name: codec for codec in _ALL}
