"""Exits as the last stage of a job: from a recipe, behind other steps, learnt alone or with the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, AutoTokenizer

import rarefy
from rarefy.calibration.examples import read_examples
from rarefy.core.errors import DataError, ModelError, RecipeError, TargetError
from rarefy.core.nodes import Quantized
from rarefy.core.nouns import Exiting, Recipe, Step, share_of
from rarefy.export.networks import opened, stored_trees
from rarefy.models.network import Network
from rarefy.report import render
from rarefy.report.summary import summary
from rarefy.run.job import Job, compress, do_recipe, run_recipe
from rarefy.run.recipe import read_recipe, write_recipe
from tiny_networks import Digits, TinyCNN

RECIPE = """
model: {folder}
data: [{folder}/train.tsv]
eval_data: [{folder}/dev.tsv]
effort: quick
steps:
  - {{technique: rtn, where: "role:up", format: int8}}
exits:
  after: [0]
  max_loss: 20%
  settings: {{rule: entropy}}
  training: {{steps: 150}}
"""


def test_a_recipe_with_exits(tiny_encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tiny_encoder))
    done = run_recipe(tmp_path / "recipe.yaml", tmp_path / "out")
    found = done.receipt["exits"]
    judged = found["samples"]["judge"]
    assert sum(found["left"].values()) == judged <= 200 and found["samples"]["calibrate"] > 100
    assert found["same"] >= 0.7 and found["max_loss"] == 0.2 and set(found["seconds"]) == {1, 32}
    network = opened(done.out)
    assert isinstance(network, Network)
    trees = stored_trees(network)
    assert isinstance(trees["bert.encoder.layer.0.intermediate.dense.weight"], Quantized)
    early = rarefy.load(done.out)
    answer = early(**next(read_examples(network, str(tiny_encoder / "dev.tsv")).batches(judged)))
    assert {int(depth) for depth in answer.blocks} <= {1, 2}
    assert early.exits.rule.threshold == found["threshold"]
    kept = read_recipe(done.out / "recipe.yaml")
    assert kept == read_recipe(tmp_path / "recipe.yaml") and kept.exits is not None
    receipt = json.loads((done.out / "receipt.json").read_text())
    assert "blocks on average" in dict(summary(receipt)[1])["exits"]
    assert "Where samples leave" in render(receipt)


def test_the_network_learns_with_its_exits(tiny_encoder: Path, tmp_path: Path) -> None:
    asked = Exiting((0,), 0.2, together=True, calibration=(str(tiny_encoder / "dev.tsv"),),
                    training={"steps": 40, "rate": 2e-3})
    data = str(tiny_encoder / "train.tsv")
    recipe = Recipe(str(tiny_encoder), (), data=(data,), effort="quick", exits=asked)
    done = do_recipe(recipe, tmp_path / "out")
    assert done.receipt["exits"]["mean_blocks"] < 2
    before, after = opened(tiny_encoder), opened(done.out)
    path = "bert.encoder.layer.0.intermediate.dense.weight"
    assert not before.weight(path).equal(after.weight(path))
    assert before.weight("bert.embeddings.word_embeddings.weight").equal(
        after.weight("bert.embeddings.word_embeddings.weight"))


@pytest.mark.parametrize("joint", [False, True])
def test_a_cnn_of_ones_own(tiny_cnn: Digits, tmp_path: Path, joint: bool) -> None:
    """Rounded by a step, then exits; the module comes back into one of its class and leaves early."""
    asked = Exiting(max_loss=0.1, together=joint, training={"steps": 60})
    done = compress(Job(Network.from_module(tiny_cnn.module), tmp_path / "out", effort="quick",
                        data=(tiny_cnn.train,), eval_data=(tiny_cnn.test,),
                        recipe=Recipe("", (Step("rtn", ("role:conv",), {}, "int8"),), "torch", exits=asked)))
    found = done.receipt["exits"]
    assert found["after"] == [0, 1] and found["behind"] == {1: "stem", 2: "conv"}
    assert found["mean_work"] < 0.9 and found["accuracy"] > found["whole"]["accuracy"] - 0.05
    trees = stored_trees(opened(done.exported, TinyCNN()))
    assert isinstance(trees["stem.0.weight"], Quantized)
    early = rarefy.load(done.out, into=TinyCNN())
    left = early(tiny_cnn.test[0]).blocks
    assert {block: int((left == block).sum()) for block in (1, 2, 3)} == found["left"]


def test_yaml_both_ways(tmp_path: Path) -> None:
    recipe = Recipe("x", (Step("rtn"),), exits=Exiting((1, 3), 0.02, {"rule": "patience"}, True, ("a",)))
    assert "max_loss: 0.02" in write_recipe(recipe)
    (tmp_path / "r.yaml").write_text("model: x\nexits:\n  max_loss: 5%\n")
    found = read_recipe(tmp_path / "r.yaml")
    assert found.exits == Exiting((), 0.05) and "after" not in write_recipe(found)


@pytest.mark.parametrize(("section", "match"), [
    ("after: [0]\n  max_los: 1%", "unknown key .*max_los'; did you mean 'max_loss'"),
    ("after: [0]\n  max_loss: 0%", "above 0 and below 1"),
    ("after: []", "after"),
    ("after: [x]", "exits.after.0: input should be a valid integer"),
])
def test_mistakes_in_the_section(section: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"model: x\nexits:\n  {section}\n")
    with pytest.raises(RecipeError, match=match):
        read_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(("exits", "error", "match"), [
    (Exiting((1,)), RecipeError, "from 0 to 0"),
    (Exiting((0,), settings={"ruel": "entropy"}), RecipeError, "did you mean 'rule'"),
    (Exiting((0,), training={"epoch": 1}), RecipeError, "did you mean 'epochs'"),
    (Exiting((0,), data=("dev",)), DataError, "to learn from"),
])
def test_what_cannot_work(exits: Any, error: type[Exception], match: str, tiny_encoder: Path, tmp_path: Path
                          ) -> None:
    dev = str(tiny_encoder / "dev.tsv")
    exits = Exiting(**{**vars(exits), "data": (dev,) if exits.data else ()})
    with pytest.raises(error, match=match):
        do_recipe(Recipe(str(tiny_encoder), (), data=(str(tiny_encoder / "train.tsv"),), eval_data=(dev,),
                         effort="quick", exits=exits), tmp_path / "out")


def test_other_targets_and_models(tiny_encoder: Path, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="in PyTorch only"):
        do_recipe(Recipe(str(tiny_encoder), (), target="onnxruntime", exits=Exiting((0,))), tmp_path / "a")
    with pytest.raises(RecipeError, match="for classifiers"):
        do_recipe(Recipe(str(tiny_llama), (), target="torch", exits=Exiting((0,))), tmp_path / "b")
    headless = tmp_path / "headless"
    AutoModel.from_pretrained(tiny_encoder).save_pretrained(headless)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(headless)
    with pytest.raises(ModelError, match="gives no classes"):
        do_recipe(Recipe(str(headless), (), target="torch", exits=Exiting((0,))), tmp_path / "c")


def test_shares() -> None:
    assert share_of("1%") == share_of("0.01") == 0.01
    for wrong in ("0", "100%", "few"):
        with pytest.raises(RecipeError, match="above 0 and below 1"):
            share_of(wrong)
