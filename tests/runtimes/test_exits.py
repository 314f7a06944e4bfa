"""Exits of an encoder: nothing changes without them, the guarantee holds, batches really shrink."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rarefy
from rarefy.calibration.examples import Examples, read_examples
from rarefy.core.errors import EditError, ModelError, RecipeError
from rarefy.core.nodes import Dense, Masked
from rarefy.core.structure import ExitAnswers
from rarefy.export.networks import EXITS, export_network, opened
from rarefy.models.form import Form
from rarefy.models.network import Network
from rarefy.models.opening import open_any
from rarefy.numerics.tails import binomial_tail, hoeffding_tail
from rarefy.runtimes.exit_training import together, trained
from rarefy.runtimes.exits import Exits, Stepped, load, measured, places, save
from rarefy.techniques.depth.early_exit import EarlyExit
from rarefy.training.loop import Settings
from small_networks import bert, tokens

QUICK = Settings(steps=150, rate=3e-3, batch=64, precision="float32")


@pytest.fixture(scope="module")
def network(tiny_encoder: Path) -> Network:
    found = open_any(tiny_encoder)
    assert isinstance(found, Network)
    return found


@pytest.fixture(scope="module")
def dev(network: Network, tiny_encoder: Path) -> Examples:
    return read_examples(network, str(tiny_encoder / "dev.tsv"))


@pytest.fixture(scope="module")
def exits(network: Network, tiny_encoder: Path) -> Exits:
    return trained(network, read_examples(network, str(tiny_encoder / "train.tsv")), (0,), QUICK)


def test_without_leaving_the_answer_is_the_networks(exits: Exits, network: Network, dev: Examples) -> None:
    inputs = next(dev.batches(40))
    logits, depth = exits(inputs)
    torch.testing.assert_close(logits, network.run(inputs))
    assert depth.tolist() == [2] * 40


def test_who_leaves_gets_the_exits_answer_and_the_rest_the_networks(
        exits: Exits, network: Network, dev: Examples) -> None:
    inputs = next(dev.batches(60))
    answers = exits.answers(Examples(inputs))
    certain = answers.logits[0].softmax(-1).amax(-1)
    threshold = float(certain.median())
    logits, depth = exits(inputs, threshold)
    left = certain >= threshold
    assert torch.equal(depth == 1, left) and 0 < int(left.sum()) < 60
    torch.testing.assert_close(logits[left], answers.logits[0][left], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[~left], network.run(inputs)[~left], rtol=1e-4, atol=1e-5)
    everyone, depth = exits(inputs, 0.0)
    assert depth.tolist() == [1] * 60 and everyone.shape == (60, 2)


def test_samples_that_left_are_not_computed(exits: Exits, dev: Examples) -> None:
    inputs = next(dev.batches(60))
    seen: list[int] = []
    hook = exits.stepped.blocks[1].register_forward_pre_hook(lambda part, args: seen.append(len(args[0])))
    certain = exits.answers(Examples(inputs)).logits[0].softmax(-1).amax(-1)
    seen.clear()
    _, depth = exits(inputs, float(certain.median()))
    hook.remove()
    assert seen == [int((depth == 2).sum())] and seen[0] < 60


def test_the_report(exits: Exits, network: Network, dev: Examples) -> None:
    first, second = dev.select(torch.arange(0, 200, 2)), dev.select(torch.arange(1, 200, 2))
    done = exits.calibrated(EarlyExit(max_loss=0.2), first)
    assert done.rule.loss <= 0.2 and done.rule.threshold < 1
    found = measured(done, second, batches=(50,))
    assert sum(found["left"].values()) == 100 and found["whole"]["same"] == 1.0
    assert found["mean_blocks"] <= found["whole"]["mean_blocks"] == 2
    assert set(found["seconds"][50]) == {"exits", "whole"}
    blocks = [point["mean_blocks"] for point in found["curve"]]
    assert blocks == sorted(blocks)  # the more careful, the deeper


@pytest.mark.parametrize("kind", ["distilbert", "albert", "mpnet", "electra"])
def test_every_family_steps(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100}
    width = {"hidden_dim": 64} if kind == "distilbert" else {"intermediate_size": 64}
    config = AutoConfig.for_model(kind, **size, **width, num_labels=3)
    module = AutoModelForSequenceClassification.from_config(config).eval()
    network = Network.from_module(module, form=Form("text", "classes", length=16, loader="AutoModel"))
    stepped, inputs = Stepped(network), tokens(4, 9)
    with torch.no_grad():
        hidden, args, kwargs = stepped.enter(inputs)
        for block in range(3):
            hidden = stepped.block(block, hidden, args, kwargs)
        torch.testing.assert_close(stepped.leave(hidden, inputs), network.run(inputs))


# ---- in a folder

def test_saved_exits_are_loaded(exits: Exits, network: Network, dev: Examples, tmp_path: Path) -> None:
    done = exits.calibrated(EarlyExit("entropy", max_loss=0.2), dev)
    export_network(network, {}, tmp_path / "out")
    save(done, tmp_path / "out")
    inputs = next(dev.batches(40))
    wanted, depth = done(inputs)
    for fast in (False, True):
        loaded = rarefy.load(tmp_path / "out", fast=fast)
        found = loaded(**inputs)
        torch.testing.assert_close(found.logits, wanted)
        assert torch.equal(found.blocks, depth) and loaded.exits.rule == done.rule
    assert network.form.answer(found, inputs).shape == (40, 2)  # it is called like any network
    plain = rarefy.load(tmp_path / "out", exits=False)
    torch.testing.assert_close(plain(**inputs).logits, network.run(inputs))


def test_no_threshold_survives_saving(exits: Exits, network: Network, tmp_path: Path) -> None:
    export_network(network, {}, tmp_path / "out")
    save(exits, tmp_path / "out")
    assert rarefy.load(tmp_path / "out").exits.rule.threshold == float("inf")


def test_exits_of_other_weights_are_refused(exits: Exits, network: Network, tmp_path: Path) -> None:
    export_network(network, {}, tmp_path / "one")
    save(exits, tmp_path / "one")
    path = network.map.sites[0].path
    export_network(network, {path: Dense(network.weight(path) + 1)}, tmp_path / "two")
    shutil.copy(tmp_path / "one" / EXITS, tmp_path / "two" / EXITS)
    with pytest.raises(ModelError, match="made for other weights"):
        rarefy.load(tmp_path / "two")
    (tmp_path / "one" / EXITS).write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="not the exits of this network"):
        rarefy.load(tmp_path / "one")
    (tmp_path / "one" / EXITS).unlink()
    with pytest.raises(ModelError, match="holds no network with exits"):
        load(tmp_path / "one")


# ---- network and heads together

def test_a_network_learns_with_its_exits(network: Network, tiny_encoder: Path, dev: Examples,
                                         tmp_path: Path) -> None:
    """Masked weights stay masked, and the first block says no less of the answer than for heads alone."""
    train = read_examples(network, str(tiny_encoder / "train.tsv"))
    path = next(site.path for site in network.map.sites if site.role == "up")
    weight = network.weight(path)
    keep = weight.abs() > weight.abs().median()
    heads, tuned = together(network, {path: Masked(keep, Dense(weight))}, network, train, (0,),
                            Settings(steps=60, rate=2e-3, batch=32, precision="float32"))
    tree = tuned.trees[path]
    assert isinstance(tree, Masked) and torch.equal(tree.keep, keep)
    export_network(network, tuned.trees, tmp_path / "out", params=tuned.params)
    learnt = opened(tmp_path / "out")
    assert isinstance(learnt, Network)
    said = Exits(Stepped(learnt), (0,), heads).answers(dev).logits.argmax(-1)
    alone = trained(network, train, (0,), QUICK).answers(dev).logits.argmax(-1)
    assert (said[0] == said[-1]).sum() >= (alone[0] == alone[-1]).sum() > 100
    assert (said[-1] == alone[-1]).float().mean() > 0.9  # the end still says what it said


# ---- the rule

def answers(agree: Tensor, sure: Tensor) -> ExitAnswers:
    """One exit that is as sure as told, of class 1 where it agrees with the network, which says 1."""
    exit_ = torch.stack([1 - sure, sure], -1)
    exit_ = torch.where(agree[:, None], exit_, exit_.flip(-1)).log()
    end = torch.tensor([0.01, 0.99]).log().expand(len(sure), 2)
    return ExitAnswers(torch.stack([exit_, end]))


def test_the_guarantee_holds_on_new_samples() -> None:
    """The exit errs with probability 1 - sure: few of many calibrations may choose a risk above the bound."""
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> ExitAnswers:
        sure = 0.5 + 0.5 * torch.rand(count, generator=generator).clamp(1e-3, 0.999)
        return answers(torch.rand(count, generator=generator) < sure, sure)

    technique, fresh, failures = EarlyExit(max_loss=0.05, delta=0.1), drawn(20000), 0
    for _ in range(40):
        rule = technique.calibrated(drawn(500))
        assert rule.threshold < 1
        failures += float(technique.lost(fresh, rule.threshold).float().mean()) > 0.05
    assert failures <= 9  # P(Bin(40, 0.1) > 9) < 1%


def test_certainties() -> None:
    logits = torch.tensor([[[2.0, 0, 0]], [[0, 1.0, 0]], [[0, 3.0, 0]]])
    p = logits[-1, 0].softmax(-1)
    assert float(EarlyExit().certainty(logits, 4)) == pytest.approx(float(p.max()))
    entropy = 1 - float(-(p * p.log()).sum()) / torch.tensor(3.0).log().item()
    assert float(EarlyExit("entropy").certainty(logits, 4)) == pytest.approx(entropy, abs=1e-6)
    assert float(EarlyExit("patience").certainty(logits, 4)) == 0.5  # two in a row of four
    three = ExitAnswers(torch.cat([logits, logits[-1:]]))
    assert EarlyExit("patience").leaves(three, 0.5).tolist() == [2]
    assert EarlyExit("patience").leaves(three, 0.25).tolist() == [0]


def test_tails_are_literal() -> None:
    import math

    literal = sum(math.comb(20, k) * 0.1**k * 0.9 ** (20 - k) for k in range(3))
    assert binomial_tail(2, 20, 0.1) == pytest.approx(literal)
    assert hoeffding_tail(0.0, 100, 0.1) == pytest.approx(math.exp(-2))
    assert hoeffding_tail(0.2, 100, 0.1) == 1.0


def test_harm_counts_right_answers_that_become_wrong() -> None:
    found = answers(torch.tensor([False, False, True]), torch.tensor([0.9, 0.9, 0.9]))
    labelled = ExitAnswers(found.logits, torch.tensor([0, 1, 1]))  # the network is wrong about the first
    assert EarlyExit().lost(labelled, 0.5).tolist() == [True, True, False]
    assert EarlyExit(harm=True).lost(labelled, 0.5).tolist() == [False, True, False]
    with pytest.raises(EditError, match="no labels"):
        EarlyExit(harm=True).lost(found, 0.5)


def test_too_few_samples_say_how_many() -> None:
    rule = EarlyExit(max_loss=0.01).calibrated(answers(torch.ones(20).bool(), torch.full((20,), 0.9)))
    assert rule.threshold == float("inf") and "at least 299 are needed" in rule.note


@pytest.mark.parametrize(("settings", "message"), [
    ({"rule": "entropie"}, "did you mean 'entropy'"), ({"bound": "exact"}, "binomial, hoeffding"),
    ({"max_loss": 0.0}, "above 0"), ({"delta": 1.0}, "below 1")])
def test_settings_that_mean_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        EarlyExit(**settings)


def test_exits_stand_evenly_where_nobody_says(network: Network) -> None:
    stepped = Stepped(network)
    assert places(stepped, ()) == (0,)
    assert stepped.names == ("bert.encoder.layer.0", "bert.encoder.layer.1") and stepped.work == (0.5, 1.0)
    with pytest.raises(RecipeError, match=r"from 0 to 0 \(0 bert.encoder.layer.0\)"):
        places(stepped, (1,))


def test_what_has_no_exits(network: Network, dev: Examples) -> None:
    with pytest.raises(ModelError, match="gives no classes"):
        trained(Network.from_module(bert()), Examples(tokens(4, 5)), (0,))
    with pytest.raises(RecipeError, match="from 0 to 0"):
        trained(network, dev, (1,))
    with pytest.raises(EditError, match="not finite"):
        EarlyExit().calibrated(ExitAnswers(torch.full((2, 3, 2), float("nan"))))
    with pytest.raises(EditError, match="0 exits"):
        EarlyExit().calibrated(ExitAnswers(torch.zeros(1, 3, 2)))
