"""What compression left to give, trained: k-means books and hash buckets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from digits import State, softened, train, trained
from rarefy.core.codebooks import Clustered, Hashed
from rarefy.core.nodes import Node


def clustered(w: Tensor, count: int = 4) -> Clustered:
    """Lloyd's algorithm on single weights, from evenly spaced values."""
    book = torch.linspace(float(w.min()), float(w.max()), count)
    for _ in range(10):
        index = (w[..., None] - book).abs().argmin(-1)
        size = torch.bincount(index.flatten(), minlength=count)
        total = torch.zeros(count).index_add_(0, index.flatten(), w.flatten())
        book = torch.where(size > 0, total / size.clamp_min(1), book)
    return Clustered(book.view(1, count, 1), index.to(torch.uint8))


def hashed(w: Tensor) -> Hashed:
    """Buckets of an eighth of the weights, each at the mean of what falls into it."""
    empty = Hashed(torch.zeros(w.numel() // 8), 7, (w.shape[0], w.shape[1]))
    place, sign = empty.places(torch.arange(w.shape[0]))
    total = torch.zeros_like(empty.buckets).index_add_(0, place.flatten(), (w * sign).flatten())
    count = torch.bincount(place.flatten(), minlength=len(total)).clamp_min(1)
    return Hashed(total / count, 7, empty.size)


def test_the_gradient_of_a_shared_value_is_the_sum_over_its_weights() -> None:
    """Han et al. 2016, eq. 3; Chen et al. 2015, eq. 12."""
    w, pull = torch.randn(6, 8), torch.randn(6, 8)
    node = clustered(w)
    soft = softened(node, None, frozenset({"codebooks"}))
    (soft() * pull).sum().backward()
    wanted = torch.stack([pull[node.index == k].sum() for k in range(4)])
    torch.testing.assert_close(soft.moving_codebook.grad.flatten(), wanted)
    small = hashed(w)
    soft = softened(small, None, frozenset({"buckets"}))
    (soft() * pull).sum().backward()
    place, sign = small.places(torch.arange(6))
    wanted = torch.stack([(pull * sign)[place == k].sum() for k in range(len(small.buckets))])
    torch.testing.assert_close(soft.moving_buckets.grad, wanted)


@pytest.mark.parametrize(("share", "mover", "least"),
                         [(clustered, "codebooks", 0.6), (hashed, "buckets", 0.5)])
def test_shared_values_learn(share: Callable[[Tensor], Node], mover: str, least: float) -> None:
    """The loss falls, places and bits stay."""
    start = trained()
    coarse = State({path: share(tree.dense()) for path, tree in start.trees.items()}, start.biases)
    learned = train(coarse, moves=frozenset({mover}), rate=5e-3)
    assert learned.loss() < least * coarse.loss()
    assert learned.correct() > coarse.correct()
    for path, tree in learned.trees.items():
        before = coarse.trees[path]
        assert type(tree) is type(before) and tree.bits() == before.bits()
        if isinstance(tree, Clustered) and isinstance(before, Clustered):
            assert torch.equal(tree.index, before.index) and len(tree.dense().unique()) <= 4
