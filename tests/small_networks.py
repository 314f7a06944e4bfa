"""Untrained networks with something of everything, and their weights rounded: made in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import BertConfig, BertModel

from rarefy.core.edit import edit
from rarefy.core.nodes import Dense, Node
from rarefy.models.network import map_network
from rarefy.numerics.grids import Grid
from rarefy.techniques.quantize.rtn import RTN


class Residual(nn.Module):
    """A stem, a residual block with BatchNorm, pooling and a head; images [samples, 1, 12, 12]."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm_one, self.norm_two = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(9 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        inner = torch.relu(self.norm_one(self.one(x)))
        x = torch.relu(x + self.norm_two(self.two(inner)))
        return self.head(self.pool(torch.relu(self.depthwise(x))).flatten(1))


def residual() -> Residual:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Residual()
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                for values, spread in ((part.running_mean, 0.3), (part.bias, 0.3)):
                    values.data.normal_(0, spread)
                for values in (part.running_var, part.weight):
                    values.data.uniform_(0.5, 1.5)
    return network.eval().requires_grad_(False)


def bert(*, pooling: bool = False) -> BertModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                            intermediate_size=64, max_position_embeddings=64)
        network = BertModel(config, add_pooling_layer=pooling)
        for values in network.parameters():
            values.data.add_(torch.randn(values.shape) * 0.1)
    return network.eval().requires_grad_(False)


def images(count: int, seed: int = 0) -> dict[str, Tensor]:
    return {"0": torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(seed))}


def tokens(count: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Padded sentences: the second half of the first is padding."""
    ids = torch.randint(0, 100, (count, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, length // 2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def rounded(values: Tensor, grid: Grid) -> Node:
    return edit("w", Dense(values), values, RTN(grid), "rtn", None, torch.Generator())[0]


def rounded_trees(network: nn.Module, grid: Grid, otherwise: Grid | None = None) -> Mapping[str, Node]:
    """Every site on a grid; on ``otherwise`` where its rows do not divide into groups."""
    sites, state = map_network(network)[0].sites, network.state_dict()
    return {site.path: rounded(site.matrix(state[site.path]).contiguous(),
                               grid if site.shape[1] % (grid.group or 1) == 0 else otherwise or grid)
            for site in sites}


def answer_of(network: nn.Module, trees: Mapping[str, Node], inputs: Mapping[str, Tensor]) -> Tensor:
    out = functional_call(network, {path: tree.dense() for path, tree in trees.items()}, (), inputs)
    return next(iter(out.values()))


def block_trees(network: nn.Module, grid: Grid, down: Grid | None = None) -> dict[str, Node]:
    """The linear layers of the blocks on ``grid``; those that lead out of the MLP on ``down``."""
    state = network.state_dict()
    return {site.path: rounded(state[site.path], down if down and "down_proj" in site.path else grid)
            for site in map_network(network)[0].sites if site.block is not None}
