"""Coding: the bytes that masks and indices take, exactly, and those bytes themselves.

A stream of n symbols from an alphabet of K opens with one byte that says how the rest is coded:

    packed     ceil(log2 K) bits each, lowest bit first
    static     a table of the symbols' frequencies, one byte each, then asymmetric numeral systems (ANS):
               about ``-sum_i log2 p(s_i)`` bits, the entropy of the table
    uniform    ANS with all symbols alike: ``n log2 K`` bits where K is no power of two

A mask is first made small: dead rows and columns are listed and taken out, tiles on which it is constant
become one entry. What is left is coded as symbols of w neighbouring entries, w = 1, 2, 4 or 8 (bytes of a
bitmask under ANS know N:M patterns and high sparsity alike), or, where every group of M has exactly N
entries set, as the rank of each group among all such groups: ``log2 binomial(M, N)`` bits.

The shortest of all wins. Coding depends on the data alone, so a node counts its bits by coding, and what it
counts is what a file holds.

Paper: Duda 2013, "Asymmetric numeral systems"; Han et al. 2016, "Deep Compression", section 4 (entropy coding
of shared weights). The ANS coder itself is the package ``constriction`` (Bamler 2022).
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations
from math import comb

import constriction
import numpy as np
import torch
from jaxtyping import Bool, Integer
from torch import Tensor

AnsCoder = constriction.stream.stack.AnsCoder
Categorical, Uniform = constriction.stream.model.Categorical, constriction.stream.model.Uniform

PACKED, STATIC, UNIFORM = 0, 1, 2
CHUNK = 1 << 20  # symbols handled at once; a multiple of 8, so that packed chunks end on whole bytes
LARGEST = 1 << 16  # alphabet
WIDTHS = (1, 2, 4, 8)  # neighbouring entries of a mask in one symbol
END = 255  # a byte's worth of end mark below the symbols under ANS
GROUPS = range(2, 17)  # M of the N:M patterns that are looked for
BELOW = 15  # added to M, to tell it from a width
STRIPPED, TILED = 1, 2  # flags in a mask's first byte


# ---- packed

def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of 1 to 8 bits one after the other, lowest bit first: eight codes make ``bits`` bytes."""
    eights = np.zeros((-(-codes.size // 8), 8), np.uint8)
    eights.reshape(-1)[:codes.size] = codes.reshape(-1)
    words = np.zeros(len(eights), "<u8")
    for k in range(8):
        words |= eights[:, k].astype(np.uint64) << np.uint64(bits * k)
    kept = words.view(np.uint8).reshape(-1, 8)[:, :bits]
    return np.ascontiguousarray(kept).reshape(-1)[:packed_size(codes.size, bits)]


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The reverse of ``pack_bits``; what follows the last code must be zero."""
    groups = -(-count // 8)
    whole = np.zeros(groups * bits, np.uint8)
    whole[:packed.size] = packed
    words = np.zeros((groups, 8), np.uint8)
    words[:, :bits] = whole.reshape(groups, bits)
    joined, mask = words.reshape(-1).view("<u8"), np.uint64((1 << bits) - 1)
    codes = np.stack([(joined >> np.uint64(bits * k) & mask).astype(np.uint8) for k in range(8)], axis=1)
    if codes.reshape(-1)[count:].any():
        raise ValueError("bits are set behind the last code")
    return codes.reshape(-1)[:count]


def _planes(bits: int) -> tuple[int, ...]:
    """Codes of more than 8 bits are packed as their low bytes, then what is above."""
    return (bits,) if bits <= 8 else (8, bits - 8)


def _pack(symbols: Tensor, bits: int) -> bytes:
    """All symbols at ``bits`` bits, plane after plane."""
    planes, shift = [], 0
    for width in _planes(bits):
        for part in torch.split(symbols, CHUNK):
            plane = (part.numpy().astype(np.uint32) >> shift & (1 << width) - 1).astype(np.uint8)
            planes.append(pack_bits(plane, width))
        shift += width
    return b"".join(plane.tobytes() for plane in planes)


def _unpack(data: np.ndarray, bits: int, count: int) -> Tensor:
    sizes = [packed_size(count, width) for width in _planes(bits)]
    if data.size != sum(sizes):
        raise ValueError(f"{data.size} bytes where {count} codes of {bits} bits take {sum(sizes)}")
    symbols, shift, first = torch.zeros(count, dtype=_dtype(1 << bits)), 0, 0
    for width, size in zip(_planes(bits), sizes, strict=True):
        plane = data[first:first + size]
        for start in range(0, count, CHUNK):
            here = min(CHUNK, count - start)
            piece = plane[start * width // 8:start * width // 8 + packed_size(here, width)]
            codes = torch.from_numpy(unpack_bits(piece, width, here))
            symbols[start:start + here] += codes.to(symbols.dtype) << shift
        first, shift = first + size, shift + width
    return symbols


# ---- asymmetric numeral systems

def _table(counts: np.ndarray) -> np.ndarray:
    """Frequencies at one byte each: 0 for what never occurs, else a float of 4 bits over 4 bits of exponent.

    Of the relative error, 3% at most, about a thousandth part reaches the size.
    """
    scaled = np.maximum(counts * ((31 << 15) / max(int(counts.max()), 1)), 16)
    exponent = np.minimum(np.floor(np.log2(scaled / 16)), 15).astype(np.int64)
    mantissa = np.rint(scaled / (1 << exponent)).astype(np.int64) - 16
    code = np.minimum(16 * exponent + mantissa, 254) + 1  # a mantissa of 16 is the next exponent's 0
    return np.where(counts > 0, code, 0).astype(np.uint8)


def _weights(table: np.ndarray) -> np.ndarray:
    """What the table's bytes stand for: whole numbers below 2^20, exact in any float."""
    code = np.maximum(table.astype(np.int64) - 1, 0)
    return np.where(table > 0, (16 + code % 16) << code // 16, 0)


def _encode(symbols: Tensor, places: np.ndarray, model: object) -> bytes:
    """ANS is a stack: the last symbol goes first. ``places``: what a symbol is called in the model.

    At the bottom lies a mark, because an empty stack would go on giving symbols to whoever asks for more.
    """
    coder = AnsCoder()
    coder.encode_reverse(END, Uniform(256))
    for part in reversed(torch.split(symbols, CHUNK)):
        coder.encode_reverse(places[part.numpy()], model)
    return bytes(coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0"))


def _decode(data: np.ndarray, count: int, alphabet: int, symbols: np.ndarray, model: object) -> Tensor:
    words = np.zeros(-(-data.size // 4) * 4, np.uint8)
    words[:data.size] = data
    coder = AnsCoder(words.view("<u4").astype(np.uint32))  # refuses a last word of zero
    out = torch.empty(count, dtype=_dtype(alphabet))
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        out[start:start + size] = torch.from_numpy(symbols[coder.decode(model, size)])
    if coder.decode(Uniform(256)) != END or not coder.is_empty():
        raise ValueError(f"there are not exactly {count} symbols")
    return out


def _static(table: np.ndarray) -> tuple[np.ndarray, object]:
    """The symbols that occur, and the model of their indices (None: there is only one)."""
    weights = _weights(table)
    used = np.flatnonzero(weights).astype(np.int32)
    if not used.size:
        raise ValueError("a table of frequencies that are all zero")
    shares = weights[used] / weights.sum()
    return used, Categorical(shares, perfect=False) if used.size > 1 else None


# ---- symbols

def counted(symbols: Integer[Tensor, " n"], alphabet: int) -> np.ndarray:
    """How often each symbol occurs, [alphabet] int64."""
    total = torch.zeros(alphabet, dtype=torch.int64)
    for part in torch.split(symbols, CHUNK):
        total += torch.bincount(part, minlength=alphabet)
    return total.numpy()


def estimated_bits(counts: np.ndarray) -> float:
    """Bits of the shortest coding of symbols that occur so often, without coding them."""
    return 8 * min(_sizes(counts).values())


def _sizes(counts: np.ndarray) -> dict[int, float]:
    """Bytes of each coding, the first byte included, from how often each symbol occurs."""
    total, alphabet = int(counts.sum()), counts.size
    sizes = {PACKED: 1.0 + packed_size(total, width_of(alphabet))}
    if alphabet & (alphabet - 1):
        sizes[UNIFORM] = 1 + total * np.log2(alphabet) / 8 + 4
    table = _weights(_table(counts))
    used = counts > 0
    information = float(-(counts[used] * np.log2(table[used] / table.sum())).sum())
    sizes[STATIC] = 1 + alphabet + information / 8 + (4 if used.sum() > 1 else 0)
    return sizes


def width_of(alphabet: int) -> int:
    """Bits of one symbol when packed."""
    return max(1, (alphabet - 1).bit_length())


def _dtype(alphabet: int) -> torch.dtype:
    return torch.uint8 if alphabet <= 256 else torch.int32


def code_symbols(symbols: Integer[Tensor, "*shape"], alphabet: int) -> bytes:
    """The shortest coding of symbols in [0, alphabet); nothing for no symbols."""
    if not 1 <= alphabet <= LARGEST:
        raise ValueError(f"an alphabet of {alphabet} symbols; 1 to {LARGEST} can be coded")
    flat = symbols.detach().cpu().reshape(-1)
    if not flat.numel():
        return b""
    return _coded(flat, counted(flat, alphabet))


def _coded(flat: Tensor, counts: np.ndarray) -> bytes:
    sizes, alphabet = _sizes(counts), counts.size
    way, packed = min(sizes, key=lambda way: sizes[way]), sizes[PACKED]
    if way == UNIFORM:
        body = _encode(flat, np.arange(alphabet, dtype=np.int32), Uniform(alphabet))
    elif way == STATIC:
        table = _table(counts)
        used, model = _static(table)
        places = np.zeros(alphabet, np.int32)
        places[used] = np.arange(used.size, dtype=np.int32)
        body = table.tobytes() + (b"" if model is None else _encode(flat, places, model))
    if way == PACKED or 1 + len(body) >= packed:
        return bytes([PACKED]) + _pack(flat, width_of(alphabet))
    return bytes([way]) + body


def decode_symbols(data: np.ndarray, count: int, alphabet: int) -> Integer[Tensor, " n"]:
    """The reverse of ``code_symbols``: uint8, or int32 if they need it. ValueError if nothing is coded so."""
    if not count:
        if data.size:
            raise ValueError(f"{data.size} bytes for no symbols")
        return torch.zeros(0, dtype=_dtype(alphabet))
    way, body = (int(data[0]) if data.size else -1), data[1:]
    if way == PACKED:
        symbols = _unpack(body, width_of(alphabet), count)
        if int(symbols.max()) >= alphabet:
            raise ValueError(f"a symbol beyond the {alphabet} that there are")
        return symbols
    if way == UNIFORM and alphabet > 1:
        return _decode(body, count, alphabet, np.arange(alphabet, dtype=np.int32), Uniform(alphabet))
    if way != STATIC or body.size < alphabet:
        raise ValueError("no coding of symbols")
    used, model = _static(body[:alphabet])
    if model is not None:
        return _decode(body[alphabet:], count, alphabet, used, model)
    if body.size > alphabet:
        raise ValueError("bytes are left behind the last symbol")
    return torch.full((count,), int(used[0]), dtype=_dtype(alphabet))


# ---- masks

def code_mask(keep: Bool[Tensor, "*shape"]) -> bytes:
    """The shortest coding of a mask. Of a mask without entries: nothing."""
    if not keep.numel():
        return b""
    grid = keep.detach().cpu().reshape(keep.shape[0] if keep.ndim > 1 else 1, -1)
    ways = [_tiled(grid, 0)]
    rows, columns = grid.any(1), grid.any(0)
    if bool(rows.any()) and not bool(rows.all() and columns.all()):
        dead = _pack(rows.byte(), 1) + _pack(columns.byte(), 1)
        inner = _tiled(grid[rows][:, columns], STRIPPED)
        ways.append(inner[:1] + dead + inner[1:])
    return min(ways, key=len)


def decode_mask(data: np.ndarray, shape: tuple[int, ...]) -> Bool[Tensor, "*shape"]:
    """The reverse of ``code_mask``; ValueError if no mask of that shape is coded so."""
    whole = torch.zeros(shape, dtype=torch.bool)
    grid = whole.view(shape[0] if len(shape) > 1 else 1, -1) if whole.numel() else whole.view(0, 0)
    if not grid.numel():
        if data.size:
            raise ValueError(f"{data.size} bytes for no mask")
        return whole
    if not data.size or data[0] > (STRIPPED | TILED):
        raise ValueError("no coding of a mask")
    flags, rest = int(data[0]), data[1:]
    if not flags & STRIPPED:
        grid.copy_(_untiled(flags, rest, grid.shape[0], grid.shape[1]))
        return whole
    alive = []
    for count in grid.shape:
        size = packed_size(count, 1)
        alive.append(_unpack(rest[:size], 1, count).bool())
        rest = rest[size:]
    rows, columns = alive
    inner = _untiled(flags, rest, int(rows.sum()), int(columns.sum()))
    grid[rows.nonzero(), columns.nonzero().T] = inner
    return whole


def _tiled(grid: Tensor, flags: int) -> bytes:
    """Flags, the tile if there is one, and the entries that are left."""
    tile = tile_of(grid)
    if tile == (1, 1):
        return bytes([flags]) + _entries(grid)
    return bytes([flags | TILED]) + np.array(tile, "<u4").tobytes() + _entries(grid[::tile[0], ::tile[1]])


def tile_of(grid: Bool[Tensor, "rows columns"]) -> tuple[int, int]:
    """Rows and columns of the largest tile on which a mask is constant, the tiles starting in its corner."""
    return _step(grid), _step(grid.T)


def _step(grid: Tensor) -> int:
    """The largest step at whose multiples alone a row can differ from the one before."""
    changes = (grid[1:] != grid[:-1]).any(1).nonzero().view(-1).numpy() + 1
    return int(np.gcd.reduce(changes)) if changes.size else grid.shape[0]


def _untiled(flags: int, data: np.ndarray, rows: int, columns: int) -> Tensor:
    if not rows * columns:
        raise ValueError("a mask with nothing kept in it")
    high, wide = 1, 1
    if flags & TILED:
        if data.size < 8:
            raise ValueError("no coding of a mask")
        high, wide = (int(each) for each in data[:8].view("<u4"))
        data = data[8:]
    if not (1 <= high <= rows and 1 <= wide <= columns):
        raise ValueError(f"tiles of {high} x {wide} in a mask of {rows} x {columns}")
    down, across = -(-rows // high), -(-columns // wide)
    grid = _entries_of(data, down * across).view(down, across)
    return grid.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]


def _entries(grid: Tensor) -> bytes:
    """One byte for w (or M, with N in another one), then the symbols."""
    flat = grid.reshape(-1)
    packed = np.packbits(flat.numpy(), bitorder="little")
    histogram = np.bincount(packed, minlength=256)
    counts = {width: _narrowed(histogram, width, flat.numel()) for width in WIDTHS}
    sizes = {width: min(_sizes(counts[width]).values()) for width in WIDTHS}
    width = min(reversed(WIDTHS), key=lambda width: sizes[width])  # of equals the widest: fewest symbols
    pattern = _pattern(flat)
    if pattern is not None:
        size, kept = pattern
        ranks = _ranks(size, kept)[0][_numbers(flat, size)]
        coded = code_symbols(ranks, comb(size, kept))
        if 1 + len(coded) <= sizes[width]:
            return bytes([size + BELOW, kept]) + coded
    if width == 1:
        symbols = flat.byte()
    else:
        parts = [packed >> shift & (1 << width) - 1 for shift in range(0, 8, width)]
        symbols = torch.from_numpy(np.stack(parts, 1).reshape(-1)[:-(-flat.numel() // width)])
    return bytes([width]) + _coded(symbols, counts[width])


def _entries_of(data: np.ndarray, count: int) -> Tensor:
    if not data.size:
        raise ValueError("no coding of a mask")
    width, data = int(data[0]), data[1:]
    if width in WIDTHS:
        symbols = decode_symbols(data, -(-count // width), 1 << width).to(torch.uint8)
        return _bits(symbols, width, count)
    size = width - BELOW
    if size not in GROUPS or not data.size or not 0 < data[0] < size or count % size:
        raise ValueError("no coding of a mask")
    ranks = decode_symbols(data[1:], count // size, comb(size, int(data[0])))
    return _bits(_ranks(size, int(data[0]))[1][ranks.int()], size, count)


def _bits(symbols: Tensor, width: int, count: int) -> Tensor:
    """The low ``width`` bits of every symbol, lowest first."""
    bits = torch.stack([(symbols >> k & 1).bool() for k in range(width)], 1).view(-1)
    if bool(bits[count:].any()):
        raise ValueError("bits are set behind the last entry")
    return bits[:count]


def _narrowed(histogram: np.ndarray, width: int, entries: int) -> np.ndarray:
    """How often each symbol of ``width`` bits occurs, from how often each byte does (the last one padded)."""
    counts = np.zeros(1 << width, np.int64)
    for shift in range(0, 8, width):
        np.add.at(counts, np.arange(256) >> shift & (1 << width) - 1, histogram)
    counts[0] -= int(counts.sum()) - -(-entries // width)
    return counts


def _pattern(flat: Tensor) -> tuple[int, int] | None:
    """(M, N) if every group of M neighbours has exactly N set; the cheapest one of those."""
    found = []
    for size in GROUPS:
        kept = int(flat[:size].sum())
        if flat.numel() % size or not 0 < kept < size:
            continue
        groups = flat.view(-1, size)
        if all(bool((part.sum(1) == kept).all()) for part in (groups[:64], groups)):
            found.append((np.log2(comb(size, kept)) / size, size, kept))
    return min(found)[1:] if found else None


def _numbers(flat: Tensor, size: int) -> Tensor:
    """Every group of ``size`` entries as a number, its first entry lowest."""
    return torch.cat([part.to(torch.float32) @ (2.0 ** torch.arange(size))
                      for part in torch.split(flat.view(-1, size), CHUNK)]).long()


@lru_cache(maxsize=8)
def _ranks(size: int, kept: int) -> tuple[Tensor, Tensor]:
    """Rank of every number with ``kept`` of ``size`` bits set, and the numbers by rank."""
    numbers = sorted(sum(1 << place for place in places) for places in combinations(range(size), kept))
    ranks = torch.zeros(1 << size, dtype=torch.int32)
    ranks[torch.tensor(numbers)] = torch.arange(len(numbers), dtype=torch.int32)
    return ranks, torch.tensor(numbers, dtype=torch.int32)
