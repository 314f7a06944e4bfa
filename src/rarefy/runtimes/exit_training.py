"""Exits that learn to say at once what the network says at its end.

    trained     the network stands still: heads learn from states that were read once
    together    the network learns, too, so that early blocks carry what an answer needs; it is trained with
                its trees as they are (masks stay, codes stay, scales move)

In both, what the original answers is the target p of every exit p_k; together, the end of the network counts
as one more, and later exits count more, by the blocks d_k before them,

    loss = sum_k d_k KL(p || p_k) / sum_k d_k.

Labels are not needed.

Paper: Zhou et al. 2020, "BERT Loses Patience", section 3 (the weights); Phuong & Lampert 2019,
"Distillation-Based Training for Multi-Exit Architectures" (the target).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rarefy.calibration.examples import Examples
from rarefy.core.nodes import Node
from rarefy.models.network import Network
from rarefy.runtimes.exits import BATCH, Exits, Heads, Staged, places, read, staged
from rarefy.training.examples import Rows
from rarefy.training.loop import Advance, Batch, Loss, Settings, Task, fit, held_out
from rarefy.training.signals import ROWS, inputs_of
from rarefy.training.student import Student
from rarefy.training.tune import Tuned, Tuning, tune

TRAINING = Settings(epochs=30, rate=3e-3, batch=64, patience=3, decay=0.01, precision="float32")
TOGETHER = Settings(epochs=1, rate=5e-5, batch=32)
PLAIN = Settings(epochs=4, rate=1e-3, batch=64, precision="float32")  # of both, where it is no encoder
STILL = frozenset({"embed", "positions", "token_types"})  # roles that stand still even then
HELD = 0.05


def trained(network: Network, examples: Examples, after: Sequence[int], settings: Settings = TRAINING
            ) -> Exits:
    """Exits behind some blocks, distilled from the network's own answer; the network stays as it is."""
    stepped = staged(network, _first(examples))
    after = places(stepped, after)
    heads = _heads(stepped, after, examples, settings)
    states, teacher = [], []
    for inputs in examples.batches(BATCH):
        caught, logits = read(stepped, after, inputs)
        states.append(caught)
        teacher.append(logits)
    columns = [torch.cat(parts) for parts in zip(*states, strict=True)]
    rows = Rows({**{_column(place): each for place, each in enumerate(columns)}, ROWS: torch.cat(teacher)})
    task = _Lesson(heads, len(after))
    train, held = rows.split(0.1, settings.seed)
    fit(task, train, settings, gate=held_out(task, held, settings))
    return Exits(stepped, after, heads.requires_grad_(False))


def together(network: Network, trees: Mapping[str, Node], teacher: Network, examples: Examples,
             after: Sequence[int], settings: Settings = TOGETHER, *, folder: Path | None = None,
             advance: Advance | None = None) -> tuple[Heads, Tuned]:
    """Heads, and what became of the network, when both learn what ``teacher`` answers.

    trees: the network's weights where they are more than numbers. folder, advance: as for ``fit``.
    """
    stepped = staged(network, _first(examples))
    after = places(stepped, after)
    with torch.no_grad():
        said = torch.cat([teacher.run(inputs) for inputs in examples.batches(BATCH)])
    heads = _heads(stepped, after, examples, settings)
    train, held = Rows({**examples.inputs, ROWS: said}).split(HELD, settings.seed)
    where = tuple(site.path for site in network.map.sites if site.role not in STILL)
    tuning = Tuning(frozenset({"weights", "factors", "adapters", "scales", "codebooks", "buckets", "norms",
                               "biases"}), where=where)
    tuned = tune(network, trees, tuning, _Deep(heads, after, stepped), train, settings, held=held,
                 folder=folder, identity={"exits": str(after)}, advance=advance)
    return heads.requires_grad_(False), tuned


def starts(network: Network, joint: bool) -> Settings:
    """The settings of training where nobody says others. joint: the network learns, too."""
    if network.form.takes != "text":
        return PLAIN
    return TOGETHER if joint else TRAINING


def _first(examples: Examples) -> dict[str, Tensor]:
    return next(examples.batches(2))


def _heads(stepped: Staged, after: tuple[int, ...], examples: Examples, settings: Settings) -> Heads:
    caught, logits = read(stepped, after, _first(examples))
    numbers = [each.shape[1] for each in caught]
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return Heads(numbers, [stepped.units(each) for each in numbers], logits.shape[1])


def _column(place: int) -> str:
    return f"features{place}"


class _Lesson(Task):
    """Every head learns the network's own distribution: KL, summed over exits."""

    def __init__(self, heads: Heads, exits: int) -> None:
        super().__init__()
        self.heads, self.exits = heads, exits

    def forward(self, batch: Batch) -> Loss:
        wanted = batch[ROWS].log_softmax(-1)
        total = wanted.new_zeros(())
        for place in range(self.exits):
            total = total + _kl(wanted, self.heads(place, batch[_column(place)])).sum()
        return Loss(total, torch.tensor(float(len(wanted)), device=wanted.device))


class _Deep(nn.Module):
    """The loss above, one number for each sample."""

    def __init__(self, heads: Heads, after: tuple[int, ...], stepped: Staged) -> None:
        super().__init__()
        self.heads, self.after, self.stepped = heads, after, stepped

    def __call__(self, student: Student, batch: Batch) -> Tensor:  # typed, unlike nn.Module's
        losses: Tensor = super().__call__(student, batch)
        return losses

    def forward(self, student: Student, batch: Batch) -> Tensor:
        inputs, wanted = inputs_of(batch), batch[ROWS].log_softmax(-1)
        answer, caught = self.stepped.taught(student, inputs, self.after)
        blocks = len(self.stepped.blocks)
        total = blocks * _kl(wanted, answer)
        for place, block in enumerate(self.after):
            total = total + (block + 1) * _kl(wanted, self.heads(place, caught[place]))
        return total / (blocks + sum(block + 1 for block in self.after))


def _kl(wanted: Float[Tensor, "samples classes"], logits: Float[Tensor, "samples classes"]
        ) -> Float[Tensor, " samples"]:
    return (wanted.exp() * (wanted - logits.float().log_softmax(-1))).sum(-1)
