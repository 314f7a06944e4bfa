"""Axes of networks that are no language models: found, tried, and changed without changing the answer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from rarefy.core.axes import Change
from rarefy.core.errors import ModelError
from rarefy.models.axes import Coupling, alterations
from rarefy.models.encoder_axes import network_couplings
from rarefy.models.form import Form
from rarefy.models.network import Network
from rarefy.models.rewritten import rewritten_network
from rarefy.numerics.hadamard import hadamard_rotation
from small_networks import bert, tokens

PICTURES = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def vit() -> ViTModel:
    """Norms stand in front of the linears here."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                           image_size=16, patch_size=8)
        network = ViTModel(config, add_pooling_layer=False)
        for values in network.parameters():
            values.data.add_(torch.randn(values.shape) * 0.1)
    return network.eval()


def of(module: nn.Module, pooling: str) -> Network:
    return Network.from_module(module, form=Form("tensors", "embedding", pooling))


CASES = {"bert": (of(bert(), "mean"), tokens(3, 12)), "vit": (of(vit(), "cls"), PICTURES)}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, Network, dict[str, Tensor]]:
    return (request.param, *CASES[request.param])


def factors(coupling: Coupling) -> Change:
    return Change(torch.rand(coupling.size, generator=torch.Generator().manual_seed(1)).mul(4).sub(2).exp2())


def test_groups_and_why_some_cannot_be_scaled(case: tuple[str, Network, dict[str, Tensor]]) -> None:
    """Every block's values can; norms can where nothing but linears reads them."""
    name, network, inputs = case
    found = network_couplings(network, inputs)
    values = [each for each in found if each.role == "values"]
    assert len(values) == 2 and all(each.scales and each.turns == 8 for each in values)
    norms = [each for each in found if each.role == "norm"]
    assert len(norms) == 4 and all(each.scales == (name == "vit") for each in norms)
    if name == "bert":
        assert all("residual connection" in each.barrier for each in norms)
    assert sorted(len(each.readers) for each in norms) == [1, 1, 3, 3]
    stream = found[-1]
    assert stream.role == "residual" and not stream.turns and "causal language models" in stream.barrier


def test_what_may_change_does_not_change_the_answer(case: tuple[str, Network, dict[str, Tensor]]) -> None:
    _, network, inputs = case
    done = []
    for coupling in network_couplings(network, inputs):
        if coupling.scales:
            done += list(alterations(coupling, factors(coupling)))
        if coupling.turns:
            turn = hadamard_rotation(coupling.turns, torch.Generator().manual_seed(0))
            done += list(alterations(coupling, Change(rotation=turn)))
    view = rewritten_network(network, done)
    torch.testing.assert_close(view.run(inputs), network.run(inputs), atol=1e-4, rtol=1e-4)
    changed = {path for path, _ in done}
    assert changed and not any(torch.allclose(view.source.read(path), network.source.read(path), rtol=1e-3)
                               for path in changed if not path.endswith("bias"))
    assert torch.equal(view.module.state_dict()[min(changed)], view.source.read(min(changed)))


def test_what_may_not_is_refused() -> None:
    network, inputs = CASES["bert"]
    norm = next(each for each in network_couplings(network, inputs) if each.role == "norm")
    with pytest.raises(ModelError, match=r"cannot have factors of their own \(what it gives is read by more"):
        list(alterations(norm, factors(norm)))


def test_a_network_without_a_configuration() -> None:
    """One's own block with a norm in front: found by who reads what, not by names."""
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ahead, self.one, self.two = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.two(torch.relu(self.one(self.ahead(x))))

    network = Network.from_module(Own(), form=Form("tensors", "embedding"))
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    norm, stream = network_couplings(network, {"0": x})
    assert norm.scales and [member.path for member in norm.writers] == ["ahead.weight", "ahead.bias"]
    assert [member.path for member in norm.readers] == ["one.weight"] and stream.role == "residual"
