"""Networks in the native format: back as they were, strictly, and whole to run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel

import rarefy
from rarefy.calibration.examples import read_examples
from rarefy.core.edit import edit
from rarefy.core.errors import ModelError, TargetError
from rarefy.core.nodes import Dense, Masked, Node, Product
from rarefy.export.networks import export_network, live, opened, stored_trees
from rarefy.models.form import Form
from rarefy.models.network import TENSOR, Network
from rarefy.models.opening import open_any
from rarefy.numerics.grids import integer_grid
from rarefy.techniques.quantize.rtn import RTN
from tiny_networks import Digits, TinyCNN


def rounded(network: Network) -> dict[str, Node]:
    """Something of everything: codes, masks, products."""
    trees: dict[str, Node] = {}
    for k, site in enumerate(network.map.sites):
        weight = network.weight(site.path)
        match k % 3:
            case 0:
                trees[site.path], _ = edit(site.path, Dense(weight), weight, RTN(integer_grid(8, 0)), "rtn",
                                           None, torch.Generator())
            case 1:
                trees[site.path] = Masked(weight.abs() > weight.abs().median(), Dense(weight.half()))
            case _:
                U, S, V = torch.linalg.svd(weight, full_matrices=False)
                rank = max(1, len(S) // 2)
                trees[site.path] = Product(Dense(U[:, :rank] * S[:rank]), Dense(V[:rank].contiguous()))
    return trees


def test_encoder_comes_back(tiny_encoder: Path, tmp_path: Path) -> None:
    network = open_any(tiny_encoder)
    assert isinstance(network, Network)
    trees = rounded(network)
    size = export_network(network, trees, tmp_path / "out")
    assert size == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    again = opened(tmp_path / "out")
    assert isinstance(again, Network) and again.form == network.form
    assert again.map.sites == network.map.sites
    assert set(stored_trees(again)) == set(trees)
    examples = read_examples(again, str(tiny_encoder / "dev.tsv"), count=8)
    batch = next(examples.batches(8))
    with torch.no_grad():
        expected = network.run(batch, network.tensors(trees.get))
        torch.testing.assert_close(again.run(batch), expected)
        loaded = rarefy.load(tmp_path / "out")
        torch.testing.assert_close(loaded(**batch).logits, expected)
        fast = rarefy.load(tmp_path / "out", fast=True, exact=True)
        torch.testing.assert_close(fast(**batch).logits, expected, rtol=1e-3, atol=1e-3)
    assert set(fast.lowered) == set(trees)
    assert all(values.requires_grad for values in loaded.parameters())


def test_a_module_of_ones_own_comes_back(tiny_cnn: Digits, tmp_path: Path) -> None:
    network = Network.from_module(tiny_cnn.module)
    trees = rounded(network)
    export_network(network, trees, tmp_path / "out")
    with pytest.raises(ModelError, match=r"holds a TinyCNN, whose code is not in it; .*into=TinyCNN\(\)"):
        rarefy.load(tmp_path / "out")
    fresh, x = TinyCNN(), tiny_cnn.test[0][:8]
    before = fresh.fc.weight.clone()
    loaded = rarefy.load(tmp_path / "out", into=fresh)
    assert torch.equal(fresh.fc.weight, before) and not loaded.training
    assert int(loaded.stem[1].num_batches_tracked) == int(tiny_cnn.module.stem[1].num_batches_tracked) > 0
    with torch.no_grad():
        expected = network.run({TENSOR: x}, network.tensors(trees.get))
        torch.testing.assert_close(loaded(x), expected)
        fast = rarefy.load(tmp_path / "out", into=TinyCNN(), fast=True, exact=True)
        torch.testing.assert_close(fast(x), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ModelError, match=r"missing|unexpected"):
        rarefy.load(tmp_path / "out", into=nn.Linear(2, 2))


def test_what_no_tree_changes_is_as_it_was(tiny_cnn: Digits, tmp_path: Path) -> None:
    network = Network.from_module(tiny_cnn.module)
    export_network(network, {}, tmp_path / "out")
    loaded = rarefy.load(tmp_path / "out", into=TinyCNN())
    assert all(torch.equal(values, tiny_cnn.module.state_dict()[name])
               for name, values in loaded.state_dict().items())
    with pytest.raises(TargetError, match=r"fc\.weigth: no such weight; did you mean 'fc\.weight'"):
        export_network(network, {"fc.weigth": Dense(torch.zeros(1, 1))}, tmp_path / "other")


def test_pooling_and_missing_poolers_travel_along(tiny_tokenizer: object, tmp_path: Path) -> None:
    config = AutoConfig.for_model("bert", vocab_size=512, hidden_size=16, intermediate_size=32,
                                  num_hidden_layers=1, num_attention_heads=2, pad_token_id=2)
    AutoModel.from_config(config, add_pooling_layer=False).save_pretrained(tmp_path / "in")
    tiny_tokenizer.save_pretrained(tmp_path / "in")
    network = open_any(tmp_path / "in")
    assert isinstance(network, Network)
    export_network(network, {}, tmp_path / "out")
    again = opened(tmp_path / "out")
    assert isinstance(again, Network)
    assert again.form == Form("text", "embedding", "mean", 128, loader="AutoModel")
    batch = dict(again.tokenizer(["one", "two three"], padding=True, return_tensors="pt"))
    with torch.no_grad():
        torch.testing.assert_close(again.run(batch), network.run(batch))


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(tokens).mean(1))

    network = Network.from_module(Tied())
    export_network(network, {}, tmp_path / "out")
    assert set(json.loads((tmp_path / "out" / "tree.json").read_text())["trees"]) == {"table.weight"}
    loaded = live(opened(tmp_path / "out", Tied()))
    assert loaded.head.weight is loaded.table.weight


def test_damaged_folders_are_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    network = open_any(tiny_encoder)
    assert isinstance(network, Network)
    export_network(network, {}, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "form": {"takes": "text", "x": 1}}))
    with pytest.raises(ModelError, match="does not say how the network is called"):
        opened(tmp_path / "out")


def test_folders_of_jobs_lead_to_what_is_in_them(tiny_encoder: Path, tmp_path: Path) -> None:
    network = open_any(tiny_encoder)
    assert isinstance(network, Network)
    export_network(network, {}, tmp_path / "out" / "model")
    (tmp_path / "out" / "receipt.json").write_text("{}")
    assert isinstance(opened(tmp_path / "out"), Network)
    plain = tmp_path / "plain"
    shutil.copytree(tiny_encoder, plain)
    held = load_file(plain / "model.safetensors")
    save_file(held, plain / "model.safetensors", {"format": "pt"})
    assert isinstance(opened(plain), Network)
