"""``tune``: what was chosen moves, the rest stands still, and the original is left as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import encoder, texts
from torch import Tensor

from rarefy.core.codebooks import Clustered
from rarefy.core.edit import Leaf
from rarefy.core.errors import RecipeError
from rarefy.core.nodes import Dense, Masked, Node, Product, Quantized, Sum
from rarefy.core.tune import soften
from rarefy.models.hooks import hooked
from rarefy.models.model import Model, open_model
from rarefy.models.network import Network
from rarefy.numerics.grids import integer_grid
from rarefy.numerics.rounding import encode, fit
from rarefy.techniques.distill.forward_kl import ForwardKL
from rarefy.techniques.distill.hard_labels import HardLabels
from rarefy.training.examples import Rows
from rarefy.training.loop import Settings, held_out
from rarefy.training.signals import Distillation
from rarefy.training.student import Learning, Student
from rarefy.training.tune import Tuning, student_of, tune

SETTINGS = Settings(steps=12, batch=16, rate=3e-3, precision="float32")
SITE = "bert.encoder.layer.1.intermediate.dense.weight"


def tree(kind: str, weight: Tensor) -> Node:
    generator = torch.Generator().manual_seed(0)
    found = fit(weight, torch.ones(weight.shape[1]), integer_grid(3, 16))
    rounded = Quantized.of(encode(weight, found), found)
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    product = Product(Dense(U[:, :4] * S[:4]), Dense(V[:4].contiguous()))
    match kind:
        case "masked":
            return Masked(weight.abs() > weight.abs().median(), Dense(weight))
        case "quantized":
            return rounded
        case "product":
            return product
        case "clustered":
            book = weight.flatten()[torch.randperm(weight.numel(), generator=generator)[:8]].sort().values
            index = (weight[..., None] - book).abs().argmin(-1).to(torch.uint8)
            return Clustered(book.view(1, -1, 1), index)
        case _:
            return Sum((rounded, product))


def recover(network: Network, trees: dict[str, Node], moves: str, **more: Any) -> Any:
    objective = Distillation(network, network, ((1.0, ForwardKL()),))
    return tune(network, trees, Tuning(frozenset(moves.split())), objective, texts(), SETTINGS,
                held=texts(48, 1), **more)


@pytest.mark.parametrize(("kind", "moves"), [
    ("masked", "weights"), ("masked", "norms biases"), ("quantized", "scales"), ("product", "factors"),
    ("clustered", "codebooks"), ("sum", "adapters"), ("masked", "everything")])
def test_recovery_moves_what_was_chosen(kind: str, moves: str) -> None:
    network = encoder()
    before = {name: value.clone() for name, value in network.module.state_dict().items()}
    trees = {site.path: tree(kind, network.weight(site.path)) for site in network.map.sites
             if "layer" in site.path}
    tuned = recover(network, trees, moves)
    gates = [point.gate for point in tuned.curve.points if point.gate is not None]
    assert tuned.curve.best < gates[0] * 0.98
    assert all(torch.equal(value, before[name]) for name, value in network.module.state_dict().items())
    assert all(values.grad is None and not values.requires_grad for values in network.module.parameters())
    start, after = trees[SITE], tuned.trees[SITE]
    assert type(after) is type(start) and after.bits() == start.bits()
    if moves == "norms biases":
        assert torch.equal(after.dense(), start.dense())
        assert any(name.endswith("bias") for name in tuned.params) and tuned.params.keys().isdisjoint(trees)
    else:
        assert not torch.equal(after.dense(), start.dense())
    match start, after:
        case Masked(keep=keep), Masked(keep=kept):
            assert torch.equal(keep, kept) and not bool(after.dense()[~keep].any())
        case Quantized(codes=codes), Quantized(codes=same):
            assert torch.equal(codes, same)
        case Sum(terms=(base, _)), Sum(terms=(same_base, _)):
            assert torch.equal(base.dense(), same_base.dense())


def test_what_tune_gives_back_is_what_was_judged() -> None:
    """The trees and params, put into the network, have the loss that the gate saw."""
    network, held = encoder(), texts(48, 1)
    trees: dict[str, Node] = {SITE: tree("masked", network.weight(SITE))}
    tuned = recover(network, trees, "everything")
    tensors = network.tensors(lambda path: tuned.trees.get(path)) | tuned.params
    inputs = {name: value for name, value in held.tensors.items() if name != "labels"}
    with torch.no_grad():
        p, q = (network.run(inputs, each).log_softmax(-1) for each in ({}, tensors))
    assert float((p.exp() * (p - q)).sum(1).mean()) == pytest.approx(tuned.curve.best, rel=1e-3)


def test_a_language_model_recovers(tiny_llama: Path) -> None:
    model = open_model(tiny_llama)
    tokens = torch.randint(3, 500, (24, 16), generator=torch.Generator().manual_seed(0))
    trees: dict[str, Node] = {}
    for site in model.map.sites:
        if site.block is not None:
            weight = model.weight(site.path)
            trees[site.path] = Masked(weight.abs() > weight.abs().median(), Dense(weight.clone()))
    objective = Distillation(model, model, ((1.0, ForwardKL()),))
    settings = Settings(steps=12, batch=8, rate=1e-3, precision="float32", checkpointing=True, gate_every=4)
    tuned = tune(model, trees, Tuning(frozenset({"weights"}), where=("*.layers.*",)), objective,
                 Rows({"input_ids": tokens}), settings, held=Rows({"input_ids": tokens}))
    gates = [point.gate for point in tuned.curve.points if point.gate is not None]
    assert tuned.curve.points[0].loss > gates[0] > gates[-1]


@pytest.mark.parametrize("kind", ["encoder", "llama"])
def test_checkpointed_blocks_have_the_same_gradients(kind: str, tiny_llama: Path) -> None:
    if kind == "encoder":
        network: Network | Model = encoder()
        batch, term = texts(8).batch(torch.arange(8)), HardLabels()
    else:
        network = open_model(tiny_llama)
        tokens = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(0))
        batch, term = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}, HardLabels()
    gradients = []
    for again in (False, True):
        settings = Settings(checkpointing=again)
        student = student_of(network, {}, Tuning(), settings).train()
        Distillation(network, None, ((1.0, term),))(student, batch).sum().backward()
        gradients.append({name: value.grad for name, value in student.named_parameters()
                          if value.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


def test_batch_statistics_are_the_students_own(convolutional: Network) -> None:
    before = convolutional.module[1].running_mean.clone()  # type: ignore[index,union-attr]
    generator = torch.Generator().manual_seed(0)
    data = Rows({"0": torch.randn(64, 1, 6, 6, generator=generator) + 2, "labels": torch.arange(64) % 4})
    objective = Distillation(convolutional, None, ((1.0, HardLabels()),))
    tuned = tune(convolutional, {}, Tuning(), objective, data, SETTINGS)
    assert torch.equal(before, convolutional.module[1].running_mean)  # type: ignore[index,union-attr]
    assert float((tuned.params["1.running_mean"] - before).abs().max()) > 1e-3
    assert tuned.trees["0.weight"].shape == (8, 9)
    assert tuned.curve.points[-1].loss < tuned.curve.points[0].loss


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_scales_move_by_a_share_of_themselves(size: float) -> None:
    """A step of m is a part of every scale, however small; what moves begins as what is stored."""
    network = encoder()
    weight = network.weight(SITE) * size
    start = tree("quantized", weight)
    student = student_of(network, {SITE: start}, Tuning(frozenset({"scales"})), SETTINGS)
    assert isinstance(student, Student) and isinstance(start, Quantized)
    soft = student.soft(SITE)
    assert set(soft.paces()) == {"moving_scale"} and torch.equal(soft(), start.dense())
    with torch.no_grad():
        soft.get_parameter("moving_scale").fill_(0.25)
    torch.testing.assert_close(soft(), 1.25 * start.dense())
    after = soft.harden()
    assert isinstance(after, Quantized) and torch.equal(after.codes, start.codes)
    torch.testing.assert_close(after.scale.dense(), 1.25 * start.scale.dense(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("relative", [False, True])
def test_zeros_move_in_units_of_the_scale(relative: bool) -> None:
    grid = integer_grid(2, 8, symmetric=False)
    assert grid.zero is not None
    grid = replace(grid, zero=replace(grid.zero, dtype=torch.float32, bits=0, relative=relative))
    scale, zero = torch.tensor([[0.1, 2.0]]), torch.tensor([[0.5, -1.0]])
    node = Quantized(torch.randint(0, 4, (1, 16), dtype=torch.uint8), Dense(scale), Dense(zero), grid)
    soft = soften(Leaf("w", node, node.dense(), None, None), frozenset({"scales"}))
    assert torch.equal(soft(), node.dense()) and set(soft.paces()) == {"moving_scale", "moving_zero"}
    with torch.no_grad():
        soft.get_parameter("moving_zero").fill_(0.5)
    moved = (soft() - node.dense()).view(2, 8)
    torch.testing.assert_close(moved, (0.5 * scale).view(2, 1).expand(2, 8))


def test_a_judgement_computes_every_weight_once() -> None:
    network, rows, settings = encoder(), texts(), replace(SETTINGS, batch=4)
    student = student_of(network, {SITE: tree("quantized", network.weight(SITE))},
                         Tuning(frozenset({"scales"})), settings)
    assert isinstance(student, Student)
    task = Learning(student, Distillation(network, None, ((1.0, HardLabels()),)))
    calls: list[int] = []

    def said() -> float:
        calls.clear()
        with torch.no_grad(), hooked([(student.soft(SITE), lambda *_: calls.append(1))]):
            return held_out(task.eval(), rows, settings)()

    first = said()
    assert len(calls) == 1 < len(rows) // settings.batch
    with torch.no_grad():
        student.soft(SITE).get_parameter("moving_scale").add_(2)
    assert said() != first and len(calls) == 1
    with torch.no_grad():
        one_by_one = sum(float(task(rows.batch(index)).total) for index in torch.arange(len(rows)).split(4))
    assert said() == pytest.approx(one_by_one / len(rows), rel=1e-5)


def test_what_cannot_be_tuned_is_named() -> None:
    network = encoder()
    with pytest.raises(RecipeError, match="nothing moves under scales"):
        recover(network, {}, "scales")
    with pytest.raises(RecipeError, match=r"'scale' can be trained; did you mean 'scales'"):
        Tuning(frozenset({"scale"}))
    with pytest.raises(RecipeError, match="no such weight"):
        recover(network, {"bert.encoder.layer.9.weight": Dense(torch.ones(1, 1))}, "weights")
    with pytest.raises(RecipeError, match="matches no weight"):
        student_of(network, {}, Tuning(where=("*.mlp.*",)), SETTINGS)
