"""Lottery tickets: shares, masks and rewinding as in the paper; and a ticket wins against a random one."""

from __future__ import annotations

import pytest
import torch

from digits import LAYERS, State, network, train
from rarefy.core.errors import RecipeError
from rarefy.core.nodes import Dense, Masked, Node
from rarefy.training.lottery import Ticket, Trees, tickets


def test_rounds_are_the_papers() -> None:
    """Each round drops the smallest of what is left after training, and goes back to the early weights."""
    early = {"a": torch.randn(10, 10, generator=torch.Generator().manual_seed(0))}
    noise = torch.Generator().manual_seed(1)
    ends: list[torch.Tensor] = []

    def shake(trees: Trees) -> Trees:
        tree = trees["a"]
        keep = tree.keep if isinstance(tree, Masked) else torch.ones(10, 10, dtype=torch.bool)
        ends.append(torch.where(keep, early["a"] + torch.randn(10, 10, generator=noise), 0.0))
        return {"a": Masked(keep, Dense(ends[-1]))}

    found = list(tickets(early, shake, sparsity=0.488, rounds=3))  # 20% of the rest, three times
    assert [round(ticket.sparsity, 3) for ticket in found] == [0.0, 0.2, 0.36, 0.488]
    left = torch.ones(100, dtype=torch.bool)
    for number, share in enumerate((0.2, 0.36, 0.488)):
        size = torch.where(left, ends[number].flatten().abs(), -1.0)
        left = left.index_fill(0, size.argsort()[:round(share * 100)], False)
        ticket = found[number + 1].start["a"]
        assert isinstance(ticket, Masked) and torch.equal(ticket.keep.flatten(), left)
        assert torch.equal(ticket.dense(), torch.where(ticket.keep, early["a"], 0.0))


def test_a_ticket_wins() -> None:
    """Trained alike from the same early weights, the masks that were found beat random ones."""
    own = dict(network(0).named_parameters())
    biases = {path: value.detach() for path, value in own.items() if path not in LAYERS}
    early = {path: own[path].detach() for path in LAYERS}

    def trained(trees: dict[str, Node]) -> State:
        return train(State(trees, biases), moves=frozenset({"weights"}), steps=120, rate=5e-3)

    *_, last = tickets(early, lambda trees: trained(dict(trees)).trees, sparsity=0.9, rounds=3)
    assert isinstance(last, Ticket) and last.sparsity == pytest.approx(0.9)
    generator = torch.Generator().manual_seed(0)
    chance: dict[str, Node] = {}
    for path, tree in last.start.items():
        assert isinstance(tree, Masked)
        shuffled = tree.keep.flatten()[torch.randperm(tree.keep.numel(), generator=generator)]
        chance[path] = Masked(shuffled.view(tree.keep.shape), tree.inner)
    assert trained(last.start).correct() > trained(chance).correct() + 0.05


@pytest.mark.parametrize(("settings", "match"), [
    ({"rounds": 0}, "rounds 0: must be at least 1"), ({"sparsity": 1.0}, r"sparsity 1\.0"),
    ({"pattern": "2:4"}, "decides the share at once"), ({"early": {}}, "nothing to rewind to")])
def test_what_means_nothing_is_refused(settings: dict, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        list(tickets(**{"early": {"a": torch.ones(4, 4)}, "train": lambda trees: trees, "sparsity": 0.5,
                        "rounds": 2, **settings}))
