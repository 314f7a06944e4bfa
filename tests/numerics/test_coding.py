"""Coding: what comes back is what went in, close to the entropy, and damage is refused."""

from __future__ import annotations

from contextlib import suppress
from math import log2

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.numerics import coding
from rarefy.numerics.coding import (
    code_symbols,
    counted,
    decode_symbols,
    estimated_bits,
    pack_bits,
    packed_size,
    unpack_bits,
)


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@given(bits=st.integers(1, 8), codes=st.lists(st.integers(0, 255), max_size=70))
@settings(deadline=None)
def test_bit_packing_against_longhand(bits: int, codes: list[int]) -> None:
    codes = [code % (1 << bits) for code in codes]
    packed = pack_bits(np.array(codes, np.uint8), bits)
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    assert packed.tobytes() == number.to_bytes(packed_size(len(codes), bits), "little")
    assert unpack_bits(packed, bits, len(codes)).tolist() == codes


@given(alphabet=st.integers(1, 700), power=st.sampled_from([0.5, 1, 4, 30]), count=st.integers(0, 3000),
       seed=st.integers(0, 99))
@settings(deadline=None)
def test_symbols_come_back(alphabet: int, power: float, count: int, seed: int) -> None:
    symbols = (noise(count, seed=seed)**power * alphabet).int()
    if alphabet <= 256:
        symbols = symbols.to(torch.uint8)
    data = code_symbols(symbols, alphabet)
    again = decode_symbols(array(data), count, alphabet)
    assert again.dtype == symbols.dtype and torch.equal(again, symbols)
    assert len(data) <= 1 + packed_size(count, max(1, (alphabet - 1).bit_length()))
    if count:
        assert 8 * len(data) <= estimated_bits(counted(symbols, alphabet)) + 32
        for other in (count - 1, count + 1, 2 * count):  # the bytes say how many there are
            with suppress(ValueError):
                assert len(decode_symbols(array(data), other, alphabet)) == other
                # packed symbols may end within a byte, and what never changes has no end
                assert data[0] == coding.PACKED or int(symbols.unique().numel()) == 1


@pytest.mark.parametrize("alphabet", [2, 16, 256, 4096])
def test_entropy_is_reached(alphabet: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "CHUNK", 1 << 12)  # several chunks, one stack
    symbols = (noise(100_000)**3 * alphabet).int()
    share = torch.bincount(symbols, minlength=alphabet).double() / symbols.numel()
    entropy = -float(torch.special.xlogy(share, share).sum()) / np.log(2) * symbols.numel() / 8
    data = code_symbols(symbols, alphabet)
    assert entropy < len(data) < 1.001 * entropy + alphabet + 8
    assert torch.equal(decode_symbols(array(data), symbols.numel(), alphabet).int(), symbols)


def test_uniform_symbols_cost_the_logarithm() -> None:
    symbols = (noise(50_000) * 70).to(torch.uint8)
    data = code_symbols(symbols, 70)
    assert len(data) == pytest.approx(50_000 * log2(70) / 8, rel=1e-3)
    assert len(code_symbols((noise(50_000) * 64).to(torch.uint8), 64)) == 1 + 50_000 * 6 // 8


def test_alphabets_are_bounded() -> None:
    with pytest.raises(ValueError, match="alphabet of 65537"):
        code_symbols(torch.zeros(3, dtype=torch.int32), 65537)
    with pytest.raises(ValueError, match="beyond the 5"):
        decode_symbols(array(b"\x00\xff\x01"), 3, 5)
    with pytest.raises(ValueError, match="for no symbols"):
        decode_symbols(array(b"\x00"), 0, 5)
