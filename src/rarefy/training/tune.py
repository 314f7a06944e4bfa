"""``tune``: train what a compressed network still has to give, against one objective.

Recovery after pruning, scales after rounding, k-means books, low-rank factors, adapters on a rounded base,
and techniques that only exist during training are one call; they differ in what moves. Any of

    weights, factors, adapters, scales, codebooks, buckets      leaves of the trees (``core.tune``)
    norms, biases, params                                       vectors beside them; all of what is no site
    everything                                                  all of these

or the leaves of a technique of scope "training". The original stays as it is, and can be the teacher.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rarefy.core.edit import Leaf
from rarefy.core.errors import RecipeError, did_you_mean
from rarefy.core.nodes import Dense, Node
from rarefy.core.nouns import Evidence
from rarefy.core.tune import MOVERS, Following, Soft, Trainer, soften
from rarefy.models.map import Site
from rarefy.numerics.ranges import Range
from rarefy.training.activations import Rounding
from rarefy.training.loop import Advance, Curve, Examples, Gate, Settings, fit, held_out
from rarefy.training.student import Learning, Objective, Student, Trainable, module_of

BESIDE = ("norms", "biases", "params")
MOVES = (*MOVERS, *BESIDE, "everything")


@dataclass(frozen=True, eq=False)
class Tuned:
    """What training made: the tree of every site that it was given or that moved, other tensors that are no
    longer the original's, how it went; what techniques did otherwise than asked, by site; the ranges of the
    inputs that were rounded, by layer."""

    trees: dict[str, Node]
    params: dict[str, Tensor]
    curve: Curve
    notes: dict[str, str]
    ranges: dict[str, Range]


@dataclass(frozen=True, eq=False)
class Tuning:
    """What moves and what does not.

    moves: any of MOVES. technique: of scope "training", for the leaves that it edits. where: globs over the
    paths of sites that train, or ``role:NAME``; the others stand still. whole: globs over paths that train as
    they are, whatever else moves (a new head). evidence: by site, for techniques that ask for it. dropout:
    whether the network's own is on. activations: which inputs of layers are rounded meanwhile (None: none).
    """

    moves: frozenset[str] = frozenset({"everything"})
    technique: Trainer | None = None
    where: tuple[str, ...] = ("*",)
    whole: tuple[str, ...] = ()
    evidence: Mapping[str, Evidence] | None = None
    dropout: bool = False
    activations: Rounding | None = None

    def __post_init__(self) -> None:
        for word in sorted(self.moves):
            if word not in MOVES:
                raise RecipeError(f"nothing called {word!r} can be trained{did_you_mean(word, list(MOVES))}; "
                                  f"choose of {', '.join(MOVES)}")

    @property
    def leaves(self) -> frozenset[str]:
        """The movers of leaves."""
        return frozenset(MOVERS) if "everything" in self.moves else self.moves & set(MOVERS)

    def entirely(self, path: str) -> bool:
        """Whether what lies there trains as it is."""
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.whole)

    def beside(self, path: str, values: Tensor) -> bool:
        """Whether a tensor that is no site moves."""
        if self.entirely(path):
            return values.is_floating_point()
        if not values.is_floating_point() or "everything" in self.moves or "params" in self.moves:
            return values.is_floating_point()
        return ("biases" if path.endswith("bias") else "norms") in self.moves and values.ndim < 2


def tune(network: Trainable, trees: Mapping[str, Node], tuning: Tuning, objective: Objective,
         examples: Examples, settings: Settings, *, held: Examples | None = None, gate: Gate | None = None,
         folder: Path | None = None, identity: dict[str, str] | None = None,
         advance: Advance | None = None) -> Tuned:
    """Train ``network`` as it stands with ``trees`` at some of its sites.

    objective: a loss per unit. held: examples of the gate, or ``gate`` itself; without either the last state
    remains. folder, identity, advance: as in ``fit``. RecipeError when nothing moves.
    """
    student = student_of(network, trees, tuning, settings, steps=settings.total(len(examples)))
    task = Learning(student, objective)
    if gate is None and held is not None:
        gate = held_out(task, held, settings)
    names = {"network": network.name, "moves": ", ".join(sorted(tuning.moves)),
             "technique": repr(tuning.technique), "activations": repr(tuning.activations),
             **(identity or {})}
    curve = fit(task, examples, settings, gate=gate, folder=folder, identity=names, advance=advance)
    ranges = {} if student.activations is None else student.activations.ranges()
    return Tuned(student.trees(), student.changed(), curve, student.notes(), ranges)


def student_of(network: Trainable, trees: Mapping[str, Node], tuning: Tuning, settings: Settings, *,
               steps: int = 1) -> Student:
    """The student of ``network`` in which moves what ``tuning`` says. steps: of the whole training."""
    module = module_of(network)
    chosen = _chosen(network.map.sites, tuning.where)
    wrong = [path for path in trees if path not in network.map.by_path]
    if wrong:
        raise RecipeError(f"{wrong[0]}: no such weight{did_you_mean(wrong[0], list(network.map.by_path))}")
    generator = torch.Generator().manual_seed(settings.seed)
    softs: dict[str, tuple[Site, Soft]] = {}
    for site in network.map.sites:
        soft = _soft(network, site, trees.get(site.path), tuning, site.path in chosen, generator)
        if soft is not None:
            softs[site.path] = (site, soft)
    for path, (_, soft) in softs.items():
        for part in soft.modules():
            if isinstance(part, Following):
                _follow(part, path, network, softs)
    own = dict(module.named_parameters())
    params = tuple(path for path, values in own.items()
                   if path not in network.map.by_path and tuning.beside(path, values))
    if not params and not any(True for _, soft in softs.values() for _ in soft.parameters()):
        raise RecipeError(f"{network.name}: nothing moves under {', '.join(sorted(tuning.moves))}; choose of "
                          f"{', '.join(MOVES)}")
    activations = None
    if tuning.activations is not None:
        activations = tuning.activations.of(_layers(network, module, tuning.activations.where), steps)
    return Student(module, softs, params, dropout=tuning.dropout, checkpointing=settings.checkpointing,
                   activations=activations)


def _layers(network: Trainable, module: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """The layers that multiply with a site that matches, in the network's order."""
    parts, chosen = dict(module.named_modules()), _chosen(network.map.sites, patterns)
    return tuple(site.layer for site in network.map.sites
                 if site.path in chosen and not isinstance(parts[site.layer], nn.Embedding))


def _follow(part: Following, path: str, network: Trainable, softs: Mapping[str, tuple[Site, Soft]]) -> None:
    """Let a shared weight move with its owner; one that stands still has no soft tree, and none is needed."""
    owner = part.node.path
    if owner not in network.map.by_path or owner == path:
        raise RecipeError(f"{path}: shares {owner!r}, which is no other weight of the network")
    part.owner = (softs[owner][1],) if owner in softs else ()


def _soft(network: Trainable, site: Site, tree: Node | None, tuning: Tuning, trains: bool,
          generator: torch.Generator) -> Soft | None:
    """The weight of a site in training; None: the original stands there and stays."""
    entirely = tuning.entirely(site.path)
    if tree is None and not entirely and not (trains and _dense_moves(tuning)):
        return None
    original = network.weight(site.path)
    evidence = None if tuning.evidence is None else tuning.evidence.get(site.path)
    leaf = Leaf(site.path, Dense(original) if tree is None else tree, original, None, evidence, site.kernel)
    if entirely:
        return soften(leaf, frozenset(MOVERS), still=True)
    if not trains:
        return soften(leaf, frozenset(), still=True)
    return soften(leaf, tuning.leaves, tuning.technique, generator, still=True)


def _dense_moves(tuning: Tuning) -> bool:
    edits = () if tuning.technique is None else tuning.technique.edits
    return "weights" in tuning.leaves or any(issubclass(Dense, kind) for kind in edits)


def _chosen(sites: Sequence[Site], patterns: Sequence[str]) -> set[str]:
    """Paths that any pattern matches; RecipeError for one that matches none."""
    found: set[str] = set()
    for pattern in patterns:
        hits = {site.path for site in sites if site.matches(pattern)}
        if not hits:
            raise RecipeError(f"pattern {pattern!r} matches no weight"
                              f"{did_you_mean(pattern, [site.path for site in sites])}")
        found |= hits
    return found
