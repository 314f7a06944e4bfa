"""Masks: the bytes that a pattern of kept weights takes, exactly, and those bytes themselves.

A mask is first made small: dead rows and columns are listed and taken out, tiles on which it is constant
become one entry. What is left is coded in the shortest of these ways:

    w neighbouring entries as one symbol, w = 1, 2, 4 or 8: bytes of a bitmask under ANS know N:M patterns and
    high sparsity alike;
    where every group of M has exactly N entries set, the rank of each group among all such groups:
    ``log2 binomial(M, N)`` bits;
    column by column (or row by row) under the density of each: the mean entropy of the columns, far less than
    a bit per weight where a criterion favours some inputs, as Wanda's and SparseGPT's do;
    gaps between kept entries, as of compressed sparse rows: less where what is kept comes in runs.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from itertools import combinations
from math import comb

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from rarefy.numerics.coding import (
    CHUNK,
    Categorical,
    ans_decode,
    ans_encode,
    code_counted,
    code_symbols,
    coded_sizes,
    counted,
    decode_symbols,
    estimated_bits,
    pack_symbols,
    packed_size,
    unpack_symbols,
)

WIDTHS = (1, 2, 4, 8)  # neighbouring entries of a mask in one symbol
GROUPS = range(2, 17)  # M of the N:M patterns that are looked for
BELOW = 15  # added to M, to tell it from a width
COLUMNS, ROWS, GAPS = 9, 10, 11  # in the place of a width: under the density of a column or row; gaps
LONGEST = (15, 63, 255)  # gaps are told apart up to these
DENSITIES = 64  # that a column may have, evenly spaced in their logarithm of odds, in 2^-16
STRIPPED, TILED = 1, 2  # flags in a mask's first byte
REMEMBERED = 4096  # masks whose size is
_SIZES: dict[tuple[tuple[int, ...], bytes], int] = {}


def code_mask(keep: Bool[Tensor, "*shape"]) -> bytes:
    """The shortest coding of a mask. Of a mask without entries: nothing."""
    if not keep.numel():
        return b""
    grid = keep.detach().cpu().reshape(keep.shape[0] if keep.ndim > 1 else 1, -1)
    ways = [_tiled(grid, 0)]
    rows, columns = grid.any(1), grid.any(0)
    if bool(rows.any()) and not bool(rows.all() and columns.all()):
        dead = pack_symbols(rows.byte(), 1) + pack_symbols(columns.byte(), 1)
        inner = _tiled(grid[rows][:, columns], STRIPPED)
        ways.append(inner[:1] + dead + inner[1:])
    return min(ways, key=len)


def mask_size(keep: Bool[Tensor, "*shape"]) -> int:
    """The bytes of ``code_mask(keep)``; of a mask that was asked for before, as planners do, it is known."""
    shape, packed = tuple(keep.shape), np.packbits(keep.detach().cpu().reshape(-1).numpy())
    key = (shape, blake2b(packed.tobytes(), digest_size=16).digest())
    if key not in _SIZES:
        if len(_SIZES) >= REMEMBERED:
            _SIZES.clear()
        _SIZES[key] = len(code_mask(keep))
    return _SIZES[key]


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
        alive.append(unpack_symbols(rest[:size], 1, count).bool())
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
    grid = _entries_of(data, down, across)
    return grid.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]


def _entries(grid: Tensor) -> bytes:
    """One byte for w (or M, with N in another one; or columns), then the symbols."""
    plain = _alike(grid.reshape(-1))
    found = [plain]
    ways = [_by_density(part) for part in (grid, grid.T)]
    best = min((0, 1), key=lambda axis: ways[axis][0])
    if ways[best][0] < len(plain):
        found.append(bytes([(COLUMNS, ROWS)[best]]) + _densely(grid.T if best else grid, ways[best][1]))
    size, longest = _by_gaps(grid.reshape(-1))
    if size < min(map(len, found)):
        found.append(bytes([GAPS]) + _gapped(grid.reshape(-1), longest))
    return min(found, key=len)


def _alike(flat: Tensor) -> bytes:
    """The codings that look at neighbours only, wherever they stand."""
    packed = np.packbits(flat.numpy(), bitorder="little")
    histogram = np.bincount(packed, minlength=256)
    counts = {width: _narrowed(histogram, width, flat.numel()) for width in WIDTHS}
    sizes = {width: min(coded_sizes(counts[width]).values()) for width in WIDTHS}
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
    return bytes([width]) + code_counted(symbols, counts[width])


def _entries_of(data: np.ndarray, rows: int, columns: int) -> Tensor:
    if not data.size:
        raise ValueError("no coding of a mask")
    width, data = int(data[0]), data[1:]
    if width == COLUMNS:
        return _density_of(data, rows, columns)
    if width == ROWS:
        return _density_of(data, columns, rows).T
    if width == GAPS:
        return _gaps_of(data, rows * columns).view(rows, columns)
    return _alike_of(width, data, rows * columns).view(rows, columns)


def _alike_of(width: int, data: np.ndarray, count: int) -> Tensor:
    if width in WIDTHS:
        symbols = decode_symbols(data, -(-count // width), 1 << width).to(torch.uint8)
        return _bits(symbols, width, count)
    size = width - BELOW
    if size not in GROUPS or not data.size or not 0 < data[0] < size or count % size:
        raise ValueError("no coding of a mask")
    ranks = decode_symbols(data[1:], count // size, comb(size, int(data[0])))
    return _bits(_ranks(size, int(data[0]))[1][ranks.int()], size, count)


@lru_cache(maxsize=1)
def _densities() -> np.ndarray:
    """From 0.0004 to 0.9996, as multiples of 2^-16, so that they are the same numbers everywhere."""
    odds = (np.arange(DENSITIES) - (DENSITIES - 1) / 2) / 4
    return np.asarray(np.rint(65536 / (1 + np.exp(-odds))) / 65536)


def _by_density(grid: Tensor) -> tuple[float, Tensor]:
    """About how many bytes ``_densely`` takes, and the best of the densities for each column."""
    held, known = grid.sum(0).double()[:, None], torch.from_numpy(_densities())
    bits = -(held * known.log2() + (grid.shape[0] - held) * (1 - known).log2())
    least, which = bits.min(1)
    return 6 + float(least.sum()) / 8 + estimated_bits(counted(which, DENSITIES)) / 8, which.to(torch.uint8)


def _densely(grid: Tensor, which: Tensor) -> bytes:
    """Length and coding of the columns' densities, then the columns, those of one density together."""
    named, places, columns = code_symbols(which, DENSITIES), np.arange(2, dtype=np.int32), grid.T
    parts = [(columns[which == k].reshape(-1).byte(), places, _chance(k))
             for k in torch.unique(which).tolist()]
    return len(named).to_bytes(4, "little") + named + ans_encode(parts)


def _density_of(data: np.ndarray, rows: int, columns: int) -> Tensor:
    length = int.from_bytes(data[:4].tobytes(), "little")
    if data.size < 4 + length:
        raise ValueError("no coding of a mask")
    which, places = decode_symbols(data[4:4 + length], columns, DENSITIES), np.arange(2, dtype=np.int32)
    kinds = torch.unique(which).tolist()
    parts = [(int((which == k).sum()) * rows, places, _chance(k)) for k in kinds]
    order = torch.cat([(which == k).nonzero().view(-1) for k in kinds])
    found = ans_decode(data[4 + length:], 2, parts).bool().view(columns, rows)
    return found[order.argsort()].T


def _chance(k: int) -> object:
    density = _densities()[k]
    return Categorical(np.array([1 - density, density]), perfect=False)


def _by_gaps(flat: Tensor) -> tuple[float, int]:
    """About how many bytes ``_gapped`` takes, from the first entries, and which gaps are best told apart."""
    seen = flat[:CHUNK]
    scale = flat.numel() / seen.numel()
    return min((6 + estimated_bits(counted(_gaps(seen, longest), longest + 1) * scale) / 8, longest)
               for longest in LONGEST)


def _gapped(flat: Tensor, longest: int) -> bytes:
    symbols = _gaps(flat, longest)
    return bytes([longest]) + symbols.numel().to_bytes(5, "little") + code_symbols(symbols, longest + 1)


def _gaps(flat: Tensor, longest: int) -> Tensor:
    """Entries that are dropped before each kept one; ``longest``: so many are, and the gap goes on."""
    parts, last = [torch.zeros(0, dtype=torch.uint8)], -1
    for start in range(0, flat.numel(), CHUNK):
        kept = flat[start:start + CHUNK].nonzero().view(-1) + start
        gaps = torch.diff(kept, prepend=kept.new_full((1,), last)) - 1
        ends = (gaps // longest + 1).cumsum(0) - 1
        symbols = torch.full((int(ends[-1]) + 1 if ends.numel() else 0,), longest, dtype=torch.uint8)
        symbols[ends] = (gaps % longest).to(torch.uint8)
        parts.append(symbols)
        last = int(kept[-1]) if kept.numel() else last
    return torch.cat(parts)


def _gaps_of(data: np.ndarray, count: int) -> Tensor:
    longest, number = int(data[0]) if data.size else 0, int.from_bytes(data[1:6].tobytes(), "little")
    if data.size < 6 or longest not in LONGEST or number > 2 * count:
        raise ValueError("no coding of a mask")
    symbols = decode_symbols(data[6:], number, longest + 1)
    steps = torch.where(symbols == longest, longest, symbols.long() + 1)
    places = steps.cumsum(0)[symbols < longest] - 1
    if places.numel() and int(places[-1]) >= count:
        raise ValueError("entries beyond the mask")
    return torch.zeros(count, dtype=torch.bool).index_fill_(0, places, True)


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
