"""k-means: Lloyd's alternation as the paper has it, better than grids, and masks that do not count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy.core.codebooks import Clustered
from rarefy.core.edit import Leaf, edit
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nodes import Dense, Masked, Node
from rarefy.core.nouns import Choice, Evidence
from rarefy.numerics import clusters
from rarefy.numerics.grids import integer_grid
from rarefy.techniques.quantize.rtn import RTN
from rarefy.techniques.share.kmeans import PLANNED, KMeans


def run(technique: object, weight: Tensor, evidence: Evidence | None, tree: Node | None = None):
    return edit("w", tree or Dense(weight), weight, technique, "t", evidence,
                torch.Generator().manual_seed(0))


def clustered(node: Node) -> Clustered:
    assert isinstance(node, Clustered)
    return node


def literal(weights: list[float], mass: list[float], centers: list[float]) -> list[float]:
    """Lloyd, entry by entry: nearest center, then weighted mean, until nothing moves."""
    while True:
        nearest = [min(range(len(centers)), key=lambda k: abs(w - centers[k])) for w in weights]
        moved = []
        for k, center in enumerate(centers):
            own = [i for i, a in enumerate(nearest) if a == k and mass[i] > 0]
            total = sum(mass[i] for i in own)
            moved.append(sum(mass[i] * weights[i] for i in own) / total if own else center)
        if moved == centers:
            return [center for k, center in enumerate(centers) if any(a == k and mass[i] > 0
                                                                      for i, a in enumerate(nearest))]
        centers = moved


@pytest.mark.parametrize("counts", ["inputs", "fisher", "nothing"])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_lloyd_entry_by_entry(counts: str, masked: bool, weight: Tensor, evidence: Evidence) -> None:
    small = weight[:6, :40].contiguous()
    assert evidence.fisher is not None
    seen = Evidence(evidence.gram[:40, :40].contiguous(), evidence.tokens, evidence.fisher[:6])
    keep = small.abs() > 0.01 if masked else torch.ones_like(small, dtype=torch.bool)
    h = torch.ones(6, 40)
    if counts != "nothing":
        h = h * seen.gram.diagonal() / seen.tokens
    if counts == "fisher":
        h = h * evidence.fisher[:6, None]
    h = h * keep
    kept = small[h > 0]
    start = torch.linspace(float(kept.min()), float(kept.max()), 9, dtype=torch.float64)
    expected = literal(small.view(-1).double().tolist(), h.view(-1).double().tolist(), start.tolist())
    tree = Masked(keep, Dense(small)) if masked else Dense(small)
    done, _ = run(KMeans(9, counts=counts, dtype="float32"), small, seen, tree)
    node = clustered(done.inner if isinstance(done, Masked) else done)
    torch.testing.assert_close(node.codebook.view(-1), torch.tensor(expected), rtol=1e-5, atol=1e-7)
    distance = (small[..., None] - node.codebook.view(-1)).abs()
    chosen = distance.gather(2, node.index.long()[..., None])[..., 0]
    torch.testing.assert_close(chosen, distance.min(2).values)
    if isinstance(done, Masked):
        assert torch.equal(done.keep, keep) and not bool(done.dense()[~keep].any())


@pytest.mark.parametrize("start", ["linear", "density", "random"])
def test_beats_the_uniform_grid_at_the_same_bits(start: str, weight: Tensor, evidence: Evidence) -> None:
    """One scale per row, four bits: the codebook of the whole layer is better and no larger."""
    _, grid = run(RTN(integer_grid(4, 0)), weight, evidence)
    _, shared = run(KMeans(24 if start == "linear" else 18, start), weight, evidence)
    assert shared.error < grid.error and shared.bits_after < grid.bits_after


def test_more_values_lose_less(weight: Tensor, evidence: Evidence) -> None:
    receipts = [run(KMeans(count), weight, evidence)[1] for count in (2, 4, 16, 64, 256, 1000)]
    assert [r.error for r in receipts] == sorted((r.error for r in receipts), reverse=True)
    assert [r.bits_after for r in receipts] == sorted(r.bits_after for r in receipts)


def test_weighting_helps_the_outputs(weight: Tensor, evidence: Evidence) -> None:
    """At the same number of values from the same start."""
    _, plain = run(KMeans(16, "density", "nothing"), weight, evidence)
    _, weighted = run(KMeans(16, "density", "inputs"), weight, evidence)
    assert weighted.error < plain.error


def test_a_mask_is_not_paid_for(weight: Tensor, evidence: Evidence) -> None:
    keep = weight.abs() >= weight.abs().quantile(0.9)
    tree, receipt = run(KMeans(16), weight, evidence, Masked(keep, Dense(weight)))
    assert isinstance(tree, Masked)
    book = clustered(tree.inner).codebook.view(-1)
    assert float(book.abs().min()) > 0.01  # no value is spent on what is dropped
    assert receipt.bits_after < (0.48 + 0.1 * 4.1) * weight.numel() + 16 * 16


@given(values=st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=30), count=st.integers(2, 9))
@settings(deadline=None)
def test_any_values(values: list[float], count: int) -> None:
    weight = torch.tensor([values])
    tree, _ = run(KMeans(count, dtype="float32"), weight, None)
    spread = float(weight.max() - weight.min())
    assert float((tree.dense() - weight).abs().max()) <= spread + 1e-6
    if weight.unique().numel() <= count:
        assert torch.equal(tree.dense(), weight)


def test_bins_come_near_to_the_values_themselves(weight: Tensor, evidence: Evidence,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    exact, one = run(KMeans(16, dtype="float32"), weight, evidence)
    monkeypatch.setattr(clusters, "EXACT", 1000)
    monkeypatch.setattr(clusters, "CHUNK", 3000)
    binned, two = run(KMeans(16, dtype="float32"), weight, evidence)
    torch.testing.assert_close(clustered(binned).codebook, clustered(exact).codebook, rtol=1e-2, atol=1e-4)
    assert two.error == pytest.approx(one.error, rel=1e-2)


def test_what_is_hardly_a_weight(evidence: Evidence) -> None:
    flat, _ = run(KMeans(), torch.full((3, 5), 0.5), None)
    assert clustered(flat).codebook.numel() == 1 and float(flat.dense().min()) == 0.5
    assert run(KMeans(), torch.tensor([[2.0]]), None)[0].dense().item() == 2
    column = torch.tensor([[0.0], [1.0], [8.0], [9.0], [20.0], [21.0]])
    assert clustered(run(KMeans(3), column, None)[0]).codebook.tolist() == [[[0.5], [8.5], [20.5]]]
    assert int(clustered(run(KMeans(700), torch.randn(30, 30), None)[0]).index.max()) > 255


def test_dead_inputs_and_masks_that_drop_all(weight: Tensor) -> None:
    dead = Evidence(torch.zeros(256, 256), 10)
    tree, receipt = run(KMeans(16), weight, dead)
    assert "all inputs are dead" in receipt.note and clustered(tree).codebook.numel() > 8
    nothing, receipt = run(KMeans(16), weight, None, Masked(torch.zeros_like(weight).bool(), Dense(weight)))
    assert "nothing is kept" in receipt.note and not bool(nothing.dense().any())
    gram = torch.zeros(256, 256)
    gram[0, 0] = 1.0
    keep = torch.ones_like(weight).bool()
    keep[:, 0] = False
    _, receipt = run(KMeans(16), weight, Evidence(gram, 1), Masked(keep, Dense(weight)))
    assert "no weight that is kept counts" in receipt.note
    assert "no Fisher" in run(KMeans(16, counts="fisher"), weight, dead)[1].note
    assert "no calibration evidence" in run(KMeans(16), weight, None)[1].note


def test_refusals_name_the_remedy(weight: Tensor) -> None:
    for settings_, message in (({"values": 1}, "values=1: a codebook holds"), ({"rounds": 0}, "rounds=0"),
                               ({"start": "densty"}, "did you mean 'density'"),
                               ({"dtype": "int8"}, "dtype='int8': choose one of float16"),
                               ({"counts": "output"}, "counts='output'")):
        with pytest.raises(RecipeError, match=message):
            KMeans(**settings_)
    with pytest.raises(EditError, match=r"w: 1e\+06 does not fit float16; use dtype=bfloat16"):
        run(KMeans(), torch.tensor([[1e6, 2.0]]), None)
    with pytest.raises(EditError, match="w: the weight holds NaN"):
        run(KMeans(), weight.clone().fill_(float("nan")), None)


def test_options_foresee_bytes_and_damage(weight: Tensor, evidence: Evidence) -> None:
    leaf = Leaf("w", Dense(weight), weight, None, replace(evidence, fisher=torch.ones(weight.shape[0])))
    assert list(KMeans.options(leaf, {"Q4_0": Choice(integer_grid(4, 32), 1)})) == []
    options = list(KMeans.options(leaf, {"tree": Choice(None, 0)}))
    assert [option.steps[0].settings["values"] for option in options] == list(PLANNED)
    for option in options:
        tree, _ = run(KMeans(**option.steps[0].settings), weight, leaf.evidence)
        assert 8 * option.bytes == pytest.approx(tree.bits(), rel=0.01)
        assert leaf.evidence is not None
        assert option.damage == pytest.approx(leaf.evidence.damage(tree.dense() - weight), rel=0.2)
    doubled = replace(leaf, sampled_from=2 * weight.shape[0])
    twice = list(KMeans.options(doubled, {"tree": Choice(None, 0)}))
    assert twice[2].bytes == pytest.approx(2 * options[2].bytes, rel=0.05)
