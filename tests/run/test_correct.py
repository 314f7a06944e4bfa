"""Means put right: what comes out where a bias was moved, what is left alone, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
from rarefy.calibration.examples import Examples, read_examples
from rarefy.core.errors import RecipeError
from rarefy.core.nodes import Dense, Node
from rarefy.core.nouns import Recipe, Step
from rarefy.measure.task import Judge
from rarefy.models.form import MASK
from rarefy.models.network import Network
from rarefy.models.opening import open_any
from rarefy.numerics.grids import integer_grid
from rarefy.run.correct import biased, corrected
from rarefy.run.job import Job, compress
from rarefy.run.progress import Silent
from rarefy.techniques.quantize.bias_correction import BiasCorrection
from small_networks import rounded
from tiny_networks import Digits


def coarse(network: Network, bits: int = 3) -> dict[str, Node]:
    grid = integer_grid(bits, 0)
    return {site.path: rounded(network.weight(site.path), grid) for site in network.map.sites}


@torch.no_grad()
def mean_of(network: Network, layer: str, examples: Examples, tensors: dict[str, Tensor]) -> Tensor:
    """The literal mean over every real token, sentence by sentence."""
    rows: list[Tensor] = []
    hook = network.module.get_submodule(layer).register_forward_hook(lambda m, i, out: rows.append(out))
    kept = []
    for place in range(len(examples)):
        batch = examples.select(torch.tensor([place]))
        network.run(batch.inputs, tensors)
        out = rows.pop()
        mask = batch.inputs.get(MASK)
        kept.append(out.movedim(1, -1).flatten(0, -2) if mask is None else out[mask.bool()]
                    if out.ndim == 3 else out)
    hook.remove()
    return torch.cat(kept).mean(0)


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path) -> tuple[Network, Examples]:
    network = open_any(str(tiny_encoder))
    assert isinstance(network, Network)
    return network, read_examples(network, str(tiny_encoder / "train.tsv"), count=64, seed=0)


def test_every_mean_is_the_originals(encoder: tuple[Network, Examples]) -> None:
    network, examples = encoder
    trees = coarse(network)
    found = corrected(network, network, trees, BiasCorrection(), examples, "bias_correction")
    norms = [path for path in biased(network) if path.endswith("LayerNorm.bias")]
    assert list(found.params) == [*norms, "bert.pooler.dense.bias", "classifier.bias"] and len(norms) == 5
    tensors = network.tensors(trees.get)
    for path in found.params:
        layer = path.removesuffix(".bias")
        wanted, before = mean_of(network, layer, examples, {}), mean_of(network, layer, examples, tensors)
        after = mean_of(network, layer, examples, {**tensors, **found.params})
        assert torch.allclose(after, wanted, atol=1e-4), layer
        assert float((before - wanted).norm()) > 20 * float((after - wanted).norm()), layer


def test_answers_come_nearer_on_samples_that_it_did_not_see(encoder: tuple[Network, Examples],
                                                            tiny_encoder: Path) -> None:
    network, examples = encoder
    others = read_examples(network, str(tiny_encoder / "dev.tsv"))
    trees = coarse(network)
    found = corrected(network, network, trees, BiasCorrection(), examples, "bias_correction")
    judge, moved = Judge(network, others), dict[str, float]()
    for name, more in (("before", {}), ("after", found.params)):
        module = network.module.__class__(network.config).eval()
        module.load_state_dict({**network.module.state_dict(), **network.tensors(trees.get), **more})
        moved[name] = judge.compare(Network.from_module(module, form=network.form)).mean
    assert moved["after"] < moved["before"]


def test_one_bias_is_the_equation(encoder: tuple[Network, Examples]) -> None:
    network, examples = encoder
    trees = coarse(network)
    whole = corrected(network, network, trees, BiasCorrection(), examples, "b").params
    part = corrected(network, network, trees, BiasCorrection(share=0.5), examples, "b").params
    first = next(iter(whole))
    layer, bias = first.removesuffix(".bias"), network.param(first)
    wanted = mean_of(network, layer, examples, {})
    apart = wanted - mean_of(network, layer, examples, network.tensors(trees.get))
    assert torch.allclose(whole[first], bias + apart, atol=1e-5)
    assert torch.allclose(part[first], bias + 0.5 * apart, atol=1e-5)


def test_images_and_batch_norms(tiny_cnn: Digits) -> None:
    network, examples = Network.from_module(tiny_cnn.module), Examples({"0": tiny_cnn.train[0][:64]})
    trees = coarse(network)
    found = corrected(network, network, trees, BiasCorrection(), examples, "bias_correction")
    behind = ["depthwise.bias", "pointwise.bias", "fc.bias"]  # behind the last normalization
    assert list(found.params) == ["stem.1.bias", "conv.1.bias", *behind]
    tensors = {**network.tensors(trees.get), **found.params}
    for path in found.params:
        layer = path.removesuffix(".bias")
        wanted = mean_of(network, layer, examples, {})
        assert torch.allclose(mean_of(network, layer, examples, tensors), wanted, atol=1e-4)


def test_layers_where_there_are_no_norms() -> None:
    torch.manual_seed(0)
    network = Network.from_module(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    assert set(biased(network)) == {"0.bias", "2.bias"}
    examples = Examples({"0": torch.rand(64, 8)})
    found = corrected(network, network, coarse(network), BiasCorrection(), examples, "bias_correction")
    assert set(found.params) == {"0.bias", "2.bias"} and len(found.receipts) == 2


def test_what_does_no_good_is_left_out(encoder: tuple[Network, Examples]) -> None:
    network, examples = encoder
    same = {site.path: Dense(network.weight(site.path)) for site in network.map.sites}
    found = corrected(network, network, same, BiasCorrection(), examples, "bias_correction")
    assert not found.params and not found.receipts


def test_refuses_networks_without_biases() -> None:
    network = Network.from_module(nn.Sequential(nn.Linear(4, 4, bias=False)))
    examples = Examples({"0": torch.rand(8, 4)})
    with pytest.raises(RecipeError, match="no bias that the original has"):
        corrected(network, network, {}, BiasCorrection(), examples, "bias_correction")
    with pytest.raises(RecipeError, match=r"share=0.0 must be above 0"):
        BiasCorrection(share=0.0)


def test_a_plan_ends_with_it_and_says_so(tiny_cnn: Digits, tmp_path: Path) -> None:
    data: dict[str, Any] = {"data": tiny_cnn.train, "eval_data": tiny_cnn.test, "effort": "quick"}
    result = rarefy.compress(tiny_cnn.module, "30%", out=tmp_path / "out", **data)
    rows = [row for row in result.receipt["axes"] if row["technique"] == "bias_correction"]
    assert rows and "its mean was" in rows[0]["note"]
    written = (tmp_path / "out" / "recipe.yaml").read_text()
    assert written.count("technique: bias_correction") == 1


def recipe(*steps: Step, **rest: Any) -> Recipe:
    return Recipe("tiny", steps, target="torch", effort="quick", **rest)


def test_where_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    steps = (Step("rtn", format="int4"), Step("bias_correction", ("*.query.weight",)))
    job = Job(str(tiny_encoder), tmp_path / "out", target="torch", effort="quick",
              data=(str(tiny_encoder / "train.tsv"),), recipe=recipe(*steps))
    with pytest.raises(RecipeError, match="corrects all biases, one behind the other"):
        compress(job, Silent())


def test_language_models_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    steps = (Step("rtn", format="int8"), Step("bias_correction"))
    job = Job(str(tiny_llama), tmp_path / "out", target="torch", effort="quick", recipe=recipe(*steps))
    with pytest.raises(RecipeError, match="language models are not corrected"):
        compress(job, Silent())
