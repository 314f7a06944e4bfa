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
from rarefy.runtimes.decoding import Layered, frequent
from rarefy.runtimes.memory import RUN, Keep, Memory
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
    layered.learn(windows, Settings(steps=60, batch=256, rate=1e-3, precision="float32"))
    after = layered.answers(windows)

    def kl(logits: Tensor) -> float:
        p, q = logits[-1].log_softmax(-1), logits[0].log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert kl(after.logits) < 0.9 * kl(before.logits)
    assert all(torch.equal(value, kept[name]) for name, value in layered.network.state_dict().items())
    assert layered.speculative(prompt, 30).tokens.tolist() == layered.greedy(prompt, 30).tokens.tolist()


def test_guesses_of_few_words_change_nothing(model: Model, prompt: Tensor) -> None:
    layered = Layered(model, (1,))
    plain = layered.greedy(prompt, 40)
    index = frequent(torch.cat([prompt[0], plain.tokens[:20]])[None], 30)
    assert len(index) <= 30 and bool((index.diff() > 0).all())
    words = layered.words(index)
    checked = layered.speculative(prompt, 40, words=words)
    assert checked.tokens.tolist() == plain.tokens.tolist()
    assert checked.checked < 39  # some guesses were right
    state = torch.randn(1, 3, 128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layered.logits(state, 0, words), layered.logits(state, 0)[..., index])
    layered.learn(prompt.repeat(4, 1), Settings(steps=3, batch=32, precision="float32"), words)
    with pytest.raises(RecipeError, match="at least"):
        layered.words(index[:0])


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


# ---- forgetting

@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_enough_room_changes_nothing(family: str, tiny_random: Callable[[str], Path]) -> None:
    layered = Layered(open_model(tiny_random(family)), (0,))
    prompt = torch.randint(3, 500, (1, 40), generator=torch.Generator().manual_seed(1))
    plain = layered.greedy(prompt, 12).tokens.tolist()
    assert layered.greedy(prompt, 12, keep=Keep(4, 20, 100)).tokens.tolist() == plain
    whole = layered.likelihoods(prompt, layered.memory(), chunk=7)
    torch.testing.assert_close(layered.likelihoods(prompt, layered.memory(), chunk=40), whole)
    torch.testing.assert_close(layered.likelihoods(prompt, layered.memory(keep=Keep(4, 50, 3)), chunk=7),
    whole)


def test_blocks_with_a_window_forget_what_lies_outside(tiny_random: Callable[[str], Path]) -> None:
    """Gemma 3's sliding block holds its window, and the text is the same."""
    layered = Layered(open_model(tiny_random("gemma3")), (0,))
    text = torch.randint(3, 500, (1, 96), generator=torch.Generator().manual_seed(1))
    memory = layered.memory(keep=Keep(0, 96))
    torch.testing.assert_close(layered.likelihoods(text, memory, chunk=8),
                               layered.likelihoods(text, layered.memory(), chunk=8))
    assert memory.length(0) == 32 and memory.length(1) == 96


def test_forgotten_tokens_are_not_seen(model: Model, prompt: Tensor) -> None:
    """With room for 3 + 8 tokens: as the whole network under a mask that hides the others."""
    layered, text = Layered(model, (0,)), prompt[:, :24]
    found = layered.likelihoods(text, layered.memory(keep=Keep(3, 8)), chunk=1)
    network = network_of(model).eval()
    place = torch.arange(24)
    back = place[:, None] - place
    seen = (back >= 0) & ((back <= 8) | (place < 3))
    with torch.no_grad():
        mask = torch.zeros(1, 1, 24, 24).masked_fill(~seen, -torch.inf)
        wanted = network(text, attention_mask=mask, use_cache=False).logits[0, :-1].log_softmax(-1)
    torch.testing.assert_close(found, wanted.gather(1, text[0, 1:, None])[:, 0], rtol=1e-3, atol=1e-4)


def test_heavy_tokens_stay() -> None:
    keep = Keep(1, 2, 2)
    assert keep.chosen(torch.zeros(5)) is None
    chosen = keep.chosen(torch.tensor([0.0, 1, 5, 2, 4, 9, 9]))
    assert chosen is not None and chosen.tolist() == [0, 2, 4, 5, 6]
    memory = Memory(1, keep=(keep,))
    values = torch.arange(7.0)[None, None, :, None].expand(1, 1, 7, 2)
    memory.update(values, values, 0)
    weights = torch.tensor([0.0, 1, 5, 2, 4, 9, 9])[None, None, None]
    memory.forget(0, 0, weights)
    key, _ = memory.update(values[:, :, :1] + 7, values[:, :, :1] + 7, 0)
    assert key[0, 0, :, 0].tolist() == [0, 2, 4, 5, 6, 7]
    memory.forget(0, 7, torch.tensor([0.0, 0, 3, 0, 0, 0])[None, None, None])
    assert memory.places(0).tolist() == [0, 4, 5, 6, 7]  # 4 + 3 and 9 are more than 5


def test_keeping_is_refused_where_it_cannot_be(model: Model) -> None:
    with pytest.raises(RecipeError, match="cannot lose tokens"):
        Layered(model, (0,)).memory(8, Keep())
    with pytest.raises(RecipeError, match="newest must be 1"):
        Keep(newest=0)
    memory = Memory(1, keep=(Keep(),))
    with pytest.raises(RecipeError, match="speculate without keep"):
        memory.crop(3)
