"""transformers and PEFT in a process of their own: what they answer, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("compressed_tensors")

from rarefy.core.errors import TargetError
from rarefy.core.nodes import Dense, Product, Sum
from rarefy.export.compressed_tensors import export_transformers
from rarefy.export.native import load
from rarefy.numerics.grids import integer_grid
from rarefy.runtimes.transformers import answer, verify_checkpoint
from small_networks import answer_of, block_trees

INPUTS = {"input_ids": torch.tensor([[0, 5, 17, 80, 33, 2, 9, 101]])}


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Any:
    return load(tiny_llama).eval().requires_grad_(False)


def test_a_repair_is_an_adapter(llama: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    trees = block_trees(llama, integer_grid(2, 32, symmetric=False))
    base = dict(trees)
    for k, path in enumerate(trees):
        rank = 8 if k % 3 else 4
        u, s, v = torch.linalg.svd(llama.state_dict()[path] - trees[path].dense(), full_matrices=False)
        trees[path] = Sum((trees[path], Product(Dense(u[:, :rank] * s[:rank]), Dense(v[:rank].contiguous()))))
    done = export_transformers(llama, trees, tmp_path / "out")
    assert done.adapter == tmp_path / "out" / "adapter"
    assert verify_checkpoint(tmp_path / "out", INPUTS, answer_of(llama, base, INPUTS)).error < 1e-4
    wanted = answer_of(llama, trees, INPUTS)
    repaired = verify_checkpoint(tmp_path / "out", INPUTS, wanted, adapter=done.adapter)
    assert repaired.error < 1e-4


def test_what_is_refused(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="not a transformers network"):
        export_transformers(nn.Linear(2, 2), {}, tmp_path / "out")
    with pytest.raises(TargetError, match=r"did you mean 'lm_head\.weight'"):
        export_transformers(llama, {"lm_head.weigth": Dense(torch.ones(1, 1))}, tmp_path / "out")
    trees = block_trees(llama, integer_grid(4, 32))
    wanted = answer_of(llama, trees, INPUTS)
    export_transformers(llama, trees, tmp_path / "out")
    held = load_file(tmp_path / "out" / "model.safetensors")
    gone = "model.layers.1.mlp.up_proj.weight_scale"
    save_file({name: values for name, values in held.items() if name != gone},
              tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(TargetError, match=r"transformers refuses it: .*weight_scale"):
        answer(tmp_path / "out", INPUTS)
    held[gone] = -held[gone]
    save_file(held, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(TargetError, match="answers otherwise"):
        verify_checkpoint(tmp_path / "out", INPUTS, wanted)
