"""The runner computes what transformers computes, whatever is replaced, and keeps the gradient."""

from typing import Any

import pytest
import torch

from rarefy.core.errors import ModelError
from rarefy.core.nodes import Dense, Product
from rarefy.models.model import Model, open_model
from rarefy.models.runner import Runner


def whole(runner: Runner, tokens: torch.Tensor, mask: torch.Tensor | None = None,
          **observe: Any) -> torch.Tensor:
    """Logits, block by block."""
    hidden, context = runner.stem(tokens, mask)
    for index in range(runner.blocks):
        hidden = runner.block(index, hidden, context, **observe)
    return runner.logits(runner.norm(hidden))


def test_logits_are_those_of_transformers(case, build, tokens):
    network = build(case)
    with torch.no_grad():
        got = whole(Runner(Model.from_module(network, None)), tokens)
        torch.testing.assert_close(got, network(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_as_in_transformers(case, side, build, tokens):
    network = build(case)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, :5 if side == "left" else None] = side == "right"
    mask[2, None if side == "left" else -4:] = side == "left"
    with torch.no_grad():
        got = whole(Runner(Model.from_module(network, None)), tokens, mask)
        want = network(tokens, attention_mask=mask.long()).logits
    torch.testing.assert_close(got[mask], want[mask], atol=1e-4, rtol=0)
    assert torch.isfinite(got).all()


def test_opened_from_a_folder_it_computes_the_same(case, build, folder, tokens):
    network = build(case)
    with torch.no_grad():
        got = whole(Runner(open_model(folder(case, network=network))), tokens)
        torch.testing.assert_close(got, network(tokens).logits, atol=1e-4, rtol=0)


def test_every_site_is_seen_with_its_input_and_output(case, build, tokens):
    model = Model.from_module(build(case), None)
    runner, seen = Runner(model), {}
    with torch.no_grad():
        whole(runner, tokens, observe=lambda path, x, y: seen.setdefault(path, (x, y)))
    assert list(seen) and set(seen) == {site.path for site in model.map.sites if site.block is not None}
    for path, (x, y) in seen.items():
        bias = path.replace(".weight", ".bias")
        extra = model.param(bias) if bias in {p.path for p in model.map.params} else 0
        torch.testing.assert_close(y, x @ model.weight(path).T + extra, atol=1e-4, rtol=1e-4)
        assert model.map.by_path[path].shape == (y.shape[-1], x.shape[-1])
    assert not any(module._forward_hooks for layer in runner._layers for module in layer.modules())


def test_a_raising_observer_leaves_no_hook(build, tokens):
    runner = Runner(Model.from_module(build("llama"), None))
    hidden, context = runner.stem(tokens)

    def fail(path, x, y):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.block(0, hidden, context, observe=fail)
    assert not any(module._forward_hooks for layer in runner._layers for module in layer.modules())


def test_replaced_weights_are_used_everywhere(case, build, tokens):
    network, other = build(case), build(case, seed=1)
    model, donor = Model.from_module(network, None), Model.from_module(other, None)

    def weight(path):
        return donor.weight(path) if path in donor.map.by_path else donor.param(path)

    with torch.no_grad():
        torch.testing.assert_close(whole(Runner(model, weight), tokens), other(tokens).logits,
                                   atol=1e-4, rtol=0)


def test_replacements_may_be_nodes_and_change_between_calls(build, tokens):
    network = build("qwen3")
    model = Model.from_module(network, None)
    path, embedding = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"
    trees = {}
    runner = Runner(model, trees.get)
    with torch.no_grad():
        before = whole(runner, tokens)
        left, right = torch.randn(64, 2), torch.randn(2, 32)
        trees[path] = Product(Dense(left), Dense(right))
        trees[embedding] = Dense(model.weight(embedding) * 1.5)
        after = whole(runner, tokens)
        network.get_parameter(path).copy_(left @ right)
        network.get_parameter(embedding).mul_(1.5)
        torch.testing.assert_close(after, network(tokens).logits, atol=1e-4, rtol=1e-4)
        trees.clear()
        torch.testing.assert_close(whole(Runner(model, trees.get), tokens), after, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before, after)


def test_loaded_tensors_are_used_instead_of_the_models(build, tokens):
    network = build("llama")
    runner = Runner(Model.from_module(network, None))
    with torch.no_grad():
        hidden, context = runner.stem(tokens)
        own = runner.load(1)
        zero = {name: torch.zeros_like(value) for name, value in own.items()}
        torch.testing.assert_close(runner.block(1, hidden, context, tensors=zero), hidden)
        torch.testing.assert_close(runner.block(1, hidden, context, tensors=own),
                                   runner.block(1, hidden, context))


def test_gradients_are_those_of_transformers(case, build, tokens):
    network = build(case)
    model = Model.from_module(network, None)
    path = next(site.path for site in model.map.sites if site.block == 1 and site.role in ("up", "gate_up"))
    replaced = model.weight(path).clone().requires_grad_()
    outputs = []

    def observe(path, x, y):
        if y.requires_grad:  # behind the replaced weight
            y.retain_grad()
            outputs.append(y)

    runner = Runner(model, lambda name: replaced if name == path else None)
    whole(runner, tokens, observe=observe).square().mean().backward()
    network.requires_grad_(False)
    original = network.get_parameter(path).requires_grad_()
    network(tokens).logits.square().mean().backward()
    gradient = original.grad.T if model.map.by_path[path].transposed else original.grad
    torch.testing.assert_close(replaced.grad, gradient, atol=1e-5, rtol=1e-3)
    assert len(outputs) >= len(model.map.in_block(2)) and all(y.grad.abs().sum() > 0 for y in outputs)


def test_gradient_with_respect_to_the_hidden_state(build, tokens):
    runner = Runner(Model.from_module(build("gemma3"), None))
    with torch.no_grad():
        hidden, context = runner.stem(tokens)
    hidden.requires_grad_()
    runner.logits(runner.norm(runner.block(0, hidden, context))).sum().backward()
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all() and hidden.grad.abs().sum() > 0


def test_the_lookup_reads_only_the_rows_it_needs(build, folder, tokens, monkeypatch):
    model = open_model(folder("gemma3"))
    asked = []
    rows = model.source._rows
    model.verify()

    def watched(name, index):
        asked.append((name, index))
        return rows(name, index)

    monkeypatch.setattr(model.source, "_rows", watched)
    Runner(model).stem(tokens)
    name, index = asked[0]
    assert name == "model.embed_tokens.weight" and index.tolist() == sorted(set(tokens.flatten().tolist()))
    assert len([name for name, _ in asked if "embed" in name]) == 1


@pytest.mark.parametrize("bad", [96, -1])
def test_a_token_without_a_row_is_refused(bad, build, tokens):
    tokens[1, 2] = bad
    with pytest.raises(ModelError, match=rf"token {bad} has no row"):
        Runner(Model.from_module(build("llama"), None)).stem(tokens)


def test_sentences_of_different_lengths_may_follow_each_other(build):
    network = build("gemma3")
    runner = Runner(Model.from_module(network, None))
    with torch.no_grad():
        for length in (9, 3, 17):
            tokens = torch.arange(3, 3 + length)[None]
            torch.testing.assert_close(whole(runner, tokens), network(tokens).logits, atol=1e-4, rtol=0)


def test_a_gradient_is_pulled_through_the_head_as_autograd_does(case, build, tokens):
    runner = Runner(Model.from_module(build(case), None))
    normed = torch.randn(*tokens.shape, 32, requires_grad=True)
    logits = runner.logits(normed)
    gradient = torch.randn(logits.shape)
    (wanted,) = torch.autograd.grad(logits, normed, gradient)
    with torch.no_grad():
        torch.testing.assert_close(runner.pull_logits(gradient, logits), wanted, atol=1e-4, rtol=1e-4)
