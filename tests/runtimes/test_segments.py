"""Exits of CNNs and plain networks: cuts where one tensor carries everything, batches that shrink there."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification

import rarefy
from rarefy.calibration.examples import Examples, read_examples
from rarefy.core.errors import ModelError, RecipeError
from rarefy.core.nodes import Dense, Masked
from rarefy.export.networks import export_network, opened
from rarefy.models.network import Network
from rarefy.numerics.grids import integer_grid
from rarefy.runtimes.exit_training import together, trained
from rarefy.runtimes.exits import Exits, load, measured, places, save
from rarefy.runtimes.segments import READ, Cut, Segments, places_read
from rarefy.techniques.depth.early_exit import EarlyExit
from rarefy.training.loop import Settings
from small_networks import images, residual, rounded_trees
from tiny_networks import Digits, TinyCNN

QUICK = Settings(steps=80, rate=1e-3, batch=64, precision="float32")


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm(self.one(x)))
        out = self.two(out)
        out += x
        return self.relu(out)  # called twice, as networks of torchvision do


def blocks(count: int = 2, width: int = 4) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(),
                             *(Block(width) for _ in range(count)),
                             nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)).eval()


@pytest.fixture(scope="module")
def network(tiny_cnn: Digits) -> Network:
    return Network.from_module(tiny_cnn.module)


@pytest.fixture(scope="module")
def train(network: Network, tiny_cnn: Digits) -> Examples:
    return read_examples(network, tiny_cnn.train)


@pytest.fixture(scope="module")
def unseen(network: Network, tiny_cnn: Digits) -> Examples:
    return read_examples(network, tiny_cnn.test)


@pytest.fixture(scope="module")
def exits(network: Network, train: Examples) -> Exits:
    return trained(network, train, (0, 1), QUICK)


# ---- where cuts are

def test_cuts_stand_behind_residual_blocks_and_not_inside() -> None:
    segments = Segments.of(Network.from_module(blocks()), images(3))
    assert segments.names == ("1", "2", "5", "the end")  # "5": pooling and flattening belong to block "3"
    stem, block, head = 9 * 4 * 144, 2 * 9 * 16 * 144, 12
    total = stem + 2 * block + head
    assert segments.work == pytest.approx((stem / total, (stem + block) / total, 1 - head / total, 1.0))


def test_a_sum_outside_of_modules_hides_no_cut() -> None:
    segments = Segments.of(Network.from_module(residual()), images(3))
    assert segments.names == ("stem", "pool", "the end")


@pytest.mark.parametrize(("kind", "settings"), [
    ("resnet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}),
    ("mobilenet_v2", {"depth_multiplier": 0.35}),
    ("efficientnet", {"width_coefficient": 0.25, "depth_coefficient": 0.2, "hidden_dim": 320}),
    ("convnext", {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2})])
def test_every_family_of_images(kind: str, settings: dict[str, Any]) -> None:
    config = AutoConfig.for_model(kind, num_labels=5, **settings)
    network = Network.from_module(AutoModelForImageClassification.from_config(config).eval())
    inputs = {"pixel_values": torch.randn(7, 3, 32, 32)}
    segments = Segments.of(network, inputs)
    cuts = range(len(segments.cuts))
    assert len(cuts) >= 4 and list(segments.work) == sorted(segments.work)
    widths: list[int] = []

    def leave(place: int, read: Tensor) -> Tensor | None:
        widths.append(read.shape[1])
        return torch.tensor([0, 2, 5]) if place == 1 else None

    found = segments.run(inputs, cuts, leave)
    assert found is not None and len(widths) == len(cuts) and max(widths) <= max(READ, 1280)
    torch.testing.assert_close(found, network.run(inputs)[[0, 2, 5]], rtol=1e-3, atol=1e-4)


class Remembers(nn.Module):
    """Asks for the size of the batch at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4 * 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[0]
        return self.head(self.two(self.one(x)).view(size, -1))


class Chooses(nn.Module):
    """Branches that depend on data, which no tracer follows; a layer that is called in one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        return self.head(self.two(x) if float(x.abs().sum()) > 0 else x)


class Long(nn.Module):
    """What every layer makes is read at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(22, 3)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        return self.head(torch.cat([x, one, self.two(one)], 1))


class Centered(nn.Module):
    """What it says of a sample depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.head(x - x.mean(0, keepdim=True))


@pytest.mark.parametrize(("module", "inputs"), [(Remembers(), images(3)),
                                                (Centered(), {"0": torch.randn(3, 6)})])
def test_what_looks_at_the_batch_is_found_by_trying(module: nn.Module, inputs: dict[str, Tensor]) -> None:
    with pytest.raises(ModelError, match=r"when samples leave behind '(two|one)', the others' answers"):
        Segments.of(Network.from_module(module), inputs)


def test_no_cut() -> None:
    for module in (Long(), nn.Sequential(nn.Linear(6, 3), nn.Identity())):
        with pytest.raises(ModelError, match="put its parts into modules that each return one tensor"):
            Segments.of(Network.from_module(module), {"0": torch.randn(3, 6)})


def test_branches_that_depend_on_data() -> None:
    network = Network.from_module(Chooses())
    inputs = {"0": torch.randn(5, 6)}
    segments = Segments.of(network, inputs)
    assert segments.names == ("one", "two", "the end")
    found = segments.run(inputs, (0,), lambda place, read: torch.tensor([3, 1]))
    assert found is not None
    torch.testing.assert_close(found, network.run(inputs)[[3, 1]])


def test_sequences_of_convolutions() -> None:
    module = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3), nn.Flatten(), nn.Linear(24, 3))
    segments = Segments.of(Network.from_module(module), {"0": torch.randn(3, 2, 10)})
    assert segments.names == ("1", "3", "the end")


@pytest.mark.parametrize("shape", [(3, 4, 7, 5), (3, 4, 3, 2), (3, 4, 1, 1), (3, 64, 8, 8), (3, 512, 7, 7),
                                   (3, 4, 9), (3, 20)])
def test_what_heads_read(shape: tuple[int, ...]) -> None:
    """Cells cover all places, and the scale of the state does not matter."""
    state = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    read = places_read(state)
    assert read.ndim == 2 and len(read) == 3 and (read.shape[1] <= READ or len(shape) == 2)
    torch.testing.assert_close(places_read(1000 * state), read, rtol=1e-3, atol=1e-3)
    for high, wide in product(*map(range, shape[2:])) if len(shape) == 4 else ():
        spike = torch.zeros(shape)
        spike[:, 0, high, wide] = 5.0
        assert bool((places_read(spike).amax(1) > 1).all())


# ---- leaving

def test_without_leaving_the_answer_is_the_networks_bit_by_bit(exits: Exits, network: Network,
                                                              unseen: Examples) -> None:
    inputs = next(unseen.batches(37))
    logits, depth = exits(inputs)
    assert torch.equal(logits, network.run(inputs)) and depth.tolist() == [3] * 37
    assert not any(part._forward_hooks for part in network.module.modules())


def test_each_sample_has_the_answer_of_its_exit_in_its_place(exits: Exits, network: Network,
                                                            unseen: Examples) -> None:
    inputs = next(unseen.batches(61))
    answers = exits.answers(Examples(inputs)).logits
    certain = answers.softmax(-1).amax(-1)
    threshold = float(certain[0].median())
    logits, depth = exits(inputs, threshold)
    leaves = exits.technique.leaves(exits.answers(Examples(inputs)), threshold)
    assert depth.tolist() == (leaves + 1).tolist() and set(depth.tolist()) == {1, 2, 3}
    torch.testing.assert_close(logits, answers[leaves, torch.arange(61)], rtol=1e-4, atol=1e-5)
    everyone, depth = exits(inputs, 0.0)
    assert depth.tolist() == [1] * 61 and torch.equal(everyone, answers[0])


def test_samples_that_left_are_not_computed(exits: Exits, network: Network, unseen: Examples) -> None:
    inputs = next(unseen.batches(60))
    certain = exits.answers(Examples(inputs)).logits[0].softmax(-1).amax(-1)
    seen: list[int] = []
    hook = exits.stepped.blocks[1].register_forward_pre_hook(lambda part, args: seen.append(len(args[0])))
    _, depth = exits(inputs, float(certain.median()))
    exits(inputs, 0.0)
    hook.remove()
    assert seen == [int((depth > 1).sum())] and 0 < seen[0] < 60


def test_places(network: Network, train: Examples) -> None:
    segments = Segments.of(network, next(train.batches(2)))
    assert places(segments, ()) == (0, 1) and places(segments, (1,)) == (1,)
    with pytest.raises(RecipeError, match=r"from 0 to 1 \(0 stem, 1 conv\)"):
        places(segments, (2,))
    with pytest.raises(ModelError, match="has one block"):
        places(Segments(network, (), {}), ())
    with pytest.raises(ModelError, match="no module 'neck'"):
        Segments(network, [Cut("neck", 0.5)], {})


def test_the_report(exits: Exits, unseen: Examples) -> None:
    first, second = unseen.select(torch.arange(0, 500, 2)), unseen.select(torch.arange(1, 500, 2))
    done = exits.calibrated(EarlyExit(max_loss=0.1), first)
    found = measured(done, second, batches=(50,))
    assert found["behind"] == {1: "stem", 2: "conv"} and sum(found["left"].values()) == 250
    assert found["mean_work"] < 0.9 < found["whole"]["mean_work"] == 1.0 and found["same"] > 0.9


# ---- in a folder

def test_saved_exits_are_loaded(exits: Exits, network: Network, unseen: Examples, tmp_path: Path) -> None:
    done = exits.calibrated(EarlyExit("entropy", max_loss=0.2), unseen)
    export_network(network, {}, tmp_path / "out")
    save(done, tmp_path / "out")
    inputs = next(unseen.batches(40))
    wanted, depth = done(inputs)
    for fast in (False, True):
        loaded = rarefy.load(tmp_path / "out", into=TinyCNN(), fast=fast)
        found = loaded(inputs["0"])
        torch.testing.assert_close(found.logits, wanted)
        assert torch.equal(found.blocks, depth) and loaded.exits.stepped.cuts == done.stepped.cuts
    with pytest.raises(ModelError, match="into=TinyCNN"):
        load(tmp_path / "out")


def test_rounded_weights_leave_early(network: Network, train: Examples, tmp_path: Path) -> None:
    """Kernels in the place of layers, one of which an exit stands behind."""
    export_network(network, rounded_trees(network.module, integer_grid(8, 0)), tmp_path / "out")
    rounded = opened(tmp_path / "out", TinyCNN())
    assert isinstance(rounded, Network)
    save(trained(rounded, train, (0, 1), QUICK), tmp_path / "out")
    slow, fast = (rarefy.load(tmp_path / "out", into=TinyCNN(), fast=fast) for fast in (False, True))
    x = next(train.batches(20))["0"]
    one, other = (each(x, threshold=0.5) for each in (slow, fast))
    assert float((one.blocks == other.blocks).float().mean()) >= 0.9


# ---- network and heads together

def test_a_network_learns_with_its_exits(network: Network, train: Examples, unseen: Examples, tmp_path: Path
                                         ) -> None:
    """Masked weights stay masked, statistics move, and all exits read digits."""
    path, weight = "pointwise.weight", network.weight("pointwise.weight")
    keep = weight.abs() > weight.abs().median()
    trees = {path: Masked(keep, Dense(weight))}
    heads, tuned = together(network, trees, network, train, (0, 1), QUICK)
    tree = tuned.trees[path]
    assert isinstance(tree, Masked) and torch.equal(tree.keep, keep)
    assert "stem.1.running_mean" in tuned.params
    export_network(network, tuned.trees, tmp_path / "out", params=tuned.params)
    learnt = opened(tmp_path / "out", TinyCNN())
    assert isinstance(learnt, Network)
    answers = Exits(Segments.of(learnt, next(train.batches(2))), (0, 1), heads).answers(unseen)
    right = (answers.logits.argmax(-1) == answers.labels).float().mean(1)
    assert bool((right > 0.9).all()) and float(right[-1]) > 0.95
