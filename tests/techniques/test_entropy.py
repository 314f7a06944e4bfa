"""Entropy-coded codes: the same values, the bytes of the entropy, and files that hold them so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rarefy.core.edit import edit
from rarefy.core.errors import EditError, ModelError
from rarefy.core.nodes import Dense, Masked, Node, Quantized, Sum
from rarefy.core.nouns import Evidence
from rarefy.formats.native import WEIGHTS, load_native, save_native
from rarefy.numerics.grids import Grid, integer_grid
from rarefy.techniques.prune.magnitude import Magnitude
from rarefy.techniques.quantize.entropy import Entropy
from rarefy.techniques.quantize.rtn import RTN

GRIDS = {"int8": integer_grid(8, 0), "int4-g32": integer_grid(4, 32), "int3-g32": integer_grid(3, 32)}


def run(technique: object, tree: Node, weight: Tensor) -> Node:
    return edit("w", tree, weight, technique, "law", None, torch.Generator())[0]


def coded(weight: Tensor, grid: Grid, sparsity: float | None = None) -> tuple[Node, Node]:
    """Packed and coded."""
    start: Node = Dense(weight)
    if sparsity is not None:
        start = run(Magnitude(sparsity), start, weight)
    packed = run(RTN(grid), start, weight)
    return packed, run(Entropy(), packed, weight)


@pytest.fixture(scope="module")
def wide(weight: Tensor) -> Tensor:
    """Rows enough for a table of frequencies not to matter."""
    generator = torch.Generator().manual_seed(0)
    return weight.repeat(4, 1) * torch.rand(4 * weight.shape[0], 1, generator=generator)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_the_bits_are_those_of_the_entropy(name: str, sparsity: float | None, wide: Tensor) -> None:
    packed, done = coded(wide, GRIDS[name], sparsity)
    assert torch.equal(done.dense(), packed.dense())
    if sparsity is None:
        node, before, keep = done, packed, torch.ones_like(wide).bool()
    else:
        assert isinstance(done, Masked) and isinstance(packed, Masked)
        node, before, keep = done.inner, packed.inner, done.keep
    assert isinstance(node, Quantized)
    counts = torch.bincount(node.codes[keep].flatten().long()).double()
    shares = counts[counts > 0] / counts.sum()
    literal = -float((shares * shares.log2()).sum()) * int(keep.sum())
    plain, ours = before.kept_bits(keep), node.kept_bits(keep)
    scales = node.scale.bits()
    table = 8 * (2 + 4 + len(node.grid.levels))
    assert literal + scales <= ours <= 1.002 * literal + table + scales
    assert ours < plain


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_the_file_holds_as_much_as_is_counted(name: str, sparsity: float | None, wide: Tensor,
                                              tmp_path: Path) -> None:
    """Law 2, and the way back to the same tree."""
    _, done = coded(wide, GRIDS[name], sparsity)
    tree = Sum((done, Dense(torch.zeros_like(wide)[:, :wide.shape[1]])))
    size = save_native(tmp_path / "out", {"w": tree}, {}, {})
    assert 8 * size == tree.bits()
    back = load_native(tmp_path / "out").trees["w"]
    assert torch.equal(back.dense(), tree.dense()) and back.bits() == tree.bits()


def test_a_damaged_stream_is_refused(wide: Tensor, tmp_path: Path) -> None:
    import hashlib
    import json

    _, done = coded(wide, GRIDS["int8"])
    save_native(tmp_path / "out", {"w": done}, {}, {})
    file, tree = tmp_path / "out" / WEIGHTS, tmp_path / "out" / "tree.json"
    raw = bytearray(file.read_bytes())
    header = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])
    start = 8 + int.from_bytes(raw[:8], "little") + header["w:codes"]["data_offsets"][0]
    raw[start] = 7  # no way of coding has this number
    file.write_bytes(raw)
    said = json.loads(tree.read_text()) | {"sha256": hashlib.sha256(raw).hexdigest()}
    tree.write_text(json.dumps(said))
    with pytest.raises(ModelError, match="no coding of symbols; the folder is damaged"):
        load_native(tmp_path / "out")


def test_what_is_even_stays_packed() -> None:
    """Every code equally often: a table would only cost."""
    grid = integer_grid(4, 32)
    codes = torch.arange(16, dtype=torch.uint8).repeat(8, 2)
    node = Quantized(codes, Dense(torch.ones(8, 1)), None, grid)
    after, receipt = edit("w", node, node.dense(), Entropy(), "entropy", None, torch.Generator())
    assert after is node and "too evenly" in receipt.note


def test_rows_and_rounding_again(wide: Tensor, evidence: Evidence) -> None:
    """Rows of coded codes are coded; whoever rounds again decides anew."""
    _, done = coded(wide, GRIDS["int8"])
    few = done.select(0, torch.arange(8))
    assert isinstance(few, Quantized) and few.coded
    assert torch.equal(few.dense(), done.dense()[:8])
    with pytest.raises(EditError, match="entropy edits Quantized and found none in Dense"):
        edit("w", Dense(wide), wide, Entropy(), "entropy", None, torch.Generator())
