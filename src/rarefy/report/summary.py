"""A receipt in a few lines for the terminal: the verdict, and the numbers behind it."""

from __future__ import annotations

import math
from typing import Any

from rarefy.report import words
from rarefy.report.verdict import file_bytes, final, runtime_name, verdict


def summary(receipt: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """The headline and (label, value) lines; what was not measured is left out."""
    measured, model = receipt.get("measured") or {}, receipt.get("model") or {}
    weight, rows = file_bytes(receipt), []
    if weight:
        original = model.get("original_bytes")
        than = f", {words.times(original / weight)} smaller than {words.size(original)}" if original else ""
        rows.append(("size", f"{words.size(weight)}{than}"))
    for where, key in (("PyTorch", "float"), ("PyTorch, other text", "second_domain"),
                       (runtime_name(receipt), "runtime")):
        found = measured.get(key)
        if found and found.get("kl_mean") is not None:
            error = f" ± {words.nats(found['kl_stderr'])}" if found.get("kl_stderr") else ""
            top = found.get("top1")
            same = "" if top is None else f", same next token {words.percent(top)}"
            rows.append((f"KL in {where}", f"{words.nats(found['kl_mean'])}{error} nats per token{same}"))
    predicted = receipt.get("predicted_kl")
    if predicted is not None and math.isfinite(predicted) and final(receipt):
        rows.append(("KL predicted", words.nats(predicted)))
    rows += _speed(receipt.get("speed") or {})
    if receipt.get("seconds"):
        rows.append(("time", words.duration(sum(receipt["seconds"].values()))))
    return verdict(receipt).headline, rows


def _speed(speed: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for label, key in (("writing", "decode"), ("reading", "prefill")):
        now, ratio = (speed.get("compressed") or {}).get(key), speed.get(f"ratio_{key}")
        if now:
            against = f", {words.times(ratio)} the original's speed" if ratio else ""
            rows.append((label, f"{words.three(now)} tokens/s{against}"))
    return rows
