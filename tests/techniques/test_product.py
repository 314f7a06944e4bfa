"""Product quantization: nearest vectors and weighted means as written down, better than single values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rarefy.core.codebooks import Clustered
from rarefy.core.edit import Leaf, edit
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nodes import Dense, Masked, Node
from rarefy.core.nouns import Choice, Evidence
from rarefy.numerics import clusters
from rarefy.numerics.clusters import nearest_center, vector_centers
from rarefy.numerics.grids import integer_grid
from rarefy.techniques.quantize.rtn import RTN
from rarefy.techniques.share.kmeans import KMeans
from rarefy.techniques.share.product import ProductQuantization


def run(technique: object, weight: Tensor, evidence: Evidence | None, tree: Node | None = None):
    return edit("w", tree or Dense(weight), weight, technique, "t", evidence,
                torch.Generator().manual_seed(0))


def clustered(node: Node) -> Clustered:
    assert isinstance(node, Clustered)
    return node


@pytest.fixture
def large() -> Tensor:
    """Rows whose neighbours are alike, as codebooks of vectors want them; large beside a codebook."""
    generator = torch.Generator().manual_seed(4)
    steps = torch.randn(400, 256, generator=generator)
    return 0.02 * (steps + steps.roll(1, 1) + steps.roll(2, 1))


def literal(vectors: Tensor, weights: Tensor, centers: Tensor) -> tuple[list[int], Tensor]:
    """One round of Lloyd, vector by vector: the nearest center, then the mean of each component."""
    index = [min(range(len(centers)), key=lambda k: float((h * (v - centers[k])**2).sum()))
             for v, h in zip(vectors, weights, strict=True)]
    moved = centers.clone()
    for k in set(index):
        own = [i for i, a in enumerate(index) if a == k]
        for t in range(vectors.shape[1]):
            total = sum(float(weights[i, t]) for i in own)
            if total > 0:
                moved[k, t] = sum(float(weights[i, t] * vectors[i, t]) for i in own) / total
    return index, moved


def test_a_settled_codebook_is_a_fixed_point_of_lloyd() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors, weights = torch.randn(60, 3, generator=generator), torch.rand(60, 3, generator=generator)
    weights[weights < 0.3] = 0.0
    tolerance, clusters.TOLERANCE = clusters.TOLERANCE, 0.0
    try:
        centers = vector_centers(vectors, weights, 7, 500, generator)
    finally:
        clusters.TOLERANCE = tolerance
    index, moved = literal(vectors, weights, centers)
    found, cost = nearest_center(vectors, weights, centers)
    assert found.tolist() == index
    torch.testing.assert_close(moved, centers, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cost, (weights * (vectors - centers[found])**2).sum(1))


def test_seeds_are_spread() -> None:
    """Four heaps, one of them of a single vector: k-means++ finds them, four random vectors would not."""
    heaps = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [99.0, 99.0]])
    vectors = heaps[torch.tensor([0] * 50 + [1] * 50 + [2] * 50 + [3])]
    found = vector_centers(vectors, torch.ones_like(vectors), 4, 10, torch.Generator().manual_seed(0))
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, heaps.tolist()))
    more = vector_centers(vectors, torch.ones_like(vectors), 9, 10, torch.Generator().manual_seed(0))
    assert more.shape[0] == 4


@pytest.mark.parametrize("books", ["one", "each"])
def test_beats_single_values_and_grids_at_two_bits(books: str, large: Tensor) -> None:
    _, grid = run(RTN(integer_grid(2, 0)), large, None)
    values, length = (256, 4) if books == "one" else (16, 2)
    tree, shared = run(ProductQuantization(values, length, books), large, None)
    error = float((tree.dense() - large).square().mean() / large.square().mean())
    for technique in (RTN(integer_grid(2, 0)), KMeans(5, "density")):
        other, _ = run(technique, large, None)
        assert error < float((other.dense() - large).square().mean() / large.square().mean())
    assert shared.bits_after < 1.35 * grid.bits_after


def test_weighting_helps_the_outputs(weight: Tensor, evidence: Evidence) -> None:
    plain, _ = run(ProductQuantization(64, 2), weight, None)
    _, receipt = run(ProductQuantization(64, 2), weight, evidence)
    assert receipt.error < evidence.error(plain.dense() - weight) / evidence.error(weight)


def test_frequent_vectors_come_first(weight: Tensor, evidence: Evidence) -> None:
    for books in ("one", "each"):
        node = clustered(run(ProductQuantization(8, 4, books), weight, evidence)[0])
        for place in range(node.codebook.shape[0]):
            index = node.index if books == "one" else node.index[:, place]
            often = torch.bincount(index.reshape(-1).long(), minlength=node.codebook.shape[1])
            assert torch.equal(often, often.sort(descending=True)[0])


def test_dropped_weights_do_not_count(weight: Tensor, evidence: Evidence) -> None:
    """With every second column gone, pieces of two are as good as single values under the same codebook."""
    keep = torch.ones_like(weight).bool()
    keep[:, 1::2] = False
    tree, _ = run(ProductQuantization(16, 2, dtype="float32"), weight, evidence, Masked(keep, Dense(weight)))
    assert isinstance(tree, Masked)
    node = clustered(tree.inner)
    distance = (weight[:, ::2, None] - node.codebook[0, :, 0]).abs()
    chosen = distance.gather(2, node.index.long()[..., None])[..., 0]
    torch.testing.assert_close(chosen, distance.min(2).values)


def test_sampling_changes_little(large: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(tree: Node) -> float:
        return float((tree.dense() - large).square().mean())

    whole = lost(run(ProductQuantization(64), large, None)[0])
    monkeypatch.setattr(clusters, "SEEN", 6000)
    assert lost(run(ProductQuantization(64), large, None)[0]) < 1.1 * whole


def test_hardly_weights_and_refusals(weight: Tensor) -> None:
    one, receipt = run(ProductQuantization(length=1), torch.tensor([[2.0]]), None)
    assert one.dense().item() == 2 and "no calibration evidence" in receipt.note
    flat, _ = run(ProductQuantization(), torch.full((3, 8), 0.5), None)
    assert torch.equal(flat.dense(), torch.full((3, 8), 0.5))
    assert "codebooks take" in run(ProductQuantization(books="each"), weight, None)[1].note
    dead = Evidence(torch.zeros(256, 256), 10)
    assert "all inputs are dead" in run(ProductQuantization(), weight, dead)[1].note
    nothing = Masked(torch.zeros_like(weight).bool(), Dense(weight))
    assert not bool(run(ProductQuantization(), weight, dead, nothing)[0].dense().any())
    with pytest.raises(EditError, match="w: 254 columns not divisible by length=4; pass length=2"):
        run(ProductQuantization(), weight[:, :254], None)
    with pytest.raises(EditError, match="does not fit float16"):
        run(ProductQuantization(), 1e6 * weight.sign(), None)
    with pytest.raises(EditError, match="holds NaN"):
        run(ProductQuantization(), weight / 0, None)
    for settings, message in (({"values": 1}, "values=1"), ({"length": 0}, "length=0"),
                              ({"books": "every"}, "books='every'"), ({"dtype": "int8"}, "dtype='int8'")):
        with pytest.raises(RecipeError, match=message):
            ProductQuantization(**settings)


def test_the_planner_is_offered_tables_alone(large: Tensor) -> None:
    """Their inputs count one by one; for other weights error feedback (GPTQ) does better at these bits."""
    leaf = Leaf("w", Dense(large), large, None, Evidence(torch.eye(256), 400, torch.full((400,), 1 / 400)))
    held = {"tree": Choice(None, 0)}
    found = list(ProductQuantization.options(leaf, held))
    assert [option.steps[0].settings["length"] for option in found] == [2, 4]  # 3 does not divide 256
    assert [option.damage for option in found] == sorted(option.damage for option in found)
    for option in found:
        node = clustered(run(ProductQuantization(**option.steps[0].settings), large, leaf.evidence)[0])
        assert option.bytes * 8 == 8 * node.index.numel() + 16 * node.codebook.numel()
        assert leaf.evidence is not None
        assert option.damage == pytest.approx(leaf.evidence.damage(node.dense() - large), rel=0.05)
    mixed = Evidence(torch.eye(256) + 0.1, 400, torch.ones(400))
    assert not list(ProductQuantization.options(replace(leaf, evidence=mixed), held))
    assert not list(ProductQuantization.options(leaf, {"int8": Choice(integer_grid(8, 0), 0)}))
