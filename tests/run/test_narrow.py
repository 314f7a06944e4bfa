"""Networks that are no language models made smaller for real."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rarefy
from rarefy.calibration.examples import Examples, read_examples
from rarefy.calibration.removals import removals, work
from rarefy.core.errors import EditError, ModelError, RecipeError
from rarefy.core.nouns import Recipe, Step
from rarefy.core.structure import Channels
from rarefy.measure.task import Judge
from rarefy.models.form import Form
from rarefy.models.narrowed import (
    channel_groups,
    neurons,
    reestimated,
    sized_like,
    sums,
    without_channels,
    without_neurons,
)
from rarefy.models.network import Network
from rarefy.models.opening import open_any
from rarefy.run.narrow import filtered, narrowed
from rarefy.run.planning import build
from rarefy.techniques.prune.filters import Filters
from small_networks import Residual, bert, images, residual, tokens
from tiny_networks import Digits, TinyCNN

pytest.importorskip("torch_pruning")


@pytest.fixture
def cnn() -> Network:
    return Network.from_module(residual())


def kill(module: nn.Module, network: Network, root: str, gone: list[int]) -> None:
    """Nothing that these channels say is heard: whatever reads them has zeros there."""
    group, = (each for each in channel_groups(network, images(2))[0] if each.root == root)
    for place in group.readers:
        weight = module.get_parameter(place.path)
        weight.data[:, torch.isin(place.unit, torch.tensor(gone))] = 0


# ---- which channels go together

def test_groups_of_a_residual_network(cnn: Network) -> None:
    groups, refused = channel_groups(cnn, images(2))
    assert [group.root for group in groups] == ["stem", "one"] and "head" in refused
    stem, one = groups
    assert {place.path for place in stem.writers} == {"stem.weight", "two.weight", "norm_two.weight",
                                                     "depthwise.weight"}
    assert {place.path for place in stem.readers} == {"one.weight", "head.weight"}
    flat = next(place for place in stem.readers if place.path == "head.weight")
    assert torch.equal(flat.unit, torch.arange(8).repeat_interleave(9))
    assert [place.path for place in one.readers] == ["two.weight"]
    absolute, square = sums(cnn, one)
    by_hand = [cnn.module.one.weight[c].square().sum() + cnn.module.two.weight[:, c].square().sum()
               + cnn.module.norm_one.weight[c].square() for c in range(8)]
    torch.testing.assert_close(square, torch.stack(by_hand))
    assert bool((absolute >= square.sqrt()).all())


@pytest.mark.parametrize("root", ["stem", "one"])
def test_channels_nobody_hears_go_without_a_trace(root: str) -> None:
    module = copy.deepcopy(residual())
    kill(module, Network.from_module(module), root, [1, 6])
    network = Network.from_module(module)
    smaller = without_channels(network, images(2), {root: torch.tensor([0, 2, 3, 4, 5, 7])}, {})
    torch.testing.assert_close(smaller.run(images(5)), network.run(images(5)))
    assert smaller.parameters < network.parameters
    assert smaller.module.get_parameter(f"{root}.weight").shape[0] == 6


def test_keeping_everything_with_a_refit_changes_nothing(cnn: Network) -> None:
    same = without_channels(cnn, images(2), {"one": torch.arange(8)}, {"one": torch.eye(72)})
    torch.testing.assert_close(same.run(images(4)), cnn.run(images(4)))


# ---- what they cost

def test_removal_is_the_square_of_the_first_order_change(cnn: Network) -> None:
    """Literally: one sample at a time, scale the channel, differentiate."""
    from rarefy.calibration.observe import direction

    group = channel_groups(cnn, images(2))[0][1]
    examples = Examples(images(3))
    found = removals(cnn, [group], examples, torch.Generator().manual_seed(0))["one"]
    vectors = direction(cnn.run(images(3)), cnn.form, torch.Generator().manual_seed(0))
    wanted = torch.zeros(8)
    for sample in range(3):
        gate = torch.ones(8, requires_grad=True)
        hook = cnn.module.two.register_forward_pre_hook(
            lambda part, args, gate=gate: (args[0] * gate.view(1, -1, 1, 1),))
        with torch.enable_grad():
            answer = cnn.module(images(3)["0"][sample:sample + 1])
            wanted += torch.autograd.grad(answer, gate, vectors[sample:sample + 1])[0].square() / 6
        hook.remove()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


def test_work_counts_what_goes_with_a_channel(cnn: Network) -> None:
    groups = channel_groups(cnn, images(2))[0]
    found = work(cnn, groups, images(2))
    assert found["one"] == 144 * 8 * 9 * 2  # a filter of one, a slice of two, at 12 x 12 places


def test_the_trained_network_keeps_what_it_knows(
        tiny_cnn: Digits, record_property: Callable[[str, object], None]) -> None:
    network = Network.from_module(tiny_cnn.module)
    train = Examples({"0": tiny_cnn.train[0][:256]}, tiny_cnn.train[1][:256])
    judge = Judge(network, Examples({"0": tiny_cnn.test[0]}, tiny_cnn.test[1]))
    kls: dict[str, float] = {}
    for name, settings in {"l1": {"criterion": "l1", "compensate": False},
                           "taylor": {"criterion": "taylor", "compensate": False},
                           "refitted": {"criterion": "taylor"}, "global": {"spread": "global"}}.items():
        done = filtered(network, Filters(ratio=0.3, **settings), train)  # type: ignore[arg-type]
        kls[name] = judge.compare(done.network).mean
        assert done.network.parameters < network.parameters
    assert kls["taylor"] < kls["l1"]
    assert kls["refitted"] < kls["taylor"]
    for label, each in (("before", network), ("after", done.network)):
        started = time.perf_counter()
        each.run({"0": tiny_cnn.test[0]})
        record_property(f"{label}: parameters, seconds", (each.parameters, time.perf_counter() - started))
    record_property("kl", kls)


def test_statistics_are_taken_anew() -> None:
    network = Network.from_module(residual())
    batches = [images(32, seed=1), images(32, seed=2)]
    again = reestimated(network, batches)
    entered: list[torch.Tensor] = []
    hook = again.module.norm_one.register_forward_hook(lambda part, args, out: entered.append(args[0]))
    for batch in batches:
        again.run(batch)
    hook.remove()
    torch.testing.assert_close(again.module.norm_one.running_mean, torch.cat(entered).mean((0, 2, 3)),
                               rtol=1e-4, atol=1e-5)
    assert not torch.equal(network.module.norm_one.running_mean, again.module.norm_one.running_mean)
    plain = Network.from_module(bert())
    assert reestimated(plain, []) is plain


def test_another_module_of_the_class_takes_the_smaller_layers(tiny_cnn: Digits) -> None:
    network = Network.from_module(tiny_cnn.module)
    done = filtered(network, Filters(criterion="l2", compensate=False),
                    Examples({"0": tiny_cnn.train[0][:8]})).network
    state = done.module.state_dict()
    fresh = sized_like(TinyCNN(), {name: tuple(value.shape) for name, value in state.items()})
    fresh.load_state_dict(state)
    x = tiny_cnn.test[0][:4]
    torch.testing.assert_close(fresh.eval()(x), done.run({"0": x}))
    assert fresh.depthwise.groups == done.module.depthwise.weight.shape[0]


# ---- choices

def group(costs: list[float], work: float = 1.0) -> Channels:
    n = torch.tensor(costs, dtype=torch.float32)
    return Channels("s", n, n.square(), work, n)


def test_global_spends_where_it_is_cheap() -> None:
    groups = (group([1, 2, 3, 4]), group([10, 20, 30, 40], work=5.0))
    kept = Filters(ratio=0.25, spread="global", floor=0.5).keep(groups)  # a quarter of 4 + 20
    assert [index.tolist() for index in kept] == [[2, 3], [2, 3]] or [len(k) for k in kept] == [2, 3]
    kept = Filters(ratio=0.5, multiple=2).keep((group([4, 1, 3, 2]),))
    assert kept[0].tolist() == [0, 2]


@pytest.mark.parametrize(("settings", "message"), [
    ({"criterion": "l3"}, "choose one of"), ({"spread": "wide"}, "uniform or global"),
    ({"ratio": 0.0}, "above 0"),
    ({"ratio": 1.0}, "below 1"), ({"multiple": 0}, "1 or more"),
    ({"spread": "global", "criterion": "l1"}, "cannot be compared")])
def test_settings_that_mean_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Filters(**settings)


def test_what_cannot_be_taken_out(cnn: Network) -> None:
    with pytest.raises(EditError, match="leaves nothing to take out"):
        filtered(cnn, Filters(multiple=8), Examples(images(4)))
    with pytest.raises(RecipeError, match="has no module 'stm'"):
        filtered(cnn, Filters(ignore=("stm",)), Examples(images(4)))
    with pytest.raises(EditError, match="no channels can be taken out"):
        filtered(cnn, Filters(ignore=("stem", "one")), Examples(images(4)))
    with pytest.raises(ModelError, match="no channel is left"):
        without_channels(cnn, images(2), {"one": torch.arange(0)}, {})
    with pytest.raises(EditError, match="needs calibration samples"):
        narrowed(cnn, Recipe("", (Step("filters"),)), None)
    with pytest.raises(EditError, match="is no encoder of transformers"):
        narrowed(cnn, Recipe("", (Step("units"),)), Examples(images(4)))
    with pytest.raises(RecipeError, match="its scope is 'exits'"):
        build(Step("early_exit"))
    grouped = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(512, 2))
    _, refused = channel_groups(Network.from_module(grouped), images(2))
    assert "in groups" in refused["0"]


# ---- encoders

def encoder() -> Network:
    return Network.from_module(bert())


def test_dead_neurons_of_an_encoder_go_without_a_trace() -> None:
    network = bert()
    for layer in network.encoder.layer:
        layer.output.dense.weight.data[:, 5:37] = 0
    whole = Network.from_module(network)
    kept = torch.cat([torch.arange(5), torch.arange(37, 64)])
    smaller = without_neurons(whole, {0: kept, 1: kept}, {})
    assert smaller.config.intermediate_size == 32 and smaller.parameters < whole.parameters
    torch.testing.assert_close(smaller.run(tokens(3, 9)), whole.run(tokens(3, 9)))
    assert neurons(smaller, 0).count == 32


def test_a_trained_encoder_with_fewer_neurons_and_blocks(tiny_encoder: Path, tmp_path: Path) -> None:
    network = open_any(tiny_encoder)
    assert isinstance(network, Network)
    train = read_examples(network, str(tiny_encoder / "train.tsv"), count=128)
    judge = Judge(network, read_examples(network, str(tiny_encoder / "dev.tsv")))
    found = {}
    for criterion, refit in (("magnitude", False), ("magnitude", True), ("obs", True)):
        step = Step("units", settings={"ratio": 0.5, "criterion": criterion, "compensate": refit})
        done = narrowed(network, Recipe("", (step,)), train)
        found[criterion, refit] = judge.compare(done.network).mean
    assert max(found["obs", True], found["magnitude", True]) < found["magnitude", False]
    done.network.module.save_pretrained(tmp_path)
    network.tokenizer.save_pretrained(tmp_path)
    again = open_any(tmp_path)
    assert isinstance(again, Network)
    assert judge.compare(again).mean == pytest.approx(found["obs", True], rel=1e-3, abs=1e-6)
    step = Step("drop", settings={"by": "kl", "keep_first": 0, "keep_last": 0})
    shorter = narrowed(network, Recipe("", (step,)), train)
    assert shorter.network.map.blocks == 1
    by_influence = narrowed(network, Recipe("", (Step("drop", settings={"keep_first": 0}),)), train)
    assert by_influence.receipts[0].site == "block 0"


@pytest.mark.parametrize("kind", ["distilbert", "roberta", "albert", "mpnet", "electra"])
def test_every_family_of_encoders(kind: str) -> None:
    from transformers import AutoConfig, AutoModel

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    width = {"hidden_dim": 64} if kind == "distilbert" else {"intermediate_size": 64}
    config = AutoConfig.for_model(kind, **size, **width)
    network = Network.from_module(AutoModel.from_config(config).eval(), form=Form(
        "text", "embedding", "mean", 16, loader="AutoModel"))
    kept = {block: torch.arange(32) for block in range(network.map.blocks)}
    smaller = without_neurons(network, kept, {})
    assert smaller.run(tokens(2, 7)).shape == (2, 32) and smaller.parameters < network.parameters
    with pytest.raises(ModelError, match="width of a head"):
        narrowed(network, Recipe("", (Step("units", settings={"units": "heads"}),)), Examples(tokens(2, 7)))


def test_residual_is_what_it_was() -> None:
    """Narrowing works on copies."""
    module = Residual()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    filtered(Network.from_module(module.eval()), Filters(), Examples(images(4)))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


# ---- in a job

def test_a_job_takes_channels_out_and_clusters_what_is_left(tiny_cnn: Digits, tmp_path: Path) -> None:
    from rarefy.run.job import Job, compress

    steps = (Step("filters", settings={"ratio": 0.25}), Step("kmeans", settings={"values": 64}))
    x, y = tiny_cnn.train
    job = Job(Network.from_module(tiny_cnn.module), tmp_path / "out", target="torch", effort="quick",
              data=((x[:256], y[:256]),), eval_data=((tiny_cnn.test[0][:128], tiny_cnn.test[1][:128]),),
              recipe=Recipe("", steps, target="torch", effort="quick"))
    done = compress(job)
    again = rarefy.load(tmp_path / "out", into=TinyCNN())
    assert again.stem[0].weight.shape[0] == 12
    assert done.receipt["measured"]["float"]["task"]["accuracy"] > 0.9
