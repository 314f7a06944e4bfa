"""Evidence for networks: grams, gradients, and damage that is foreseen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.calibration.examples import Examples, read_examples
from rarefy.calibration.observe import direction, inputs, survey, unfolded
from rarefy.core.nouns import Evidence
from rarefy.models.form import MASK, Form
from rarefy.models.network import TENSOR, Network
from rarefy.models.opening import open_any
from tiny_networks import Digits


def surveyed(network: Network, examples: Examples, seed: int = 0) -> dict[str, Evidence]:
    generator = torch.Generator().manual_seed(seed)
    return {seen.site.path: seen.evidence for seen in survey(network, examples, generator)}


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path) -> tuple[Network, Examples]:
    network = open_any(tiny_encoder)
    assert isinstance(network, Network)
    return network, read_examples(network, str(tiny_encoder / "train.tsv"), count=160)


@pytest.fixture(scope="module")
def cnn(tiny_cnn: Digits) -> tuple[Network, Examples]:
    return Network.from_module(tiny_cnn.module), Examples({TENSOR: tiny_cnn.train[0][:200]})


# ---- grams ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "x"), [
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2), (3, 4, 9, 8)),
    (nn.Conv2d(4, 4, 3, padding="same", groups=4), (2, 4, 5, 5)),
    (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 6, 6)),
    (nn.Conv2d(3, 5, 1), (2, 3, 4, 4)), (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 11)),
])
def test_patches_times_weights_are_the_convolution(module: nn.Conv1d | nn.Conv2d, x: tuple[int, ...]) -> None:
    """The matrix of a site times what its gram is made of is what the module computes."""
    values = torch.randn(x, generator=torch.Generator().manual_seed(0))
    patches = unfolded(module, values)
    weight = module.weight.detach().flatten(1).view(module.groups, -1, patches.shape[2])
    y = torch.einsum("pgk,gok->pgo", patches, weight).flatten(1) + module.bias.detach()
    expected = module(values).detach().movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_grams_are_sums_over_positions_averaged_over_groups(cnn: tuple[Network, Examples]) -> None:
    network, examples = cnn
    found = inputs(network, examples, list(network.map.by_path), {})
    module = network.module
    with torch.no_grad():
        x = module.conv(module.stem(examples.inputs[TENSOR]))  # what the depthwise convolution sees
    patches = F.unfold(x, 3, padding=1).view(len(x), 32, 9, -1)
    expected = torch.einsum("ngkp,nglp->kl", patches.double(), patches.double()) / 32
    torch.testing.assert_close(found["depthwise.weight"].gram.double(), expected, rtol=1e-4, atol=1e-2)
    assert found["depthwise.weight"].tokens == len(x) * 16
    assert found["fc.weight"].tokens == len(x)


def test_weights_in_front_change_what_arrives(cnn: tuple[Network, Examples]) -> None:
    network, examples = cnn
    zero = network.tensors({"conv.0.weight": torch.zeros(32, 144)}.get)
    found = inputs(network, examples, ["depthwise.weight", "conv.0.weight"], zero)
    plain = inputs(network, examples, ["depthwise.weight", "conv.0.weight"], {})
    assert torch.equal(found["conv.0.weight"].gram, plain["conv.0.weight"].gram)
    assert not torch.allclose(found["depthwise.weight"].gram, plain["depthwise.weight"].gram)


def test_padding_is_no_evidence(encoder: tuple[Network, Examples]) -> None:
    network, examples = encoder
    some = examples.select(torch.arange(20))
    wide = Examples({name: F.pad(values, (0, 7), value=2 if name == "input_ids" else 0)
                     for name, values in some.inputs.items()})
    paths = [site.path for site in network.map.sites if site.block is not None]
    short, padded = (inputs(network, each, paths, {}) for each in (some, wide))
    for path in paths:
        assert short[path].tokens == int(some.inputs[MASK].sum())
        torch.testing.assert_close(short[path].gram, padded[path].gram, rtol=1e-4, atol=1e-3)


def test_grams_in_several_passes_are_the_same(cnn: tuple[Network, Examples],
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    network, examples = cnn
    once = inputs(network, examples, list(network.map.by_path), {})
    monkeypatch.setattr("rarefy.calibration.observe.GRAMS", 1)
    apart = inputs(network, examples, list(network.map.by_path), {})
    assert all(torch.equal(once[path].gram, apart[path].gram) for path in once)


# ---- gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gives", ["classes", "embedding"])
def test_directions_have_the_hessian_of_the_divergence_as_covariance(gives: str) -> None:
    z = torch.tensor([[0.3, -1.0, 2.0, 0.1]])
    form = Form(gives=gives)

    def divergence(other: Tensor) -> Tensor:
        if gives == "classes":
            p, q = z.log_softmax(-1), other.log_softmax(-1)
            return (p.exp() * (p - q)).sum()
        return 1 - F.cosine_similarity(z, other).sum()

    hessian = torch.autograd.functional.hessian(divergence, z)[0, :, 0]
    v = direction(z.expand(200_000, -1), form, torch.Generator().manual_seed(0))
    torch.testing.assert_close(v.T @ v / len(v), hessian, rtol=0.02, atol=2e-3)


def measured(network: Network, examples: Examples, path: str, delta: Tensor) -> float:
    """What a change of one weight really does to the answers."""
    changed = network.tensors({path: network.weight(path) + delta}.get)
    total = 0.0
    with torch.no_grad():
        for batch in examples.batches(64):
            before, after = network.run(batch), network.run(batch, changed)
            if network.form.gives == "classes":
                p, q = before.log_softmax(-1), after.log_softmax(-1)
                total += float((p.exp() * (p - q)).sum())
            else:
                total += float((1 - F.cosine_similarity(before, after)).sum())
    return total / len(examples)


def check(network: Network, examples: Examples, factor: float) -> None:
    found = surveyed(network, examples)
    assert set(found) == set(network.map.by_path)
    generator = torch.Generator().manual_seed(3)
    ratios = {}
    for path, evidence in found.items():
        weight = network.weight(path)
        deltas = 0.03 * weight.std() * torch.randn(6, *weight.shape, generator=generator)
        ratios[path] = (sum(evidence.damage(delta) for delta in deltas)
                        / sum(measured(network, examples, path, delta) for delta in deltas))
    assert all(1 / factor < ratio < factor for ratio in ratios.values()), ratios


def test_damage_of_a_cnn_is_foreseen(cnn: tuple[Network, Examples]) -> None:
    check(*cnn, factor=4)


def test_damage_of_a_classifier_of_text_is_foreseen(encoder: tuple[Network, Examples]) -> None:
    check(*encoder, factor=5)


def test_damage_of_an_embedding_is_foreseen(tiny_cnn: Digits) -> None:
    module = nn.Sequential(*list(tiny_cnn.module.stem), nn.Conv2d(16, 8, 3, stride=2), nn.Flatten())
    network = Network.from_module(module, form=Form(gives="embedding"))
    check(network, Examples({TENSOR: tiny_cnn.train[0][:128]}), factor=4)


def test_what_reaches_no_answer_is_not_reported() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.called, self.never = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.called(x)
            return self.used(x)

    found = surveyed(Network.from_module(Idle()), Examples({TENSOR: torch.randn(8, 4)}))
    assert set(found) == {"used.weight"}


def test_a_module_that_is_called_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(torch.relu_(self.inner(x))))

    network, x = Network.from_module(Twice()), torch.randn(8, 4)
    found = surveyed(network, Examples({TENSOR: x}))
    assert found["inner.weight"].tokens == 16
    with torch.no_grad():
        second = torch.relu(network.module.inner(x))
    plain = inputs(network, Examples({TENSOR: x}), ["inner.weight"], {})["inner.weight"]
    torch.testing.assert_close(plain.gram, x.T @ x + second.T @ second)


def test_same_seed_same_bits(cnn: tuple[Network, Examples]) -> None:
    one, other = (surveyed(*cnn, seed=5) for _ in range(2))
    assert all(torch.equal(one[path].gram, other[path].gram) for path in one)
    assert all(torch.equal(one[path].fisher, other[path].fisher) for path in one)
