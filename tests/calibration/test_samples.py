"""The model's own samples: from its own distribution, through a cache that changes nothing."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.cache_utils import Cache

from rarefy.calibration import samples
from rarefy.calibration.samples import affordable, batch_size, materialize, sample_windows
from rarefy.core.errors import DataError
from rarefy.models.model import Model, open_model
from rarefy.models.runner import Runner

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3", "gpt2")


@pytest.fixture(scope="module")
def model(tiny_gemma3: Path) -> Model:
    return open_model(tiny_gemma3)


def test_same_seed_same_text(model: Model) -> None:
    first = sample_windows(model, count=5, length=40, seed=0, dtype=torch.float32)
    assert first.shape == (5, 40) and first.dtype == torch.int64
    assert torch.equal(first, sample_windows(model, count=5, length=40, seed=0, dtype=torch.float32))
    assert not torch.equal(first, sample_windows(model, count=5, length=40, seed=1, dtype=torch.float32))
    assert bool((first[:, 0] == 0).all()) and int((first < 3).sum()) == 5  # BOS once, no other special token


def test_text_reads_like_the_training_text(model: Model) -> None:
    """The model finds its own samples about as likely as its entropy says, uniform noise far less so."""
    runner = Runner(model)
    own = sample_windows(model, count=8, length=64, seed=0)
    noise = torch.randint(3, 512, own.shape, generator=torch.Generator().manual_seed(0))
    losses = []
    for tokens in (own, noise):
        logs = _logits(runner, tokens).log_softmax(-1)
        losses.append(float(-logs[:, :-1].gather(2, tokens[:, 1:, None]).mean()))
        entropy = float(-(logs.exp() * logs).sum(-1)[:, :-1].mean())
        if tokens is own:
            assert losses[0] == pytest.approx(entropy, abs=0.35)
    assert losses[0] < losses[1] - 1.5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_changes_nothing(family: str, tiny_random: Callable[[str], Path]) -> None:
    """One token at a time over the cache, past the sliding window, equals the runner's whole forward."""
    opened = open_model(tiny_random(family))
    tokens = torch.randint(3, 512, (2, 44), generator=torch.Generator().manual_seed(0))
    network = materialize(opened, torch.float32)
    cache = Cache(layers=[samples._Slots(44) for _ in range(opened.map.blocks)])
    with torch.inference_mode():
        hidden = torch.cat([network.base_model(input_ids=tokens[:, at:at + 1], past_key_values=cache,
                                               use_cache=True)[0] for at in range(44)], 1)
        whole = _final(Runner(opened), tokens)
    torch.testing.assert_close(hidden, whole, atol=3e-5, rtol=1e-4)


def test_the_draw_follows_the_distribution() -> None:
    """Equally spaced uniform numbers must hit every token as often as its probability says, to one."""
    vocabulary, n = 11, 4001
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0))
    draw = samples._Draw(n, vocabulary, torch.tensor([4]))
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = torch.bincount(draw(logits[:, None].expand(-1, n), uniform), minlength=vocabulary)
    logits[4] = -math.inf
    assert counts[4] == 0
    assert float((counts - n * logits.softmax(0)).abs().max()) <= 1.01


def test_the_draw_never_leaves_the_support() -> None:
    logits = torch.full((10, 3), -math.inf)
    logits[2], logits[7] = 0.0, 1.0
    draw = samples._Draw(3, 10, torch.tensor([], dtype=torch.int64))
    uniform = torch.tensor([0.0, 0.5, 1.0 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniform).tolist() == [2, 7, 7]


def test_windows_are_written_in_as_many_batches_as_memory_allows(model: Model,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "CACHE_BYTES", 2 * 2 * 3 * 1 * 32 * 20 * 4)
    assert batch_size(model, 20, torch.float32) == 2
    told: list[tuple[int, int]] = []
    tokens = sample_windows(model, count=5, length=20, seed=0, dtype=torch.float32,
                            progress=lambda done, total: told.append((done, total)))
    assert tokens.shape == (5, 20)
    assert told[-1] == (100, 100) and told == sorted(told)


@pytest.mark.parametrize("separator", [1, None])
def test_without_bos(separator: int | None, tiny_llama: Path, tmp_path: Path) -> None:
    """The token that separates texts stands in front; without one, some ordinary token."""
    folder = tmp_path / "m"
    shutil.copytree(tiny_llama, folder)
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        for key in [key for key in settings if key.startswith("bos_token") or
                    (key.startswith("eos_token") and separator is None)]:
            settings[key] = None
        (folder / name).write_text(json.dumps(settings))
    tokens = sample_windows(open_model(folder), count=6, length=8, seed=0)
    if separator is not None:
        assert bool((tokens[:, 0] == separator).all())
    else:
        assert len(torch.unique(tokens[:, 0])) > 1
    assert int((tokens[:, 1:] < 3).sum()) == 0


def test_broken_requests_and_models(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="has room for 512"):
        sample_windows(model, count=1, length=513, seed=0)
    with pytest.raises(DataError, match="at least 1"):
        sample_windows(model, count=0, length=8, seed=0)
    monkeypatch.setattr(samples._Draw, "__call__",
                        lambda self, logits, uniform: torch.full(uniform.shape, 7))
    with pytest.raises(DataError, match="copies of one another"):
        sample_windows(model, count=3, length=8, seed=0)


def test_time_is_reckoned(model: Model) -> None:
    assert affordable(model, count=40, length=64, seconds=60.0) == 40
    assert affordable(model, count=40, length=64, seconds=1e-9) == 1


@torch.no_grad()
def _final(runner: Runner, tokens: torch.Tensor) -> torch.Tensor:
    hidden, context = runner.stem(tokens)
    for index in range(runner.blocks):
        hidden = runner.block(index, hidden, context)
    return runner.norm(hidden)


@torch.no_grad()
def _logits(runner: Runner, tokens: torch.Tensor) -> torch.Tensor:
    return runner.logits(_final(runner, tokens))
