"""How the answers of each kind of network are spoken of: what their distance is called, and what it means.

A language model is compared token by token, a classifier sample by sample, both by the KL divergence of their
distributions; an encoder by 1 - cosine of its vectors. What a reader notices begins at other values for each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rarefy.report import words

Bands = tuple[tuple[float, str, str], ...]

SAMPLES: Bands = (
    (0.001, "practically the same", "answers practically like the original"),
    (0.01, "nearly the same", "answers nearly like the original"),
    (0.05, "very close", "stays very close to the original"),
    (0.15, "close", "stays close to the original; doubtful samples change their class"),
    (0.5, "different", "answers noticeably differently from the original"),
    (math.inf, "damaged", "no longer behaves like the original"),
)
VECTORS: Bands = (
    (0.0005, "practically the same", "answers practically like the original"),
    (0.005, "nearly the same", "answers nearly like the original"),
    (0.02, "very close", "stays very close to the original"),
    (0.06, "close", "stays close to the original; near neighbours change their order"),
    (0.2, "different", "answers noticeably differently from the original"),
    (math.inf, "damaged", "no longer behaves like the original"),
)


@dataclass(frozen=True)
class Answers:
    """The words for one kind.

    distance: its name. unit: of its mean; big: the same, short. each: what is averaged over. same: what
    ``top1`` counts. same_text: in a sentence. meaning: of the distance. rates: title, key and unit of speeds.
    """

    distance: str
    unit: str
    big: str
    each: str
    same: str
    same_text: str
    meaning: str
    bands: Bands
    rates: tuple[tuple[str, str, str], ...]

    def band(self, value: float) -> tuple[str, str]:
        """A short name for a mean distance and a clause that says it."""
        return next((name, clause) for limit, name, clause in self.bands
                    if value < limit or limit == math.inf)

    def told(self, value: float) -> str:
        """``mean KL 0.0871 nats per token (very close)``."""
        unit = self.unit and " " + self.unit
        return f"mean {self.distance} {words.nats(value)}{unit} ({self.band(value)[0]})"


_RATES = (("Many at once", "batch", "samples/s"), ("One at a time", "single", "samples/s"))
KINDS = {
    "tokens": Answers(
        "KL", "nats per token", "nats", "token", "same next token",
        "How often both models rank the same token first, on text neither was calibrated on.",
        "KL divergence says how much the compressed model's probabilities for the next token differ from the "
        "original's, in nats per token; 0 is the same model.", words.BANDS,
        (("Writing (decode)", "decode", "tokens/s"), ("Reading (prefill)", "prefill", "tokens/s"))),
    "classes": Answers(
        "KL", "nats per sample", "nats", "sample", "same class",
        "How often both models choose the same class, for samples neither was calibrated on.",
        "KL divergence says how much the compressed model's probabilities for the classes differ from the "
        "original's, in nats per sample; 0 is the same model.", SAMPLES, _RATES),
    "embedding": Answers(
        "distance", "", "1 − cosine", "sample", "same direction",
        "Mean cosine of both models' vectors, for samples neither was calibrated on.",
        "Distance is 1 − cosine of the compressed model's vector and the original's; 0 is the same "
        "direction.", VECTORS, _RATES),
}


def answers_of(receipt: dict[str, Any]) -> Answers:
    """The words for the model of a receipt; a receipt that does not say is of a language model."""
    return KINDS.get((receipt.get("model") or {}).get("answers", "tokens"), KINDS["tokens"])


def plain(summary: dict[str, Any] | None) -> dict[str, Any]:
    """A measurement under one set of names, whatever the distance is: ``mean``, ``stderr``, ``median``,
    ``p999``, ``top1`` (of vectors: the cosine), what the task says, and over how many it was measured."""
    if not summary:
        return {}
    found = dict(summary)
    for kind in ("kl", "distance"):
        for name in ("mean", "stderr", "median", "p999"):
            if f"{kind}_{name}" in summary:
                found[name] = summary[f"{kind}_{name}"]
    found.setdefault("top1", summary.get("cosine"))
    counts = (summary.get(key) for key in ("tokens", "positions", "samples"))
    found["count"] = next(filter(None, counts), None)
    return found | (summary.get("task") or {})
