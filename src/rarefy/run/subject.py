"""What is compressed, as a job sees it, whatever kind of network it is.

A job looks at weights, rewrites them and judges the answers; how examples are read, gradients taken, weights
visited and answers compared is the business of a ``Subject``. There are two: ``language`` (causal language
models, block by block, so that they need not fit in memory) and ``samples`` (any other network, whole).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from rarefy.calibration.evidence import Advance, Seen
from rarefy.core.nodes import Node
from rarefy.core.nouns import Evidence, Receipt, Recipe
from rarefy.models.map import Site
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.models.runner import Override
from rarefy.run.effort import Effort
from rarefy.run.progress import Progress, Stage
from rarefy.run.sweep import Store, Work

Pace = Callable[[nn.Module], int]  # runs a network once, and says how many units that was


class Subject(Protocol):
    """One kind of network with its examples.

    opened: its name, map, source and weights. usual: the target that ``--for auto`` means.
    """

    usual: str

    @property
    def opened(self) -> Model | Network: ...

    def about(self) -> dict[str, Any]:
        """What a receipt says of the model."""
        ...

    # ---- examples

    def gather(self, data: tuple[Any, ...], eval_data: tuple[Any, ...], effort: Effort, seed: int,
               progress: Progress, kept: Path | None = None) -> Any:
        """Choose and check the examples; ``kept``: where an interrupted job left its own.

        What comes back is for this subject's other methods; anyone may read its ``sources``, words for what
        each part is from.
        """
        ...

    def judged(self, eval_data: tuple[Any, ...], effort: Effort, seed: int) -> Any:
        """Examples to judge on when nothing is calibrated."""
        ...

    # ---- compression

    def reshaped(self, recipe: Recipe, effort: Effort, data: Any, advance: Advance
                 ) -> tuple[Subject, tuple[Receipt, ...]]:
        """What a recipe's steps for the whole model make of it; itself where there are none."""
        ...

    def survey(self, data: Any, effort: Effort, generator: torch.Generator, advance: Advance
               ) -> Iterator[Seen]:
        """Evidence with Fisher at every site that the examples reach."""
        ...

    def outside(self, site: Site) -> bool:
        """Whether the sweep fits a site with the survey's evidence, having none of its own for it."""
        ...

    def distance(self, data: Any, effort: Effort) -> Callable[[Override], float]:
        """How far answers move on a few examples when weights are overridden: KL, or 1 - cosine."""
        ...

    def sweep(self, work: Mapping[str, Work], data: Any, seen: Mapping[str, Evidence],
              fishers: Mapping[str, torch.Tensor], store: Store, seed: int, effort: Effort, advance: Advance
              ) -> None:
        """Do the work at every site it names. seen: the survey's evidence; fishers: by site."""
        ...

    # ---- proof

    def measure(self, candidate: Subject, data: Any, stage: Stage) -> dict[str, Any]:
        """``float`` and ``second_domain`` of a receipt: a reopened export against this."""
        ...

    def live(self) -> nn.Module:
        """A torch network of one's own, every weight decoded, frozen, in eval mode."""
        ...

    def trees(self) -> dict[str, Node]:
        """The trees that this was opened from, not decoded."""
        ...

    def glimpse(self, data: Any) -> Any:
        """A few of the examples, without labels: enough to tell whether two programs compute the same."""
        ...

    def measure_live(self, candidate: nn.Module, data: Any, effort: Effort) -> dict[str, Any]:
        """A few numbers of the same kind, for a network that runs by other kernels."""
        ...

    def paces(self, data: Any) -> dict[str, Pace]:
        """What is timed, by the key under which a receipt keeps it."""
        ...

    def completions(self, original: nn.Module, compressed: nn.Module) -> list[dict[str, str]]:
        """Answers of both side by side, where they can be read; else none."""
        ...
