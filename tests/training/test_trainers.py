"""Techniques that work during training, in the one loop: what was asked for is what remains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from networks import encoder, texts

from rarefy.core.nodes import Masked, Node, Quantized
from rarefy.core.tune import Trainer
from rarefy.numerics.grids import integer_grid
from rarefy.techniques.distill.forward_kl import ForwardKL
from rarefy.techniques.prune.gradual import Gradual
from rarefy.techniques.prune.l0 import L0
from rarefy.techniques.prune.movement import Movement
from rarefy.techniques.quantize.lsq import LSQ
from rarefy.training.loop import Settings
from rarefy.training.signals import Distillation
from rarefy.training.tune import Tuned, Tuning, tune

WHERE = "*.layer.*"


def taught(technique: Trainer, **more: Any) -> Tuned:
    """Distillation from itself: the gate likes nothing better than the network untouched."""
    network = encoder()
    objective = Distillation(network, network, ((1.0, ForwardKL()),))
    settings = Settings(steps=16, batch=16, rate=3e-3, precision="float32", gate_every=2, patience=2)
    return tune(network, {}, Tuning(frozenset({"biases"}), technique, where=(WHERE,)), objective, texts(),
                settings, held=texts(48, 1), **more)


def dropped(trees: dict[str, Node]) -> float:
    masks = [tree.keep for tree in trees.values() if isinstance(tree, Masked)]
    return 1 - sum(float(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


@pytest.mark.parametrize("technique", [Gradual(0.75, every=2), Movement(0.75)])
def test_a_gate_chooses_among_states_that_are_as_sparse_as_asked(technique: Gradual | Movement) -> None:
    tuned = taught(technique)
    assert dropped(tuned.trees) == pytest.approx(0.75, abs=0.01)
    assert tuned.curve.best_step >= round(technique.end * 16)


def test_gates_that_close_until_the_end_are_taken_at_the_end() -> None:
    assert taught(L0(5.0, pace=200.0)).curve.best_step == 16


def test_rounded_weights_learn_under_a_gate(tmp_path: Path) -> None:
    tuned = taught(LSQ(integer_grid(2, 16)), folder=tmp_path)
    assert {type(tree) for tree in tuned.trees.values()} == {Quantized}
    judged = [point.gate for point in tuned.curve.points if point.gate is not None]
    assert tuned.curve.best < judged[0]
