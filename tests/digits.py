"""A task on which training techniques are judged: handwritten digits, and a small network that was trained.

The loop here is a plain one, twenty lines, so that a technique's test depends on nothing but the technique.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from rarefy.core.edit import Leaf, edit
from rarefy.core.nodes import Dense, Masked, Node
from rarefy.core.tune import Soft, Trainer, soften

LAYERS = ("0.weight", "2.weight", "4.weight")
WIDTH = 64
BATCH = 64


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [n, 64] and labels to train on, and to be judged on."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(found.data, dtype=torch.float32)[order] / 16, torch.tensor(found.target)[order]
    return x[:1200], y[:1200], x[1200:], y[1200:]


def network(seed: int = 0) -> nn.Sequential:
    """Three matrices: [64, 64], [64, 64], [10, 64]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(),
                             nn.Linear(WIDTH, 10))


@dataclass(frozen=True, eq=False)
class State:
    """The network at some time: a tree for every matrix, a vector for every bias."""

    trees: Mapping[str, Node]
    biases: Mapping[str, Tensor]
    losses: list[float] = field(default_factory=list)

    def correct(self) -> float:
        """Share of held-out digits that are read correctly."""
        _, _, x, y = digits()
        with torch.no_grad():
            logits = _call({path: tree.dense() for path, tree in self.trees.items()}, self.biases, x)
        return float((logits.argmax(1) == y).float().mean())

    def loss(self) -> float:
        """Cross-entropy on held-out digits."""
        _, _, x, y = digits()
        with torch.no_grad():
            logits = _call({path: tree.dense() for path, tree in self.trees.items()}, self.biases, x)
        return float(nn.functional.cross_entropy(logits, y))

    def edited(self, technique: object) -> State:
        """Every matrix rewritten without training."""
        trees = {path: edit(path, tree, tree.dense(), technique, "t", None,  # type: ignore[arg-type]
                            torch.Generator().manual_seed(0))[0] for path, tree in self.trees.items()}
        return State(trees, self.biases)

    def sparsity(self) -> float:
        """Share of zeros in all matrices."""
        zeros = sum(int((tree.dense() == 0).sum()) for tree in self.trees.values())
        return zeros / sum(tree.dense().numel() for tree in self.trees.values())


@lru_cache(maxsize=4)
def trained(seed: int = 0, steps: int = 300) -> State:
    """The float network that everything starts from; 97 of 100 digits are read correctly."""
    own = dict(network(seed).named_parameters())
    start = State({path: Dense(own[path].detach()) for path in LAYERS},
                  {path: value.detach() for path, value in own.items() if path not in LAYERS})
    return train(start, moves=frozenset({"weights"}), steps=steps, rate=5e-3)


def train(start: State, technique: Trainer | None = None, *, moves: frozenset[str] = frozenset(),
          steps: int = 200, rate: float = 2e-3, seed: int = 0, where: Iterable[str] = LAYERS,
          watch: Callable[[int, Mapping[str, Soft]], None] | None = None) -> State:
    """Adam on softened matrices and on biases, its rate falling to zero."""
    softs = {path: softened(start.trees[path], technique if path in where else None, moves, path)
             for path in start.trees}
    biases = {path: nn.Parameter(value.clone()) for path, value in start.biases.items()}
    groups = [{"params": list(biases.values()), "lr": rate}]
    for soft in softs.values():
        for part in (each for each in soft.modules() if isinstance(each, Soft)):
            paces = part.paces()
            groups += [{"params": [value], "lr": rate * paces.get(name, 1.0)}
                       for name, value in part.named_parameters(recurse=False)]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    x, y, _, _ = digits()
    generator = torch.Generator().manual_seed(seed)
    losses = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step in range(1, steps + 1):
            rows = torch.randint(0, len(x), (BATCH,), generator=generator)
            logits = _call({path: soft() for path, soft in softs.items()}, biases, x[rows])
            loss = nn.functional.cross_entropy(logits, y[rows])
            losses.append(float(loss.detach()))
            for soft in softs.values():
                loss = loss + soft.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            for soft in softs.values():
                soft.update(step, steps)
            if watch is not None:
                watch(step, softs)
    return State({path: soft.eval().harden() for path, soft in softs.items()},
                 {path: value.detach() for path, value in biases.items()}, losses)


def softened(tree: Node, technique: Trainer | None, moves: frozenset[str] = frozenset(),
             path: str = "layers.0.up") -> Soft:
    """A tree that trains, or the tree as it is when nothing moves."""
    leaf = Leaf(path, tree, tree.dense(), None, None)
    if technique is None and not moves:
        from rarefy.core.tune import Fixed

        return Fixed(tree)
    return soften(leaf, moves, technique, torch.Generator().manual_seed(0))


def weight_of(tree: Node) -> Tensor:
    """The plain values in a tree, what masks drop included."""
    return weight_of(tree.inner) if isinstance(tree, Masked) else tree.dense()


def _call(weights: Mapping[str, Tensor], biases: Mapping[str, Tensor], x: Tensor) -> Tensor:
    for path in LAYERS:
        x = nn.functional.linear(x, weights[path], biases[path.replace("weight", "bias")])
        x = x if path == LAYERS[-1] else x.relu()
    return x
