"""CP: exact where there is an exact answer, guarded where there is none, and four convolutions in the end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.core.edit import edit
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nodes import Dense, Node, Quantized
from rarefy.core.nouns import Evidence
from rarefy.core.tensors import CP as CPNode
from rarefy.numerics.decompose import component_norms
from rarefy.numerics.grids import integer_grid
from rarefy.techniques.factorize.cp import CP
from rarefy.techniques.quantize.rtn import RTN

OUT, KERNEL = 14, (10, 3, 3)


def run(technique: object, weight: Tensor, evidence: Evidence | None = None, tree: Node | None = None,
        kernel: tuple[int, ...] = KERNEL, seed: int = 0):
    return edit("conv", tree or Dense(weight), weight, technique, "cp", evidence,
                torch.Generator().manual_seed(seed), kernel)


def of_rank(rank: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(size, rank, generator=generator) for size in (OUT, *KERNEL)]
    return torch.einsum("or,ir,hr,wr->oihw", *factors).flatten(1)


def literal(weight: Tensor, factors: list[Tensor], sweeps: int) -> Tensor:
    """Kolda & Bader 2009, figure 3.3: every factor in turn, by least squares against the others' products."""
    T = weight.double().view(OUT, *KERNEL)
    factors = [factor.double() for factor in factors]
    for _ in range(sweeps):
        for n in range(4):
            others = [f for k, f in enumerate(factors) if k != n]
            design = torch.einsum("ar,br,cr->abcr", *others).flatten(0, 2)
            factors[n] = torch.linalg.lstsq(design, T.movedim(n, 0).flatten(1).T).solution.T
    return torch.einsum("or,ir,hr,wr->oihw", *factors).flatten(1).float()


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_recovers_a_kernel_of_that_rank(rank: int) -> None:
    weight = of_rank(rank)
    tree, receipt = run(CP(rank=rank, sweeps=1000), weight)
    assert isinstance(tree, CPNode) and tree.bits() == 32 * rank * (OUT + sum(KERNEL))
    assert (weight - tree.dense()).square().sum() < 1e-3 * weight.square().sum()
    assert "degenerate" not in receipt.note


def test_ends_where_literal_least_squares_ends() -> None:
    weight = of_rank(6) + 0.5 * torch.randn(OUT, 90, generator=torch.Generator().manual_seed(1))
    tree, _ = run(CP(rank=4, sweeps=1000), weight)
    again = literal(weight, [factor.dense() for factor in tree.factors], 30)
    ours, theirs = ((weight - each).norm() for each in (tree.dense(), again))
    assert float(ours) == pytest.approx(float(theirs), rel=2e-3)


def test_more_starts_end_no_worse_and_seeds_repeat() -> None:
    weight = of_rank(12) + torch.randn(OUT, 90, generator=torch.Generator().manual_seed(2))
    errors = []
    for starts in (1, 4):
        tree, _ = run(CP(rank=8, starts=starts), weight)
        errors.append(float((weight - tree.dense()).norm()))
    assert errors[1] <= errors[0]
    again, _ = run(CP(rank=8, starts=4), weight)
    assert torch.equal(again.dense(), tree.dense())


def test_is_four_convolutions() -> None:
    weight, images = of_rank(5), torch.randn(2, KERNEL[0], 9, 9, generator=torch.Generator().manual_seed(0))
    tree, _ = run(CP(rank=5), weight)
    A, B, C, D = (factor.dense() for factor in tree.factors)
    step = F.conv2d(images, B.T[:, :, None, None])
    step = F.conv2d(step, C.T[:, None, :, None], groups=5)
    step = F.conv2d(step, D.T[:, None, None, :], groups=5)
    step = F.conv2d(step, A[:, :, None, None])
    whole = F.conv2d(images, tree.dense().view(OUT, *KERNEL))
    torch.testing.assert_close(step, whole, rtol=1e-3, atol=1e-2)


def border() -> Tensor:
    """A sum of four components whose nearest tensor of rank two does not exist (de Silva & Lim 2008)."""
    generator = torch.Generator().manual_seed(5)
    u, v = ([torch.randn(size, generator=generator) for size in (OUT, *KERNEL)] for _ in range(2))
    return sum(torch.einsum("o,i,h,w->oihw", *[v[k] if k == j else u[k] for k in range(4)])
               for j in range(4)).flatten(1)


def q(tree: CPNode, weight: Tensor) -> float:
    return float(component_norms([factor.dense() for factor in tree.factors]).norm() / weight.norm())


def test_components_that_cancel_are_regularised_and_said() -> None:
    weight = border()
    free, receipt = run(CP(rank=2, sweeps=300, limit=1e9), weight)
    assert q(free, weight) > 2 and "degenerate" not in receipt.note
    sound, receipt = run(CP(rank=2, sweeps=300, limit=1.5), weight)
    assert q(sound, weight) <= 1.5
    assert "all 3 starts degenerate, q = " in receipt.note and "above 1.5: ridge " in receipt.note
    # the price: somewhat further from the weight, and far less hurt by rounding
    assert (weight - sound.dense()).norm() < 0.6 * weight.norm()


def test_data_lowers_the_error_at_the_outputs() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = of_rank(12) + torch.randn(OUT, 90, generator=generator)
    x = torch.randn(800, 10, 9, generator=generator) * torch.logspace(-1, 1, 10)[:, None]
    x = (x @ torch.randn(9, 9, generator=generator)).flatten(1)
    seen = Evidence(x.T @ x, 800)
    blind, _ = run(CP(rank=8), weight)
    _, receipt = run(CP(rank=8), weight, seen)
    assert receipt.error < 0.7 * seen.error(weight - blind.dense()) / seen.error(weight)


def test_factors_can_be_quantized() -> None:
    weight = of_rank(5)
    tree, before = run(CP(rank=16), weight)
    tree, after = run(RTN(integer_grid(8, 16)), weight, None, tree)
    assert isinstance(tree, CPNode) and all(isinstance(each, Quantized) for each in tree.factors)
    assert (weight - tree.dense()).norm() < 0.1 * weight.norm() and after.bits_after < 0.3 * before.bits_after


def test_one_dimensional_and_depthwise_kernels() -> None:
    for kernel in ((18, 5), (1, 10, 9), (10, 9, 1)):
        tree, _ = run(CP(ratio=0.9), of_rank(2), kernel=kernel)
        assert tree.shape == (OUT, 90) and len(tree.factors) == len(kernel) + 1
        assert (of_rank(2) - tree.dense()).norm() < of_rank(2).norm()


def test_zero_and_constant_weights() -> None:
    tree, _ = run(CP(rank=3), torch.zeros(OUT, 90))
    assert not bool(tree.dense().any())
    tree, _ = run(CP(rank=3), torch.full((OUT, 90), 0.5))
    torch.testing.assert_close(tree.dense(), torch.full((OUT, 90), 0.5), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("settings", "kernel", "message"), [
    ({}, (), "conv: CP decomposes convolutions, and this weight has no window; use svd"),
    ({}, (90, 1, 1), "a 1x1 convolution is a matrix; use svd"),
    ({"rank": 91}, KERNEL, "conv: rank=91 is above the full rank 90; pass rank=90 or less"),
    ({"ratio": 0.01}, KERNEL, "conv: ratio=0.01 of 40320 bits allows 403, .* pass ratio=0.024 or more"),
])
def test_refusals(settings: dict[str, float], kernel: tuple[int, ...], message: str) -> None:
    with pytest.raises(EditError, match=message):
        run(CP(**settings), of_rank(2), kernel=kernel)


def test_settings_that_mean_nothing() -> None:
    for settings, message in (({"rank": 4, "ratio": 0.5}, "rank=4 and"), ({"starts": 0}, "starts=0"),
                              ({"limit": 1.0}, "limit=1.0: sound components"), ({"rank": 0}, "rank=0")):
        with pytest.raises(RecipeError, match=message):
            CP(**settings)
