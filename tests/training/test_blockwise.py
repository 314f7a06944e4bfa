"""Blocks that learn to compute what they computed before rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rarefy.core.edit import Leaf, edit
from rarefy.core.errors import DataError, RecipeError, TrainingError
from rarefy.core.nodes import Dense, Quantized
from rarefy.core.tune import Soft
from rarefy.measure.divergence import Reference
from rarefy.models.model import Model, open_model
from rarefy.models.runner import Runner
from rarefy.numerics.grids import integer_grid
from rarefy.techniques.quantize.lsq import LSQ
from rarefy.techniques.quantize.rtn import RTN
from rarefy.training.blockwise import Blockwise, Reconstructed, reconstruct

GRID = integer_grid(2, 32, symmetric=False)


class Breaking:
    """A technique whose weights are lost in training."""

    edits = (Dense,)
    scope = "training"

    def soften(self, leaf: Leaf, generator: torch.Generator) -> Soft:
        return Lost()


class Lost(Soft):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(torch.nan))

    def forward(self) -> Tensor:
        return self.value.expand(128, 128)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Model:
    return open_model(tiny_llama)


@pytest.fixture(scope="module")
def tokens(model: Model) -> Tensor:
    from pydoc_data.topics import topics

    text = "\n\n".join(text for _, text in sorted(topics.items()))
    ids = torch.tensor(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:40 * 64])
    return torch.cat([torch.zeros(40, 1, dtype=torch.int64), ids.view(40, 64)], 1)


def test_blocks_learn_and_the_whole_gains(model: Model, tokens: Tensor) -> None:
    """Two bits: every block's error falls, and the KL to the original is far below that of rounding."""
    went: list[Reconstructed] = []
    settings = Blockwise(epochs=4, batch=4, rate=1e-3)
    trees = reconstruct(model, LSQ(GRID), tokens[:24], settings, went.append)
    assert [each.block for each in went] == [0, 1, 2]
    assert all(each.after < 0.7 * each.before for each in went)
    assert set(trees) == {site.path for site in model.map.sites if site.block is not None}
    assert all(isinstance(tree, Quantized) and tree.grid == GRID for tree in trees.values())
    rounded = {path: edit(path, Dense(model.weight(path)), model.weight(path), RTN(GRID), "rtn", None,
                          torch.Generator())[0] for path in trees}
    reference = Reference(model, tokens[32:])
    kl = [reference.compare(Runner(model, found.get)).kl_mean for found in (rounded, trees)]
    assert kl[1] < 0.6 * kl[0]


def test_where_and_again(model: Model, tokens: Tensor) -> None:
    settings = Blockwise(epochs=1, where=("role:down",))
    pair = [reconstruct(model, LSQ(GRID), tokens[:4], settings) for _ in range(2)]
    assert set(pair[0]) == {site.path for site in model.map.sites if site.role == "down"}
    assert all(torch.equal(tree.dense(), pair[1][path].dense()) for path, tree in pair[0].items())


def test_what_means_nothing_is_refused(model: Model, tokens: Tensor) -> None:
    with pytest.raises(RecipeError, match=r"epochs 0, .*must be positive"):
        Blockwise(epochs=0)
    with pytest.raises(DataError, match=r"tokens of shape \[65\]"):
        reconstruct(model, LSQ(GRID), tokens[0], Blockwise())
    with pytest.raises(RecipeError, match=r"pattern nothing\.\*: matches no matrix"):
        reconstruct(model, LSQ(GRID), tokens[:2], Blockwise(where=("nothing.*",)))
    with pytest.raises(TrainingError, match="block 0: the error is no longer a number; lower the rate"):
        reconstruct(model, Breaking(), tokens[:2], Blockwise(where=("role:o",)))
