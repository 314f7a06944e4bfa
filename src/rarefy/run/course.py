"""The course of a recipe: its steps in runs of one kind, and the network as each run leaves it.

    whole      steps that change the model's shape or its axes: a smaller model, or a view of it
    sharing    one step that lets blocks use each other's matrices
    training   one step that trains what there is; the teacher is always the model that the job began with
    correction one step that moves biases, when the weights are what they will be
    leaves     steps that rewrite weights, one weight at a time

Training leaves a tree at every weight that is more than plain numbers (a mask, codes, an adapter), from which
later steps go on, and a view of the network that computes with what it found. The last run of leaves is the
job's own business (``compression``); everything before it and behind it is here.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.calibration.samples import materialize
from rarefy.core.errors import RecipeError, did_you_mean
from rarefy.core.nodes import Dense, Masked, Node
from rarefy.core.nouns import Receipt, Recipe, Step
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.models.sources import ModuleSource
from rarefy.numerics.ranges import Range
from rarefy.run.correct import corrected
from rarefy.run.effort import Effort
from rarefy.run.language import Language
from rarefy.run.lessons import Lesson, Term, check_labels, explained, losses, material
from rarefy.run.planning import TUNE, build_correction, build_sharing, build_trainer
from rarefy.run.progress import Progress
from rarefy.run.recipe import EMPTIES, Run, runs
from rarefy.run.samples import Samples, some
from rarefy.run.sharing import share_layers
from rarefy.run.subject import Subject
from rarefy.training.activations import Rounding
from rarefy.training.blockwise import Blockwise, Reconstructed, reconstruct
from rarefy.training.loop import Settings
from rarefy.training.tune import Tuned, Tuning, tune

Leaves = Callable[["State", tuple[Step, ...], int], "State"]
BESIDE = ("norms", "biases")  # what moves beside the weights of a technique that trains


@dataclass(frozen=True, eq=False)
class State:
    """The network on its way.

    view: as it computes now. trees: of weights that are more than plain numbers. receipts: of what was done
    to parts of the whole. curves: of every training, plain data.
    """

    view: Subject
    trees: Mapping[str, Node] = field(default_factory=dict)
    receipts: tuple[Receipt, ...] = ()
    curves: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, eq=False)
class Course:
    """Does a recipe's runs.

    original: the teacher. data: the job's samples; what they judge is not trained on. folder: of checkpoints.
    leaves: how weights are rewritten.
    """

    original: Subject
    recipe: Recipe
    effort: Effort
    data: Any
    folder: Path
    progress: Progress
    leaves: Leaves

    def through(self, found: Sequence[Run], state: State, first: int = 0) -> State:
        """``state`` after some runs; ``first``: the number of the first, which names its files."""
        for number, (kind, steps) in enumerate(found, first):
            before = state.view.opened
            match kind:
                case "whole":
                    state = self._reshaped(state, steps, self._weighed(number))
                case "sharing":
                    state = self._shared(state, steps[0])
                case "training":
                    state = self._trained(state, steps[0], number)
                case "correction":
                    state = self.corrected(state, steps[0])
                case "leaves":
                    state = self.leaves(state, steps, number)
            if ranges_of(before) and not ranges_of(state.view.opened):
                warnings.warn(f"{steps[0].technique}: changes what layers read, so the ranges of "
                              f"{len(ranges_of(before))} inputs that training found no longer hold; train "
                              "with rounded activations behind it", stacklevel=1)
        return state

    def _weighed(self, number: int) -> tuple[Step, ...]:
        """The next steps that rewrite weights: factors of channels are chosen for what follows (AWQ)."""
        return next((steps for kind, steps in runs(self.recipe.steps)[number + 1:] if kind == "leaves"), ())

    def _reshaped(self, state: State, steps: tuple[Step, ...], weighed: tuple[Step, ...]) -> State:
        with self.progress.stage("reshape") as stage:
            view, receipts = state.view.reshaped(replace(self.recipe, steps=(*steps, *weighed)), self.effort,
                                                 self.data, stage.advance)
        if all(step.technique == EMPTIES for step in steps):  # layers read what they read before
            view = with_ranges(view, ranges_of(state.view.opened))
        return replace(state, view=view, trees=recut(view.opened, state.trees),
                       receipts=state.receipts + receipts)

    def _shared(self, state: State, step: Step) -> State:
        """``state`` with blocks that share; what they store is plain numbers of the view."""
        with self.progress.stage("share"):
            found = share_layers(state.view.opened, build_sharing(step), self.data.calibration)
        trees = {path: tree for path, tree in found.trees.items() if not isinstance(tree, Dense)}
        view = computing(state.view.opened, found.trees, ranges={})
        return replace(state, view=view, trees={**state.trees, **trees},
                       receipts=state.receipts + found.receipts)

    def corrected(self, state: State, step: Step) -> State:
        """``state`` with biases that bring means back to the original's."""
        opened, original = state.view.opened, self.original.opened
        if not (isinstance(opened, Network) and isinstance(original, Network)):
            raise RecipeError(f"{step.technique}: works on encoders, CNNs and other networks that answer "
                              "samples; language models are not corrected; take the step out")
        with self.progress.stage("means"):
            found = corrected(original, opened, state.trees, build_correction(step),
                              some(self.data.calibration, self.effort.samples[0]), step.technique)
        if not found.params:
            return state
        return replace(state, view=computing(opened, {}, found.params),
                       receipts=state.receipts + found.receipts)

    def _trained(self, state: State, step: Step, number: int) -> State:
        """``state`` after one training."""
        if "by" in step.training:
            return self._reconstructed(state, step)
        started, opened, work = time.perf_counter(), state.view.opened, self.folder / f"training{number}"
        lesson, tuning = lesson_of(step, self.recipe), tuning_of(step)
        with self.progress.stage("training data"):
            avoid = self.data.evaluation
            found = material(lesson, opened, distils=True, avoid=avoid)
            check_labels(opened, found)
        teacher = self.original.opened
        examples, held, objective = explained(opened, teacher, losses(lesson, opened, found), found, work,
                                              self.progress)
        with self.progress.stage("train") as stage:
            tuned = tune(opened, state.trees, tuning, objective, examples, lesson.settings, held=held,
                         folder=work, advance=stage.advance)
        trees = {path: tree for path, tree in tuned.trees.items() if not isinstance(tree, Dense)}
        receipts = _receipts(opened, step, state.trees, trees, tuned, time.perf_counter() - started)
        curve = {"technique": step.technique, "examples": len(found.train), "held": len(found.held),
                 **tuned.curve.as_dict()}
        before = {path: tree for path, tree in state.trees.items() if path not in tuned.trees}
        if tuned.ranges and isinstance(opened, Model):
            warnings.warn(f"{step.technique}: files of language models hold no ranges of activations; inputs "
                          f"of {len(tuned.ranges)} layers were rounded in training, and runtimes leave them "
                          "in floats or round them as they come", stacklevel=1)
        return State(computing(opened, tuned.trees, tuned.params, tuned.ranges), {**before, **trees},
                     state.receipts + receipts, (*state.curves, curve))

    def _reconstructed(self, state: State, step: Step) -> State:
        """``state`` after one training that went block by block."""
        opened, original, settings = state.view.opened, self.original.opened, blocks_of(step, self.recipe)
        if not (isinstance(opened, Model) and isinstance(original, Model)):
            raise RecipeError(f"{step.technique}: only language models are trained by blocks; leave 'by' out")
        data = _several(step.training.get("data", self.recipe.data))
        length = Settings(steps=-(-settings.sequences // settings.batch), batch=settings.batch,
                          seed=self.recipe.seed)
        tokens = material(Lesson(data, settings=length), opened, distils=True,
                          avoid=self.data.evaluation).train.tensors["input_ids"]
        technique, went, started = build_trainer(step), list[Receipt](), time.perf_counter()
        with self.progress.stage("blocks") as stage:

            def tell(each: Reconstructed) -> None:
                stage.advance(each.block + 1, opened.map.blocks)
                went.append(Receipt(f"block {each.block}", step.technique, 0, 0, each.after,
                                    time.perf_counter() - started,
                                    note=f"error of its output {each.before:.3g}, now {each.after:.3g}"))

            trees = reconstruct(opened, technique, tokens, settings, tell, before=state.trees,
                                teacher=original)
        kept = {path: tree for path, tree in trees.items() if not isinstance(tree, Dense)}
        return replace(state, view=computing(opened, trees), trees={**state.trees, **kept},
                       receipts=state.receipts + tuple(went))


def recut(opened: Model | Network, trees: Mapping[str, Node]) -> dict[str, Node]:
    """Masks over what is left of their weights, in a network that lost parts of them; RecipeError for other
    trees that no longer fit, whose codes or factors cannot be cut."""
    found: dict[str, Node] = {}
    for path, tree in trees.items():
        values = opened.weight(path)
        if values.shape == tree.shape:
            found[path] = tree
        elif not isinstance(tree, Masked):
            raise RecipeError(f"{path}: is no longer plain numbers, and parts of it are to be taken out; "
                              "take them out first")
        elif not bool(values.all()):
            found[path] = Masked(values != 0, Dense(values))
    return found


def ranges_of(opened: Model | Network) -> Mapping[str, Range]:
    """Ranges of the inputs that training rounded; a language model keeps none."""
    return opened.ranges if isinstance(opened, Network) else {}


def with_ranges(view: Subject, ranges: Mapping[str, Range]) -> Subject:
    """``view`` with the ranges of layers that it still has."""
    if not isinstance(view.opened, Network):
        return view
    layers = {site.layer for site in view.opened.map.sites}
    kept = {layer: span for layer, span in ranges.items() if layer in layers}
    return Samples(view.opened.with_ranges(kept))


def computing(opened: Model | Network, trees: Mapping[str, Node], params: Mapping[str, Tensor] | None = None,
              ranges: Mapping[str, Range] | None = None) -> Subject:
    """``opened`` with weights as some trees stand for them, other norms and biases, and other ranges of
    inputs (None: its own)."""
    module = materialize(opened, torch.float32) if isinstance(opened, Model) else copy.deepcopy(opened.module)
    sites = opened.map.by_path
    state: dict[str, Tensor] = {path: sites[path].stored(tree.dense()) for path, tree in trees.items()}
    strange = module.load_state_dict({**state, **(params or {})}, strict=False).unexpected_keys
    assert not strange, f"{opened.name}: changed, and not in the network: {', '.join(strange)}"
    module.eval().requires_grad_(False)
    if isinstance(opened, Model):
        return Language(Model.from_module(module, opened.tokenizer, opened.name))
    tokenizer = (lambda: opened.tokenizer) if opened.form.takes == "text" else None
    return Samples(Network(opened.name, module, ModuleSource(module), opened.form, config=opened.config,
                           tokenizer=tokenizer, files=opened.files,
                           ranges=opened.ranges if ranges is None else ranges))


def _receipts(opened: Model | Network, step: Step, before: Mapping[str, Node], after: Mapping[str, Node],
              tuned: Tuned, seconds: float) -> tuple[Receipt, ...]:
    """One of the whole training; one of every weight that became something else, or of which there is a
    note."""
    changed = [path for path in after
               if path in tuned.notes or type(after[path]) is not type(before.get(path))]
    curve = tuned.curve
    judged = "" if curve.best != curve.best else f", best {curve.best:.4g} at step {curve.best_step}"
    bits = opened.parameters * 32
    whole = Receipt(opened.name, step.technique, bits, bits, float("nan"), seconds,
                    note=f"{len(curve.points)} steps, {curve.stopped}{judged}")
    plain = {path: opened.map.by_path[path].shape for path in changed}
    return (whole, *(Receipt(path, step.technique, plain[path][0] * plain[path][1] * 32, after[path].bits(),
                             float("nan"), 0.0, note=tuned.notes.get(path, "")) for path in changed))


# ---- what a step says ----------------------------------------------------------------------------------

OWN = ("moves", "whole", "objectives", "data", "held", "activations", "dropout")  # beside the loop's settings


def check(recipe: Recipe) -> None:
    """Refuse what steps of training say wrong, before any work is done."""
    for kind, steps in runs(recipe.steps):
        for step in steps:
            if kind == "training" and "by" in step.training:
                blocks_of(step, recipe)
            elif kind == "training":
                lesson_of(step, recipe)
                tuning_of(step)
            elif step.training:
                raise RecipeError(f"{step.technique}: does not train; leave `training` out, or add a step of "
                                  f"{TUNE} behind it")


def lesson_of(step: Step, recipe: Recipe) -> Lesson:
    """What a step of training learns from; its data are the recipe's unless it names others."""
    said = _checked(step)
    settings = {name: value for name, value in said.items() if name not in OWN}
    terms = tuple(_term(step, each) for each in said.get("objectives", ()))
    return Lesson(_several(said.get("data", recipe.data)), _several(said.get("held", ())), terms,
                  Settings(**{"seed": recipe.seed, **settings}))


def tuning_of(step: Step) -> Tuning:
    """What moves under a step of training: everything, or what its technique edits, norms and biases."""
    said = _checked(step)
    technique = None if step.technique == TUNE else build_trainer(step)
    moves = _several(said.get("moves", ("everything",) if technique is None else BESIDE))
    rounding = said.get("activations")
    if rounding is not None:
        known = [each.name for each in fields(Rounding)]
        wrong = [name for name in rounding if name not in known]
        if wrong:
            raise RecipeError(f"{step.technique}: activations have no setting {wrong[0]!r}"
                              f"{did_you_mean(wrong[0], known)}")
        named: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value
                                 for name, value in rounding.items()}
        rounding = Rounding(**named)
    return Tuning(frozenset(moves), technique, step.where, _several(said.get("whole", ())),
                  dropout=bool(said.get("dropout", False)), activations=rounding)


def blocks_of(step: Step, recipe: Recipe) -> Blockwise:
    """How a step trains one block after the other."""
    said = {name: value for name, value in step.training.items() if name not in ("by", "data")}
    known = [each.name for each in fields(Blockwise)]
    wrong = [name for name in said if name not in known or name == "where"]
    if step.training["by"] != "blocks" or step.technique == TUNE:
        raise RecipeError(f"{step.technique}: by: {step.training['by']!r}: techniques can train by blocks; "
                          "all else trains as a whole, without 'by'")
    if wrong:
        raise RecipeError(f"{step.technique}: training by blocks has no setting {wrong[0]!r}"
                          f"{did_you_mean(wrong[0], known)}")
    return Blockwise(**{"seed": recipe.seed, **said, "where": step.where})


def _checked(step: Step) -> dict[str, Any]:
    known = [*OWN, *(each.name for each in fields(Settings))]
    wrong = [name for name in step.training if name not in known]
    if wrong:
        raise RecipeError(f"{step.technique}: training has no setting {wrong[0]!r}"
                          f"{did_you_mean(wrong[0], known)}")
    return step.training


def _term(step: Step, said: Any) -> Term:
    known = [each.name for each in fields(Term)]
    if isinstance(said, str):
        return Term(said)
    if not isinstance(said, dict) or "technique" not in said or set(said) - set(known):
        raise RecipeError(f"{step.technique}: objective {said!r}: write a name, or technique, weight and "
                          "settings")
    return Term(**said)


def _several(said: Any) -> tuple[str, ...]:
    return (said,) if isinstance(said, str) else tuple(said)
