"""Coding: the bytes that a stream of symbols takes, exactly, and those bytes themselves.

A stream of n symbols from an alphabet of K opens with one byte that says how the rest is coded:

    packed     ceil(log2 K) bits each, lowest bit first
    static     a table of the symbols' frequencies, one byte each, then asymmetric numeral systems (ANS):
               about ``-sum_i log2 p(s_i)`` bits, the entropy of the table
    uniform    ANS with all symbols alike: ``n log2 K`` bits where K is no power of two

The shortest wins. Coding depends on the data alone, so a node counts its bits by coding, and what it counts
is what a file holds.

Paper: Duda 2013, "Asymmetric numeral systems"; Han et al. 2016, "Deep Compression", section 4 (entropy coding
of shared weights). The ANS coder itself is the package ``constriction`` (Bamler 2022).
"""

from __future__ import annotations

import constriction
import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor

AnsCoder = constriction.stream.stack.AnsCoder
Categorical, Uniform = constriction.stream.model.Categorical, constriction.stream.model.Uniform

PACKED, STATIC, UNIFORM = 0, 1, 2
CHUNK = 1 << 20  # symbols handled at once; a multiple of 8, so that packed chunks end on whole bytes
LARGEST = 1 << 16  # alphabet
END = 255  # a byte's worth of end mark below the symbols under ANS


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


def pack_symbols(symbols: Tensor, bits: int) -> bytes:
    """All symbols at ``bits`` bits, plane after plane."""
    planes, shift = [], 0
    for width in _planes(bits):
        for part in torch.split(symbols, CHUNK):
            plane = (part.numpy().astype(np.uint32) >> shift & (1 << width) - 1).astype(np.uint8)
            planes.append(pack_bits(plane, width))
        shift += width
    return b"".join(plane.tobytes() for plane in planes)


def unpack_symbols(data: np.ndarray, bits: int, count: int) -> Tensor:
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


def ans_encode(parts: list[tuple[Tensor, np.ndarray, object]]) -> bytes:
    """Symbols, what each is called in a model, and that model; one stream for all parts.

    ANS is a stack: the last symbol goes first. At the bottom lies a mark, because an empty stack would go on
    giving symbols to whoever asks for more.
    """
    coder = AnsCoder()
    coder.encode_reverse(END, Uniform(256))
    for symbols, places, model in reversed(parts):
        for part in reversed(torch.split(symbols, CHUNK)):
            coder.encode_reverse(places[part.numpy()], model)
    return bytes(coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0"))


def ans_decode(data: np.ndarray, alphabet: int, parts: list[tuple[int, np.ndarray, object]]) -> Tensor:
    """The reverse: how many symbols there are in a part, which ones, and their model."""
    words = np.zeros(-(-data.size // 4) * 4, np.uint8)
    words[:data.size] = data
    coder = AnsCoder(words.view("<u4").astype(np.uint32))  # refuses a last word of zero
    total, first = sum(count for count, _, _ in parts), 0
    out = torch.empty(total, dtype=_dtype(alphabet))
    for count, symbols, model in parts:
        for start in range(first, first + count, CHUNK):
            size = min(CHUNK, first + count - start)
            out[start:start + size] = torch.from_numpy(symbols[coder.decode(model, size)])
        first += count
    if coder.decode(Uniform(256)) != END or not coder.is_empty():
        raise ValueError(f"there are not exactly {total} symbols")
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
    return 8 * min(coded_sizes(counts).values())


def coded_sizes(counts: np.ndarray) -> dict[int, float]:
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
    return code_counted(flat, counted(flat, alphabet))


def code_counted(flat: Tensor, counts: np.ndarray) -> bytes:
    sizes, alphabet = coded_sizes(counts), counts.size
    way, packed = min(sizes, key=lambda way: sizes[way]), sizes[PACKED]
    if way == UNIFORM:
        body = ans_encode([(flat, np.arange(alphabet, dtype=np.int32), Uniform(alphabet))])
    elif way == STATIC:
        table = _table(counts)
        used, model = _static(table)
        places = np.zeros(alphabet, np.int32)
        places[used] = np.arange(used.size, dtype=np.int32)
        body = table.tobytes() + (b"" if model is None else ans_encode([(flat, places, model)]))
    if way == PACKED or 1 + len(body) >= packed:
        return bytes([PACKED]) + pack_symbols(flat, width_of(alphabet))
    return bytes([way]) + body


def decode_symbols(data: np.ndarray, count: int, alphabet: int) -> Integer[Tensor, " n"]:
    """The reverse of ``code_symbols``: uint8, or int32 if they need it. ValueError if nothing is coded so."""
    if not count:
        if data.size:
            raise ValueError(f"{data.size} bytes for no symbols")
        return torch.zeros(0, dtype=_dtype(alphabet))
    way, body = (int(data[0]) if data.size else -1), data[1:]
    if way == PACKED:
        symbols = unpack_symbols(body, width_of(alphabet), count)
        if int(symbols.max()) >= alphabet:
            raise ValueError(f"a symbol beyond the {alphabet} that there are")
        return symbols
    if way == UNIFORM and alphabet > 1:
        return ans_decode(body, alphabet, [(count, np.arange(alphabet, dtype=np.int32), Uniform(alphabet))])
    if way != STATIC or body.size < alphabet:
        raise ValueError("no coding of symbols")
    used, model = _static(body[:alphabet])
    if model is not None:
        return ans_decode(body[alphabet:], alphabet, [(count, used, model)])
    if body.size > alphabet:
        raise ValueError("bytes are left behind the last symbol")
    return torch.full((count,), int(used[0]), dtype=_dtype(alphabet))
