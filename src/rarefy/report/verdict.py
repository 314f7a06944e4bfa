"""The verdict: does the file keep to the budget, and how close is it to the original, in plain words.

The words follow from the numbers alone, by fixed thresholds (``words.BANDS``); a bound that was missed
comes first, and what was not measured is said to be so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rarefy.report import words
from rarefy.report.answers import answers_of, plain


@dataclass(frozen=True)
class Verdict:
    """kept: every bound that the user set holds. badge: two words. headline, detail: sentences."""

    kept: bool
    badge: str
    headline: str
    detail: str


def file_bytes(receipt: dict[str, Any]) -> int:
    """Bytes of what was exported, report and receipt aside."""
    own = {"report.html", "receipt.json"}
    outputs = [o for o in receipt.get("outputs") or () if o["path"].rsplit("/", 1)[-1] not in own]
    return sum(o["bytes"] for o in outputs) or sum(row["bytes"] for row in receipt.get("plan") or ())


def runtime_name(receipt: dict[str, Any]) -> str:
    """How people call the runtime: the target, whatever package carries it here."""
    runtime = (receipt.get("measured") or {}).get("runtime") or {}
    return str(receipt.get("target") or runtime.get("name") or "the runtime")


def final(receipt: dict[str, Any]) -> dict[str, Any]:
    """The measurement that counts: the exported file in its runtime, else in PyTorch; may be empty.

    Names as ``answers.plain`` gives them.
    """
    measured = receipt.get("measured") or {}
    return plain(measured.get("runtime") or measured.get("float"))


def distance(summary: dict[str, Any]) -> Any:
    """How far answers moved, by whatever they are compared: KL, or 1 - cosine; None: not measured."""
    return plain(summary).get("mean")


def missed(receipt: dict[str, Any]) -> list[str]:
    """Which of the user's bounds do not hold, as clauses."""
    budget, kl, weight = receipt.get("budget") or {}, final(receipt).get("mean"), file_bytes(receipt)
    found = []
    if budget.get("limit_bytes") and weight > budget["limit_bytes"]:
        found.append(f"the file takes {weight:,} bytes, {weight - budget['limit_bytes']:,} more than allowed")
    if budget.get("max_kl") is not None and kl is not None and kl > budget["max_kl"]:
        bound = budget["max_kl"]
        said = answers_of(receipt)
        unit = said.unit and " " + said.unit
        found.append(f"the mean {said.distance} is {words.nats(kl)}{unit}, over the bound of {bound:g}")
    return found


def verdict(receipt: dict[str, Any]) -> Verdict:
    """The sentences at the top of the page."""
    name = (receipt.get("model") or {}).get("name", "the model")
    failures = missed(receipt)
    if failures:
        return Verdict(False, "Rejected", f"{name} does not keep to its budget: {' and '.join(failures)}.",
                       _detail(receipt))
    kl = final(receipt).get("mean")
    if kl is None:
        return Verdict(True, "Not measured", f"{name} now takes {words.size(file_bytes(receipt))}; "
                       "how far its answers moved was not measured.", _detail(receipt))
    headline = f"{name} {_fits(receipt)} and {answers_of(receipt).band(kl)[1]}."
    return Verdict(True, "Within budget", headline, _detail(receipt))


def _fits(receipt: dict[str, Any]) -> str:
    budget, weight = receipt.get("budget") or {}, file_bytes(receipt)
    if budget.get("limit_bytes"):
        return f"fits in {words.size(budget['limit_bytes'])}"
    return f"now takes {words.size(weight)}"


def _detail(receipt: dict[str, Any]) -> str:
    """Size, drift and speed in three short sentences; absent numbers leave their sentence out."""
    weight, original = file_bytes(receipt), (receipt.get("model") or {}).get("original_bytes")
    said = []
    if original and weight:
        said.append(f"The file is {words.size(weight)}, {words.times(original / weight)} smaller than "
                    f"the original's {words.size(original)}.")
    measured, runtime = final(receipt), (receipt.get("measured") or {}).get("runtime")
    kind, where = answers_of(receipt), runtime_name(receipt) if runtime else "PyTorch"
    if measured.get("top1") is not None:
        said.append(_agreement(kind.same, where, measured["top1"]))
    if measured.get("accuracy") is not None:
        said.append(f"Its accuracy is {words.percent(measured['accuracy'])}, the original's "
                    f"{words.percent(measured['accuracy_original'])}.")
    key = kind.rates[0][1]
    ratio, does = (receipt.get("speed") or {}).get(f"ratio_{key}"), "writes" if key == "decode" else "runs"
    if ratio:
        said.append(f"It {does} {words.times(ratio)} as fast." if ratio >= 1.05 else
                    f"It {does} no faster ({words.times(ratio)})." if ratio >= 0.95 else
                    f"It {does} slower than the original ({words.times(ratio)} its speed).")
    return " ".join(said)


def _agreement(same: str, where: str, share: float) -> str:
    match same:
        case "same next token":
            return (f"Run by {where} on text it had not seen, it ranks the same next token first "
                    f"{100 * share:.0f} times out of 100.")
        case "same class":
            return (f"Run by {where} on samples it had not seen, it chooses the same class "
                    f"{100 * share:.1f} times out of 100.")
        case _:
            return (f"Run by {where} on samples it had not seen, its vectors have a mean cosine of "
                    f"{share:.4f} to the original's.")
