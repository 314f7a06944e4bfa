"""The nouns that flow between the floors: Evidence, Option, Budget, Target, Step, Recipe, Receipt.

Frozen values all. ``Evidence`` and ``Option`` carry tensors; the rest is plain data that goes to
YAML or JSON and back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.core.errors import RecipeError
from rarefy.numerics.grids import Grid


@dataclass(frozen=True, eq=False)
class Evidence:
    """What calibration saw at one weight ``y = W x``.

    gram: sum over tokens of ``x x^T``, [in, in] float32. tokens: how many tokens were summed.
    fisher: mean over tokens of the squared gradient of the log-likelihood of the model's own samples
    with respect to ``y``, [out], so that ``KL ~ 1/2 sum_i fisher_i dW_i (gram/tokens) dW_i^T`` in nats
    per token (the Kronecker-factored Fisher of Martens & Grosse 2015 with a diagonal output side).
    """

    gram: Float[Tensor, "in_ in_"]
    tokens: int
    fisher: Float[Tensor, " out"] | None = None

    @property
    def separate(self) -> bool:
        """Whether every input counts by itself, as in a table of embeddings: the gram is a diagonal."""
        return int(self.gram.count_nonzero()) <= len(self.gram)

    def __add__(self, other: Evidence) -> Evidence:
        """Evidence from two shards of data. The Fisher is a mean, so it is weighted by tokens."""
        fisher = None
        if self.fisher is not None and other.fisher is not None:
            total = self.tokens + other.tokens
            fisher = (self.fisher * self.tokens + other.fisher * other.tokens) / total
        return Evidence(self.gram + other.gram, self.tokens + other.tokens, fisher)

    def through(self, matrix: Float[Tensor, "rank in_"]) -> Evidence:
        """The evidence that arrives behind ``matrix``: inputs become ``matrix @ x``."""
        return replace(self, gram=matrix @ self.gram @ matrix.T)

    def before(self, matrix: Float[Tensor, "out rank"]) -> Evidence:
        """The evidence in front of ``matrix``: the outputs of this weight are its inputs."""
        if self.fisher is None:
            return self
        return replace(self, fisher=(matrix.square() * self.fisher[:, None]).sum(0))

    def damage(self, delta: Float[Tensor, "out in_"]) -> float:
        """Predicted KL in nats per token of changing the weight by ``delta`` (second order)."""
        if self.fisher is None:
            raise RecipeError("predicting damage needs evidence with a Fisher: run a survey first")
        rows = ((delta @ self.gram) * delta).sum(1)
        return 0.5 * float((rows * self.fisher).sum()) / max(self.tokens, 1)

    def error(self, delta: Float[Tensor, "out in_"]) -> float:
        """Mean squared output error per token of changing the weight by ``delta``."""
        return float(((delta @ self.gram) * delta).sum()) / max(self.tokens, 1)


def bytes_of(text: str) -> int:
    """``"160MB"`` -> 160_000_000; ``"1.5GiB"`` -> 1610612736; a bare number is bytes."""
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9,
             "kib": 2**10, "mib": 2**20, "gib": 2**30}
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in units:
        raise RecipeError(f"size {text!r}: expected bytes like 160MB or 1.5GiB, a share like 60%, "
                          "or bits per weight like 4.5bpw")
    return int(float(match[1]) * units[match[2].lower()])


@dataclass(frozen=True)
class Budget:
    """What the exported file may cost. Exactly one of ``to`` and ``max_kl`` drives the planner.

    to: bytes of the whole exported file (``160MB``), a share of the original's exported bytes
    (``60%``), or bits per weight of the whole file (``4.5bpw``). max_kl: mean KL to the original in
    nats per token; the file is then as small as that allows. With both, ``to`` drives and ``max_kl``
    is a bound that the measurement must meet.
    """

    to: str | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        if self.to is None and self.max_kl is None:
            raise RecipeError("no budget: pass --to SIZE (160MB, 60%, 4.5bpw) or --max-kl NATS")
        if self.max_kl is not None and not 0 < self.max_kl < float("inf"):
            raise RecipeError(f"--max-kl must be a positive number of nats per token, got {self.max_kl}")
        if self.to is not None:
            self.limit(original=1, weights=1)

    def limit(self, *, original: int, weights: int) -> int | None:
        """The bound in bytes, for an original of that many bytes and that many weights."""
        if self.to is None:
            return None
        text = self.to.strip()
        if text.endswith("%"):
            share = _number(text[:-1], text)
            if not 0 < share <= 100:
                raise RecipeError(f"size {text!r}: a share must lie in (0, 100]%")
            return int(original * share / 100)
        if text.lower().endswith("bpw"):
            return int(weights * _number(text[:-3], text) / 8)
        limit = bytes_of(text)
        if limit <= 0:
            raise RecipeError(f"size {text!r}: must be positive")
        return limit


def share_of(text: str) -> float:
    """``"1%"`` and ``"0.01"`` -> 0.01: a share above 0 and below 1."""
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = float("nan")
    if not 0 < value < 1:
        raise RecipeError(f"share {text!r}: expected 1% or 0.01, above 0 and below 1")
    return value


def _number(text: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise RecipeError(f"size {whole!r}: {text!r} is not a number") from None
    if not 0 < value < float("inf"):
        raise RecipeError(f"size {whole!r}: must be positive")
    return value


@dataclass(frozen=True)
class Target:
    """What a runtime can load; it restricts the search before any work.

    formats: names of the storage formats it loads. suffix: of the exported file.
    """

    name: str
    formats: tuple[str, ...]
    suffix: str
    description: str = ""


@dataclass(frozen=True)
class Choice:
    """How a target could store one site: a grid of codes or a floating dtype, and the exact bytes.

    stored None: as any tree, at the bits that the tree counts (``bytes`` is then meaningless).
    """

    stored: Grid | torch.dtype | None
    bytes: int


@dataclass(frozen=True)
class Option:
    """One way to store one site: a chain of steps with its exact bytes and predicted damage.

    damage: predicted mean KL to the original in nats per token if only this site changes (NaN: not
    predicted, because a recipe asked for it).
    """

    site: str
    format: str
    bytes: int
    damage: float
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Step:
    """One technique with its settings, applied where a pattern matches.

    technique: file stem of the technique. where: globs over site paths, or ``role:NAME``; a pattern that
    matches nothing is an error. settings: fields of the technique's config. format: the target's storage
    format whose grid the technique works on (needed by quantizers that are not given a grid). training: how
    a step that trains does so (``run.course`` reads it).
    """

    technique: str
    where: tuple[str, ...] = ("*",)
    settings: dict[str, Any] = field(default_factory=dict)
    format: str = ""
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Exiting:
    """Exits of a classifier: where, how careful, and what they learn from.

    after: behind which blocks, from 0 (empty: evenly over the work). max_loss: the share of answers that may
    be lost. settings: others of the technique ``early_exit``. together: the network learns with its exits.
    data: what they learn from, at most ``samples`` of it (empty: the recipe's). calibration: what the
    threshold is chosen on (empty: a fifth of the data is kept for it; that is only a guarantee where the
    network was not trained on it). training: fields of ``training.loop.Settings``.
    """

    after: tuple[int, ...] = ()
    max_loss: float = 0.01
    settings: dict[str, Any] = field(default_factory=dict)
    together: bool = False
    data: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()
    samples: int = 8000
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Techniques in order, spelled out: what ``rarefy run`` executes. Plain data, YAML both ways.

    exits: what a classifier gets when all steps are done.
    """

    model: str
    steps: tuple[Step, ...]
    target: str = "auto"
    effort: str = "balanced"
    data: tuple[str, ...] = ()
    eval_data: tuple[str, ...] = ()
    seed: int = 0
    dequantize: bool = False
    exits: Exiting | None = None


@dataclass(frozen=True)
class Receipt:
    """What one step did to one site. ``note`` lists every fallback; silence is not an option.

    error: mean squared output error per token after the step, relative to the mean squared output.
    """

    site: str
    technique: str
    bits_before: int
    bits_after: int
    error: float
    seconds: float
    format: str = ""
    note: str = ""
