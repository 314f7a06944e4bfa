"""Attention that looks at less: each against every score written down, with padding, caches and groups."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.core.attention import Attending, Attention
from rarefy.core.errors import EditError, RecipeError
from rarefy.numerics.attention import bands
from rarefy.techniques.attention.linear_attention import LinearAttention
from rarefy.techniques.attention.linformer import Linformer
from rarefy.techniques.attention.strided import Strided
from rarefy.techniques.attention.window import Window


def call(queries: int, keys: int, *, causal: bool, padded: bool = False, seed: int = 0) -> Attention:
    """Four heads that share two sets of keys and values; padded: the second text is shorter."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, queries, 8, generator=generator)
    key, value = (torch.randn(2, 2, keys, 8, generator=generator) for _ in range(2))
    real = torch.arange(keys) < torch.tensor([[keys], [max(1, keys - 5)]])
    return Attention(query, key, value, 0.3, causal, real if padded else None)


def literal(found: Attention, seen: Tensor) -> Tensor:
    """Every score, a softmax over those that are seen; ``seen`` [queries, keys]."""
    out = torch.zeros_like(found.query)
    for batch in range(2):
        for head in range(4):
            key, value = found.key[batch, head // 2], found.value[batch, head // 2]
            visible = seen if found.real is None else seen & found.real[batch]
            for place in range(len(seen)):
                which = visible[place]
                if which.any():
                    scores = found.scale * key[which] @ found.query[batch, head, place]
                    out[batch, head, place] = scores.softmax(0) @ value[which]
    return out


def away(found: Attention) -> Tensor:
    at = found.offset + torch.arange(found.query.shape[2])
    return at[:, None] - torch.arange(found.key.shape[2])


SHAPES = [(1, 1), (5, 5), (16, 16), (37, 37), (64, 64)]
CACHED = [(1, 30), (7, 30)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize(("queries", "keys"), [*SHAPES, *CACHED])
def test_window_sees_its_window_and_the_sinks(queries: int, keys: int, sinks: int, padded: bool) -> None:
    found = call(queries, keys, causal=True, padded=padded)
    far = away(found)
    seen = (far >= 0) & ((far < 8) | (torch.arange(keys) < sinks))
    torch.testing.assert_close(Window(8, sinks).attend(found, {}), literal(found, seen))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("length", [1, 5, 16, 37])
def test_window_of_an_encoder_sees_both_sides(length: int, sinks: int, padded: bool) -> None:
    found = call(length, length, causal=False, padded=padded)
    seen = (away(found).abs() < 8) | (torch.arange(length) < sinks)
    torch.testing.assert_close(Window(8, sinks).attend(found, {}), literal(found, seen))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [*SHAPES, *CACHED])
def test_strided_sees_near_tokens_and_every_stride(queries: int, keys: int, causal: bool, padded: bool
                                                   ) -> None:
    if not causal and queries != keys:
        pytest.skip("encoders have no cache")
    found = call(queries, keys, causal=causal, padded=padded)
    far = away(found)
    seen = (far.abs() < 8) | (far % 8 == 0)
    seen = seen & (far >= 0) if causal else seen
    torch.testing.assert_close(Strided(8).attend(found, {}), literal(found, seen))


@pytest.mark.parametrize("technique", [Window(256, 4), Strided(256)])
def test_a_window_of_everything_is_ordinary_attention(technique: Attending) -> None:
    found = call(40, 40, causal=True)
    torch.testing.assert_close(technique.attend(found, {}), literal(found, away(found) >= 0))


@pytest.mark.parametrize("technique", [Window(16, 2), Strided(16)])
def test_what_is_skipped_is_not_computed(technique: Attending) -> None:
    """A share of zero of what is no number would be none either."""
    found = call(160, 160, causal=True)
    found.value[:, :, 5] = float("nan")
    out = technique.attend(found, {})
    assert bool(out[:, :, 5].isnan().all())
    place = torch.arange(160)
    untouched = place >= 64 if isinstance(technique, Window) else (place >= 48) & (place % 16 != 5)
    assert bool(torch.isfinite(out[:, :, untouched]).all())
    assert technique.keys(8192, True) < 8192 / 10


def test_linformer_is_its_equation() -> None:
    found, technique = call(13, 13, causal=False, padded=True), Linformer(rank=4, length=16)
    project = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    out = technique.attend(found, {"project": project})
    assert found.real is not None
    for batch in range(2):
        mix = project[:, :13] * found.real[batch]
        for head in range(4):
            key, value = (mix @ each[batch, head // 2] for each in (found.key, found.value))
            shares = (found.scale * found.query[batch, head] @ key.T).softmax(-1)
            torch.testing.assert_close(out[batch, head], shares @ value)


def test_linformer_begins_as_means_and_can_be_exact() -> None:
    start = Linformer(4, 16).learned(8, torch.Generator())["project"]
    assert torch.equal(start.sum(1), torch.ones(4)) and int((start != 0).sum()) == 16
    found = call(16, 16, causal=False)
    out = Linformer(16, 16).attend(found, {"project": torch.eye(16)})
    torch.testing.assert_close(out, literal(found, torch.ones(16, 16).bool()))
    with pytest.raises(EditError, match="a text of 16 tokens, at most length=8"):
        Linformer(4, 8).attend(found, {"project": torch.ones(4, 8)})


@pytest.mark.parametrize("padded", [False, True])
def test_elu_is_its_equation(padded: bool) -> None:
    found = call(11, 11, causal=False, padded=padded)
    out = LinearAttention("elu").attend(found, {})
    for batch in range(2):
        for head in range(4):
            features = [torch.nn.functional.elu(math.sqrt(found.scale) * each) + 1
                        for each in (found.query[batch, head], found.key[batch, head // 2])]
            shares = features[0] @ features[1].T
            if found.real is not None:
                shares = shares * found.real[batch]
            shares = shares / shares.sum(1, keepdim=True)
            torch.testing.assert_close(out[batch, head], shares @ found.value[batch, head // 2])


def test_random_features_are_the_softmax_up_to_noise() -> None:
    found, errors = call(11, 11, causal=False, padded=True), []
    wanted = literal(found, torch.ones(11, 11).bool())
    for count in (16, 4096):
        technique = LinearAttention(count=count)
        learned = technique.learned(8, torch.Generator().manual_seed(0))
        assert learned["project"].shape == (count, 8)
        errors.append(float((technique.attend(found, learned) - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.2 and errors[1] < errors[0] / 3
    block = LinearAttention(count=8).learned(8, torch.Generator().manual_seed(0))["project"]
    angles = torch.nn.functional.normalize(block) @ torch.nn.functional.normalize(block).T
    torch.testing.assert_close(angles, torch.eye(8), atol=1e-5, rtol=0)


@pytest.mark.parametrize("technique", [Window(8), Strided(8), Linformer(4, 64), LinearAttention(count=16)])
def test_gradients_are_finite(technique: Attending) -> None:
    found = call(21, 21, causal=False, padded=True)
    found.query.requires_grad_(True)
    found.value.requires_grad_(True)
    technique.attend(found, technique.learned(8, torch.Generator().manual_seed(0))).sum().backward()
    assert found.query.grad is not None and bool(torch.isfinite(found.query.grad).all())
    assert found.value.grad is not None and bool(torch.isfinite(found.value.grad).all())


def test_bands() -> None:
    values = torch.arange(10.0)[None, None, :, None]
    assert bands(values, -2, 3, 4, 6)[0, :, 0, :, 0].tolist() == [
        [0, 0, 0, 1, 2, 3], [2, 3, 4, 5, 6, 7], [6, 7, 8, 9, 0, 0]]
    assert bands(values, 4, 2, 3, 3)[0, :, 0, :, 0].tolist() == [[4, 5, 6], [7, 8, 9]]


@pytest.mark.parametrize(("technique", "settings", "match"), [
    (Window, {"window": 0}, "at least 1"), (Strided, {"stride": 1}, "2 or more"),
    (Linformer, {"rank": 9, "length": 8}, "from 1 to length"),
    (LinearAttention, {"features": "rand"}, "did you mean 'random'"),
    (LinearAttention, {"count": 0}, "1 or more")])
def test_settings_that_mean_nothing(technique: type[Any], settings: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        technique(**settings)
