"""Nodes of weight sharing: the hash is the published one, and nodes stand for what they say."""

from __future__ import annotations

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from rarefy.core.codebooks import Clustered, Hashed, xxhash32


@given(value=st.integers(0, 2**32 - 1), seed=st.integers(0, 2**32 - 1))
def test_the_hash_is_xxhash32_of_four_bytes(value: int, seed: int) -> None:
    found = xxhash32(torch.tensor([value]), seed)
    assert int(found) == xxhash.xxh32(value.to_bytes(4, "little"), seed=seed).intdigest()


@pytest.mark.parametrize(("books", "d"), [(1, 1), (1, 4), (6, 2)])
def test_clustered_longhand(books: int, d: int) -> None:
    generator = torch.Generator().manual_seed(0)
    places = 6
    node = Clustered(torch.randn(books, 5, d, generator=generator),
                     torch.randint(0, 5, (4, places), generator=generator).to(torch.uint8))
    dense = node.dense()
    assert node.shape == dense.shape == (4, places * d)
    for row in range(4):
        for column in range(places * d):
            book = column // d if books > 1 else 0
            value = node.codebook[book, int(node.index[row, column // d]), column % d]
            assert dense[row, column] == value
    rows = torch.tensor([3, 0, 3])
    assert torch.equal(node.rows(rows), dense[rows])
    assert torch.equal(node.select(0, rows).dense(), dense[rows])
    whole = (torch.tensor([4, 1])[:, None] * d + torch.arange(d)).view(-1)
    assert torch.equal(node.select(1, whole).dense(), dense[:, whole])
    if d > 1:
        with pytest.raises(ValueError, match="whole vectors"):
            node.select(1, torch.arange(1, 1 + d))


def test_a_vector_is_kept_where_any_of_it_is() -> None:
    node = Clustered(torch.randn(1, 8, 2), torch.arange(8).view(2, 4).to(torch.uint8))
    keep = torch.zeros(2, 8, dtype=torch.bool)
    keep[0, 3] = keep[1, 0] = keep[1, 1] = True
    assert node.used(keep).tolist() == [[False, True, False, False], [True, False, False, False]]
    assert node.kept_bits(keep) < node.bits() == node.codebook.numel() * 32 + 8 * (1 + 3)


def test_bits_know_what_is_rare() -> None:
    """Sixteen values of which one takes nine weights of ten cost far less than four bits each."""
    book = torch.randn(1, 16, 1)
    often = torch.where(torch.rand(100, 100, generator=torch.Generator().manual_seed(0)) < 0.9, 3,
                        torch.arange(10_000).view(100, 100) % 16)
    bits = Clustered(book, often.to(torch.uint8)).bits() - 16 * 32
    assert bits < 1.0 * 10_000
    even = torch.arange(10_000).view(100, 100) % 16
    assert Clustered(book, even.to(torch.uint8)).bits() - 16 * 32 == 4 * 10_000 + 8


def test_signs_and_buckets_look_random() -> None:
    node = Hashed(torch.randn(64), 5, (80, 80))
    bucket, sign = node.places(torch.arange(80))
    counts = torch.bincount(bucket.view(-1), minlength=64)
    assert int(counts.min()) > 60 and int(counts.max()) < 145  # 100 +- 10 each
    assert abs(float(sign.mean())) < 0.05
    # the sign is no function of the bucket: within each both occur
    assert all(abs(float(sign[bucket == k].mean())) < 0.5 for k in range(64))
    assert torch.equal(node.rows(torch.tensor([7])), node.dense()[7:8])
    other = Hashed(node.buckets, 6, (80, 80)).places(torch.arange(80))
    assert float((other[0] == bucket).float().mean()) < 0.05
