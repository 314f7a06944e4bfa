"""Tucker-2 against literal orthogonal iteration, as the three convolutions it stands for, and by its data."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.core.edit import Leaf, edit
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nodes import Dense, Masked, Node, Product, Quantized
from rarefy.core.nouns import Choice, Evidence
from rarefy.core.tensors import Tucker as TuckerNode
from rarefy.numerics.grids import integer_grid
from rarefy.techniques.factorize.svd_llm import SVDLLM
from rarefy.techniques.factorize.tucker import Tucker
from rarefy.techniques.quantize.cast import Cast
from rarefy.techniques.quantize.rtn import RTN

OUT, KERNEL = 32, (20, 3, 3)


def run(technique: object, weight: Tensor, evidence: Evidence | None = None, tree: Node | None = None,
        kernel: tuple[int, ...] = KERNEL):
    tree = tree or Dense(weight)
    return edit("layer1.conv2", tree, weight, technique, "tucker", evidence, torch.Generator(), kernel)


@pytest.fixture(scope="module")
def conv() -> Tensor:
    """A kernel with few true channels, under noise."""
    generator = torch.Generator().manual_seed(0)
    left, core = torch.randn(OUT, 10, generator=generator), torch.randn(10, 7, 9, generator=generator)
    right = torch.randn(KERNEL[0], 7, generator=generator)
    kernel = torch.einsum("oa,abw,ib->oiw", left, core, right).flatten(1)
    return 0.02 * kernel + 0.05 * torch.randn(kernel.shape, generator=generator)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Channels that are correlated and of uneven scale, as places of an image are."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(KERNEL[0], KERNEL[0], generator=generator) * torch.logspace(-1, 0.5, KERNEL[0])
    noise = torch.randn(4, KERNEL[0], 20, 20, generator=generator)
    return torch.einsum("nchw,dc->ndhw", F.avg_pool2d(noise, 3, stride=1), mix)


@pytest.fixture(scope="module")
def seen(images: Tensor) -> Evidence:
    rows = F.unfold(images, 3).transpose(1, 2).flatten(0, 1)
    return Evidence(rows.T @ rows, len(rows), torch.rand(OUT, generator=torch.Generator().manual_seed(2)))


def literal(weight: Tensor, ranks: tuple[int, int], sweeps: int) -> Tensor:
    """De Lathauwer, De Moor & Vandewalle 2000: one mode after the other, the other one projected away."""
    T = weight.double().view(OUT, KERNEL[0], -1)
    A = torch.linalg.svd(T.flatten(1))[0][:, :ranks[0]]
    B = torch.linalg.svd(T.transpose(0, 1).flatten(1))[0][:, :ranks[1]]
    for _ in range(sweeps):
        A = torch.linalg.svd(torch.einsum("oiw,ib->obw", T, B).flatten(1))[0][:, :ranks[0]]
        B = torch.linalg.svd(torch.einsum("oiw,oa->iaw", T, A).flatten(1))[0][:, :ranks[1]]
    core = torch.einsum("oiw,oa,ib->abw", T, A, B)
    return torch.einsum("abw,oa,ib->oiw", core, A, B).flatten(1).float()


@pytest.mark.parametrize("ranks", [(8, 5), (1, 1), (32, 20), (3, 20)])
def test_equals_literal_orthogonal_iteration(ranks: tuple[int, int], conv: Tensor) -> None:
    tree, _ = run(Tucker(rank=ranks, sweeps=60), conv)
    assert isinstance(tree, TuckerNode)
    assert tree.left.shape == (OUT, ranks[0]) and tree.right.shape == (KERNEL[0], ranks[1])
    expected = literal(conv, ranks, 200)
    assert (conv - tree.dense()).norm() == pytest.approx(float((conv - expected).norm()), rel=1e-3, abs=1e-5)


def test_is_three_convolutions(conv: Tensor, images: Tensor, seen: Evidence) -> None:
    tree, _ = run(Tucker(rank=(10, 7)), conv, seen)
    left, core, right = (child.dense() for child in tree.children())
    step = F.conv2d(images, right.T[:, :, None, None])
    step = F.conv2d(step, core.view(10, 7, 3, 3))
    step = F.conv2d(step, left[:, :, None, None])
    whole = F.conv2d(images, tree.dense().view(OUT, *KERNEL))
    torch.testing.assert_close(step, whole, rtol=1e-3, atol=1e-3)


def test_ranks_by_energy_and_by_ratio(conv: Tensor) -> None:
    tree, _ = run(Tucker(energy=0.9), conv)
    T = conv.view(OUT, KERNEL[0], -1)
    for unfolded, rank in ((T.flatten(1), tree.left.shape[1]),
                           (T.transpose(0, 1).flatten(1), tree.right.shape[1])):
        S = torch.linalg.svdvals(unfolded.double()).square()
        assert S[:rank].sum() >= 0.9 * S.sum() > S[:rank - 1].sum()
    best = float("inf")
    tree, receipt = run(Tucker(ratio=0.3), conv)
    assert receipt.bits_after <= 0.3 * receipt.bits_before
    for a in range(1, 21):  # no cheap enough pair is much nearer than the one chosen by the bound
        for b in range(1, 15):
            if OUT * a + 9 * a * b + KERNEL[0] * b <= 0.3 * conv.numel() and a <= 9 * b and b <= 9 * a:
                best = min(best, float((conv - literal(conv, (a, b), 0)).norm()))
    assert (conv - tree.dense()).norm() <= 1.02 * best


def test_data_lowers_the_error_at_the_outputs(conv: Tensor, seen: Evidence) -> None:
    ranks = (8, 5)
    blind, _ = run(Tucker(rank=ranks), conv)
    tree, receipt = run(Tucker(rank=ranks, damping=1e-6), conv, seen)
    assert tree.bits() == blind.bits()
    assert receipt.error < 0.8 * seen.error(conv - blind.dense()) / seen.error(conv)
    assert receipt.note == ""
    # given the right factor, no other left and core do better
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        left, core = (child.dense() * (1 + 0.01 * torch.randn(child.shape, generator=generator))
                      for child in (tree.left, tree.core))
        nudged = replace(tree, left=Dense(left), core=Dense(core))
        assert seen.error(conv - nudged.dense()) > seen.error(conv - tree.dense())


def test_beats_the_whitened_svd_at_equal_bits(conv: Tensor, seen: Evidence) -> None:
    """Where channels are few, in and out: a matrix knows only of outputs."""
    _, matrix = run(SVDLLM(ratio=0.25), conv, seen)
    _, tensor = run(Tucker(ratio=0.25), conv, seen)
    assert tensor.error < 0.5 * matrix.error


def test_factors_can_be_quantized(conv: Tensor, seen: Evidence) -> None:
    tree, before = run(Tucker(rank=(16, 16)), conv, seen)
    tree, after = run(RTN(integer_grid(8, 16)), conv, seen, tree)
    assert isinstance(tree, TuckerNode) and all(isinstance(each, Quantized) for each in tree.children())
    assert after.error < before.error + 0.005 and after.bits_after < 0.3 * before.bits_after


def test_under_a_mask(conv: Tensor, seen: Evidence) -> None:
    keep = conv.abs() > 0.02
    tree, receipt = run(Tucker(), conv, seen, Masked(keep, Dense(conv)))
    assert isinstance(tree, Masked) and isinstance(tree.inner, TuckerNode) and "under a mask" in receipt.note


def test_one_dimensional_and_depthwise_kernels() -> None:
    weight = torch.randn(12, 8 * 5, generator=torch.Generator().manual_seed(0))
    tree, _ = run(Tucker(rank=[12, 8]), weight, kernel=(8, 5))
    torch.testing.assert_close(tree.dense(), weight, rtol=1e-4, atol=1e-5)
    depthwise = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    tree, _ = run(Tucker(rank=[9, 1]), depthwise, kernel=(1, 3, 3))
    torch.testing.assert_close(tree.dense(), depthwise, rtol=1e-4, atol=1e-5)


def test_zero_weights_and_dead_channels(conv: Tensor, seen: Evidence) -> None:
    tree, _ = run(Tucker(), torch.zeros_like(conv), seen)
    assert not bool(tree.dense().any())
    gram, dead = seen.gram.clone(), slice(9, 18)
    gram[dead], gram[:, dead] = 0.0, 0.0
    tree, receipt = run(Tucker(rank=[10, 10]), conv, Evidence(gram, seen.tokens))
    assert bool(torch.isfinite(tree.dense()).all()) and receipt.error < 0.2
    indefinite = torch.eye(180)
    indefinite[0, 1] = indefinite[1, 0] = 1000.0
    _, receipt = run(Tucker(rank=[10, 10]), conv, Evidence(indefinite, 1000))
    assert "not positive definite" in receipt.note


@pytest.mark.parametrize(("settings", "kernel", "message"), [
    ({}, (), "layer1.conv2: Tucker-2 decomposes convolutions, and this weight has no window; use svd"),
    ({}, (180, 1, 1), "a 1x1 convolution is a matrix; use svd"),
    ({"rank": [33, 5]}, KERNEL, r"rank=\(33, 5\) is above the full ranks of 32 outputs and 20 inputs with a "
                                r"window of 9; pass at most \(32, 20\)"),
    ({"rank": [20, 2]}, KERNEL, r"rank=\(20, 2\) is above .* pass at most \(18, 20\)"),
    ({"ratio": 0.001}, KERNEL, "layer1.conv2: ratio=0.001 of 184320 bits .* pass ratio=0.011 or more"),
])
def test_refusals(settings: dict[str, object], kernel: tuple[int, ...], message: str, conv: Tensor) -> None:
    with pytest.raises(EditError, match=message):
        run(Tucker(**settings), conv, kernel=kernel)


def test_settings_that_mean_nothing() -> None:
    for settings, message in (({"rank": [4]}, "two ranks"), ({"rank": [4, 0]}, "must be 1 or more"),
                              ({"rank": [4, 4], "ratio": 0.5}, "one of rank, energy and ratio")):
        with pytest.raises(RecipeError, match=message):
            Tucker(**settings)


def test_a_factor_of_a_product_has_no_window(conv: Tensor) -> None:
    product = Product(Dense(conv[:, :4].contiguous()), Dense(conv[:4]))
    with pytest.raises(EditError, match="no window"):
        run(Tucker(), conv, tree=product)


def test_foreseen_damage(conv: Tensor, seen: Evidence) -> None:
    leaf, trees = Leaf("c", Dense(conv), conv, None, seen, KERNEL), {"tree": Choice(None, 0)}
    options = list(Tucker.options(leaf, trees))
    assert len(options) > 5
    for option in options:
        tree: Node = Dense(conv)
        for step in option.steps:
            technique = {"tucker": Tucker, "cast": Cast}[step.technique](**step.settings)
            tree, _ = run(technique, conv, seen, tree)
        assert option.bytes * 8 == tree.bits() < 16 * conv.numel()
        assert option.damage == pytest.approx(seen.damage(tree.dense() - conv), rel=0.2)
    assert list(Tucker.options(replace(leaf, kernel=()), trees)) == []
    assert list(Tucker.options(leaf, {"F16": Choice(torch.float16, 2 * prod(conv.shape))})) == []
