"""The laws of files and of training, over every technique on the weights of trained recurrent networks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rarefy.calibration.examples import Examples
from rarefy.calibration.observe import survey
from rarefy.core.edit import edit
from rarefy.core.errors import EditError
from rarefy.core.nodes import Dense, Node
from rarefy.core.nouns import Evidence
from rarefy.export.networks import export_network, opened
from rarefy.models.network import TENSOR, Network
from rarefy.run.planning import techniques, trainers
from rarefy.runtimes.torch import load
from rarefy.techniques.distill.soft_labels import SoftLabels
from rarefy.training.examples import Rows
from rarefy.training.loop import Settings
from rarefy.training.signals import Distillation
from rarefy.training.tune import Tuning, tune
from tiny_networks import TinyRNN

TECHNIQUES, TRAINERS = techniques(), trainers()


def narrow(technique: Any) -> Any:
    """The technique with a grid whose groups divide 32 columns."""
    grid = getattr(technique, "grid", None)
    if grid is None or 32 % (grid.block or 32) == 0:
        return technique
    return replace(technique, grid=replace(grid, name=f"{grid.name} by 32", group=32))


@pytest.fixture(scope="module", params=["lstm", "gru"])
def network(request: pytest.FixtureRequest) -> tuple[Network, torch.Tensor, dict[str, Evidence]]:
    """A trained network, unseen images, and what arrives at every weight with 32 columns."""
    digits = request.getfixturevalue(f"tiny_{request.param}")
    found = Network.from_module(digits.module, request.param.upper())
    seen = survey(found, Examples({TENSOR: digits.train[0][:64]}), torch.Generator().manual_seed(0))
    return found, digits.test[0][:50], {each.site.path: each.evidence for each in seen
                                        if each.site.shape[1] == 32 and each.site.role != "head"}


@pytest.mark.parametrize("name", sorted(TECHNIQUES))
def test_what_is_written_answers_as_the_trees_do(
        name: str, network: tuple[Network, torch.Tensor, dict[str, Evidence]], tmp_path: Path) -> None:
    """Laws 1, 7 and 8: shapes stay, the folder gives back the trees, torch's own layer computes them."""
    (opened_network, x, seen), technique = network, narrow(TECHNIQUES[name]())
    trees: dict[str, Node] = {}
    assert len(seen) == 5
    for path, evidence in seen.items():
        weight, generator = opened_network.weight(path), torch.Generator().manual_seed(0)
        tree = Dense(weight)
        if not isinstance(tree, technique.edits):  # it improves on what another made
            start = TECHNIQUES[technique.beats or "rtn"]()
            tree, _ = edit(path, tree, weight, start, "law", evidence, generator)
        if "convolution" in (type(technique).__doc__ or ""):
            with pytest.raises(EditError, match="no window; use svd"):
                edit(path, tree, weight, technique, "law", evidence, generator)
            return
        trees[path], _ = edit(path, tree, weight, technique, "law", evidence, generator)
        assert trees[path].shape == weight.shape
    wanted = opened_network.run({TENSOR: x}, opened_network.tensors(trees.get))
    assert bool(torch.isfinite(wanted).all())
    export_network(opened_network, trees, tmp_path / "out")
    again = opened(tmp_path / "out", TinyRNN(opened_network.name))
    assert isinstance(again, Network)
    torch.testing.assert_close(again.run({TENSOR: x}), wanted)
    fast = load(tmp_path / "out", into=TinyRNN(opened_network.name), exact=True)
    torch.testing.assert_close(fast(x), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", sorted(TRAINERS))
def test_weights_of_steps_learn_under_every_technique(
        name: str, network: tuple[Network, torch.Tensor, dict[str, Evidence]]) -> None:
    """What hardens is what was computed, and the last step's lesson reached the first weight."""
    opened_network, x, _ = network
    technique = narrow(TRAINERS[name]())
    tuned = tune(opened_network, {}, Tuning(frozenset({"biases"}), technique, ("role:hh",)),
                 Distillation(opened_network, opened_network, ((1.0, SoftLabels()),)), Rows({TENSOR: x}),
                 Settings(steps=4, batch=16, rate=1e-3, precision="float32"))
    path = "rnn.layers.0.hh.weight"
    tree, before = tuned.trees[path].dense(), opened_network.weight(path)
    assert set(tuned.trees) == {f"rnn.layers.{layer}.hh.weight" for layer in range(3)}
    assert tree.shape == before.shape and not torch.equal(tree, before)
    bias = tuned.params["rnn.layers.0.ih.bias"]
    assert not torch.equal(bias, opened_network.param("rnn.layers.0.ih.bias"))
    answers = opened_network.run({TENSOR: x}, opened_network.tensors(tuned.trees.get) | tuned.params)
    assert bool(torch.isfinite(answers).all())
