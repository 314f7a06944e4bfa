"""Recipes that train: before weights are rewritten, between, behind; what is refused before any work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rarefy.core.errors import DataError, RecipeError, TargetError
from rarefy.core.nodes import Dense, Masked, Node, Product, Quantized, Shared, Sum
from rarefy.core.nouns import Recipe, Step
from rarefy.export.networks import opened, stored_trees
from rarefy.models.opening import open_any
from rarefy.run.course import check, lesson_of, recut, tuning_of
from rarefy.run.job import Job, Result, compress
from rarefy.run.lessons import Term
from rarefy.run.recipe import parts, read_recipe, runs, write_recipe
from rarefy.techniques.prune.gradual import Gradual
from rarefy.training.activations import Rounding

FEW: dict[str, Any] = {"steps": 6, "batch": 8, "rate": 1e-3, "precision": "float32"}


def done(model: Path, out: Path, *steps: Step, **more: Any) -> Result:
    data = {"data": (str(model / "train.tsv"),), "eval_data": (str(model / "dev.tsv"),)}
    recipe = Recipe(str(model), steps, **{"target": "torch", "effort": "quick", **data, **more})
    return compress(Job(str(model), out, target=recipe.target, effort="quick", data=recipe.data,
                        eval_data=recipe.eval_data, recipe=recipe))


def trees_in(result: Result, model: Path) -> dict[str, Node]:
    return stored_trees(opened(result.exported))


def test_a_student_with_a_narrow_embedding_is_taught_and_rounded(tiny_encoder: Path, tmp_path: Path) -> None:
    result = done(
        tiny_encoder, tmp_path / "out",
        Step("drop", settings={"count": 1, "keep_first": 0, "keep_last": 0}),
        Step("svd", ("role:embed",), {"rank": 8}),
        Step("tune", training={**FEW, "objectives": ["soft_labels", "hard_labels"]}),
        Step("rtn", format="int8"))
    found = trees_in(result, tiny_encoder)
    embed = next(tree for path, tree in found.items() if "word_embeddings" in path)
    assert isinstance(embed, Product) and all(isinstance(part, Quantized) for part in embed.children())
    assert sum(isinstance(tree, Quantized) for tree in found.values()) > 5
    training, = result.receipt["training"]
    assert training["technique"] == "tune" and len(training["points"]) == 6
    assert result.receipt["measured"]["float"]["task"]["accuracy"] > 0.5
    assert any(each["technique"] == "tune" and "6 steps" in each["note"] for each in result.receipt["axes"])


def test_masks_that_grew_stay_under_codes(tiny_encoder: Path, tmp_path: Path) -> None:
    where = ("role:up", "role:down")
    result = done(tiny_encoder, tmp_path / "out",
                  Step("gradual", where, {"sparsity": 0.5, "every": 1}, training=FEW),
                  Step("rtn", where, format="int8"))
    found = trees_in(result, tiny_encoder)
    masked = {path: tree for path, tree in found.items() if isinstance(tree, Masked)}
    assert masked and all(isinstance(tree.inner, Quantized) for tree in masked.values())
    for tree in masked.values():
        assert float(tree.keep.float().mean()) == pytest.approx(0.5, abs=0.02)
        assert not bool(tree.dense()[~tree.keep].any())


def test_neurons_that_training_pruned_are_taken_out(tiny_encoder: Path, tmp_path: Path) -> None:
    """Layers go on reading what they read, so ranges of inputs stay."""
    result = done(tiny_encoder, tmp_path / "out",
                  Step("movement", ("role:down", "role:o"), {"sparsity": 0.5, "pattern": "column"},
                       training={**FEW, "activations": {"bits": 8}}),
                  Step("emptied", settings={"multiple": 1}),
                  Step("rtn", ("role:down",), format="int8"))
    network = opened(result.exported)
    whole = open_any(tiny_encoder)
    assert network.config.intermediate_size == whole.config.intermediate_size // 2
    found = stored_trees(network)
    down = [tree for path, tree in found.items() if network.map.by_path[path].role == "down"]
    assert len(down) == network.map.blocks and all(isinstance(tree, Quantized) for tree in down)
    assert {site.layer for site in network.map.sites if site.role == "down"} <= set(network.ranges)
    assert all(isinstance(found[site.path], Masked) for site in network.map.sites if site.role == "o")
    notes = [each["note"] for each in result.receipt["axes"] if each["technique"] == "emptied"]
    assert len(notes) == network.map.blocks and all("neurons left out" in note for note in notes)


def test_only_masks_are_cut_behind_other_steps(tiny_encoder: Path) -> None:
    network = open_any(tiny_encoder)
    site = next(site for site in network.map.sites if site.role == "down")
    weight, wider = network.weight(site.path), torch.ones(site.shape[0], site.shape[1] + 3)
    assert recut(network, {site.path: Masked(wider > 0, Dense(wider))}) == {}  # nothing is masked in it now
    same = Masked(weight > 0, Dense(weight))
    assert recut(network, {site.path: same}) == {site.path: same}
    with pytest.raises(RecipeError, match="take them out first"):
        recut(network, {site.path: Product(Dense(torch.ones(site.shape[0], 1)), Dense(wider[:1]))})


def test_blocks_that_share_learn_and_are_rounded_once(tiny_encoder: Path, tmp_path: Path) -> None:
    result = done(tiny_encoder, tmp_path / "out",
                  Step("layers", settings={"what": "ffn", "rank": 2}),
                  Step("tune", training={**FEW, "objectives": ["soft_labels"]}),
                  Step("rtn", ("role:down", "role:up", "role:o"), format="int8"))
    network = opened(result.exported)
    found = stored_trees(network)
    for role in ("up", "down"):
        first, *others = [site.path for site in network.map.sites if site.role == role]
        assert isinstance(found[first], Quantized) and others
        for path in others:
            tree = found[path]
            assert isinstance(tree, Sum) and isinstance(tree.terms[1], Product)
            shared = tree.terms[0]
            assert isinstance(shared, Shared) and shared.path == first
            assert torch.equal(shared.dense(), found[first].dense())
            with torch.no_grad():
                torch.testing.assert_close(network.weight(path), tree.dense())
    assert sum("uses" in each["note"] for each in result.receipt["axes"]) == 2 * (network.map.blocks - 1)
    rows = {row["site"]: row for row in result.receipt["plan"]}
    assert rows[others[0]]["bytes"] < rows[first]["bytes"]
    assert result.receipt["measured"]["float"]["task"]["accuracy"] > 0.5


def test_blocks_of_a_language_model_share(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = Recipe(str(tiny_llama), (Step("layers", settings={"what": "attention"}),), "torch", "quick",
                    data=("python-docs",))
    result = compress(Job(str(tiny_llama), tmp_path / "out", target="torch", effort="quick", data=recipe.data,
                          recipe=recipe))
    found = stored_trees(opened(result.exported))
    assert sum(isinstance(tree, Shared) for tree in found.values()) >= 4
    assert result.receipt["bytes"] < result.receipt["model"]["original_bytes"]


def test_where_sharing_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="stores the weights of every layer"):
        done(tiny_encoder, tmp_path / "a", Step("layers"), target="onnxruntime")
    with pytest.raises(RecipeError, match="leave 'where' out"):
        done(tiny_encoder, tmp_path / "b", Step("layers", ("role:up",)))
    with pytest.raises(RecipeError, match="move it up"):
        runs((Step("rtn"), Step("layers")))
    assert not list(tmp_path.iterdir())


def test_training_behind_the_last_leaves(tiny_encoder: Path, tmp_path: Path) -> None:
    result = done(tiny_encoder, tmp_path / "out",
                  Step("rtn", ("role:up",), format="int4-g32"),
                  Step("tune", training={**FEW, "moves": ["scales", "norms"]}),
                  Step("lora", ("role:up",), {"rank": 2}, training=FEW))
    up = [tree for path, tree in trees_in(result, tiny_encoder).items() if "intermediate" in path]
    assert up and all(isinstance(tree, Sum) and isinstance(tree.terms[0], Quantized)
                      and isinstance(tree.terms[1], Product) for tree in up)
    assert [each["technique"] for each in result.receipt["training"]] == ["tune", "lora"]


def test_block_after_block_from_codes(tiny_llama: Path, tmp_path: Path) -> None:
    """EfficientQAT as a recipe: GPTQ, blocks that learn from there, then the scales of all."""
    few = {"steps": 2, "batch": 2, "moves": ["scales"], "objectives": ["forward_kl"]}
    recipe = Recipe(str(tiny_llama), (
        Step("gptq", ("role:down",), format="int2-g32"),
        Step("lsq", ("role:down",), format="int2-g32",
             training={"by": "blocks", "epochs": 5, "batch": 4, "sequences": 32, "rate": 3e-4}),
        Step("tune", training=few)), "torch", "quick", data=("self",))
    found = [compress(Job(str(tiny_llama), tmp_path / name, target="torch", effort="quick", data=("self",),
                          recipe=replace(recipe, steps=steps)))
             for name, steps in (("rounded", recipe.steps[:1]), ("trained", recipe.steps))]
    rows = [row for row in found[1].receipt["axes"] if row["site"].startswith("block ")]
    assert [row["site"] for row in rows] == ["block 0", "block 1", "block 2"]
    errors = [[float(part.split()[-1]) for part in row["note"].split(", now")] for row in rows]
    assert all(after <= before for before, after in errors) and errors[-1][1] < errors[-1][0]
    moved = [each.receipt["measured"]["float"]["kl_mean"] for each in found]
    assert moved[1] < moved[0] and found[1].receipt["bytes"] <= found[0].receipt["bytes"] * 1.01


@pytest.mark.parametrize(("technique", "said", "match"), [
    ("lsq", {"by": "layers"}, "by: 'layers'"), ("tune", {"by": "blocks"}, "trains as a whole"),
    ("lsq", {"by": "blocks", "steps": 3}, "by blocks has no setting 'steps'"),
    ("lsq", {"by": "blocks", "epochs": 0}, "must be positive")])
def test_what_blocks_are_not_trained_by(technique: str, said: dict[str, Any], match: str) -> None:
    step = Step(technique, format="" if technique == "tune" else "int4-g32", training=said)
    with pytest.raises(RecipeError, match=match):
        check(Recipe("x", (step,)))


def test_encoders_are_not_trained_by_blocks(tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="only language models are trained by blocks"):
        done(tiny_encoder, tmp_path / "out", Step("lsq", format="int4-g32", training={"by": "blocks"}))


def test_a_language_model(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = Recipe(str(tiny_llama), (
        Step("rtn", ("role:up", "role:down"), format="int3-g32"),
        Step("tune", training={**FEW, "moves": ["scales", "norms"], "steps": 4})), "torch", "quick",
        ("self",))
    result = compress(Job(str(tiny_llama), tmp_path / "out", target="torch", effort="quick", data=("self",),
                          recipe=recipe))
    training, = result.receipt["training"]
    assert training["best"] < training["points"][0]["loss"]
    assert sum(isinstance(tree, Quantized) for tree in stored_trees(opened(result.exported)).values()) > 2


def test_a_job_that_was_killed_trains_no_step_twice(tiny_encoder: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    steps = (Step("tune", training={**FEW, "save_every": 2}), Step("rtn", format="int8"))
    whole = done(tiny_encoder, tmp_path / "whole", *steps)

    def broken(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("rarefy.run.to_torch.Torch.export", broken)
        with pytest.raises(KeyboardInterrupt):
            done(tiny_encoder, tmp_path / "out", *steps)
    with monkeypatch.context() as patched:
        patched.setattr("rarefy.training.loop._Run._gradient", broken)  # no step is left to do
        again = done(tiny_encoder, tmp_path / "out", *steps)
    first, second = trees_in(whole, tiny_encoder), trees_in(again, tiny_encoder)
    assert all(torch.equal(first[path].dense(), second[path].dense()) for path in first)


def test_what_is_judged_is_not_trained_on(tiny_encoder: Path, tmp_path: Path) -> None:
    lines = (tiny_encoder / "train.tsv").read_text().splitlines()
    table = tmp_path / "both.tsv"
    table.write_text("\n".join(dict.fromkeys(lines)) + "\n")
    result = done(tiny_encoder, tmp_path / "out", Step("tune", training=FEW), data=(str(table),),
                  eval_data=())
    training, = result.receipt["training"]
    judged = result.receipt["measured"]["float"]["samples"]
    distinct = len({line.split("\t")[0] for line in lines[1:]})
    assert judged and training["examples"] + training["held"] <= distinct - judged


@pytest.mark.parametrize(("labels", "match"), [
    ([1] * 20, "all labels are 1; a classifier needs examples of two classes"),
    ([0, 1, 2, 3] * 5, "label 3 is outside the model's 2 classes"),
])
def test_labels_that_teach_nothing_are_refused(labels: list[int], match: str, tiny_encoder: Path,
                                               tmp_path: Path) -> None:
    table = tmp_path / "table.tsv"
    lines = [f"the film number {k} is good\t{label}" for k, label in enumerate(labels)]
    table.write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    with pytest.raises(DataError, match=match):
        done(tiny_encoder, tmp_path / "out", Step("tune", training={**FEW, "data": str(table)}))
    assert not (tmp_path / "out").exists()


# ---- orders and words ----------------------------------------------------------------------------------


def test_runs_and_parts() -> None:
    steps = (Step("drop"), Step("tune"), Step("units"), Step("svd"), Step("tune"), Step("rtn"), Step("gptq"),
             Step("lora"), Step("tune"))
    assert [(kind, len(run)) for kind, run in runs(steps)] == [
        ("whole", 1), ("training", 1), ("whole", 1), ("leaves", 1), ("training", 1), ("leaves", 2),
        ("training", 1), ("training", 1)]
    before, last, behind = parts(steps)
    assert len(before) == 5 and last == steps[5:7] and [run for _, run in behind] == [steps[7:8], steps[8:]]
    assert parts(steps[:2]) == ((("whole", steps[:1]), ("training", steps[1:2])), (), ())
    for wrong in ((Step("rtn"), Step("drop")), (Step("gradual"), Step("units"))):
        with pytest.raises(RecipeError, match="move it up"):
            runs(wrong)
    dead = Step("emptied")
    assert [kind for kind, _ in runs((Step("gradual"), dead, Step("rtn")))] == ["training", "whole", "leaves"]


def test_yaml_and_back(tmp_path: Path) -> None:
    place = tmp_path / "recipe.yaml"
    place.write_text("""
model: x
steps:
- technique: gradual
  where: role:up
  settings: {sparsity: 0.9}
  training:
    epochs: 2
    moves: [norms]
    held: dev.tsv
    activations: {bits: 4}
    objectives: [hard_labels, {technique: soft_labels, weight: 0.5}]
data: [train.tsv]
seed: 4
""")
    recipe = read_recipe(place)
    place.write_text(write_recipe(recipe))
    assert read_recipe(place) == recipe
    lesson, tuning = lesson_of(recipe.steps[0], recipe), tuning_of(recipe.steps[0])
    assert lesson.data == ("train.tsv",) and lesson.held == ("dev.tsv",)
    assert lesson.objectives == (Term("hard_labels"), Term("soft_labels", 0.5))
    assert (lesson.settings.epochs, lesson.settings.seed) == (2, 4)
    assert tuning.technique == Gradual(0.9) and tuning.moves == {"norms"}
    assert tuning.activations == Rounding(4) and tuning.where == ("role:up",)


@pytest.mark.parametrize(("step", "match"), [
    (Step("tune", training={"epoch": 1}), "no setting 'epoch'; did you mean 'epochs'"),
    (Step("tune", training={"moves": ["scale"]}), "did you mean 'scales'"),
    (Step("tune", training={"activations": {"bit": 4}}), "did you mean 'bits'"),
    (Step("tune", training={"objectives": [{"weight": 1}]}), "write a name"),
    (Step("tune", training={"rate": 0}), "rate=0 must be positive"),
    (Step("gradual", settings={"sparsty": 0.5}), "did you mean 'sparsity'"),
    (Step("rtn", training={"epochs": 1}), "rtn: does not train"),
])
def test_mistakes_are_named_before_any_work(step: Step, match: str, tiny_encoder: Path, tmp_path: Path
                                            ) -> None:
    with pytest.raises(RecipeError, match=match):
        done(tiny_encoder, tmp_path / "out", step)
    assert not (tmp_path / "out.partial" / "receipt.json").exists()


def test_the_receipt_is_plain(tiny_encoder: Path, tmp_path: Path) -> None:
    result = done(tiny_encoder, tmp_path / "out", Step("tune", training={**FEW, "steps": 2}))
    held = json.loads((result.out / "receipt.json").read_text())
    assert [point["step"] for point in held["training"][0]["points"]] == [1, 2]
    assert all(isinstance(tree, Dense) for tree in trees_in(result, tiny_encoder).values())
