"""A receipt in a few lines for the terminal: the verdict, and the numbers behind it."""

from __future__ import annotations

import math
from typing import Any

from rarefy.report import words
from rarefy.report.answers import answers_of, plain
from rarefy.report.verdict import file_bytes, final, runtime_name, verdict


def summary(receipt: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """The headline and (label, value) lines; what was not measured is left out."""
    measured, model, kind = receipt.get("measured") or {}, receipt.get("model") or {}, answers_of(receipt)
    weight, rows = file_bytes(receipt), []
    if weight:
        original = model.get("original_bytes")
        than = f", {words.times(original / weight)} smaller than {words.size(original)}" if original else ""
        rows.append(("size", f"{words.size(weight)}{than}"))
    for where, key in (("PyTorch", "float"), ("PyTorch, other text", "second_domain"),
                       (runtime_name(receipt), "runtime")):
        found = plain(measured.get(key))
        if found.get("mean") is not None:
            error = f" ± {words.nats(found['stderr'])}" if found.get("stderr") else ""
            top, unit = found.get("top1"), kind.unit and " " + kind.unit
            same = "" if top is None else f", {kind.same} {words.percent(top)}" if kind.unit else (
                f", cosine {top:.4f}")
            rows.append((f"{kind.distance} in {where}", f"{words.nats(found['mean'])}{error}{unit}{same}"))
    rows += _task(plain(measured.get("runtime") or measured.get("float")))
    predicted = receipt.get("predicted_kl")
    if predicted is not None and math.isfinite(predicted) and final(receipt):
        rows.append((f"{kind.distance} predicted", words.nats(predicted)))
    rows += _speed(receipt.get("speed") or {}) + exit_rows(receipt.get("exits") or {})
    if receipt.get("seconds"):
        rows.append(("time", words.duration(sum(receipt["seconds"].values()))))
    return verdict(receipt).headline, rows


RATES = (("writing", "decode", "tokens/s"), ("reading", "prefill", "tokens/s"),
         ("many at once", "batch", "samples/s"), ("one at a time", "single", "samples/s"))


def _speed(speed: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for label, key, unit in RATES:
        now, ratio = (speed.get("compressed") or {}).get(key), speed.get(f"ratio_{key}")
        if now:
            against = f", {words.times(ratio)} the original's speed" if ratio else ""
            rows.append((label, f"{words.three(now)} {unit}{against}"))
    return rows


def exit_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Where samples leave, what it costs and gains."""
    if not found:
        return []
    whole = found["whole"]
    left = ", ".join(f"{count} after {block}" for block, count in found["left"].items())
    quality = f"{words.percent(found['same'])} of the answers are the whole network's"
    if "accuracy" in found:
        quality += f", accuracy {words.percent(found['accuracy'])} of {words.percent(whole['accuracy'])}"
    rows = [("exits", f"{found['mean_blocks']:.2f} of {whole['mean_blocks']:g} blocks on average, "
                      f"{words.percent(found['mean_work'])} of the work: {left}"),
            ("behind", ", ".join(f"block {block}: {name}" for block, name in found["behind"].items())),
            ("answers", f"{quality} (may lose {words.percent(found['max_loss'])})")]
    for size, seconds in found["seconds"].items():
        faster = words.times(seconds["whole"] / seconds["exits"])
        rows.append((f"speed, batch {size}", f"{faster} the whole network's: {1e3 * seconds['exits']:.3g} ms "
                                             f"a sample instead of {1e3 * seconds['whole']:.3g}"))
    return rows + ([("note", found["note"])] if found["note"] else [])


def _task(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What labels say of both models."""
    if found.get("accuracy") is None:
        return []
    by = " of a probe on its vectors" if found.get("by") == "probe" else ""
    error = f" ± {words.percent(found['accuracy_stderr'])}" if found.get("accuracy_stderr") else ""
    return [(name + by, f"{words.percent(found[key])}{more}, the original's "
                        f"{words.percent(found[f'{key}_original'])}")
            for name, key, more in (("accuracy", "accuracy", error), ("macro F1", "f1", ""))]
