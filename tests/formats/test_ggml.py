"""Every block format against an independent reader: the gguf package, or the layout written out longhand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.core.errors import ModelError, TargetError
from rarefy.core.nodes import Dense, Quantized
from rarefy.formats.ggml import CHUNK, CODECS, Codec
from rarefy.numerics.grids import integer_grid

QUANTIZED = [codec for codec in CODECS.values() if codec.grid is not None]
FLOATS = [codec for codec in CODECS.values() if codec.grid is None]
SEEDS = st.integers(0, 2**32 - 1)
few = settings(max_examples=12, deadline=None)


def name(codec: Codec) -> str:
    return codec.name


def longhand_q2_0(data: np.ndarray) -> np.ndarray:
    """64 weights: an fp16 scale, then four 2-bit values to a byte, -1, 0, 1 or 2 scales each."""
    rows = []
    for row in data:
        values = []
        for block in row.reshape(-1, 18):
            scale = np.float32(block[:2].view(np.float16)[0])
            for j in range(64):
                values.append(np.float32((int(block[2 + j // 4]) >> (j % 4 * 2) & 3) - 1) * scale)
        rows.append(values)
    return np.array(rows, np.float32)


def reference(codec: Codec, data: np.ndarray) -> np.ndarray:
    """What someone else reads in these bytes."""
    if codec.name == "Q2_0":
        return longhand_q2_0(data)
    return dequantize(data, gguf.GGMLQuantizationType[codec.name])


def same_bits(values: torch.Tensor, other: np.ndarray) -> bool:
    return np.array_equal(values.numpy().view(np.uint32), other.reshape(values.shape).view(np.uint32))


def clear(part: np.ndarray, bits: int, value: int, mask: int) -> None:
    """Where a field of that many bits has this value, clear the bits of ``mask`` in it."""
    for shift in range(0, 8, bits):
        hit = (part >> shift & (1 << bits) - 1) == value
        part &= np.where(hit, 0xFF ^ (mask << shift), 0xFF).astype(np.uint8)


def valid_bytes(codec: Codec, rows: int, columns: int, seed: int) -> np.ndarray:
    """Random bytes that ggml's own quantizers could have written: finite scales, canonical codes."""
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (rows, codec.row_bytes(columns)), dtype=np.uint8)
    blocks = data.reshape(-1, codec.block_bytes)
    halves = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82),
              "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": ()}
    for first in halves.get(codec.name, (0,)):
        blocks[:, first + 1] &= 0xBF  # an exponent without its highest bit is neither infinity nor NaN
    if codec.name == "MXFP4":
        blocks[:, 0] = np.clip(blocks[:, 0], 1, 252)  # 12 * 2^125 overflows
        clear(blocks[:, 1:], 4, 8, 8)  # minus zero is written as zero
    if codec.name == "TQ2_0":
        clear(blocks[:, :64], 2, 3, 1)  # 3 is no ternary digit
    if codec.name == "TQ1_0":
        numbers = random.integers(0, 243, (len(blocks), 52))
        numbers[:, 48:] = numbers[:, 48:] // 3 * 3  # the last bytes hold four digits
        blocks[:, :52] = (numbers * 256 + 242) // 243
    return data


@pytest.mark.parametrize("codec", QUANTIZED, ids=name)
@given(seed=SEEDS, rows=st.integers(1, 5), blocks=st.integers(1, 4))
@few
def test_others_read_what_we_pack(codec: Codec, on_grid: Any, seed: int, rows: int, blocks: int) -> None:
    """pack(node), read by someone else, is node.dense() bit for bit; and unpack gives the node back."""
    node = on_grid(codec.grid, rows, blocks * codec.block, seed)
    packed = codec.pack(node)
    assert packed.shape == (rows, codec.row_bytes(blocks * codec.block))
    assert same_bits(node.dense(), reference(codec, packed))
    again = codec.unpack(packed, blocks * codec.block)
    assert isinstance(again, Quantized)
    assert again.grid == codec.grid
    assert torch.equal(again.codes, node.codes)
    assert same_bits(again.dense(), node.dense().numpy())


@pytest.mark.parametrize("codec", QUANTIZED, ids=name)
@given(seed=SEEDS)
@few
def test_we_read_what_others_pack(codec: Codec, seed: int) -> None:
    """unpack(bytes) means what someone else reads in them, and packs into the same bytes."""
    data = valid_bytes(codec, 3, 2 * codec.block, seed)
    node = codec.unpack(data, 2 * codec.block)
    assert same_bits(node.dense(), reference(codec, data))
    assert np.array_equal(codec.pack(node), data)


@pytest.mark.parametrize("codec", QUANTIZED, ids=name)
def test_sizes_and_numbers_are_those_of_ggml(codec: Codec, on_grid: Any) -> None:
    if codec.name == "Q2_0":
        assert (codec.type_id, codec.block, codec.block_bytes) == (42, 64, 18)
    else:
        kind = gguf.GGMLQuantizationType[codec.name]
        assert (codec.type_id, (codec.block, codec.block_bytes)) == (kind.value, gguf.GGML_QUANT_SIZES[kind])
    # five ternary digits share a byte of TQ1_0, which no grid of whole bits can say
    counted = on_grid(codec.grid, 1, codec.block).bits()
    assert counted == (2.0625 * 256 if codec.name == "TQ1_0" else codec.block_bytes * 8)


@pytest.mark.parametrize("codec", QUANTIZED, ids=name)
def test_rows_pack_alone_as_they_pack_together(codec: Codec, on_grid: Any) -> None:
    """Row slices and streams of pieces give the same bytes as the whole, across the chunks inside."""
    columns, rows = 512, CHUNK // 512 + 37
    node = on_grid(codec.grid, rows, columns, 1)
    whole = codec.pack(node)
    for start, end in ((0, 1), (5, 9), (rows - 3, rows)):
        part = node.select(0, torch.arange(start, end))
        assert np.array_equal(codec.pack(part), whole[start:end])
    view = Quantized(node.codes[7:9], node.scale.select(0, torch.tensor([7, 8])),
                     None if node.zero is None else node.zero.select(0, torch.tensor([7, 8])), node.grid)
    assert np.array_equal(codec.pack(view), whole[7:9])
    pieces = list(codec.stream(node))
    assert len(pieces) > 1
    assert np.array_equal(np.concatenate(pieces), whole)
    assert same_bits(codec.unpack(whole, columns).dense(), node.dense().numpy())


@pytest.mark.parametrize("codec", FLOATS, ids=name)
def test_floats(codec: Codec) -> None:
    """Rounded to the type as the gguf package rounds; unpacked without loss; any number of axes."""
    values = torch.randn(7, 96, generator=torch.Generator().manual_seed(0)) * 10
    packed = codec.pack(Dense(values))
    theirs = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[codec.name])
    assert np.array_equal(packed, theirs.view(np.uint8))
    node = codec.unpack(packed, 96)
    assert isinstance(node, Dense)
    assert node.values.dtype == codec.dtype
    assert np.array_equal(codec.pack(node), packed)
    assert np.array_equal(codec.pack(Dense(values[3])), packed[3:4])


def test_q8_0_with_the_code_that_ggml_never_writes() -> None:
    """A byte of -128 is read on a wider grid and packed back as it was."""
    codec = CODECS["Q8_0"]
    data = valid_bytes(codec, 2, 64, 0)
    data[1, 5] = 0x80
    node = codec.unpack(data, 64)
    assert isinstance(node, Quantized)
    assert len(node.grid.levels) == 256
    assert same_bits(node.dense(), reference(codec, data))
    assert np.array_equal(codec.pack(node), data)


def test_mxfp4_zero_blocks_and_negative_zero() -> None:
    """ggml gives zero blocks the exponent 0 and has two zeros: both mean zero, neither is lost as a NaN."""
    codec = CODECS["MXFP4"]
    data = np.zeros((1, 34), np.uint8)
    data[0, 17], data[0, 18] = 127, 0x88
    node = codec.unpack(data, 64)
    assert not node.dense().any()
    assert not reference(codec, codec.pack(node)).any()
    data[0, 1] = 1
    with pytest.raises(ModelError, match="2\\^-128"):
        codec.unpack(data, 64)


def test_ternary_bytes_that_are_not_ternary() -> None:
    data = np.full((1, 66), 0xFF, np.uint8)
    data[0, 64:] = 0
    with pytest.raises(ModelError, match=r"TQ2_0: .* code 3"):
        CODECS["TQ2_0"].unpack(data, 256)


def broken(node: Quantized, how: str) -> Any:
    match how:
        case "columns":
            return Quantized(node.codes[:, :-1], node.scale, node.zero, node.grid)
        case "code":
            codes = node.codes.clone()
            codes[1, 3] = len(node.grid.levels)
            return replace(node, codes=codes)
        case "grid":
            return replace(node, grid=integer_grid(3, 32))
        case "dense":
            return Dense(node.dense())
        case "zero":
            return replace(node, zero=None)
        case "scale type":
            return replace(node, scale=Dense(node.scale.dense()))
        case "scale step":
            assert isinstance(node.scale, Quantized)
            return replace(node, scale=replace(node.scale, codes=node.scale.codes + 64))
        case "scale":
            plain = node.scale.scale if isinstance(node.scale, Quantized) else node.scale
            assert isinstance(plain, Dense)
            values = plain.values.clone()
            values[0, 0] = float("nan")
            worse = replace(node.scale, scale=Dense(values)) if isinstance(node.scale, Quantized) \
                else Dense(values)
            return replace(node, scale=worse)
    raise AssertionError(how)


@pytest.mark.parametrize(("codec", "how", "message"), [
    ("Q4_0", "columns", "not divisible by 32; choose"),
    ("Q4_0", "code", "code 16 in rows 0 to 3 lies beyond the 16 levels"),
    ("Q4_K", "grid", "cannot store weights on the grid 'int3g32'; quantize onto"),
    ("Q4_K", "dense", "cannot store a Dense; expected Quantized"),
    ("Q4_1", "zero", "the zero is not stored as the grid says"),
    ("Q4_K", "zero", "the zero is not stored as the grid says"),
    ("Q4_0", "scale type", "the scale is not stored as the grid says.*torch.float32"),
    ("Q4_K", "scale type", "the scale is not stored as the grid says"),
    ("Q5_K", "scale step", "a scale has code .* beyond the 64 levels"),
    ("Q6_K", "scale", "a scale is NaN or infinite"),
    ("IQ4_NL", "scale", "a scale is NaN or infinite"),
])
def test_what_cannot_be_packed(codec: str, how: str, message: str, on_grid: Any) -> None:
    node = on_grid(CODECS[codec].grid, 4, 256, 3)
    with pytest.raises(TargetError, match=message):
        CODECS[codec].pack(broken(node, how))


def test_floats_that_cannot_be_packed() -> None:
    with pytest.raises(TargetError, match="F16: cannot store values beyond 65504; store this weight as F32"):
        CODECS["F16"].pack(Dense(torch.tensor([[1.0, 7e4]])))
    with pytest.raises(TargetError, match="F32: cannot store NaN"):
        CODECS["F32"].pack(Dense(torch.tensor([[1.0, float("nan")]])))
    # a sum that overflows is no infinite value
    large = torch.full((1, 8), 3e38)
    assert np.array_equal(CODECS["F32"].pack(Dense(large)).view(np.float32), large.numpy())


def test_bytes_of_another_size_are_refused() -> None:
    with pytest.raises(ModelError, match="Q4_0: expected bytes"):
        CODECS["Q4_0"].unpack(np.zeros((2, 18), np.uint8), 64)
