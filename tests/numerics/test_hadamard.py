"""Hadamard matrices are what their definition says, and fast rotations equal the matrices."""

from __future__ import annotations

import pytest
import torch

from rarefy.numerics.hadamard import Rotation, _parts, hadamard, hadamard_rotation, orthogonal_rotation


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("order", [1, 4, 8, 12, 20, 24, 28, 36, 44, 48, 60, 68, 76, 84, 108, 124, 140, 172])
def test_definition(order: int) -> None:
    if order == 172:  # 171 and 85 are no primes: known to mathematics, not built here
        with pytest.raises(ValueError, match="order 172"):
            hadamard(order)
        return
    H = hadamard(order)
    assert bool((H.abs() == 1).all())
    assert torch.equal(H @ H.T, order * torch.eye(order))


@pytest.mark.parametrize(("width", "base", "mixed"), [
    (64, 1, 64), (128, 1, 128), (576, 36, 576), (640, 20, 640), (768, 12, 768), (896, 28, 896),
    (960, 60, 960), (1152, 36, 1152), (1536, 12, 1536), (2304, 36, 2304), (3584, 28, 3584), (5120, 20, 5120),
    (1376, 1, 32), (7, 1, 1), (1, 1, 1)])
def test_widths_in_use_mix_whole(width: int, base: int, mixed: int) -> None:
    found, doublings = _parts(width)
    assert (found, found << doublings) == (base, mixed)


def matrix(rotation: Rotation) -> torch.Tensor:
    """Kronecker products written out."""
    sylvester = torch.ones(1, 1)
    for _ in range(rotation.doublings):
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5, sylvester)
    one = torch.kron(sylvester, rotation.base)
    return torch.diag(rotation.signs) @ torch.kron(torch.eye(rotation.width // one.shape[0]), one)


@pytest.mark.parametrize("width", [1, 2, 16, 20, 24, 40, 96, 160, 172, 640])
@pytest.mark.parametrize("kind", [hadamard_rotation, orthogonal_rotation])
def test_fast_equals_the_matrix_and_back_undoes(width: int, kind: object) -> None:
    rotation: Rotation = kind(width, seeded())  # type: ignore[operator]
    x = torch.randn(3, 5, width, generator=seeded())
    Q = matrix(rotation)
    torch.testing.assert_close(Q @ Q.T, torch.eye(width), atol=1e-5, rtol=0)
    torch.testing.assert_close(rotation.turned(x), x @ Q, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rotation.back(x), x @ Q.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rotation.back(rotation.turned(x)), x, atol=1e-5, rtol=1e-5)


def test_spreads_a_spike_evenly() -> None:
    rotation = hadamard_rotation(640, seeded())
    spike = torch.zeros(640)
    spike[17] = 1.0
    torch.testing.assert_close(rotation.turned(spike).abs(), torch.full((640,), 640**-0.5), atol=1e-6, rtol=0)


def test_same_seed_same_rotation() -> None:
    one, two = hadamard_rotation(64, seeded()), hadamard_rotation(64, seeded())
    assert torch.equal(one.signs, two.signs)
    assert one.mixed == 64
