"""Block after block: each block learns to compute, with compressed weights, what it computed without them.

The blocks of a language model are trained one at a time, from the first to the last, each against

    || block'(x') - block(x) ||^2,

x' what the compressed blocks before it make of the calibration text, x what the original ones did: so a block
also makes up for the errors that arrive. One whose error has not fallen in the end stays what it was.
Everything in a block that a technique softens moves, latent weights as well as steps; memory is that of one
block, and of the hidden states of the text. Trained with ``lsq`` on an affine grid, this is the first phase
of EfficientQAT; the second trains the scales alone through the whole network, which is ``tune`` with
``scales``.

Paper: Chen et al. 2024, "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models",
section 3.2; Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction",
section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.core.edit import Leaf
from rarefy.core.errors import DataError, RecipeError, TrainingError
from rarefy.core.nodes import Dense, Node
from rarefy.core.tune import Soft, Trainer, soften
from rarefy.models.map import Site
from rarefy.models.model import Model
from rarefy.models.runner import Context, Runner


@dataclass(frozen=True)
class Blockwise:
    """How to train each block.

    sequences: of text, as many at most. epochs: times that they are seen. batch: sequences of a step. rate:
    of weights. where: globs over the paths of sites, or ``role:NAME``; the others stay as they are. seed: of
    the order of batches.
    """

    sequences: int = 256
    epochs: int = 2
    batch: int = 2
    rate: float = 1e-4
    where: tuple[str, ...] = ("*",)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.epochs < 1 or self.batch < 1 or not self.rate > 0:
            raise RecipeError(f"blockwise: sequences {self.sequences}, epochs {self.epochs}, batch "
                              f"{self.batch}, rate {self.rate}: all must be positive")


@dataclass(frozen=True)
class Reconstructed:
    """How one block went: the error of its output relative to its energy, before training and after."""

    block: int
    before: float
    after: float


def reconstruct(model: Model, technique: Trainer, tokens: Tensor, settings: Blockwise,
                advance: Callable[[Reconstructed], None] | None = None, *,
                before: Mapping[str, Node] | None = None, teacher: Model | None = None) -> dict[str, Node]:
    """The trees of all matrices in blocks that match, trained on ``tokens`` [sequences, length].

    advance: told of every block. before: what weights of ``model`` have become already; training goes on from
    there. teacher: whose blocks are learnt from, where that is not the model itself. TrainingError when an
    error is no number; RecipeError when the teacher has other blocks.
    """
    teacher = teacher or model
    if tokens.ndim != 2 or not len(tokens):
        raise DataError(f"blockwise: tokens of shape {list(tokens.shape)}; give [sequences, length]")
    if (teacher.map.blocks, teacher.config.hidden_size) != (model.map.blocks, model.config.hidden_size):
        raise RecipeError(f"{model.name}: has other blocks than {teacher.name}, so none can learn from its "
                          "own; train it as a whole")
    parts = tokens[:settings.sequences].split(settings.batch)
    runner, original = Runner(model), Runner(teacher)
    with torch.no_grad():
        stems = [runner.stem(part) for part in parts]
        wanted = [original.stem(part)[0] for part in parts]  # what the original blocks make of the text
    contexts = [context for _, context in stems]
    arrives = [hidden for hidden, _ in stems]  # what the trained ones do
    generator = torch.Generator().manual_seed(settings.seed)
    trees: dict[str, Node] = {}
    for index in range(runner.blocks):
        with torch.no_grad():
            wanted = [original.block(index, *each) for each in zip(wanted, contexts, strict=True)]
        sites = [site for site in model.map.in_block(index) if any(map(site.matches, settings.where))]
        softs = {site: _softened(model, site, (before or {}).get(site.path), technique, generator)
                 for site in sites}
        block = _Block(runner, index, softs)
        went = block.learn(arrives, wanted, contexts, settings, generator)
        trees |= block.harden()
        arrives = block.answers(arrives, contexts)
        if advance is not None:
            advance(went)
    if not trees:
        raise RecipeError(f"pattern {', '.join(settings.where)}: matches no matrix inside a block")
    return trees


class _Block:
    """One block, some of whose matrices are in training."""

    def __init__(self, runner: Runner, index: int, softs: dict[Site, Soft]) -> None:
        self.runner, self.index, self.softs = runner, index, softs
        self.own = runner.load(index)
        self.prefix = f"{runner.model.map.family.blocks}.{index}."

    def tensors(self) -> dict[str, Tensor]:
        """What the block multiplies with now."""
        now = {site.path.removeprefix(self.prefix): site.stored(soft()) for site, soft in self.softs.items()}
        return {**self.own, **now}

    @torch.no_grad()
    def answers(self, arrives: Sequence[Tensor], contexts: Sequence[Context]) -> list[Tensor]:
        """The output of every batch, in eval mode; nothing moves meanwhile, so weights are computed once."""
        for soft in self.softs.values():
            soft.eval()
        still = self.tensors()
        return [self.runner.block(self.index, x, context, tensors=still)
                for x, context in zip(arrives, contexts, strict=True)]

    def error(self, arrives: Sequence[Tensor], wanted: Sequence[Tensor],
              contexts: Sequence[Context]) -> float:
        """The squared error of the output over its energy."""
        lost = sum(float((x - y).square().sum())
                   for x, y in zip(self.answers(arrives, contexts), wanted, strict=True))
        return lost / max(sum(float(y.square().sum()) for y in wanted), 1e-30)

    def learn(self, arrives: Sequence[Tensor], wanted: Sequence[Tensor], contexts: Sequence[Context],
              settings: Blockwise, generator: torch.Generator) -> Reconstructed:
        """Train, and go back if the error did not fall."""
        before, held = self.error(arrives, wanted, contexts), self.state()
        self.train(arrives, wanted, contexts, settings, generator)
        after = self.error(arrives, wanted, contexts)
        if after != after:
            raise TrainingError(f"block {self.index}: the error is no longer a number; lower the rate "
                                f"({settings.rate:g})")
        if after > before:  # codes that were chosen well may lose more by moving than few steps can give back
            self.restore(held)
            after = before
        return Reconstructed(self.index, before, after)

    def train(self, arrives: Sequence[Tensor], wanted: Sequence[Tensor], contexts: Sequence[Context],
              settings: Blockwise, generator: torch.Generator) -> None:
        """Adam, its rate falling to zero."""
        groups = [{"params": [value], "lr": settings.rate * part.paces().get(name, 1.0)}
                  for soft in self.softs.values() for part in soft.modules() if isinstance(part, Soft)
                  for name, value in part.named_parameters(recurse=False)]
        if not groups:
            return
        total, step = settings.epochs * len(arrives), 0
        optimizer = torch.optim.Adam(groups, settings.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        energy = sum(float(y.square().mean()) for y in wanted) / len(wanted)
        for soft in self.softs.values():
            soft.train()
        for _ in range(settings.epochs):
            for place in torch.randperm(len(arrives), generator=generator).tolist():
                step += 1
                answer = self.runner.block(self.index, arrives[place], contexts[place],
                                           tensors=self.tensors())
                loss = (answer - wanted[place]).square().mean() / energy
                for soft in self.softs.values():
                    loss = loss + soft.penalty()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                for soft in self.softs.values():
                    soft.update(step, total)

    def state(self) -> list[dict[str, Tensor]]:
        """All numbers of what trains, to go back to."""
        return [{name: value.clone() for name, value in soft.state_dict().items()}
                for soft in self.softs.values()]

    def restore(self, state: Sequence[Mapping[str, Tensor]]) -> None:
        """Back to a ``state``."""
        for soft, held in zip(self.softs.values(), state, strict=True):
            soft.load_state_dict(held)

    def harden(self) -> dict[str, Node]:
        return {site.path: soft.eval().harden() for site, soft in self.softs.items()}


def _softened(model: Model, site: Site, tree: Node | None, technique: Trainer, generator: torch.Generator
              ) -> Soft:
    original = model.weight(site.path)
    leaf = Leaf(site.path, Dense(original) if tree is None else tree, original, None, None, site.kernel)
    return soften(leaf, frozenset(), technique, generator)
