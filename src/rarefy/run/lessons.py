"""What a job trains on and towards what: rows or windows, the losses, the teacher's answers to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.calibration.examples import Examples, read_examples
from rarefy.calibration.samples import SELF, sample_windows
from rarefy.calibration.text import split_windows, windows
from rarefy.core.errors import DataError, RecipeError, did_you_mean
from rarefy.core.nodes import Node
from rarefy.core.signals import Objective
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.run.planning import objectives
from rarefy.run.progress import Progress
from rarefy.training.examples import LABELS, Answered, Rows
from rarefy.training.loop import Settings
from rarefy.training.signals import Distillation, inputs_of
from rarefy.training.teacher import answered

LENGTH = 256  # tokens of a window
HELD = 0.1  # share of the data that judges, where the user names no other
ASIDE = 2000  # examples that judge at most: ten judgements of more take longer than a short training
MOST = 4096  # windows of text
BESIDES = 64  # windows that judge
Losses = tuple[tuple[float, Objective], ...]


@dataclass(frozen=True)
class Term:
    """One loss: its technique, its weight, and the technique's settings."""

    technique: str
    weight: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Lesson:
    """What a network learns.

    data: a table with labels, or texts; nothing, or ``self``: what a teacher writes. held: what judges
    (empty: a tenth of the data). objectives: losses with their weights (empty: what suits the network).
    """

    data: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    objectives: tuple[Term, ...] = ()
    settings: Settings = field(default_factory=Settings)

    @property
    def written(self) -> bool:
        """Whether the teacher writes the text."""
        return self.data in ((), (SELF,))


@dataclass(frozen=True, eq=False)
class Material:
    """Rows to train on and rows to judge on. labels: names of the classes, where there are labels."""

    train: Rows
    held: Rows
    labels: tuple[str, ...] = ()


def material(lesson: Lesson, network: Model | Network, *, distils: bool,
             avoid: Examples | Tensor | None = None) -> Material:
    """The data of a lesson as ``network`` takes it.

    distils: whether there is a teacher, which may then write the text. avoid: samples, or windows of tokens,
    that the result will be judged on: none of them is trained on.
    """
    if isinstance(network, Model):
        return _windows(lesson, network, distils=distils, avoid=avoid)
    if len(lesson.data) != 1 or len(lesson.held) > 1:
        raise DataError("pass one table of sentences (and labels) to train on, and at most one to judge on")
    parts = [_rows(network, ref, avoid) for ref in (*lesson.data, *lesson.held)]
    share = min(HELD, ASIDE / max(1, len(parts[0])))
    train, aside = (parts[0], parts[1]) if lesson.held else parts[0].split(share, lesson.settings.seed)
    labels: tuple[str, ...] = network.form.labels
    if LABELS in parts[0].tensors and network.form.gives == "embedding":
        labels = tuple(str(k) for k in range(int(parts[0].tensors[LABELS].max()) + 1))
    return Material(train, aside, labels if LABELS in train.tensors else ())


def _rows(network: Network, ref: str, avoid: Examples | Tensor | None) -> Rows:
    found = read_examples(network, ref)
    if isinstance(avoid, Examples):
        found = found.apart_from(avoid)
        if not len(found):
            raise DataError(f"{ref}: every sample of it is judged on; pass other evaluation data")
    return Rows({**found.inputs, **({} if found.labels is None else {LABELS: found.labels})})


def _windows(lesson: Lesson, model: Model, *, distils: bool, avoid: Examples | Tensor | None) -> Material:
    """Windows of text, or of what the teacher writes; the label of a token is the one that follows."""
    length = min(LENGTH + 1, getattr(model.config, "max_position_embeddings", LENGTH + 1))
    seed, unseen = lesson.settings.seed, avoid if isinstance(avoid, Tensor) else None
    if not lesson.written:
        tokens = windows(lesson.data, model.tokenizer, length=length, count=MOST, seed=seed, minimum=4,
                         avoid=unseen)
    elif distils:
        count = max(8, min(MOST, (lesson.settings.steps or 64) * lesson.settings.batch))
        tokens = sample_windows(model, count=count, length=length, seed=seed)
    else:
        raise DataError("fine-tuning needs --data: text to learn from")
    if lesson.held:
        held = windows(lesson.held, model.tokenizer, length=length, count=BESIDES, seed=1, minimum=1,
                       avoid=unseen)
    else:
        tokens, held = split_windows(tokens, max(1, min(BESIDES, len(tokens) // 10)), seed=seed)
    parts = [Rows({"input_ids": each[:, :-1].contiguous(), LABELS: each[:, 1:].contiguous()})
             for each in (tokens, held)]
    return Material(parts[0], parts[1])


def check_labels(network: Model | Network, found: Material) -> None:
    """Refuse labels that ``network`` has no class for, and those that are all the same."""
    if isinstance(network, Model) or LABELS not in found.train.tensors:
        return
    labels, classes = found.train.tensors[LABELS].unique(), len(network.form.labels)
    if len(labels) < 2:
        raise DataError(f"all labels are {int(labels[0])}; a classifier needs examples of two classes")
    outside = [int(label) for label in labels if not 0 <= int(label) < classes]
    if network.form.gives == "classes" and classes and outside:
        raise DataError(f"label {outside[-1]} is outside the model's {classes} classes "
                        f"({', '.join(network.form.labels[:8])}); correct the data, or start from an encoder "
                        "without a head")


def losses(lesson: Lesson, student: Model | Network, found: Material) -> Losses:
    """The losses of a lesson; by default what suits the network."""
    known = objectives()
    chosen = lesson.objectives
    if not chosen and isinstance(student, Model):
        chosen = (Term("forward_kl"),)
    elif not chosen and isinstance(student, Network):
        rows = Term("cosine", settings={"of": "rows"})
        # states between the blocks are what networks of transformers give
        labels = Term("soft_labels" if student.config is None else "triple")
        chosen = (labels if student.form.gives == "classes" else rows,)
    terms = tuple((term.weight, _objective(term, known)) for term in chosen)
    if any("samples" in term.needs for _, term in terms) and not lesson.written:
        raise RecipeError("sequence learns from what the teacher writes; leave --data out")
    if any("labels" in term.needs for _, term in terms) and LABELS not in found.train.tensors:
        raise DataError("this objective needs labels and the data has none; use soft_labels")
    return terms


@torch.no_grad()
def score(network: Model | Network, held: Rows, trees: Mapping[str, Node], params: Mapping[str, Tensor]
          ) -> dict[str, float]:
    """Accuracy on what was held out, for classifiers with labels."""
    if isinstance(network, Model) or LABELS not in held.tensors or network.form.gives != "classes":
        return {}
    tensors = network.tensors(trees.get) | dict(params)
    right = 0
    for index in torch.arange(len(held)).split(64):
        batch = held.batch(index)
        right += int((network.run(inputs_of(batch), tensors).argmax(1) == batch[LABELS]).sum())
    return {"accuracy": right / len(held)}


def _objective(term: Term, known: Mapping[str, type[Any]]) -> Objective:
    if term.technique not in known:
        raise RecipeError(f"objective {term.technique!r} does not exist"
                          f"{did_you_mean(term.technique, list(known))}; choose of {', '.join(known)}")
    kind = known[term.technique]
    fields = list(kind.__dataclass_fields__)
    wrong = [name for name in term.settings if name not in fields]
    if wrong:
        raise RecipeError(f"{term.technique}: no setting {wrong[0]!r}{did_you_mean(wrong[0], fields)}")
    objective: Objective = kind(**term.settings)
    return objective


def explained(student: Model | Network, teacher: Model | Network | None, terms: Losses, found: Material,
              work: Path, progress: Progress) -> tuple[Rows | Answered, Rows | Answered, Distillation]:
    """Examples with the teacher's answers, where those are all that is needed of it; the objective.

    work: where its answers are kept.
    """
    needs = frozenset().union(*(term.needs for _, term in terms))
    if teacher is None or needs <= {"labels", "samples"}:
        return found.train, found.held, Distillation(student, None, terms)
    # of a language model's answers the largest are kept, at temperature 1; of others all
    classes = min(len(teacher.tokenizer), teacher.map.head.shape[0]) if isinstance(teacher, Model) else None
    softened = isinstance(teacher, Model) and any(getattr(term, "temperature", 1) != 1 for _, term in terms)
    if not needs <= {"logits", "labels"} or softened:
        return found.train, found.held, Distillation(student, teacher, terms, classes=classes)
    with progress.stage("ask the teacher") as stage:
        parts = [answered(teacher, rows, work, classes=classes, advance=stage.advance)
                 for rows in (found.train, found.held)]
    return parts[0], parts[1], Distillation(student, None, terms, classes=classes)
