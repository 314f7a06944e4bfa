"""Models whose keys and values have a latent: what they compute, behind caches, in folders, under others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.core.errors import ModelError, TargetError
from rarefy.core.nouns import Recipe, Step
from rarefy.export.decoder import trace_decoder
from rarefy.export.metadata import architecture_metadata
from rarefy.export.native import export_native, network_of, open_native
from rarefy.measure.divergence import Reference
from rarefy.models.attending import LATENT, attending, said
from rarefy.models.axes import couplings
from rarefy.models.latent import with_latents
from rarefy.models.model import Model, open_model
from rarefy.models.runner import Runner
from rarefy.models.shrunk import without_blocks
from rarefy.run.attention import check_attention
from rarefy.run.reshape import reshaped
from rarefy.runtimes.decoding import Layered
from rarefy.runtimes.memory import Keep
from rarefy.techniques.attention.window import Window

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "smollm3")


@pytest.fixture(scope="module")
def text() -> Tensor:
    return torch.randint(3, 500, (4, 40), generator=torch.Generator().manual_seed(1))


def converted(model: Model, tokens: Tensor, **settings: Any) -> Model:
    recipe = Recipe("", (Step("latent", settings={"multiple": 2, **settings}),))
    return reshaped(model, recipe, tokens).model


def logits(model: Model, tokens: Tensor, **rest: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = network_of(model).eval()(tokens, use_cache=False, **rest).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_latent_of_full_rank_changes_nothing(family: str, tiny_random: Callable[[str], Path], text: Tensor
                                               ) -> None:
    model = open_model(tiny_random(family))
    whole = converted(model, text, ratio=1.0, weigh="energy", damping=1e-6)
    mask = torch.ones_like(text)
    mask[0, 33:] = 0
    for rest in ({}, {"attention_mask": mask}):
        wanted, found = (logits(each, text, **rest) for each in (model, whole))
        torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_remembered_is_what_was_seen(family: str, tiny_random: Callable[[str], Path], text: Tensor
                                             ) -> None:
    """The text in pieces behind a cache, ours and transformers', against the whole text at once."""
    model = converted(open_model(tiny_random(family)), text, weigh="energy")
    wanted, network = logits(model, text[:1]), network_of(model).eval()
    layered = Layered(model, (0,))
    memory, found = layered.memory(), []
    with torch.no_grad():
        for start in range(0, 40, 7):
            part = text[:1, start:start + 7]
            hidden = layered.stem(part, start)
            for index in range(2):
                hidden = layered.part(index, hidden, start, memory)
            found.append(layered.logits(hidden))
        torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=1e-3, atol=1e-3)
        ranks = getattr(model.config, LATENT)
        assert memory.bytes == 40 * 4 * sum(ranks)  # and nothing else
        past = network(text[:1, :25], use_cache=True).past_key_values
        behind = network(text[:1, 25:], past_key_values=past, use_cache=True).logits
        torch.testing.assert_close(behind, wanted[:, 25:], rtol=1e-3, atol=1e-3)


def test_half_the_cache_at_a_price(tiny_llama: Path, text: Tensor) -> None:
    """The Fisher's weights are worth their survey, and a latent that is rounded and forgets still works."""
    model = open_model(tiny_llama)
    tokens = model.tokenizer("The standard types that are built into the interpreter are described. " * 20,
                             return_tensors="pt")["input_ids"][:, :320].view(4, 80)
    reference = Reference(model, tokens)
    losses = {weigh: reference.compare(Runner(converted(model, tokens, ratio=0.5, weigh=weigh))).kl_mean
              for weigh in ("fisher", "energy")}
    assert losses["fisher"] < 0.2
    half = converted(model, tokens, ratio=0.5)
    plain, ours = (Layered(each, (0,)) for each in (model, half))
    written = ours.greedy(tokens[:1], 40).tokens
    assert written.tolist() == ours.speculative(tokens[:1], 40).tokens.tolist()
    held = {}
    for name, layered, bits in (("plain", plain, 32), ("latent", ours, 32), ("rounded", ours, 8)):
        memory = layered.memory(bits)
        likely = layered.likelihoods(tokens[:1], memory)
        assert bool(torch.isfinite(likely).all())
        held[name] = memory.bytes
    assert held["latent"] == held["plain"] / 2 and held["rounded"] < held["latent"] / 2
    some = ours.memory(keep=Keep(2, 16, 8))
    assert bool(torch.isfinite(ours.likelihoods(tokens[:1], some, chunk=8)).all())
    assert some.length(0) == 26


def test_a_folder_keeps_it(tiny_gemma3: Path, text: Tensor, tmp_path: Path) -> None:
    model = open_model(tiny_gemma3)
    half = converted(model, text, ratio=0.5)
    assert said(half.config) == "latent" and half.parameters < model.parameters
    export_native(half, {}, tmp_path / "native")
    again = open_native(tmp_path / "native")
    assert again.map.sites == half.map.sites
    torch.testing.assert_close(logits(again, text), logits(half, text))
    with pytest.raises(TargetError, match="latent attention"):
        architecture_metadata(half.map.family, half.config, 512)
    with pytest.raises(TargetError, match="has latent attention, and graphs"):
        trace_decoder(network_of(half))
    with pytest.raises(TargetError, match=r"latent: llama\.cpp computes ordinary attention"):
        check_attention(Recipe("", (Step("latent"),)), "llama.cpp")


def test_other_techniques_work_on_it(tiny_llama: Path, text: Tensor) -> None:
    """Blocks that go, channels that are scaled, windows, training: the latent is a matrix like others."""
    half = converted(open_model(tiny_llama), text, ratio=0.5)
    roles = [site.role for site in half.map.in_block(0)]
    assert "kv" in roles
    norm = next(each for each in couplings(half) if each.role == "norm" and each.block == 0)
    assert [half.map.by_path[member.path].role for member in norm.readers] == ["q", "kv"]
    fewer = without_blocks(half, frozenset({1}))
    assert getattr(fewer.config, LATENT) == [getattr(half.config, LATENT)[block] for block in (0, 2)]
    assert bool(torch.isfinite(logits(fewer, text)).all())
    wide = attending(half, "window", Window(4096, 0))
    assert isinstance(wide, Model)
    torch.testing.assert_close(logits(wide, text), logits(half, text), rtol=1e-4, atol=1e-4)
    network = network_of(half)
    network(text).logits.square().mean().backward()
    assert float(network.get_parameter("model.layers.0.self_attn.kv_proj.weight").grad.abs().sum()) > 0


def test_what_has_no_latent(tiny_random: Callable[[str], Path], tiny_llama: Path, text: Tensor) -> None:
    for family in ("gpt2", "phi3"):
        with pytest.raises(ModelError, match="in one matrix"):
            converted(open_model(tiny_random(family)), text, weigh="energy")
    with pytest.raises(ModelError, match="caps its attention scores"):
        converted(open_model(tiny_random("gemma2")), text, weigh="energy")
    model = open_model(tiny_llama)
    half = converted(model, text, ratio=0.5, weigh="energy")
    with pytest.raises(ModelError, match="start from the original"):
        converted(half, text, weigh="energy")
    down = torch.zeros(3, model.config.hidden_size)
    with pytest.raises(ModelError, match="even number for each of 3 blocks"):
        with_latents(model, {block: (torch.zeros(128, 3), down) for block in range(3)})
