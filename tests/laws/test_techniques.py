"""The laws of the design, over every technique that is found in the folder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.core.edit import edit, leaves
from rarefy.core.errors import EditError
from rarefy.core.nodes import Dense, Masked, Node, Product, Quantized, Shared, Sum
from rarefy.core.nouns import Evidence
from rarefy.numerics.grids import integer_grid
from rarefy.run.planning import techniques
from rarefy.techniques.quantize.rtn import RTN

TECHNIQUES = techniques()
ROWS = 24
KERNEL = (16, 4, 4)  # how a row of 256 was flattened, for techniques that decompose convolutions


def run(technique: Any, tree: Node, original: Tensor, evidence: Evidence | None, seed: int = 0) -> Any:
    return edit("layers.3.mlp.up", tree, original, technique, "law", evidence,
                torch.Generator().manual_seed(seed), KERNEL)


@pytest.fixture(scope="module")
def small(weight: Tensor) -> Tensor:
    return weight[:ROWS].contiguous()


@pytest.fixture(scope="module")
def seen(evidence: Evidence) -> Evidence:
    assert evidence.fisher is not None
    return Evidence(evidence.gram, evidence.tokens, evidence.fisher[:ROWS])


def trees(weight: Tensor) -> dict[str, Node]:
    """Every shape of tree that a weight can have."""
    keep = weight.abs() > weight.abs().median()
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    product = Product(Dense(U[:, :16] * S[:16]), Dense(V[:16].contiguous()))
    dense, zeros = Dense(weight), Dense(torch.zeros_like(weight))
    rounded, _ = edit("w", dense, weight, RTN(integer_grid(4, 32)), "rtn", None, torch.Generator())
    return {"dense": dense, "quantized": rounded, "masked": Masked(keep, dense),
            "masked quantized": Masked(keep, rounded), "sum": Sum((rounded, zeros)),
            "sum with product": Sum((rounded, product))}


@pytest.mark.parametrize("kind", sorted(trees(torch.randn(4, 32))))
@pytest.mark.parametrize("name", sorted(TECHNIQUES))
def test_edit_keeps_shape_and_masks_and_repeats(name: str, kind: str, small: Tensor, seen: Evidence) -> None:
    """Laws 1, 3, 4 and 5: the shape stays, dropped weights stay dropped, the same seed gives the same bits,
    and a technique that finds nothing to edit says so."""
    tree, technique = trees(small)[kind], TECHNIQUES[name]()
    editable = [leaf for leaf in leaves(tree) if isinstance(leaf, technique.edits)]
    if not editable:
        with pytest.raises(EditError, match="found none"):
            run(technique, tree, small, seen)
        return
    # the factors of the product have 16 columns: block grids refuse them by name
    if kind == "sum with product" and hasattr(technique, "grid"):
        with pytest.raises(ValueError, match=r"layers\.3\.mlp\.up: 16 columns"):
            run(technique, tree, small, seen)
        return
    if kind == "sum with product" and "convolution" in (type(technique).__doc__ or ""):
        with pytest.raises(EditError, match=r"layers\.3\.mlp\.up: .* no window; use svd"):
            run(technique, tree, small, seen)
        return
    after, receipt = run(technique, tree, small, seen)
    again, _ = run(technique, tree, small, seen)
    assert after.shape == tree.shape == small.shape
    assert torch.equal(after.dense(), again.dense())
    assert bool(torch.isfinite(after.dense()).all())
    assert receipt.bits_after == after.bits() and receipt.bits_before == tree.bits()
    if isinstance(tree, Masked):
        # what repairs a masked weight adds to it from outside
        masked = after.terms[0] if isinstance(after, Sum) and Masked in technique.edits else after
        assert isinstance(masked, Masked) and not bool((masked.keep & ~tree.keep).any())
        assert torch.equal(masked.keep, tree.keep) or hasattr(technique, "sparsity")  # prunings drop more
        assert not bool(masked.dense()[~tree.keep].any())


@pytest.mark.parametrize("name", sorted(TECHNIQUES))
def test_editing_nothing_raises(name: str, small: Tensor, seen: Evidence) -> None:
    with pytest.raises(EditError, match="found none in Shared"):
        run(TECHNIQUES[name](), Shared("model.embed", Dense(small)), small, seen)


@pytest.mark.parametrize("name", sorted(name for name, kind in TECHNIQUES.items() if kind.beats))
def test_beats_its_naive_baseline(name: str, small: Tensor, seen: Evidence) -> None:
    """Law 6. A technique that improves on what is there starts from its baseline's result."""
    baseline, technique = TECHNIQUES[TECHNIQUES[name].beats](), TECHNIQUES[name]()
    start, before = run(baseline, Dense(small), small, seen)
    tree = start if Dense not in technique.edits else Dense(small)
    done, after = run(technique, tree, small, seen)
    if "fisher" in technique.needs:  # what it lowers is the predicted KL, in which outputs do not count alike
        assert seen.damage(done.dense() - small) < seen.damage(start.dense() - small)
    else:
        assert after.error < before.error
    assert after.bits_after <= before.bits_after


@pytest.mark.parametrize("name", sorted(name for name, kind in TECHNIQUES.items() if kind.needs))
def test_missing_evidence_is_named(name: str, small: Tensor) -> None:
    with pytest.raises(EditError, match=r"layers\.3\.mlp\.up: law needs calibration evidence"):
        run(TECHNIQUES[name](), Dense(small), small, None)


@pytest.mark.parametrize("name", sorted(TECHNIQUES))
def test_declares_what_a_user_meets(name: str) -> None:
    """Idea, equation or rule, and paper in the file's docstring; settings are frozen fields."""
    import sys

    kind = TECHNIQUES[name]
    manual = sys.modules[kind.__module__].__doc__ or ""
    assert "Paper:" in manual
    assert kind.__dataclass_params__.frozen
    assert kind.__doc__ and "Shapes:" in kind.__doc__
    assert not kind.beats or kind.beats in TECHNIQUES


def test_quantized_columns_are_selected_in_whole_groups(small: Tensor) -> None:
    tree, _ = run(RTN(integer_grid(4, 32)), Dense(small), small, None)
    assert isinstance(tree, Quantized)
    index = torch.cat([torch.arange(64, 96), torch.arange(0, 32)])
    torch.testing.assert_close(tree.select(1, index).dense(), tree.dense()[:, index])
    with pytest.raises(ValueError, match="whole groups"):
        tree.select(1, torch.arange(1, 33))
