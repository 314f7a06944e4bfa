"""How far a network's answers moved, and what that does to its task.

A classifier is compared by the KL divergence of its distributions and by how often both choose the same
class; any other network by 1 - cosine of its vectors. With labels there is also the task itself: accuracy
and macro F1, of both, and the standard error of the difference, which is paired: both judged the same
samples.

    F1 = mean over classes of 2 TP / (2 TP + FP + FN)

An encoder has no classes of its own. With labels its vectors are judged by a linear probe (logistic
regression) that is fitted once, to the original's vectors of the calibration samples, and then reads both
models' vectors of the evaluation samples: that is what happens to those who trained something on top of an
encoder and then compress it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from rarefy.calibration.examples import Examples
from rarefy.core.errors import DataError, ModelError
from rarefy.models.form import Form
from rarefy.models.network import Network
from rarefy.models.runner import Override

BATCH = 64
PROBE_DECAY = 1e-4   # of the probe's weights: vectors are normalised, classes are few
PROBE_STEPS = 200


@dataclass(frozen=True)
class Task:
    """What the labels say of both. by: the network's own classes, or a probe fitted on its vectors."""

    accuracy: float
    accuracy_original: float
    accuracy_stderr: float
    f1: float
    f1_original: float
    by: str = "labels"


@dataclass(frozen=True)
class Answers:
    """The distance between two networks on some samples: KL in nats, or 1 - cosine, per sample.

    same: how often both choose the same class (None: there are none).
    """

    kind: str
    mean: float
    stderr: float
    median: float
    p999: float
    samples: int
    same: float | None = None
    task: Task | None = None

    def as_dict(self) -> dict[str, Any]:
        """For a receipt: ``kl_mean`` and so on, or ``distance_mean`` where it is 1 - cosine."""
        found = {f"{self.kind}_mean": self.mean, f"{self.kind}_stderr": self.stderr,
                 f"{self.kind}_median": self.median, f"{self.kind}_p999": self.p999, "samples": self.samples}
        if self.same is not None:
            found["top1"] = self.same
        if self.kind == "distance":
            found["cosine"] = 1 - self.mean
        return found if self.task is None else {**found, "task": dict(vars(self.task))}


class Judge:
    """The original's answers on some samples. calibration: labelled samples that a probe may be fitted to."""

    def __init__(self, network: Network, examples: Examples, calibration: Examples | None = None) -> None:
        self.form, self.examples = network.form, examples.by_length()
        self.answers = _answers(network, self.examples, {})
        self.read: Float[Tensor, "width classes"] | None = None
        labels = self.examples.labels
        if labels is not None and self.form.gives == "classes":
            most = self.answers.shape[1]
            if int(labels.min()) < 0 or int(labels.max()) >= most:
                raise DataError(f"labels from {int(labels.min())} to {int(labels.max())}: the network has "
                                f"{most} classes, 0 to {most - 1}; pass labels that are among them")
        if (labels is not None and self.form.gives == "embedding" and calibration is not None
                and calibration.labels is not None and len(calibration.labels.unique()) > 1):
            count = int(max(labels.max(), calibration.labels.max())) + 1
            self.read = probe(_answers(network, calibration, {}), calibration.labels, count)

    def compare(self, candidate: Network, override: Override = lambda path: None) -> Answers:
        """Measure a network of the same form, or the same one with other weights."""
        answers = _answers(candidate, self.examples, candidate.tensors(override))
        bad = (~torch.isfinite(answers)).any(1).nonzero()
        if len(bad):
            raise ModelError(f"{candidate.name}: computes NaN or infinity for sample {int(bad[0])}; it is "
                             "damaged, or its scales overflow")
        apart = divergences(self.answers, answers, self.form)
        same = None
        if self.form.gives == "classes":
            same = float((self.answers.argmax(1) == answers.argmax(1)).double().mean())
        return Answers("kl" if self.form.gives == "classes" else "distance", float(apart.mean()),
                       _error(apart), float(apart.median()), float(apart.quantile(0.999)), len(apart), same,
                       self._task(answers))

    def _task(self, answers: Tensor) -> Task | None:
        labels = self.examples.labels
        if labels is None:
            return None
        if self.form.gives == "classes":
            return task(self.answers.argmax(1), answers.argmax(1), labels, "labels")
        if self.read is None:
            return None
        return task(classes(self.answers, self.read), classes(answers, self.read), labels, "probe")


@torch.no_grad()
def _answers(network: Network, examples: Examples, tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([network.run(batch, tensors) for batch in examples.batches(BATCH)])


def divergences(original: Float[Tensor, "n width"], candidate: Float[Tensor, "n width"], form: Form
                ) -> Float[Tensor, " n"]:
    """KL in nats, or 1 - cosine, of every sample, in float64."""
    if form.gives == "classes":
        p, q = original.double().log_softmax(1), candidate.double().log_softmax(1)
        return (p.exp() * (p - q)).sum(1).clamp_min(0)
    return (1 - F.cosine_similarity(original.double(), candidate.double(), eps=1e-12)).clamp_min(0)


def task(original: Int64[Tensor, " n"], candidate: Int64[Tensor, " n"], labels: Int64[Tensor, " n"],
         by: str) -> Task:
    """Accuracy and F1 of both models' choices."""
    before, after = (original == labels).double(), (candidate == labels).double()
    return Task(float(after.mean()), float(before.mean()), _error(after - before),
                macro_f1(candidate, labels), macro_f1(original, labels), by)


def macro_f1(chosen: Int64[Tensor, " n"], labels: Int64[Tensor, " n"]) -> float:
    """Mean of the classes' F1 over the classes that were chosen or wanted."""
    scores = []
    for label in torch.cat([chosen, labels]).unique():
        hit = ((chosen == label) & (labels == label)).sum()
        scores.append(float(2 * hit / ((chosen == label).sum() + (labels == label).sum())))
    return sum(scores) / len(scores)


def probe(vectors: Float[Tensor, "n width"], labels: Int64[Tensor, " n"], count: int
          ) -> Float[Tensor, "inputs classes"]:
    """Logistic regression on normalised vectors, to its optimum (L-BFGS); the last row is the bias."""
    x = _with_bias(vectors)
    weight = torch.zeros(x.shape[1], count, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=PROBE_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight, labels) + PROBE_DECAY * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach()


def classes(vectors: Float[Tensor, "n width"], read: Float[Tensor, "inputs classes"]) -> Int64[Tensor, " n"]:
    """What a probe reads from vectors."""
    return (_with_bias(vectors) @ read).argmax(1)


def _with_bias(vectors: Tensor) -> Tensor:
    unit = F.normalize(vectors.float(), dim=1)
    return torch.cat([unit, unit.new_ones(len(unit), 1)], 1)


def _error(values: Float[Tensor, " n"]) -> float:
    """The standard error of the mean."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else float("nan")
