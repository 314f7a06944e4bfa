"""Jobs on recurrent networks: budgets, sharing that learns, training, graphs, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rarefy
from rarefy.core.errors import TargetError
from rarefy.core.nodes import Dense, Masked, Quantized, Shared
from rarefy.core.nouns import Recipe, Step
from rarefy.export.networks import opened, stored_trees
from rarefy.models.form import Form
from rarefy.models.network import Network
from rarefy.run.job import Job, Result, compress
from rarefy.run.progress import Silent
from tiny_networks import Digits, TinyRNN

FEW: dict[str, Any] = {"steps": 40, "batch": 32, "rate": 3e-3, "precision": "float32"}


def job(digits: Digits, out: Path, **more: Any) -> Result:
    data = {"data": (digits.train,), "eval_data": (digits.test,), "effort": "quick"}
    return compress(Job(Network.from_module(digits.module), out, **{**data, **more}), Silent())


def recipe(digits: Digits, out: Path, *steps: Step) -> Result:
    """Steps that train read their examples from a file."""
    x, y = digits.train
    np.savez(out.with_suffix(".npz"), x=x.numpy(), labels=y.numpy())
    steps = tuple(replace(step, training={**step.training, "data": str(out.with_suffix(".npz"))})
                  if step.training else step for step in steps)
    return job(digits, out, target="torch", recipe=Recipe("", steps))


def accuracy(module: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float((module(data[0]).argmax(1) == data[1]).float().mean())


def test_a_budget_is_kept_and_torchs_own_layer_comes_back(tiny_lstm: Digits, tmp_path: Path) -> None:
    digits = tiny_lstm
    result = job(digits, tmp_path / "out", to="30%", target="torch")
    receipt = result.receipt
    assert receipt["bytes"] <= receipt["budget"]["limit_bytes"]
    task = receipt["measured"]["float"]["task"]
    assert task["accuracy"] >= task["accuracy_original"] - 0.02
    assert {row["role"] for row in receipt["plan"]} == {"ih", "hh", "head"}
    for fast in (False, True):
        loaded = rarefy.load(tmp_path / "out", into=TinyRNN("LSTM"), fast=fast)
        assert type(loaded.rnn) is type(digits.module.rnn)
        assert accuracy(loaded, digits.test) == pytest.approx(task["accuracy"], abs=0.01)


def test_layers_share_learn_and_are_rounded_once(tiny_gru: Digits, tmp_path: Path) -> None:
    result = recipe(tiny_gru, tmp_path / "out",
                    Step("layers"), Step("tune", training={**FEW, "objectives": ["soft_labels"]}),
                    Step("rtn", ("role:hh",), {}, "int8"))
    untaught = recipe(tiny_gru, tmp_path / "untaught", Step("layers"))
    found = stored_trees(opened(result.exported, TinyRNN("GRU")))
    owner, *others = [tree for path, tree in found.items() if ".hh." in path]
    assert isinstance(owner, Quantized) and len(others) == 2
    for tree in others:
        assert isinstance(tree, Shared) and torch.equal(tree.dense(), owner.dense())
    assert isinstance(found["rnn.layers.2.ih.weight"], Shared)
    task, before = (each.receipt["measured"]["float"]["task"]["accuracy"] for each in (result, untaught))
    assert task > before + 0.05
    notes = [each["note"] for each in result.receipt["axes"]]
    assert "stays alone: no other layer has one of its shape" in notes


@pytest.mark.parametrize(("step", "kind"), [
    (Step("gradual", ("role:hh",), {"sparsity": 0.5, "every": 1}, training=FEW), Masked),
    (Step("qat", ("role:hh",), {}, "int8", training=FEW), Quantized)])
def test_weights_that_step_learn_under_a_technique(step: Step, kind: type, tiny_gru: Digits, tmp_path: Path
                                                   ) -> None:
    result = recipe(tiny_gru, tmp_path / "out", step)
    found = stored_trees(opened(result.exported, TinyRNN("GRU")))
    assert {type(tree) for path, tree in found.items() if ".hh." in path} == {kind}
    assert {type(tree) for path, tree in found.items() if ".hh." not in path} == {Dense}
    task = result.receipt["measured"]["float"]["task"]
    assert task["accuracy"] > task["accuracy_original"] - 0.1


class Last(nn.Module):
    """The state after the last step."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]


@pytest.mark.slow
def test_a_graph_has_the_steps_written_out(tiny_gru: Digits, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    one = nn.GRU(8, 32, batch_first=True)
    module = nn.Sequential(nn.Flatten(1, 2), Last(one), nn.Linear(32, 10))
    few = tuple((x[:100, :, :3], y[:100]) for x, y in (tiny_gru.train, tiny_gru.test))
    result = job(Digits(module, *few), tmp_path / "out", to="95%", target="onnxruntime")
    measured = result.receipt["measured"]
    assert measured["runtime"]["logit_error_vs_float"]["relative_error"] < 1e-2
    assert result.receipt["lowered"]["1.rnn.layers.0.hh.weight"] == "8-bit integers"
    text = Network.from_module(tiny_gru.module, form=Form("text"), tokenizer=object())
    with pytest.raises(TargetError, match=r"the steps of recurrent layers written out.*use --for torch"):
        compress(Job(text, tmp_path / "text", to="50%", target="onnxruntime"), Silent())


def test_integers_alone_are_refused_by_name(tiny_gru: Digits, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(TargetError, match="recurrent layers have no form in integers alone; use --for torch"):
        job(tiny_gru, tmp_path / "out", to="50%", target="integer")


def test_states_are_taken_out_and_the_rest_is_taught_and_rounded(tiny_gru: Digits, tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    result = recipe(tiny_gru, tmp_path / "out", Step("filters", settings={"ratio": 0.25}),
                    Step("tune", training={**FEW, "objectives": ["soft_labels"]}),
                    Step("rtn", ("role:hh", "role:ih"), {}, "int8"))
    network = opened(result.exported, TinyRNN("GRU"))
    assert {type(tree) for path, tree in stored_trees(network).items() if "rnn" in path} == {Quantized}
    loaded = rarefy.load(tmp_path / "out", into=TinyRNN("GRU"))
    assert isinstance(loaded.rnn, nn.GRU) and loaded.rnn.hidden_size == 24 and loaded.fc.in_features == 24
    task = result.receipt["measured"]["float"]["task"]
    assert accuracy(loaded, tiny_gru.test) == pytest.approx(task["accuracy"])
    assert task["accuracy"] > task["accuracy_original"] - 0.1
