"""Layers of any network that have weights at the same place."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from rarefy.models.model import open_model
from rarefy.models.network import Network
from rarefy.models.stacks import alike, places
from small_networks import bert


def paths(module: nn.Module) -> list[list[str]]:
    return [[site.path for site in place] for place in places(Network.from_module(module))]


def test_members_of_a_list() -> None:
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    assert paths(plain) == [["0.weight", "2.weight", "4.weight"]]
    found, = places(Network.from_module(plain))
    assert [[site.path for site in group] for group in alike(found)] == [["2.weight", "4.weight"]]
    assert paths(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))) == []
    assert paths(nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})) == []  # no list, no order


def test_kinds_and_windows_count_as_shapes_do() -> None:
    convs = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3),
                          nn.Conv2d(4, 36, 1), nn.Flatten(), nn.Linear(36, 4))
    found, = places(Network.from_module(convs))
    assert [[site.path for site in group] for group in alike(found)] == [["0.weight", "2.weight"]]


def test_outer_lists_come_first() -> None:
    def pair() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    assert paths(nn.Sequential(pair(), pair())) == [["0.0.weight", "1.0.weight"],
                                                    ["0.1.weight", "1.1.weight"]]
    assert paths(nn.Sequential(pair(), nn.Linear(4, 2))) == [["0.0.weight", "0.1.weight"]]


def test_layers_of_a_recurrent_one_and_what_is_used_twice() -> None:
    assert paths(nn.LSTM(4, 6, 3, bidirectional=True)) == [
        [f"layers.{layer}.{kind}.weight" for layer in range(3)]
        for kind in ("ih", "hh", "ih_reverse", "hh_reverse")]
    assert paths(nn.GRU(4, 6)) == []
    same = nn.Linear(4, 4)
    assert paths(nn.Sequential(same, nn.ReLU(), same)) == []  # one weight already


def test_blocks_of_an_encoder_and_of_a_language_model(tiny_llama: Path) -> None:
    found = paths(bert())
    assert len(found) == 6 and all(len(place) == 2 for place in found)
    roles = [{site.role for site in place} for place in places(open_model(tiny_llama))]
    assert all(len(each) == 1 for each in roles) and {"q", "up"} <= set().union(*roles)
