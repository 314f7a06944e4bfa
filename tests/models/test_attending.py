"""Networks with other attention: what they compute, in folders, under padding, behind caches, in training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rarefy
from rarefy.calibration.examples import Examples
from rarefy.core.attention import Attending
from rarefy.core.errors import ModelError, TargetError
from rarefy.export.compressed_tensors import export_transformers
from rarefy.export.metadata import architecture_metadata
from rarefy.export.native import export_native, network_of, open_native
from rarefy.export.networks import export_network, opened
from rarefy.models.attending import KEY, attending, said
from rarefy.models.form import Form
from rarefy.models.model import open_model
from rarefy.models.network import Network
from rarefy.models.runner import Runner
from rarefy.runtimes.decoding import Layered
from rarefy.techniques.attention.linear_attention import LinearAttention
from rarefy.techniques.attention.linformer import Linformer
from rarefy.techniques.attention.strided import Strided
from rarefy.techniques.attention.window import Window
from rarefy.techniques.distill.cosine import Cosine
from rarefy.training.examples import Rows
from rarefy.training.loop import Settings
from rarefy.training.signals import Distillation
from rarefy.training.tune import Tuning, tune
from small_networks import bert, tokens

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "phi3", "smollm3", "gpt2")
WIDE = {"window": Window(4096, 0), "strided": Strided(4096)}


def text(length: int = 48) -> Tensor:
    return torch.randint(3, 500, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_of_everything_changes_nothing(family: str, tiny_random: Callable[[str], Path]) -> None:
    """Beyond the windows that blocks have already: those stay, by our kernel."""
    model = open_model(tiny_random(family))
    plain = network_of(model).eval()
    real = torch.ones(2, 48, dtype=torch.int64)
    real[1, 40:] = 0
    for name, technique in WIDE.items():
        other = network_of(attending(model, name, technique)).eval()
        with torch.no_grad():
            for mask in (None, real):
                wanted = plain(text(), attention_mask=mask, use_cache=False).logits
                found = other(text(), attention_mask=mask, use_cache=False).logits
                kept = torch.ones_like(real).bool() if mask is None else mask.bool()
                torch.testing.assert_close(found[kept], wanted[kept], rtol=1e-4, atol=1e-4)


def test_blocks_with_a_window_have_one_already(tiny_random: Callable[[str], Path]) -> None:
    model = open_model(tiny_random("mistral"))
    with pytest.raises(ModelError, match="name blocks"):
        attending(model, "window", Window(8))
    plain, other = (network_of(each).eval() for each in (
        model, attending(model, "window", Window(32, 0, blocks=(0,)))))
    with torch.no_grad():  # the same window, by our kernel in both blocks
        found, wanted = (each(text(), use_cache=False).logits for each in (other, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def by_mask(model: Any, seen: Tensor) -> Tensor:
    """Literally: the whole network under a mask."""
    mask = torch.zeros(1, 1, *seen.shape).masked_fill(~seen, -torch.inf).expand(2, -1, -1, -1)
    with torch.no_grad():
        logits: Tensor = network_of(model).eval()(text(), attention_mask=mask, use_cache=False).logits
    return logits


def test_a_window_sees_what_a_mask_shows(tiny_llama: Path, tmp_path: Path) -> None:
    """In the network, from a folder, block by block, and token by token behind a cache."""
    model = open_model(tiny_llama)
    converted = attending(model, "window", Window(8, 2))
    place = torch.arange(48)
    back = place[:, None] - place
    wanted = by_mask(model, (back >= 0) & ((back < 8) | (place < 2)))
    export_native(converted, {}, tmp_path / "out")
    assert said(open_native(tmp_path / "out").config) == "window"
    with torch.no_grad():
        for network in (network_of(converted), rarefy.load(tmp_path / "out")):
            torch.testing.assert_close(network.eval()(text(), use_cache=False).logits, wanted,
                                       rtol=1e-4, atol=1e-4)
        runner = Runner(converted)
        hidden, context = runner.stem(text())
        for block in range(runner.blocks):
            hidden = runner.block(block, hidden, context)
        logits = runner.logits(runner.norm(hidden))
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    written = Layered(converted, (0,)).greedy(text()[:1], 6).tokens
    cached = network_of(converted).eval().generate(text()[:1], max_new_tokens=6, do_sample=False,
                                                   pad_token_id=2, eos_token_id=None)
    assert cached[0, 48:].tolist() == written.tolist()


def test_only_some_blocks(tiny_llama: Path) -> None:
    model = open_model(tiny_llama)
    network = network_of(attending(model, "window", Window(4, 0, blocks=(1,))))
    parts = [hasattr(block.self_attn, "attending") for block in network.model.layers]
    assert parts == [False, True, False]
    with pytest.raises(ModelError, match="only 0 to 2"):
        attending(model, "window", Window(4, 0, blocks=(7,)))


@pytest.mark.parametrize(("name", "technique"), [("linformer", Linformer()),
                                                 ("linear_attention", LinearAttention())])
def test_what_is_for_encoders_is_refused_elsewhere(name: str, technique: Attending, tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match=f"{name}: is for encoders"):
        attending(open_model(tiny_llama), name, technique)


def encoder(kind: str = "bert") -> Network:
    if kind == "bert":
        return Network.from_module(bert(), tokenizer=None)
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(kind, vocab_size=100, hidden_size=32, num_hidden_layers=2,
                                  num_attention_heads=4, max_position_embeddings=64,
                                  **{"hidden_dim" if kind == "distilbert" else "intermediate_size": 64})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = AutoModel.from_config(config).eval()
    return Network.from_module(module, form=Form("text", "embedding", "mean", 32, loader="AutoModel"))


@pytest.mark.parametrize("kind", ["bert", "distilbert", "electra", "roberta"])
def test_encoders(kind: str) -> None:
    network, inputs = encoder(kind), tokens(4, 9)
    wanted = network.run(inputs)
    for name, technique in WIDE.items():
        found = attending(network, name, technique)
        assert isinstance(found, Network)
        torch.testing.assert_close(found.run(inputs), wanted, rtol=1e-4, atol=1e-5)
    random = attending(network, "linear_attention", LinearAttention(count=2048))
    assert isinstance(random, Network)
    apart = 1 - torch.cosine_similarity(random.run(inputs), wanted)
    assert 0 < float(apart.max()) < 0.05


def test_what_is_learnt_is_kept(tmp_path: Path) -> None:
    """Mixtures of keys learn with the blocks, come nearer to the original, and survive a folder."""
    network = encoder()
    converted = attending(network, "linformer", Linformer(2, 16))
    assert isinstance(converted, Network)
    path = "encoder.layer.0.attention.self.attending.project"
    assert path in [param.path for param in converted.map.params]
    examples = Examples(tokens(64, 9))
    where = tuple(site.path for site in converted.map.sites if site.block is not None)
    tuned = tune(converted, {}, Tuning(frozenset({"weights", "norms", "biases"}), where=where,
                                       whole=("*.attending.*",)),
                 Distillation(converted, network, ((1.0, Cosine(of="rows")),)), Rows(examples.inputs),
                 Settings(steps=40, batch=32, rate=3e-3, precision="float32"))
    assert not torch.equal(tuned.params[path], converted.param(path))
    converted.form = network.form
    folder = tmp_path / "out"
    export_tokenless(converted, tuned.trees, tuned.params, folder)
    again = opened(folder)
    assert isinstance(again, Network) and said(again.config) == "linformer"
    torch.testing.assert_close(again.param(path), tuned.params[path])

    def apart(one: Network) -> float:
        wanted = network.run(examples.inputs)
        return float((1 - torch.cosine_similarity(one.run(examples.inputs), wanted)).mean())

    assert apart(again) < 0.5 * apart(converted)


def export_tokenless(network: Network, trees: Any, params: Any, folder: Path) -> None:
    """A folder of an encoder that came without a tokenizer."""
    from unittest.mock import Mock

    network._tokenizer = Mock(save_pretrained=lambda folder: None)
    export_network(network, trees, folder, params=params)


def test_a_damaged_configuration_is_refused(tiny_llama: Path) -> None:
    model = open_model(tiny_llama)
    for wrong, match in (({"technique": "os"}, "'os' is unknown"), ({"technique": "grouped"}, "are wrong"),
                         ({"technique": "window", "settings": {"widow": 3}}, "settings of window are wrong")):
        converted = attending(model, "window", Window())
        setattr(converted.config, KEY, wrong)
        with pytest.raises(ModelError, match=match):
            network_of(converted)


def test_capped_scores_are_refused(tiny_random: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match="caps its attention scores"):
        attending(open_model(tiny_random("gemma2")), "window", Window())


def test_no_other_format_takes_it(tiny_llama: Path, tmp_path: Path) -> None:
    """A file that looked ordinary would be another function."""
    converted = attending(open_model(tiny_llama), "window", Window(8))
    with pytest.raises(TargetError, match="computes ordinary attention"):
        architecture_metadata(converted.map.family, converted.config, 512)
    with pytest.raises(TargetError, match="choose the native format"):
        export_transformers(network_of(converted), {}, tmp_path / "out")
