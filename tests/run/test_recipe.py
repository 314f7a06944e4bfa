"""Recipes: YAML both ways, and every mistake named."""

from __future__ import annotations

from pathlib import Path

import pytest

from rarefy.core.errors import RecipeError
from rarefy.core.nouns import Option, Recipe, Step
from rarefy.models.model import open_model
from rarefy.run.effort import effort_named
from rarefy.run.planning import (
    affordable,
    chain,
    corrections,
    grid_named,
    sharings,
    structures,
    techniques,
    trainers,
    transforms,
)
from rarefy.run.recipe import matching, plan_of, read_recipe, split, write_recipe
from rarefy.run.to_llamacpp import LlamaCpp

GOOD = """
model: gemma-3-270m
steps:
  - {technique: gptq, where: "role:embed", format: IQ4_NL, settings: {damping: 0.02}}
  - {technique: quantease, where: ["role:embed"]}
seed: 3
"""


def read(text: str, folder: Path) -> Recipe:
    (folder / "recipe.yaml").write_text(text)
    return read_recipe(folder / "recipe.yaml")


def test_round_trip(tmp_path: Path) -> None:
    recipe = read(GOOD, tmp_path)
    assert recipe.steps[0] == Step("gptq", ("role:embed",), {"damping": 0.02}, "IQ4_NL")
    assert read(write_recipe(recipe), tmp_path) == recipe


@pytest.mark.parametrize(("text", "match"), [
    ("model: x\nstep: []", r"unknown key 'step'; did you mean 'steps'|steps"),
    ("model: x\nsteps:\n- {technique: gptq, were: '*'}", r"unknown key .*were'; did you mean 'where'"),
    ("model: x\nsteps: []", "steps"),
    ("steps:\n- {technique: gptq}", "model"),
    ("model: [", "not YAML"),
    ("just text", "expected keys"),
    ("model: x\nsteps:\n- {technique: !!python/object/apply:os.system [ls]}", "not YAML"),
])
def test_mistakes_are_named(text: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=match):
        read(text, tmp_path)


@pytest.mark.parametrize(("step", "match"), [
    (Step("gtpq"), "technique 'gtpq' does not exist; did you mean 'gptq'"),
    (Step("gptq", ("*",), {"dampng": 1}, "Q4_0"), "no setting 'dampng'; did you mean 'damping'"),
    (Step("gptq", ("model.layrs.*",), {}, "Q4_0"), r"pattern 'model\.layrs\.\*' matches no weight"),
    (Step("gptq", ("role:emebd",), {}, "Q4_0"), "did you mean 'role:embed'"),
    (Step("gptq", ("*",), {}, "Q4_K"), "cannot store rows of 128 weights; choose one of"),
    (Step("rtn", ("role:up",)), "no step says in which format llama.cpp is to store it; add `format:`"),
    (Step("magnitude", ("role:up",), {}, "IQ4_NL"), "IQ4_NL has no code for zero.* choose one of .*Q8_0"),
])
def test_what_means_nothing_is_refused_before_any_work(step: Step, match: str, tiny_gemma3: Path) -> None:
    with pytest.raises(RecipeError, match=match):
        plan_of(open_model(tiny_gemma3), Recipe("x", (step,)), LlamaCpp())


def test_later_steps_follow_and_the_rest_is_f16(tiny_gemma3: Path) -> None:
    model = open_model(tiny_gemma3)
    steps = (Step("gptq", ("*.mlp.*",), {}, "Q4_0"), Step("quantease", ("*.mlp.down_proj.weight",)))
    plan = plan_of(model, Recipe("x", steps), LlamaCpp())
    down, up = (next(s.path for s in model.map.sites if s.role == role) for role in ("down", "up"))
    assert [s.technique for s in plan[down].steps] == ["gptq", "quantease"]
    assert [s.technique for s in plan[up].steps] == ["gptq"]
    assert {o.format for p, o in plan.items() if ".mlp." not in p} == {"F16"}


def test_patterns_keep_the_order_of_the_model(tiny_gemma3: Path) -> None:
    sites = open_model(tiny_gemma3).map.sites
    assert matching(sites, ["*"]) == list(sites)
    assert {s.role for s in matching(sites, ["role:q", "role:k"])} == {"q", "k"}


def test_quick_refines_only_where_a_recipe_asks_for_it() -> None:
    steps = (Step("gptq", ("a",), format="Q4_0"), Step("quantease", ("a",)))
    planned = {name: affordable(Option("a", "Q4_0", 18, 0.1, steps), effort_named(name))
               for name in ("quick", "balanced")}
    assert [step.technique for step in planned["quick"].steps] == ["gptq"]
    assert planned["balanced"].steps == steps
    asked = dict(chain(steps, "Q4_0", effort_named("quick")))
    assert asked["quantease"].sweeps == 1


RECIPES = [path for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
           if "steps:" in path.read_text()]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_this_repository_can_be_read(path: Path, tmp_path: Path) -> None:
    """Steps in an order that is possible, with settings that there are, and the same recipe again."""
    recipe = read_recipe(path)
    (tmp_path / "again.yaml").write_text(write_recipe(recipe))
    assert read_recipe(tmp_path / "again.yaml") == recipe
    whole, rest = split(recipe.steps)
    assert whole + rest == recipe.steps
    known = {**techniques(), **transforms(), **structures(), **sharings(), **trainers(), **corrections()}
    for step in recipe.steps:
        if step.technique != "tune":  # what trains has settings of its own
            assert set(step.settings) <= set(known[step.technique].__dataclass_fields__)
        assert not step.format or grid_named(step.format) is not None or step.format.startswith("float")
