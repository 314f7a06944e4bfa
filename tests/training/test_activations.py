"""Activations rounded in training: the paper's codes, moving ranges, and four bits that work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from digits import BATCH, digits
from rarefy.core.edit import Leaf, edit
from rarefy.core.errors import DataError, RecipeError
from rarefy.core.nodes import Dense
from rarefy.core.tune import soften
from rarefy.models.folding import fold
from rarefy.numerics.grids import integer_grid
from rarefy.techniques.quantize.lsq import LSQ
from rarefy.techniques.quantize.rtn import RTN
from rarefy.training.activations import Activations, Rounded
from rarefy.training.loop import Batch, Loss, Task


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


def convolutional() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                         nn.Linear(72, 10))


class Learning(Task):
    """The folded network, its weights in training or not."""

    def __init__(self, network: nn.Module, technique: object | None) -> None:
        super().__init__()
        self._network = (network,)
        self.biases = nn.ParameterDict({
            name.replace(".", ":"): nn.Parameter(value.clone())
            for name, value in network.named_parameters() if name.endswith("bias")})
        self.shapes = {name: value.shape for name, value in network.named_parameters() if value.ndim > 1}
        self.softs = nn.ModuleDict()
        for name in self.shapes:
            matrix = network.get_parameter(name).detach().flatten(1)
            leaf = Leaf(name, Dense(matrix), matrix, None, None)
            self.softs[name.replace(".", ":")] = soften(leaf, frozenset({"weights"}), technique)  # type: ignore[arg-type]

    def logits(self, x: Tensor) -> Tensor:
        tensors = {name: self.softs[name.replace(".", ":")]().view(shape)
                   for name, shape in self.shapes.items()}
        tensors |= {name.replace(":", "."): value for name, value in self.biases.items()}
        out: Tensor = functional_call(self._network[0], tensors, (x,))
        return out

    def forward(self, batch: Batch) -> Loss:
        losses = nn.functional.cross_entropy(self.logits(batch["x"]), batch["y"], reduction="none")
        return Loss(losses.sum(), torch.tensor(float(len(losses))))

    def update(self, step: int, total: int) -> None:
        for soft in self.softs.values():
            soft.update(step, total)


def run(task: Task, steps: int, rate: float) -> None:
    x, y = images()
    groups = [{"params": [value]} for value in task.parameters()]
    optimizer = torch.optim.Adam(groups, rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        rows = torch.randint(0, len(x), (BATCH,), generator=generator)
        loss = task({"x": x[rows], "y": y[rows]})
        optimizer.zero_grad()
        (loss.total / loss.units).backward()
        optimizer.step()
        schedule.step()
        task.update(step, steps)
    task.eval()


def images(held: bool = False) -> tuple[Tensor, Tensor]:
    data = digits()
    x, y = data[2:] if held else data[:2]
    return x.view(-1, 1, 8, 8), y


def correct(logits: Tensor, y: Tensor) -> float:
    return float((logits.argmax(1) == y).float().mean())


def test_four_bits_of_a_convolutional_network() -> None:
    """Trained, folded, and then weights and activations in 4 bits: rounded after training, or during it."""
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
    layers, grid = ["0", "3", "7"], integer_grid(3, 0)
    before = correct(folded.module(held), answers)

    ranges = Activations(layers, 4)
    with ranges.on(folded.module), torch.no_grad():
        for rows in torch.arange(len(x)).split(BATCH):
            folded.module(x[rows])
    rounded = {}
    for name, value in folded.module.named_parameters():
        if value.ndim > 1:
            matrix = value.flatten(1)
            rounded[name] = edit(name, Dense(matrix), matrix, RTN(grid), "rtn", None,
                                 torch.Generator())[0].dense().view(value.shape)
    ranges.eval()
    with ranges.on(folded.module), torch.no_grad():
        after = correct(functional_call(folded.module, rounded, (held,)), answers)

    activations = Activations(layers, 4, memory=0.9, delay=10)
    inner = Learning(folded.module, LSQ(grid))
    task = Rounded(inner, folded.module, activations)
    run(task, 120, 2e-3)
    with activations.on(folded.module), torch.no_grad():
        during = correct(inner.logits(held), answers)
    assert before > 0.94 and during > after + 0.01 and during > before - 0.03
    assert not any(part._forward_pre_hooks for part in folded.module.modules())


def test_what_means_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="no layers"):
        Activations([])
    for settings in ({"bits": 1}, {"memory": 1.0}, {"delay": -1}):
        with pytest.raises(RecipeError, match="bits must lie between 2"):
            Activations(["0"], **settings)
    with (pytest.raises(RecipeError, match="conw: no such layer; did you mean 'conv'"),
          Activations(["conw"]).on(nn.ModuleDict({"conv": nn.Identity()}))):
        pass
    with pytest.raises(DataError, match="0: has seen no input"):
        Activations(["0"]).ranges()
