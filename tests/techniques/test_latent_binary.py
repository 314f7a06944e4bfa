"""Binary training against the paper's rules, written out, and against taking signs at once."""

from __future__ import annotations

import pytest
import torch

from digits import softened, train, trained
from rarefy.core.errors import RecipeError
from rarefy.core.nodes import Dense, Masked, Quantized
from rarefy.techniques.quantize.binary import Binary
from rarefy.techniques.quantize.latent_binary import LatentBinary


@pytest.mark.parametrize("group", [0, 32])
def test_forward_and_backward_are_the_papers(group: int) -> None:
    generator = torch.Generator().manual_seed(0)
    w, pull = torch.randn(3, 64, generator=generator), torch.randn(3, 64, generator=generator)
    soft = softened(Dense(w), LatentBinary(group))
    out = soft()
    (out * pull).sum().backward()
    n = group or 64
    for row in range(3):
        for first in range(0, 64, n):
            part = w[row, first:first + n].tolist()
            a = float(torch.tensor(sum(map(abs, part)) / n).half())  # as it is stored
            wanted = [a if v >= 0 else -a for v in part]
            assert out.detach()[row, first:first + n].tolist() == pytest.approx(wanted, rel=1e-3)
            for j, v in enumerate(part):
                g = float(pull[row, first + j])
                factor = 1 / n + (a if abs(v) <= 1 else 0.0)
                assert float(soft.latent.grad[row, first + j]) == pytest.approx(g * factor, rel=2e-3)


def test_hardens_to_what_was_computed() -> None:
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    w[1] = 0.0
    soft = softened(Dense(w), LatentBinary()).eval()
    node = soft.harden()
    assert isinstance(node, Quantized) and node.grid.code_bits == 1
    assert torch.equal(node.dense(), soft().detach()) and not bool(node.dense()[1].any())


def test_dropped_weights_do_not_count() -> None:
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    keep = torch.rand(4, 64, generator=torch.Generator().manual_seed(1)) < 0.5
    keep[3] = False
    trees = [softened(Masked(keep, Dense(values)), LatentBinary()).harden()
             for values in (torch.where(keep, w, 100.0), torch.where(keep, w, 0.0))]
    torch.testing.assert_close(trees[0].dense(), trees[1].dense())
    assert bool(torch.isfinite(trees[0].dense()).all())


def test_training_beats_signs_at_once() -> None:
    start = trained()
    signs, learned = start.edited(Binary()), train(start, LatentBinary(), rate=5e-3)
    assert learned.correct() > signs.correct() + 0.05
    assert learned.correct() > start.correct() - 0.05
    pair = [train(start, LatentBinary(), steps=20) for _ in range(2)]
    assert all(torch.equal(tree.dense(), pair[1].trees[path].dense()) for path, tree in pair[0].trees.items())


def test_what_means_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"clip 0\.0: must be positive"):
        LatentBinary(clip=0.0)
    with pytest.raises(ValueError, match="100 columns not divisible"):
        softened(Dense(torch.randn(2, 100)), LatentBinary(32))
