"""Text written with some of the blocks: the same text when it is checked, nothing lost when it is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rarefy.core.errors import RecipeError
from rarefy.export.native import network_of
from rarefy.models.model import Model, open_model
from rarefy.runtimes.decoding import Layered
from rarefy.runtimes.memory import RUN, Memory
from rarefy.techniques.depth.early_exit import EarlyExit
from rarefy.training.loop import Settings

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3", "gpt2")


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Model:
    return open_model(tiny_llama)


@pytest.fixture(scope="module")
def prompt(model: Model) -> Tensor:
    text = "The following sections describe the standard types that are built into the interpreter."
    return torch.tensor([model.tokenizer(text)["input_ids"]])


def by_transformers(model: Model, prompt: Tensor, count: int) -> list[int]:
    """Literally: the whole text through the whole network for every token."""
    network, tokens = network_of(model).eval(), prompt
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat([tokens, network(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tokens[0, prompt.shape[1]:].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_what_it_wrote(family: str, tiny_random: Callable[[str], Path]) -> None:
    model = open_model(tiny_random(family))
    prompt = torch.randint(3, 500, (1, 40), generator=torch.Generator().manual_seed(1))  # beyond the window
    wanted = by_transformers(model, prompt, 12)
    layered = Layered(model, (0,))
    assert layered.greedy(prompt, 12).tokens.tolist() == wanted
    assert layered.speculative(prompt, 12, draft=3).tokens.tolist() == wanted


@pytest.mark.parametrize("draft", [1, 2, 5])
def test_what_is_checked_is_what_greedy_writes(draft: int, model: Model, prompt: Tensor) -> None:
    layered = Layered(model, (1,))
    plain, checked = layered.greedy(prompt, 48), layered.speculative(prompt, 48, draft=draft)
    assert checked.tokens.tolist() == plain.tokens.tolist()
    assert len(checked.tokens) == 48 and checked.checked <= 47


def test_learnt_exits_guess_better(model: Model, prompt: Tensor) -> None:
    windows = torch.cat([Layered(model, (1,)).greedy(prompt[:, :k], 65).tokens[None] for k in range(3, 15)])
    layered = Layered(model, (1,))
    before = layered.answers(windows)
    kept = {name: value.clone() for name, value in layered.network.state_dict().items()}
    layered.learn(windows, Settings(steps=30, batch=6, rate=1e-2, precision="float32"))
    after = layered.answers(windows)

    def kl(logits: Tensor) -> float:
        p, q = logits[-1].log_softmax(-1), logits[0].log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert kl(after.logits) < 0.9 * kl(before.logits)
    assert all(torch.equal(value, kept[name]) for name, value in layered.network.state_dict().items())
    assert layered.speculative(prompt, 30).tokens.tolist() == layered.greedy(prompt, 30).tokens.tolist()


def usual(layered: Layered, tokens: Tensor) -> float:
    """How sure the first exit is of half of some text."""
    said = layered.answers(tokens[None]).logits
    return float(EarlyExit().certainty(said[:1], 2).median())


def test_tokens_leave_where_they_are_sure(model: Model, prompt: Tensor) -> None:
    layered = Layered(model, (0, 1))
    whole = layered.greedy(prompt, 30)
    assert whole.blocks.tolist() == [3] * 30
    some = layered.early(prompt, 30, EarlyExit(), usual(layered, whole.tokens))
    assert 1 < float(some.blocks.float().mean()) < 3
    everyone = layered.early(prompt, 30, EarlyExit(), 0.0)
    assert everyone.blocks.tolist() == [3] + [1] * 29
    rule = EarlyExit(max_loss=0.3).calibrated(layered.answers(prompt.repeat(12, 1)))
    assert rule.loss <= 0.3


def test_debts_are_paid_exactly(model: Model, prompt: Tensor) -> None:
    """Tokens that left early are, for those behind them, what the whole network makes of them."""
    layered = Layered(model, (0,))
    text = layered.early(prompt, 20, EarlyExit(), usual(layered, layered.greedy(prompt, 20).tokens))
    went_deep = (text.blocks == 3).nonzero()[1:, 0].tolist()
    assert went_deep and 1 in text.blocks.tolist()
    network = network_of(model).eval()
    written = torch.cat([prompt, text.tokens[None]], 1)
    with torch.no_grad():
        logits = network(written, use_cache=False).logits[0]
    for place in went_deep:  # each says what the network would have said of the same text
        assert int(logits[prompt.shape[1] + place - 1].argmax()) == int(text.tokens[place])


# ---- memory

def test_memory_is_exact_in_float() -> None:
    memory, generator = Memory(2), torch.Generator().manual_seed(0)
    parts = [torch.randn(1, 2, n, 8, generator=generator) for n in (40, 1, 1, 30)]
    for part in parts:
        key, value = memory.update(part, 2 * part, 1)
    assert torch.equal(key, torch.cat(parts, 2)) and torch.equal(value, 2 * key)
    memory.crop(37)
    key, _ = memory.update(parts[1], parts[1], 1)
    assert torch.equal(key, torch.cat([parts[0][:, :, :37], parts[1]], 2))
    assert memory.length(0) == 0 and memory.length(1) == 38


@pytest.mark.parametrize(("bits", "share"), [(8, 0.36), (4, 0.24)])
def test_rounded_memory_is_smaller_and_near(bits: int, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 2, 8 * RUN + 1, 64, generator=generator)
    values[..., 3] *= 20  # a large channel spoils no other
    plain, rounded = Memory(1), Memory(1, bits)
    plain.update(values, values, 0)
    rounded.update(values, values, 0)
    assert rounded.bytes < share * plain.bytes
    key, value = rounded.update(values[:, :, :1], values[:, :, :1], 0)
    runs = values[:, :, :8 * RUN].unflatten(2, (8, RUN))
    step = (runs.amax(3) - runs.amin(3)) / (2**bits - 1)
    error = (key[:, :, :8 * RUN].unflatten(2, (8, RUN)) - runs).abs()
    assert bool((error <= 0.52 * step[:, :, :, None] + 0.002 * runs.abs().amax()).all())
    assert float(error[..., 5].max()) < float(error[..., 3].max())
    assert torch.equal(key[:, :, -1], values[:, :, 0]) and key.shape == value.shape
    rounded.crop(RUN + 5)
    assert rounded.length(0) == RUN + 5
    assert torch.equal(rounded.update(values[:, :, :1], values[:, :, :1], 0)[0][:, :, :RUN], key[:, :, :RUN])


def test_text_from_rounded_memory(model: Model, prompt: Tensor) -> None:
    layered = Layered(model, (1,))
    long = layered.greedy(prompt, 60)
    near = layered.greedy(prompt, 60, bits=8)
    same = int((long.tokens == near.tokens).long().cumprod(0).sum())
    assert same > 30
    assert layered.speculative(prompt, 20, bits=8).tokens.shape == (20,)


def test_what_cannot_be_written(model: Model, prompt: Tensor) -> None:
    with pytest.raises(RecipeError, match="from 0 to 1"):
        Layered(model, (2,))
    with pytest.raises(RecipeError, match="guesses come from one exit"):
        Layered(model, (0, 1)).speculative(prompt, 4)
    with pytest.raises(RecipeError, match="32, 8 or 4"):
        Memory(1, bits=3)
    with pytest.raises(RecipeError, match="go into a byte"):
        Memory(1, bits=4).update(torch.zeros(1, 1, 1, 3), torch.zeros(1, 1, 1, 3), 0)
