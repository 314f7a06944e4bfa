"""Checkpoints that plain transformers and PEFT load, in a process without this project."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("compressed_tensors")

from rarefy.core.nodes import Dense, Masked, Node
from rarefy.export.compressed_tensors import export_transformers
from rarefy.export.native import load
from rarefy.numerics.grids import integer_grid
from rarefy.runtimes.transformers import verify_checkpoint
from small_networks import answer_of, bert, block_trees, rounded, rounded_trees, tokens

INPUTS = {"input_ids": torch.tensor([[0, 5, 17, 80, 33, 2, 9, 101]])}


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Any:
    return load(tiny_llama).eval().requires_grad_(False)


@pytest.mark.parametrize("grid", [integer_grid(4, 32), integer_grid(4, 32, symmetric=False),
                                  integer_grid(8, 0)], ids=lambda grid: grid.name)
def test_weights_alone(llama: Any, tmp_path: Path, grid: Any) -> None:
    trees = block_trees(llama, grid)
    done = export_transformers(llama, trees, tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out", INPUTS, answer_of(llama, trees, INPUTS)).error < 1e-4
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert told["format"] == "pack-quantized" and told["quantization_status"] == "compressed"
    assert told["ignore"] == ["lm_head"] and len(told["config_groups"]) == 1
    assert len(done.schemes) == 21 and done.notes == ()


def test_eight_bit_activations(llama: Any, tmp_path: Path) -> None:
    trees = block_trees(llama, integer_grid(8, 0))
    export_transformers(llama, trees, tmp_path / "out", activations=True)
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert told["format"] == "int-quantized"
    wanted = answer_of(llama, trees, INPUTS)
    assert verify_checkpoint(tmp_path / "out", INPUTS, wanted, tolerance=0.1).error < 0.1


def test_mixed_schemes_and_what_does_not_fit(llama: Any, tmp_path: Path) -> None:
    trees = block_trees(llama, integer_grid(4, 32), down=integer_grid(8, 64))
    embed = "model.embed_tokens.weight"
    trees[embed] = rounded(llama.state_dict()[embed], integer_grid(8, 0))
    done = export_transformers(llama, trees, tmp_path / "out")
    assert len(set(done.schemes.values())) == 2
    assert done.notes == (f"{embed}: a Quantized that compressed-tensors cannot hold; stored as float32",)
    assert verify_checkpoint(tmp_path / "out", INPUTS, answer_of(llama, trees, INPUTS)).error < 1e-4


def test_pruned_networks_are_ordinary(llama: Any, tmp_path: Path) -> None:
    state = llama.state_dict()
    trees: dict[str, Node] = {path: Masked(state[path].abs() > 0.02, Dense(state[path]))
                              for path in block_trees(llama, integer_grid(4, 32))}
    export_transformers(llama, trees, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert verify_checkpoint(tmp_path / "out", INPUTS, answer_of(llama, trees, INPUTS)).error < 1e-5


def test_an_encoder(tmp_path: Path) -> None:
    network, inputs = bert(pooling=True), tokens(3, 12)
    trees = {path: tree for path, tree in rounded_trees(network, integer_grid(4, 32)).items()
             if "layer" in path}
    export_transformers(network, trees, tmp_path / "out")
    wanted = answer_of(network, trees, inputs)
    assert verify_checkpoint(tmp_path / "out", inputs, wanted, loader="AutoModel").error < 1e-4
