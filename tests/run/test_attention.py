"""Attention in recipes: a view that other steps work on, kept by the folder, refused where it cannot run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rarefy
from rarefy.core.errors import RecipeError, TargetError
from rarefy.core.nouns import Recipe, Step
from rarefy.models.attending import said
from rarefy.run.job import do_recipe


def test_a_language_model_with_windows(tiny_llama: Path, tmp_path: Path) -> None:
    steps = (Step("window", settings={"window": 16, "sinks": 2}), Step("rtn", ("role:up",), {}, "int8"))
    done = do_recipe(Recipe(str(tiny_llama), steps, target="torch", effort="quick", data=("python-docs",)),
                     tmp_path / "out")
    assert 0 < done.receipt["measured"]["float"]["kl_mean"] < 1
    assert "of 8,192 keys a query" in done.receipt["axes"][0]["note"]
    network = rarefy.load(done.out)
    assert said(network.config) == "window"
    assert network.model.layers[0].self_attn.attending.technique.window == 16


def test_a_language_model_with_latents(tiny_llama: Path, tmp_path: Path) -> None:
    """Its matrices are sites like others: rounded in the same recipe, decoded from the folder, run behind a
    cache."""
    steps = (Step("latent"), Step("gptq", ("role:kv", "role:k"), {}, "int8"))
    done = do_recipe(Recipe(str(tiny_llama), steps, target="torch", effort="quick", data=("python-docs",)),
                     tmp_path / "out")
    assert 0 < done.receipt["measured"]["float"]["kl_mean"] < 1
    assert "numbers a token in the place of 128" in done.receipt["axes"][0]["note"]
    network = rarefy.load(done.out)
    assert said(network.config) == "latent"
    tokens = torch.arange(5, 30)[None]
    network.generation_config.pad_token_id = 2
    written = network.generate(tokens, max_new_tokens=6, do_sample=False)
    again = network.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=False)
    assert written.tolist() == again.tolist()


def test_an_encoder_with_mixtures(tiny_encoder: Path, tmp_path: Path) -> None:
    data = str(tiny_encoder / "train.tsv")
    steps = (Step("linformer", settings={"rank": 16, "length": 64}),)
    done = do_recipe(Recipe(str(tiny_encoder), steps, data=(data,), effort="quick"), tmp_path / "out")
    assert said(rarefy.load(done.out).config) == "linformer"
    assert done.receipt["measured"]["float"]["kl_mean"] > 0


def test_where_it_cannot_be(tiny_llama: Path, tmp_path: Path) -> None:
    step = Step("window", settings={"window": 16})
    with pytest.raises(TargetError, match="computes ordinary attention"):
        do_recipe(Recipe(str(tiny_llama), (step,), target="llama.cpp"), tmp_path / "a")
    with pytest.raises(RecipeError, match="blocks says where"):
        do_recipe(Recipe(str(tiny_llama), (Step("window", ("role:q",)),), target="torch", effort="quick"),
                  tmp_path / "b")
    with pytest.raises(RecipeError, match="did you mean"):
        do_recipe(Recipe(str(tiny_llama), (Step("window", settings={"widow": 1}),), target="torch",
                         effort="quick"), tmp_path / "c")
    with pytest.raises(RecipeError, match="move it up"):
        do_recipe(Recipe(str(tiny_llama), (Step("awq"), step), target="torch", effort="quick"),
                  tmp_path / "d")
