"""The laws of the design, over every technique that works during training."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.core.edit import Leaf, leaves
from rarefy.core.errors import EditError
from rarefy.core.nodes import Dense, Masked, Node, Product, Quantized, Shared, Sum
from rarefy.core.tune import Soft, Trainer, soften
from rarefy.numerics.grids import integer_grid
from rarefy.run.planning import techniques, trainers
from rarefy.techniques.quantize.rtn import RTN

TRAINERS = trainers()
STEPS = 12


@pytest.fixture(scope="module")
def small(weight: Tensor) -> Tensor:
    return weight[:24].contiguous()


def trees(weight: Tensor) -> dict[str, Node]:
    """Trees that a network in training may have."""
    keep = weight.abs() > weight.abs().median()
    dense = Dense(weight)
    rounded = RTN(integer_grid(4, 32)).rewrite(Leaf("w", dense, weight, None, None), torch.Generator()).node
    adapter = Product(Dense(torch.zeros(weight.shape[0], 64)), Dense(torch.randn(64, weight.shape[1]) * 0.02))
    return {"dense": dense, "quantized": rounded, "masked": Masked(keep, dense),
            "masked quantized": Masked(keep, rounded), "with adapter": Sum((rounded, adapter))}


def trained(technique: Trainer, tree: Node, target: Tensor, steps: int = STEPS) -> Soft:
    """Some steps towards another weight, as a loop would take them."""
    soft = soften(Leaf("layers.3.mlp.up", tree, target, None, None), frozenset(), technique,
                  torch.Generator().manual_seed(0))
    groups = [{"params": [value], "lr": 1e-3 * part.paces().get(name, 1.0)} for part in soft.modules()
              if isinstance(part, Soft) for name, value in part.named_parameters(recurse=False)]
    optimizer = torch.optim.Adam(groups)
    goal = target.flip(0)
    with torch.random.fork_rng(devices=[]):
        for step in range(1, steps + 1):
            torch.manual_seed(step)
            optimizer.zero_grad()
            ((soft() - goal).square().sum() + soft.penalty()).backward()
            optimizer.step()
            soft.update(step, STEPS)
    return soft.eval()


@pytest.mark.parametrize("kind", sorted(trees(torch.randn(4, 64))))
@pytest.mark.parametrize("name", sorted(TRAINERS))
def test_training_keeps_shape_and_masks_and_repeats(name: str, kind: str, small: Tensor) -> None:
    """What hardens is what was computed, of the same shape; dropped weights stay dropped; the same seed gives
    the same bits; and where there is nothing to train that is an error."""
    tree, technique = trees(small)[kind], TRAINERS[name]()
    if not any(isinstance(leaf, technique.edits) for leaf in leaves(tree)):
        with pytest.raises(EditError, match="nothing in it moves"):
            trained(technique, tree, small)
        return
    soft = trained(technique, tree, small)
    node = soft.harden()
    assert node.shape == tree.shape
    assert bool(torch.isfinite(node.dense()).all()) and node.bits() > 0
    assert torch.equal(node.dense(), soft().detach())
    assert torch.equal(node.dense(), trained(technique, tree, small).harden().dense())
    if isinstance(tree, Masked):
        beside = Node in technique.edits and isinstance(node, Sum)  # an adapter stands beside what is masked
        base = node.terms[0] if beside and isinstance(node, Sum) else node
        assert isinstance(base, Masked) and not isinstance(base.inner, Masked)
        assert not bool((base.keep & ~tree.keep).any()) and not bool(base.dense()[~tree.keep].any())


@pytest.mark.parametrize("name", sorted(TRAINERS))
def test_settles(name: str, small: Tensor) -> None:
    """At the latest with the last step; while masks grow, a gate must not choose among states."""
    technique = TRAINERS[name]()
    early, late = (trained(technique, Dense(small), small, steps) for steps in (1, STEPS))
    assert late.settled()
    assert early.settled() or early.harden().bits() >= late.harden().bits()


@pytest.mark.parametrize("name", sorted(TRAINERS))
def test_a_checkpoint_is_all_there_is(name: str, small: Tensor) -> None:
    """Parameters and persistent buffers: with them, another module in the middle of training is the same."""
    technique = TRAINERS[name]()
    soft = trained(technique, Dense(small), small, STEPS // 2)
    other = soften(Leaf("layers.3.mlp.up", Dense(small), small, None, None), frozenset(), technique,
                   torch.Generator().manual_seed(1))
    other.load_state_dict(soft.state_dict())
    assert torch.equal(other.eval()(), soft())
    assert torch.equal(other.penalty(), soft.penalty())


@pytest.mark.parametrize("name", sorted(name for name, kind in TRAINERS.items() if Node not in kind.edits))
def test_training_nothing_raises(name: str, small: Tensor) -> None:
    with pytest.raises(EditError, match=r"layers\.3\.mlp\.up: nothing in it moves"):
        trained(TRAINERS[name](), Shared("model.embed", Dense(small)), small)


@pytest.mark.parametrize("name", sorted(TRAINERS))
def test_declares_what_a_user_meets(name: str) -> None:
    """Idea, equation and paper in the file's docstring; settings are frozen fields."""
    kind: Any = TRAINERS[name]
    assert "Paper:" in (sys.modules[kind.__module__].__doc__ or "")
    assert kind.__dataclass_params__.frozen and "Shapes:" in kind.__doc__
    assert isinstance(kind(), Trainer) and not kind.needs
    assert not kind.beats or kind.beats in {**techniques(), **TRAINERS}


def test_rounded_weights_have_trainers() -> None:
    assert {name for name, kind in TRAINERS.items() if Quantized in kind.edits} >= {"qat", "lsq"}
