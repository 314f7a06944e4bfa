"""SliceGPT with one rotation: exact where the stream has room to spare, and close where it has little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rarefy.core.errors import EditError, ModelError, RecipeError
from rarefy.core.nouns import Recipe, Step
from rarefy.core.structure import Residual
from rarefy.export.gguf import export_gguf
from rarefy.measure.divergence import Reference
from rarefy.models.axes import couplings
from rarefy.models.model import Model, open_model
from rarefy.models.runner import Runner
from rarefy.models.sliced import sliced, without_gains
from rarefy.run.reshape import _moment, reshaped
from rarefy.runtimes.llamacpp import Session
from rarefy.techniques.prune.slice import Slice


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(3, 512, (6, 48), generator=torch.Generator().manual_seed(3))


def logits(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    runner = Runner(model)
    hidden, context = runner.stem(tokens)
    for block in range(runner.blocks):
        hidden = runner.block(block, hidden, context)
    return runner.logits(runner.norm(hidden))


def test_basis_is_that_of_a_singular_value_decomposition() -> None:
    X = torch.randn(8, 60, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 3, 8)[:, None]
    Q = Slice(ratio=0.5, multiple=1).basis(Residual("s", X @ X.T / 60))
    U = torch.linalg.svd(X, full_matrices=False).U[:, :4]
    torch.testing.assert_close(Q @ Q.T, U @ U.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(Q.T @ Q, torch.eye(4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3", "smollm3"])
def test_a_stream_with_room_to_spare_is_sliced_without_a_trace(family: str, tiny_random: Any,
                                                               tokens: torch.Tensor) -> None:
    """All that is written lies in 40 of 64 directions, though in no 40 channels."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(tiny_random(family))
    basis = torch.linalg.qr(torch.randn(64, 40, generator=torch.Generator().manual_seed(1))).Q
    plain = Model.from_module(network, None)
    stream = next(each for each in couplings(plain) if each.role == "residual")
    for member in stream.writers:
        values = network.get_parameter(member.path).data
        values.copy_(values @ basis @ basis.T if member.axis == 1 else basis @ (basis.T @ values))
    model = Model.from_module(network, None)
    step = Step("slice", settings={"ratio": 0.375, "multiple": 8})
    done = reshaped(model, Recipe("", (step,)), tokens)
    assert done.model.config.hidden_size == 40
    assert done.receipts[0].error == pytest.approx(0, abs=1e-4)
    after, before = logits(done.model, tokens[:2]), logits(model, tokens[:2])
    torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-2)


def test_principal_directions_beat_channels(tiny_llama_wide: Path, tokens: torch.Tensor) -> None:
    model = open_model(tiny_llama_wide)
    reference = Reference(model, tokens)
    plain = without_gains(model)
    assert reference.compare(Runner(plain)).kl_mean < 1e-6
    moment = _moment(plain, tokens, lambda done, total: None)
    assert float(moment.trace()) == pytest.approx(256, rel=1e-3)
    loudest = torch.eye(256)[:, moment.diagonal().argsort(descending=True)[:192]]
    ours, channels = (reference.compare(Runner(sliced(plain, basis, moment))).kl_mean for basis in
                      (Slice(ratio=0.25).basis(Residual("s", moment)), loudest))
    assert ours < channels / 2


def test_llama_cpp_runs_the_narrower_model(tiny_llama: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = open_model(tiny_llama)
    narrow = reshaped(model, Recipe("", (Step("slice", settings={"ratio": 0.25}),)), tokens).model
    path = tmp_path / "model.gguf"
    export_gguf(narrow, {}, {site.path: "F32" for site in narrow.map.sites}, path)
    wanted = logits(narrow, tokens[:1]).log_softmax(-1)
    with Session(path, threads=1) as session:
        found = torch.tensor(next(iter(session.distributions(tokens[:1].numpy()))))
    torch.testing.assert_close(found, wanted[0], rtol=1e-2, atol=1e-2)
    again = open_model(path)
    twice = reshaped(again, Recipe("", (Step("slice", settings={"ratio": 0.4}),)), tokens).model
    export_gguf(twice, {}, {site.path: "F32" for site in twice.map.sites}, tmp_path / "again.gguf")
    assert open_model(tmp_path / "again.gguf").config.hidden_size == 64


def test_what_cannot_be_sliced(tiny_random: Any, tokens: torch.Tensor) -> None:
    for family, reason in (("gemma3", "norms behind attention"), ("gpt2", "subtract the mean")):
        with pytest.raises(ModelError, match=reason):
            without_gains(open_model(tiny_random(family)))
    with pytest.raises(EditError, match="leaves none to take out in steps of 64"):
        Slice(ratio=0.1, multiple=64).basis(Residual("s", torch.eye(64)))
    with pytest.raises(RecipeError, match="below 1"):
        Slice(ratio=1.0)
