"""Students of another shape: where they begin, that they learn, that folders keep them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rarefy.calibration.examples import read_examples
from rarefy.core.errors import ModelError, RecipeError
from rarefy.models.network import Network
from rarefy.models.opening import open_any
from rarefy.techniques.distill.soft_labels import SoftLabels
from rarefy.training.architectures import bottleneck, in_two, separable
from rarefy.training.examples import Rows
from rarefy.training.loop import Settings
from rarefy.training.signals import Distillation
from rarefy.training.tune import Tuning, tune
from small_networks import residual


@pytest.fixture(scope="module")
def teacher(tiny_encoder: Path) -> Network:
    found = open_any(tiny_encoder)
    assert isinstance(found, Network)
    return found


def test_a_bottleneck_begins_with_the_teachers_words(teacher: Network) -> None:
    student = bottleneck(teacher, inner=32, feedforwards=2, embedding=64)
    inside: Any = student.module
    embeddings = inside.mobilebert.embeddings
    table = embeddings.word_embeddings.weight @ embeddings.embedding_transformation.weight[:, 64:128].T
    torch.testing.assert_close(table, teacher.weight("bert.embeddings.word_embeddings.weight"),
                               rtol=1e-3, atol=1e-4)
    assert student.form.gives == "classes" and student.form.labels == teacher.form.labels
    narrow = bottleneck(teacher, inner=32, embedding=16, blocks=1)
    assert narrow.parameters < student.parameters and narrow.map.blocks == 1
    assert bottleneck(teacher, inner=128).map.by_path  # inverted: wider than the states


def test_a_bottleneck_learns_and_is_kept(teacher: Network, tiny_encoder: Path, tmp_path: Path) -> None:
    student = bottleneck(teacher, inner=32, feedforwards=2, embedding=32, blocks=1)
    train, dev = (read_examples(teacher, str(tiny_encoder / f"{name}.tsv")) for name in ("train", "dev"))
    tuned = tune(student, {}, Tuning(), Distillation(student, teacher, ((1.0, SoftLabels()),)),
                 Rows(train.inputs), Settings(steps=150, rate=5e-3, precision="float32"))
    module: Any = student.module
    trained = {path: tree.dense() for path, tree in tuned.trees.items()}
    state = {**module.state_dict(), **tuned.params, **trained}
    module.save_pretrained(tmp_path, state_dict=state)
    student.tokenizer.save_pretrained(tmp_path)
    again = open_any(tmp_path)
    assert isinstance(again, Network)
    batch = next(dev.batches(len(dev)))
    same = (again.run(batch).argmax(1) == teacher.run(batch).argmax(1)).float().mean()
    assert same > 0.8


def test_bottlenecks_that_cannot_be(teacher: Network) -> None:
    with pytest.raises(RecipeError, match="multiple of the 4 heads"):
        bottleneck(teacher, inner=30)
    with pytest.raises(ModelError, match="encoders of text"):
        bottleneck(Network.from_module(residual()))


@pytest.mark.parametrize("settings", [{"padding": 1}, {"stride": 2, "bias": False}, {"dilation": 2}])
def test_all_filters_are_the_convolution(settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, **settings)
    images = torch.randn(2, 4, 12, 12, generator=generator)
    torch.testing.assert_close(in_two(conv, 6)(images), conv(images), rtol=1e-4, atol=1e-5)


def test_fewer_filters_are_the_nearest() -> None:
    """For each input channel the best matrix of that rank, by a literal SVD."""
    conv = nn.Conv2d(3, 5, 3)
    depthwise, pointwise = in_two(conv, 2)
    for channel in range(3):
        whole = conv.weight[:, channel].flatten(1)
        left, values, right = torch.linalg.svd(whole, full_matrices=False)
        best = (left[:, :2] * values[:2]) @ right[:2]
        made = pointwise.weight[:, 2 * channel:2 * channel + 2, 0, 0] @ depthwise.weight[
            2 * channel:2 * channel + 2, 0].flatten(1)
        torch.testing.assert_close(made, best, rtol=1e-4, atol=1e-5)


def test_separable_networks() -> None:
    network = Network.from_module(residual())
    done = separable(network)
    assert done.parameters < network.parameters
    parts = [name for name, part in done.module.named_modules() if isinstance(part, nn.Sequential)]
    assert parts == ["one", "two"]  # the stem has one channel, the depthwise one mixes none
    images = {"0": torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(0))}
    exact = separable(network, multiplier=9).run(images)
    torch.testing.assert_close(exact, network.run(images), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(done.run(images), exact, atol=1e-2)
    some = separable(network, where=("two",))
    assert some.parameters > done.parameters
    with pytest.raises(RecipeError, match="matches no convolution"):
        separable(network, where=("three",))
    with pytest.raises(RecipeError, match="1 or more"):
        separable(network, multiplier=0)
