"""Blocks that share matrices: the fit is least squares, what is shared is stored and trained once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
from rarefy.calibration.examples import Examples, read_examples
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nodes import Dense, Shared, Sum
from rarefy.core.nouns import Evidence
from rarefy.core.structure import Sharing, Stack
from rarefy.export.native import export_native, open_native, trees_of
from rarefy.export.networks import export_network, opened, stored_trees
from rarefy.measure.divergence import Reference
from rarefy.measure.task import Judge
from rarefy.models.form import Form
from rarefy.models.model import Model, open_model
from rarefy.models.network import TENSOR, Network
from rarefy.models.opening import open_any
from rarefy.models.runner import Runner
from rarefy.run.sharing import share_layers
from rarefy.techniques.distill.soft_labels import SoftLabels
from rarefy.techniques.share.layers import Layers
from rarefy.training.examples import Rows
from rarefy.training.loop import Settings
from rarefy.training.signals import Distillation
from rarefy.training.tune import Tuning, tune
from small_networks import bert, tokens
from tiny_networks import TinyRNN


@pytest.fixture(scope="module")
def stack() -> tuple[Stack, list[Tensor]]:
    g = torch.Generator().manual_seed(0)
    scales = torch.linspace(0.2, 2, 6)[:, None]
    inputs = [torch.randn(6, 200, generator=g) * scales.roll(k, 0) for k in range(3)]
    weights = torch.randn(3, 5, 6, generator=g)
    seen = tuple(Evidence(X @ X.T, 200) for X in inputs)
    return Stack("up", ("a", "b", "c"), weights, seen), inputs


def test_fit_is_least_squares(stack: tuple[Stack, list[Tensor]]) -> None:
    """Literally: one regression of all outputs on all inputs."""
    found, X = stack
    W, corrections = Layers(damping=0.0).share(found)
    outputs = torch.cat([W_l @ X_l for W_l, X_l in zip(found.weights, X, strict=True)], 1)
    wanted = torch.linalg.lstsq(torch.cat(X, 1).T, outputs.T).solution.T
    torch.testing.assert_close(W, wanted, rtol=1e-4, atol=1e-5)
    assert corrections == (None, None)

    def lost(start: str) -> float:
        M, _ = Layers(start=start, damping=0.0).share(found)
        return sum(float(((M - W_l) @ X_l).square().sum()) for W_l, X_l in zip(found.weights, X, strict=True))

    assert lost("fit") < lost("average") and lost("fit") < lost("first")


def test_corrections_are_the_best_of_their_rank(stack: tuple[Stack, list[Tensor]]) -> None:
    found, X = stack
    W, corrections = Layers(start="first", rank=2, damping=0.0).share(found)
    torch.testing.assert_close(W, found.weights[0])
    for W_l, X_l, correction in zip(found.weights[1:], X[1:], corrections, strict=True):
        assert correction is not None
        left, right = correction
        assert left.shape == (5, 2) and right.shape == (2, 6)
        missing = (W_l - W) @ X_l
        best = torch.linalg.svdvals(missing.double())[2:].square().sum()  # Eckart-Young: X has full rank
        got = (missing - left @ right @ X_l).square().sum().double()
        torch.testing.assert_close(got, best, rtol=1e-3, atol=1e-6)


def test_groups() -> None:
    assert [list(g) for g in Layers(group=2).groups(5)] == [[0, 1], [2, 3]]
    assert [list(g) for g in Layers().groups(3)] == [[0, 1, 2]]
    assert Layers(what="ffn").chosen("down") and not Layers(what="ffn").chosen("q")
    assert isinstance(Layers(), Sharing)
    with pytest.raises(EditError, match="sharing takes two"):
        Layers().groups(1)


@pytest.mark.parametrize(("settings", "message"), [
    ({"what": "heads"}, "all, attention, ffn"), ({"start": "median"}, "average, first, fit"),
    ({"group": 1}, "2 blocks or more"), ({"rank": -1}, "0 or more")])
def test_settings_that_mean_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Layers(**settings)


def test_what_cannot_be_shared(stack: tuple[Stack, list[Tensor]]) -> None:
    with pytest.raises(EditError, match="rank 5 corrects nothing"):
        Layers(rank=5).share(stack[0])
    with pytest.raises(EditError, match="needs examples"):
        share_layers(Network.from_module(bert()), Layers())
    huge = bert()
    huge.encoder.layer[0].output.dense.weight.data[0, 0] = 1e6
    with pytest.raises(EditError, match="overflows float16"):
        share_layers(Network.from_module(huge), Layers(start="first"))


@pytest.mark.parametrize("rank", [0, 4])
def test_an_encoder_stores_shared_weights_once(rank: int, tmp_path: Path) -> None:
    network = Network.from_module(bert())
    whole = export_native_bytes(network, {}, tmp_path / "whole")
    done = share_layers(network, Layers(rank=rank), Examples(tokens(6, 9)), dtype=torch.float32)
    stored = export_native_bytes(network, done.trees, tmp_path / "shared")
    first, second = (sum(site.shape[0] * site.shape[1] for site in network.map.in_block(b)) for b in range(2))
    deltas = sum(rank * sum(site.shape) for site in network.map.in_block(1))
    assert abs(whole - stored - 4 * (second - deltas)) < 6000 and first == second  # the rest is JSON
    again = opened(tmp_path / "shared")
    assert isinstance(again, Network)
    torch.testing.assert_close(again.run(tokens(3, 8)),
                               network.run(tokens(3, 8), network.tensors(done.trees.get)))
    path = "encoder.layer.1.output.dense.weight"
    assert isinstance(stored_trees(again)[path], Sum if rank else Shared)


def export_native_bytes(network: Network, trees: dict[str, Any], folder: Path) -> int:
    plain = Network.from_module(network.module, form=network.form, tokenizer=_Tokenizer())
    return export_network(plain, trees, folder)


class _Tokenizer:
    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "tokenizer.txt").write_text("none")


def test_a_language_model_shares_too(tiny_llama: Path, tmp_path: Path) -> None:
    model = open_model(tiny_llama)
    windows = torch.randint(0, 512, (4, 48), generator=torch.Generator().manual_seed(0))
    reference = Reference(model, windows)
    kl = {}
    for name, technique in {"average": Layers("ffn", start="average"), "fit": Layers("ffn"),
                            "corrected": Layers("ffn", rank=32)}.items():
        done = share_layers(model, technique, windows)
        kl[name] = reference.compare(Runner(model, done.trees.get)).kl_mean
    assert kl["corrected"] < kl["fit"]
    assert all(receipt.error >= 0 for receipt in done.receipts) and len(done.receipts) == 9
    export_native(model, done.trees, tmp_path / "out")
    again = open_native(tmp_path / "out")
    assert isinstance(again, Model)
    assert isinstance(trees_of(again)["model.layers.2.mlp.up_proj.weight"], Sum)
    assert reference.compare(Runner(again)).kl_mean == pytest.approx(kl["corrected"], rel=1e-2, abs=1e-4)


def test_distillation_recovers_what_sharing_lost(tiny_encoder: Path) -> None:
    network = open_any(tiny_encoder)
    assert isinstance(network, Network)
    found = read_examples(network, str(tiny_encoder / "train.tsv"))
    judge = Judge(network, read_examples(network, str(tiny_encoder / "dev.tsv")))
    done = share_layers(network, Layers(rank=4), found.select(torch.arange(64)), dtype=torch.float32)
    before = judge.compare(network, done.trees.get)
    tuned = tune(network, done.trees, Tuning(frozenset({"weights", "adapters", "norms", "biases"})),
                 Distillation(network, network, ((1.0, SoftLabels()),)), Rows(found.inputs),
                 Settings(steps=40, rate=2e-3, precision="float32"))
    owner = tuned.trees["bert.encoder.layer.0.output.dense.weight"]
    follower = tuned.trees["bert.encoder.layer.1.output.dense.weight"]
    assert isinstance(owner, Dense) and isinstance(follower, Sum)
    shared = follower.terms[0]
    assert isinstance(shared, Shared) and torch.equal(shared.dense(), owner.dense())
    assert not torch.equal(owner.dense(), done.trees["bert.encoder.layer.0.output.dense.weight"].dense())
    tensors = network.tensors(tuned.trees.get) | tuned.params
    answers = network.run(found.batches(200).__next__(), tensors)
    teacher = network.run(found.batches(200).__next__())
    agreed = float((answers.argmax(1) == teacher.argmax(1)).float().mean())
    assert before.same is not None and agreed > max(before.same, 0.9)


# ---- any network ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_recurrent_layers_share_what_has_one_shape(kind: str, request: pytest.FixtureRequest, tmp_path: Path
                                                   ) -> None:
    digits = request.getfixturevalue(f"tiny_{kind}")
    network, (x, _) = Network.from_module(digits.module), digits.train
    done = share_layers(network, Layers(rank=2), Examples({TENSOR: x[:64]}))
    at = "rnn.layers.{}.{}.weight".format
    assert {path: type(tree) for path, tree in done.trees.items()} == {
        at(1, "ih"): Dense, at(2, "ih"): Sum, at(0, "hh"): Dense, at(1, "hh"): Sum, at(2, "hh"): Sum}
    notes = {receipt.site: receipt.note for receipt in done.receipts}
    assert notes[at(0, "ih")] == "stays alone: no other layer has one of its shape"
    assert notes[at(0, "hh")] == "stored for all" and notes[at(2, "ih")] == f"uses {at(1, 'ih')}"
    stored = export_network(network, done.trees, tmp_path / "out")
    again = opened(tmp_path / "out", TinyRNN(kind.upper()))
    assert stored < 0.6 * export_network(network, {}, tmp_path / "whole")
    assert isinstance(again, Network)
    tensors = network.tensors(done.trees.get)
    torch.testing.assert_close(again.run({TENSOR: x[:8]}), network.run({TENSOR: x[:8]}, tensors))
    pair = share_layers(network, Layers(group=2, start="average"))
    left = {receipt.site for receipt in pair.receipts if "left over" in receipt.note}
    assert left == {at(2, "hh")}


def test_plain_layers_share_and_corrections_of_full_rank_change_nothing() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3),
                           nn.Flatten(), nn.Linear(8, 3))
    network, x = Network.from_module(module), torch.randn(40, 2, 8)
    done = share_layers(network, Layers(start="first", rank=3), Examples({TENSOR: x}), dtype=torch.float32)
    assert set(done.trees) == {"2.weight", "4.weight"}
    assert done.trees["4.weight"].shape == (4, 12)
    lost = share_layers(network, Layers(start="first"), dtype=torch.float32)
    error = {receipt.site: receipt.error for receipt in done.receipts}
    assert error["4.weight"] < next(each.error for each in lost.receipts if each.site == "4.weight")


@pytest.mark.parametrize(("module", "settings", "message"), [
    (nn.GRU(4, 6), {}, "no two layers of one list have a weight of the same shape; sharing takes two"),
    (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), {}, "sharing takes two"),
    (nn.LSTM(4, 6, 2), {"what": "attention"}, "no weights of that kind to share, only hh; use what: all"),
    (nn.LSTM(4, 6, 2), {"what": "ffn"}, "no weights of that kind")])
def test_networks_with_nothing_to_share(module: nn.Module, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EditError, match=message):
        share_layers(Network.from_module(module), Layers(start="average", **settings))


@pytest.mark.parametrize("fast", [False, True])
def test_what_is_shared_is_in_memory_once(fast: bool, tmp_path: Path) -> None:
    module = nn.Sequential(nn.GRU(6, 6, 3, batch_first=True))
    network = Network.from_module(module, form=Form(gives="embedding"))
    done = share_layers(network, Layers(start="average", group=2), dtype=torch.float32)
    export_network(network, done.trees, tmp_path / "out")
    loaded = rarefy.load(tmp_path / "out", into=module, fast=fast)
    assert type(loaded[0]) is nn.GRU
    assert loaded[0].weight_hh_l0 is loaded[0].weight_hh_l1 is not loaded[0].weight_hh_l2
    whole = sum(value.numel() for value in nn.GRU(6, 6, 3).parameters())
    assert sum(value.numel() for value in loaded.parameters()) == whole - 2 * 18 * 6
    x = torch.randn(2, 5, 6)
    tensors = network.tensors(done.trees.get)
    torch.testing.assert_close(loaded(x)[0].flatten(1), network.run({TENSOR: x}, tensors))
