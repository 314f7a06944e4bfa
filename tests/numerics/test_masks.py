"""Masks: what comes back is what went in, no larger than its pattern says, and damage is refused."""

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
from rarefy.numerics.masks import code_mask, decode_mask, mask_size, tile_of


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


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
    "columns, uneven": (noise(*SHAPE) < torch.linspace(0, 1, 240)**2, 96 * 240 * 0.65 / 8),
    "a vector": (noise(77) < 0.5, 77 / 8 + 5),
    "a kernel": (noise(8, 4, 3, 3) < 0.5, 8 * 36 / 8 + 5),
    "empty": (torch.zeros(0, 5, dtype=torch.bool), 0),
}
for _kept, _group in ((2, 4), (1, 4), (4, 8), (8, 16), (3, 5), (7, 10)):
    _places = noise(96 * 240 // _group, _group).argsort(1).argsort(1)
    MASKS[f"{_kept}:{_group}"] = ((_places < _kept).view(SHAPE),
                                  96 * 240 / _group * log2(comb(_group, _kept)) / 8 + 12)


@pytest.mark.parametrize("shape", [SHAPE, SHAPE[::-1], (96 * 240,), (0, 4)])
def test_sizes_are_those_of_the_codes(shape: tuple[int, ...]) -> None:
    """Also the second time, and of the same entries in another shape."""
    entries = (noise(*SHAPE, seed=5) * torch.linspace(0, 2, 240) < 0.5).reshape(-1)
    keep = entries[:int(np.prod(shape))].reshape(shape)
    assert [mask_size(keep) for _ in range(2)] == [len(code_mask(keep))] * 2


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


@pytest.mark.parametrize("transposed", [False, True])
def test_columns_of_uneven_density_cost_their_own_entropy(transposed: bool,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of all is kept, but some columns keep nearly all and some nearly nothing."""
    monkeypatch.setattr(coding, "CHUNK", 1 << 10)  # several chunks of one density
    density = torch.linspace(0.01, 0.99, 240)
    keep = noise(*SHAPE, seed=3).repeat(5, 1) < density
    entropy = float(-(density * density.log2() + (1 - density) * (1 - density).log2()).mean())
    if transposed:
        keep = keep.T.contiguous()
    data = code_mask(keep)
    assert 8 * len(data) < (entropy + 0.02) * keep.numel() + 6 * 240
    assert torch.equal(decode_mask(array(data), tuple(keep.shape)), keep)


def test_runs_cost_less_as_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of some ten entries, ten apart in the mean, some of them hundreds: two choices a run."""
    monkeypatch.setattr("rarefy.numerics.masks.CHUNK", 1000)
    lengths = (1 + 20 * noise(600) ** 3 * (1 + 20 * (noise(600, seed=1) < 0.02))).long()
    keep = torch.repeat_interleave(torch.arange(600) % 2 == 1, lengths)[:3000].view(30, 100)
    data = code_mask(keep)
    assert data[1] == 11 and len(data) < 0.8 * 3000 / 8
    assert torch.equal(decode_mask(array(data), (30, 100)), keep)
    late = torch.zeros(1, 5000, dtype=torch.bool)
    late[0, 4321] = late[0, 4999] = True
    assert torch.equal(decode_mask(array(code_mask(late)), (1, 5000)), late)


def test_the_largest_tile() -> None:
    assert tile_of(MASKS["tiles"][0]) == (4, 8) and tile_of(MASKS["half"][0]) == (1, 1)
    assert tile_of(MASKS["rows"][0]) == (1, 240) and tile_of(MASKS["all"][0]) == SHAPE


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
    (b"\x00\x09\x09\x00\x00\x00\x00", "no coding of a mask"),
    (b"\x00\x0a\x02\x00\x00\x00\x00\x00", "bytes where 2 codes"),
    (b"\x00\x0b\x0f\x01", "no coding of a mask"), (b"\x00\x0b\x0e\x01\x00\x00\x00\x00", "no coding"),
    (b"\x00\x0b\x0f\x01\x00\x00\x00\x00\x00\x09", "beyond the mask"),
])
def test_what_is_no_mask_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_mask(array(data), (2, 4))


def test_no_mask_has_no_bytes() -> None:
    with pytest.raises(ValueError, match="for no mask"):
        decode_mask(array(b"\x00"), (0, 5))
