"""Activations rounded in training: the paper's codes, moving ranges, and few bits that work."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from digits import BATCH, digits
from rarefy.core.edit import edit
from rarefy.core.errors import DataError, RecipeError
from rarefy.core.nodes import Dense
from rarefy.models.folding import fold
from rarefy.models.network import Network
from rarefy.numerics.grids import integer_grid
from rarefy.numerics.ranges import Range
from rarefy.techniques.distill.hard_labels import HardLabels
from rarefy.techniques.distill.soft_labels import SoftLabels
from rarefy.techniques.quantize.lsq import LSQ
from rarefy.techniques.quantize.rtn import RTN
from rarefy.training.activations import Activations, Rounding
from rarefy.training.examples import Rows
from rarefy.training.loop import Batch, Settings
from rarefy.training.signals import Distillation
from rarefy.training.student import Student
from rarefy.training.tune import Tuning, student_of, tune


def jacob(x: float, low: float, high: float, bits: int) -> float:
    """Jacob et al. 2018, eq. 12, with a zero point that is a code."""
    top = 2**bits - 1
    s = (high - low) / top
    z = round(-low / s)
    return s * (min(top, max(0, round(x / s) + z)) - z)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_is_the_papers(bits: int) -> None:
    own = Activations(["0"], bits)
    x = torch.randn(50, generator=torch.Generator().manual_seed(0), requires_grad=True)
    seen = torch.tensor([-0.7, 1.3])
    with own.on(nn.Sequential(nn.Identity())):
        pass
    own.rounded(0, seen)
    own.eval()
    y = own.rounded(0, x)
    wanted = [jacob(v, -0.7, 1.3, bits) for v in x.tolist()]
    torch.testing.assert_close(y.detach(), torch.tensor(wanted), atol=1e-5, rtol=0)
    y.sum().backward()
    assert {*x.grad.tolist()} == {0.0, 1.0}
    assert not bool(x.grad[(x.detach() < -1.1) | (x.detach() > 1.7)].any())
    if bits == 8:  # the same codes that an integer runtime will use
        torch.testing.assert_close(own.ranges()["0"].rounded(x.detach()), y.detach(), atol=1e-5, rtol=0)


def test_ranges_move_with_the_batches_and_wait() -> None:
    own = Activations(["0"], 2, memory=0.75, delay=2)
    assert torch.equal(own.rounded(0, torch.tensor([-1.0, 2.0])), torch.tensor([-1.0, 2.0]))
    own.rounded(0, torch.tensor([-2.0, 1.0]))
    found = own.ranges()["0"]
    assert (found.low, found.high) == (-0.75 - 0.5, 1.5 + 0.25)
    own.steps.fill_(2)
    assert not torch.equal(own.rounded(0, torch.tensor([-0.9, 0.9])), torch.tensor([-0.9, 0.9]))
    other = Activations(["0"], 2)
    other.load_state_dict(own.state_dict())
    assert other.ranges() == own.ranges()
    positive = Activations(["0"])  # zero always has a code
    positive.rounded(0, torch.tensor([3.0, 5.0]))
    assert float(positive.eval().rounded(0, torch.tensor(0.0))) == 0.0
    dead = Activations(["0"])
    assert torch.equal(dead.rounded(0, torch.zeros(3)), torch.zeros(3))


def test_learned_ranges_have_the_gradients_of_learned_steps() -> None:
    """PACT's outside, LSQ+'s inside, for ends that move by factors."""
    own = Activations(["0"], 3, learned=True)
    own.rounded(0, torch.tensor([-1.0, 2.0]))  # the first batch gives a range
    own.steps.fill_(1)
    x = torch.linspace(-2.0, 4.0, 61)[None].requires_grad_(True)
    weights = torch.randn(61, generator=torch.Generator().manual_seed(0))
    y = own.rounded(0, x)
    (y[0] * weights).sum().backward()
    s, z, pull = 3 / 7, round(7 / 3), (61 * 7) ** -0.5
    high = low = 0.0
    for value, weight in zip(x[0].tolist(), weights.tolist(), strict=True):
        code = round(value / s) + z
        if 0 <= code <= 7:
            slope = round(value / s) - value / s
            high, low = high + weight * slope / 7, low - weight * slope / 7
        elif code > 7:
            high += weight
        else:
            low += weight
    assert own.stretch is not None
    expected = torch.tensor([pull * low * -1.0, pull * high * 2.0])
    torch.testing.assert_close(own.stretch.grad[0], expected, atol=1e-4, rtol=1e-4)
    wanted = [jacob(v, -1.0, 2.0, 3) for v in x[0].tolist()]
    torch.testing.assert_close(y[0].detach(), torch.tensor(wanted), atol=1e-5, rtol=0)
    assert set(x.grad[0][(x[0] < -1.3) | (x[0] > 2.6)].tolist()) == {0.0}
    own.rounded(0, torch.tensor([-9.0, 9.0]))  # and later ones none
    assert own.ranges() == {"0": Range(-1.0, 2.0, 3)}


def distances(student: Student, batch: Batch) -> Tensor:
    """To the answers of the network that it was, [units]."""
    with student.original() as module:
        wanted = module(batch["0"])
    return (student(batch) - wanted).square().mean(1)


def test_learned_ranges_clip_what_is_rare() -> None:
    """A layer whose input has a few far outliers: at 3 bits the others need the codes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 16, generator=generator)
    x[::64] *= 10
    network = Network.from_module(nn.Sequential(nn.Linear(16, 16, bias=False)))
    settings = Settings(steps=150, batch=128, rate=3e-3, schedule="linear", precision="float32")
    errors = []
    for learned in (False, True):
        rounding = Rounding(3, memory=0.9, delay=0.2, learned=learned)
        tuned = tune(network, {}, Tuning(frozenset({"weights"}), activations=rounding), distances,
                     Rows({"0": x}), settings)
        with network.with_ranges(tuned.ranges).as_trained(), torch.no_grad():
            rounded = network.run({"0": x}, network.tensors(tuned.trees.get))
        errors.append(float((rounded - network.run({"0": x})).square().mean()))
        span, = tuned.ranges.values()
        assert (span.high < 0.6 * float(x.max())) == learned
    assert errors[1] < 0.8 * errors[0], errors


def convolutional() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                         nn.Linear(72, 10))


def images(held: bool = False) -> tuple[Tensor, Tensor]:
    data = digits()
    x, y = data[2:] if held else data[:2]
    return x.view(-1, 1, 8, 8), y


def correct(logits: Tensor, y: Tensor) -> float:
    return float((logits.argmax(1) == y).float().mean())


def test_few_bits_of_a_convolutional_network() -> None:
    """Trained, folded, then weights of 2 bits and activations of 4: rounded after training, or during it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = convolutional()
    x, y = images()
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        rows = torch.randint(0, len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
        optimizer.step()
    folded = fold(network, x[:8])
    assert folded.pairs == (("0", "1"), ("3", "4"))
    held, answers = images(held=True)
    grid, network = integer_grid(2, 0), Network.from_module(folded.module)
    layers = [site.path.removesuffix(".weight") for site in network.map.sites]
    before = correct(network.run({"0": held}), answers)

    watching = Activations(layers, 4)
    with watching.on(network.module), torch.no_grad():
        for rows in torch.arange(len(x)).split(BATCH):
            network.run({"0": x[rows]})
    rounded = {path: edit(path, Dense(network.weight(path)), network.weight(path), RTN(grid), "rtn", None,
                          torch.Generator())[0] for path in network.map.by_path}
    with network.with_ranges(watching.ranges()).as_trained(), torch.no_grad():
        after = correct(network.run({"0": held}, network.tensors(rounded.get)), answers)

    tuning = Tuning(frozenset({"biases"}), LSQ(grid), activations=Rounding(4, memory=0.9, delay=0.1))
    settings = Settings(steps=120, batch=BATCH, rate=2e-3, schedule="linear", precision="float32")
    objective = Distillation(network, network, ((1.0, HardLabels()), (1.0, SoftLabels())))
    tuned = tune(network, {}, tuning, objective, Rows({"0": x, "labels": y}), settings)
    assert set(tuned.ranges) == set(layers)
    with network.with_ranges(tuned.ranges).as_trained(), torch.no_grad():
        during = correct(network.run({"0": held}, network.tensors(tuned.trees.get) | tuned.params), answers)
    assert before > 0.94 and during > after + 0.01 and during > before - 0.03
    assert not any(part._forward_pre_hooks for part in network.module.modules())


def test_a_teacher_that_is_the_same_module_sees_no_rounding() -> None:
    network = Network.from_module(nn.Sequential(nn.Linear(4, 3)))
    tuning = Tuning(activations=Rounding(2))
    student = student_of(network, {}, tuning, Settings()).eval()
    assert student.activations is not None
    student.activations.low.fill_(-1.0)
    student.activations.high.fill_(1.0)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    with student.original() as module:
        assert torch.equal(module(x), network.module(x))
    assert not torch.equal(student({"0": x}), network.module(x))


def test_what_means_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="no layers"):
        Activations([])
    for settings in ({"bits": 1}, {"memory": 1.0}, {"delay": -1}):
        for kind in (Rounding, partial(Activations, ["0"])):
            with pytest.raises(RecipeError, match=r"memory (and delay )?be"):
                kind(**settings)  # type: ignore[operator]
    with pytest.raises(RecipeError, match="leave out checkpointing"):
        student_of(Network.from_module(nn.Sequential(nn.Linear(4, 3))), {}, Tuning(activations=Rounding()),
                   Settings(checkpointing=True))
    with (pytest.raises(RecipeError, match="conw: no such layer; did you mean 'conv'"),
          Activations(["conw"]).on(nn.ModuleDict({"conv": nn.Identity()}))):
        pass
    with pytest.raises(DataError, match="0: has seen no input"):
        Activations(["0"]).ranges()
