"""Coding: what comes back is what went in, close to the entropy, and damage is refused."""

from __future__ import annotations

from contextlib import suppress
from math import comb, log2
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.numerics import coding
from rarefy.numerics.coding import (
    code_mask,
    code_symbols,
    counted,
    decode_mask,
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


SHAPE = (96, 240)
MASKS: dict[str, tuple[torch.Tensor, float]] = {
    # a mask and the bytes that it may take
    "half": (noise(*SHAPE) < 0.5, 96 * 240 / 8 + 3),
    "tenth": (noise(*SHAPE) < 0.1, 96 * 240 * 0.4690 / 8 * 1.03),
    "rows": ((noise(96, 1) < 0.5).expand(SHAPE), 96 / 8 + 12),
    "columns": ((noise(1, 240) < 0.5).expand(SHAPE), 240 / 8 + 12),
    "rows and columns": ((noise(96, 1) < 0.5) & (noise(1, 240, seed=1) < 0.5), (96 + 240) / 8 + 13),
    "rows, then here and there": ((noise(96, 1, seed=2) < 0.5) & (noise(*SHAPE) < 0.3), 1660),
    "tiles": ((noise(24, 30) < 0.5).repeat_interleave(4, 0).repeat_interleave(8, 1), 24 * 30 / 8 + 12),
    "cut tiles": ((noise(24, 30) < 0.5).repeat_interleave(4, 0).repeat_interleave(8, 1)[:94, :235],
                  24 * 30 / 8 + 12),
    "all": (torch.ones(SHAPE, dtype=torch.bool), 16),
    "none": (torch.zeros(SHAPE, dtype=torch.bool), 16),
    "one": (torch.ones(1, 1, dtype=torch.bool), 4),
    "a column": (noise(77, 1) < 0.5, 77 / 8 + 5),
    "a vector": (noise(77) < 0.5, 77 / 8 + 5),
    "a kernel": (noise(8, 4, 3, 3) < 0.5, 8 * 36 / 8 + 5),
    "empty": (torch.zeros(0, 5, dtype=torch.bool), 0),
}
for _kept, _group in ((2, 4), (1, 4), (4, 8), (8, 16), (3, 5), (7, 10)):
    _places = noise(96 * 240 // _group, _group).argsort(1).argsort(1)
    MASKS[f"{_kept}:{_group}"] = ((_places < _kept).view(SHAPE),
                                  96 * 240 / _group * log2(comb(_group, _kept)) / 8 + 12)


@pytest.mark.parametrize("name", MASKS)
def test_masks_come_back_small(name: str) -> None:
    keep, most = MASKS[name]
    data = code_mask(keep)
    assert len(data) <= most
    assert torch.equal(decode_mask(array(data), tuple(keep.shape)), keep)


def test_at_most_two_of_four_is_cheaper_than_a_bit() -> None:
    """Not every group is full, so there is no rank; the bytes of the bitmask know it all the same."""
    keep = MASKS["2:4"][0] & (noise(*SHAPE, seed=5) < 0.98)
    assert len(code_mask(keep)) < 0.75 * 96 * 240 / 8


@given(rows=st.integers(1, 9), columns=st.integers(1, 40), density=st.floats(0, 1), seed=st.integers(0, 99))
@settings(deadline=None)
def test_any_mask_comes_back(rows: int, columns: int, density: float, seed: int) -> None:
    keep = noise(rows, columns, seed=seed) < density
    assert torch.equal(decode_mask(array(code_mask(keep)), (rows, columns)), keep)


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_damaged_masks_are_refused_or_read(data: Any) -> None:
    keep = MASKS[data.draw(st.sampled_from(sorted(MASKS)))][0]
    coded = bytearray(code_mask(keep))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(len(coded), 40)))
        coded[at:at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    shape = data.draw(st.sampled_from([tuple(keep.shape), (3, 5), (0, 0)]))
    with suppress(ValueError):
        assert decode_mask(array(bytes(coded)), shape).shape == shape


@pytest.mark.parametrize(("data", "message"), [
    (b"", "no coding"), (b"\x07", "no coding"), (b"\x02\x01", "no coding of a mask"),
    (b"\x02" + bytes(8) + b"\x01\x00\x00", "tiles of 0 x 0"), (b"\x01\x00\x00\x01\x00", "nothing kept"),
    (b"\x00\x03\x00", "no coding of a mask"), (b"\x00\x13\x00\x00", "no coding of a mask"),
    (b"\x00\x01\x01\x00\x00", "all zero"), (b"\x00\x01\x01\x00\x01\x01", "left behind"),
    (b"\x00\x01\x09", "no coding of symbols"), (b"\x00\x01\x00", "0 bytes where 8 codes"),
    (b"\x00\x01\x01\x05\x05\x00", "zero word"),
])
def test_what_is_no_mask_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_mask(array(data), (2, 4))


def test_alphabets_are_bounded() -> None:
    with pytest.raises(ValueError, match="alphabet of 65537"):
        code_symbols(torch.zeros(3, dtype=torch.int32), 65537)
    with pytest.raises(ValueError, match="beyond the 5"):
        decode_symbols(array(b"\x00\xff\x01"), 3, 5)
    with pytest.raises(ValueError, match="for no symbols"):
        decode_symbols(array(b"\x00"), 0, 5)
    with pytest.raises(ValueError, match="for no mask"):
        decode_mask(array(b"\x00"), (0, 5))
