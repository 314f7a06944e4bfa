"""Coupled axes: whatever is done to a group of channels, every family computes what it computed before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.core.axes import Change
from rarefy.core.errors import ModelError
from rarefy.models.axes import changes, couplings
from rarefy.models.model import Model, open_model
from rarefy.models.rewritten import Fill, RewrittenSource, original, rewritten, untied
from rarefy.models.runner import Runner
from rarefy.numerics.hadamard import hadamard_rotation, orthogonal_rotation

TURNED = ("llama", "llama3", "mistral", "qwen2", "qwen3", "phi3", "phi3long", "smollm3")


def whole(model: Model, tokens: Tensor) -> Tensor:
    runner = Runner(model)
    with torch.no_grad():
        hidden, context = runner.stem(tokens)
        for index in range(runner.blocks):
            hidden = runner.block(index, hidden, context)
        return runner.logits(runner.norm(hidden))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def scaled(model: Model) -> Model:
    """Every group that can be scaled, by random factors between 1/4 and 4."""
    generator = seeded()
    return rewritten(model, [each for coupling in couplings(model) if coupling.scales for each in
                             changes(model, coupling, Change(torch.rand(coupling.size, generator=generator)
                                                             .mul(4).sub(2).exp2()))])


def turned(model: Model, role: str, kind: object = hadamard_rotation) -> Model:
    generator = seeded()
    return rewritten(model, [each for coupling in couplings(model) if coupling.role == role for each in
                             changes(model, coupling, Change(rotation=kind(coupling.turns, generator)))])


def test_factors_keep_the_function_of_every_family(case, build, tokens) -> None:
    model = Model.from_module(build(case), None)
    view = scaled(model)
    torch.testing.assert_close(whole(view, tokens), whole(model, tokens), atol=1e-4, rtol=0)
    changed = {path for path in model.map.by_path
               if not torch.allclose(view.weight(path), model.weight(path), rtol=1e-3)}
    inside = {site.path for site in model.map.sites if site.block is not None}
    fixed = {site.path for site in model.map.sites if model.map.family.name == "gpt2" and site.role == "down"}
    assert inside - fixed <= changed  # every matrix of a block takes part, save what follows GPT-2's GELU


def test_rotated_heads_keep_the_function_of_every_family(case, build, tokens) -> None:
    model = Model.from_module(build(case), None)
    view = turned(model, "values")
    torch.testing.assert_close(whole(view, tokens), whole(model, tokens), atol=1e-4, rtol=0)
    (path,) = (site.path for site in model.map.in_block(0) if site.role == "o")
    assert not torch.allclose(view.weight(path), model.weight(path), rtol=1e-2)


@pytest.mark.parametrize("kind", [hadamard_rotation, orthogonal_rotation])
def test_a_rotated_stream_keeps_the_function_where_norms_allow(case, kind, build, tokens) -> None:
    model = Model.from_module(build(case), None)
    before = whole(model, tokens)
    if case not in TURNED:
        stream = couplings(model)[-1]
        assert stream.turns == 0 and stream.barrier
        with pytest.raises(ModelError, match="does not fit"):
            list(changes(model, stream, Change(rotation=kind(stream.size, seeded()))))
        return
    view = turned(untied(model), "residual", kind)
    torch.testing.assert_close(whole(view, tokens), before, atol=1e-4, rtol=0)
    for site in view.map.sites:
        same = torch.allclose(view.weight(site.path), untied(model).weight(site.path), rtol=1e-2)
        assert not same, site.path
    gains = [param.path for param in view.map.params if view.map.family.is_norm(param.path)
             and "q_norm" not in param.path and "k_norm" not in param.path]
    assert gains and all(bool((view.param(path) == 1).all()) for path in gains)


def test_views_of_views_add_up(build, tokens) -> None:
    model = Model.from_module(build("llama"), None)
    view = turned(scaled(turned(scaled(model), "residual")), "values")
    torch.testing.assert_close(whole(view, tokens), whole(model, tokens), atol=2e-4, rtol=0)
    assert isinstance(view.source, RewrittenSource) and original(view.source) is model.source


def test_a_gain_of_zero_is_folded_too(build, tokens) -> None:
    network = build("llama")
    with torch.no_grad():
        network.get_parameter("model.layers.1.input_layernorm.weight")[3] = 0.0
    model = Model.from_module(network, None)
    view = turned(model, "residual")
    torch.testing.assert_close(whole(view, tokens), whole(model, tokens), atol=1e-4, rtol=0)


def test_grouped_heads_share_the_factors_of_their_values(build) -> None:
    """8 channels a head, 2 heads of v, 4 heads of o: channel 11 is row 11 of v and columns 19 and 27 of o."""
    model = Model.from_module(build("llama"), None)
    (values,) = (each for each in couplings(model) if each.role == "values" and each.block == 0)
    factors = torch.ones(16)
    factors[11] = 4.0
    view = rewritten(model, changes(model, values, Change(factors)))
    v, o = "model.layers.0.self_attn.v_proj.weight", "model.layers.0.self_attn.o_proj.weight"
    assert (view.weight(v) / model.weight(v))[:, 0].nonzero().numel() == 16
    torch.testing.assert_close(view.weight(v)[11], model.weight(v)[11] / 4)
    ratio = (view.weight(o) / model.weight(o))[0]
    assert (ratio - 1).abs().gt(0.5).nonzero()[:, 0].tolist() == [19, 27]


def test_rows_are_read_as_the_whole_is(case, build) -> None:
    model = scaled(Model.from_module(build(case), None))
    model = turned(model, "values")
    index = torch.tensor([0, 5, 3])
    for site in model.map.sites:
        torch.testing.assert_close(model.rows(site.path, index), model.weight(site.path)[index])
        torch.testing.assert_close(model.rows(site.path, slice(2, 7)), model.weight(site.path)[2:7])


def test_a_view_is_a_model(folder, tokens) -> None:
    """Files, names and dtypes are those of the original; nothing is written into what was read."""
    model = open_model(folder("llama"))
    before = {path: model.weight(path).clone() for path in model.map.by_path}
    view = scaled(model)
    view.verify()
    whole(view, tokens)
    assert view.source.files() == model.source.files() and view.source.names() == model.source.names()
    assert view.source.dtype("model.norm.weight") == "float32"
    assert all(torch.equal(model.weight(path), values) for path, values in before.items())
    assert all(view.source.shape(name) == model.source.shape(name) for name in model.source.names())


def test_a_head_of_its_own(build, tokens) -> None:
    model = Model.from_module(build("qwen3"), None)
    view = untied(model)
    assert model.map.tied and not view.map.tied and view.map.head.path == "lm_head.weight"
    assert torch.equal(view.weight("lm_head.weight"), model.weight("model.embed_tokens.weight"))
    assert torch.equal(whole(view, tokens), whole(model, tokens))
    assert model.config.tie_word_embeddings and untied(view) is view


def test_mistakes_are_named(build) -> None:
    model = Model.from_module(build("llama"), None)
    found = couplings(model)
    with pytest.raises(ModelError, match=r"did you mean 'model\.norm\.weight'"):
        rewritten(model, [("model.norms.weight", Fill(1.0))])
    with pytest.raises(ModelError, match="model: channels of this group cannot have factors"):
        list(changes(model, found[-1], Change(torch.ones(32))))
    norm = next(each for each in found if each.role == "norm")
    with pytest.raises(ModelError, match=r"layers\.0\.input_layernorm: a rotation of 32 channels does"):
        list(changes(model, norm, Change(rotation=hadamard_rotation(32, seeded()))))
