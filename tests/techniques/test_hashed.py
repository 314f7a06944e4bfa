"""HashedNets: the paper's equations by two loops and the published hash; means are what is nearest."""

from __future__ import annotations

import pytest
import torch
import xxhash
from torch import Tensor

from rarefy.core.codebooks import Hashed
from rarefy.core.edit import edit
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nodes import Dense, Masked, Node
from rarefy.core.nouns import Evidence
from rarefy.techniques.share import hashed
from rarefy.techniques.share.hashed import HashedNets


def run(technique: object, weight: Tensor, evidence: Evidence | None, tree: Node | None = None):
    return edit("w", tree or Dense(weight), weight, technique, "t", evidence,
                torch.Generator().manual_seed(0))


def places(rows: int, columns: int, buckets: int, seed: int) -> list[list[tuple[int, int]]]:
    """h(i, j) and xi(i, j) of the paper, by the published hash of the position."""
    def of(position: int) -> tuple[int, int]:
        data = position.to_bytes(4, "little")
        bucket = xxhash.xxh32(data, seed=seed).intdigest() % buckets
        return bucket, 1 - 2 * (xxhash.xxh32(data, seed=seed ^ 0xFFFFFFFF).intdigest() & 1)

    return [[of(row * columns + column) for column in range(columns)] for row in range(rows)]


@pytest.mark.parametrize("seed", [0, 77])
def test_equals_the_layer_of_the_paper(seed: int, weight: Tensor, evidence: Evidence) -> None:
    """z_i = sum_j w_h(i,j) xi(i,j) a_j  (eq. 7), with w the means of section 4.3's buckets."""
    small = weight[:12, :32].contiguous()
    seen = Evidence(evidence.gram[:32, :32].contiguous(), evidence.tokens)
    tree, receipt = run(HashedNets(0.125, seed, "float32"), small, seen)
    assert isinstance(tree, Hashed)
    h = (seen.gram.diagonal() / seen.tokens).double()
    where, buckets = places(12, 32, 48, seed), [[0.0, 0.0] for _ in range(48)]
    for row in range(12):
        for column in range(32):
            bucket, sign = where[row][column]
            buckets[bucket][0] += float(h[column])
            buckets[bucket][1] += float(h[column]) * sign * float(small[row, column])
    means = torch.tensor([moment / held if held else 0.0 for held, moment in buckets])
    torch.testing.assert_close(tree.buckets, means, rtol=1e-5, atol=1e-8)
    a = torch.randn(32, generator=torch.Generator().manual_seed(1))
    z = [sum(float(means[k]) * sign * float(a[j]) for j, (k, sign) in enumerate(where[i])) for i in range(12)]
    torch.testing.assert_close(tree.dense() @ a, torch.tensor(z), rtol=1e-4, atol=1e-6)
    assert receipt.bits_after == 48 * 32


def test_no_other_numbers_come_nearer(weight: Tensor, evidence: Evidence) -> None:
    tree, _ = run(HashedNets(0.1, dtype="float32"), weight, evidence)
    assert isinstance(tree, Hashed)
    h = evidence.gram.diagonal()

    def loss(buckets: Tensor) -> float:
        return float((h * (Hashed(buckets, 0, tree.size).dense() - weight).square()).sum())

    generator, best = torch.Generator().manual_seed(0), loss(tree.buckets)
    for _ in range(5):
        assert loss(tree.buckets + 1e-3 * torch.randn(tree.buckets.shape, generator=generator)) > best


def test_more_numbers_lose_less(weight: Tensor, evidence: Evidence) -> None:
    receipts = [run(HashedNets(ratio), weight, evidence)[1] for ratio in (1 / 64, 1 / 8, 1 / 2, 1.0)]
    assert [r.error for r in receipts] == sorted((r.error for r in receipts), reverse=True)
    assert [round(weight.numel() * 16 / r.bits_after) for r in receipts] == [64, 8, 2, 1]


def test_dropped_weights_do_not_count(weight: Tensor) -> None:
    keep = weight > 0
    tree, _ = run(HashedNets(dtype="float32"), weight, None, Masked(keep, Dense(weight)))
    noisy = torch.where(keep, weight, 100.0)
    other, _ = run(HashedNets(dtype="float32"), noisy, None, Masked(keep, Dense(noisy)))
    assert torch.equal(tree.dense(), other.dense())


def test_chunks_of_rows_change_nothing(weight: Tensor, evidence: Evidence,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(HashedNets(), weight, evidence)
    monkeypatch.setattr(hashed, "CHUNK", 1000)
    assert torch.equal(whole.dense(), run(HashedNets(), weight, evidence)[0].dense())


def test_hardly_weights_and_refusals(weight: Tensor, evidence: Evidence) -> None:
    one, _ = run(HashedNets(), torch.tensor([[2.0]]), None)
    assert one.dense().item() == 2.0 and isinstance(one, Hashed) and one.buckets.numel() == 1
    assert "buckets hold no weight" in run(HashedNets(1.0), weight, evidence)[1].note
    assert "all inputs are dead" in run(HashedNets(), weight, Evidence(torch.zeros(256, 256), 3))[1].note
    gram = evidence.gram.clone()
    gram[:200], gram[:, :200] = 0, 0
    assert bool(torch.isfinite(run(HashedNets(), weight, Evidence(gram, 9))[0].dense()).all())
    for settings, message in (({"ratio": 0.0}, r"ratio=0\.0"), ({"ratio": 1.5}, r"ratio=1\.5"),
                              ({"seed": -1}, "seed=-1"), ({"dtype": "int8"}, "dtype='int8'")):
        with pytest.raises(RecipeError, match=message):
            HashedNets(**settings)
    with pytest.raises(EditError, match="does not fit float16"):
        run(HashedNets(), torch.full((2, 8), 1e6), None)
    with pytest.raises(EditError, match="w: the weight holds NaN"):
        run(HashedNets(), weight / 0, None)
