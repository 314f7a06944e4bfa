"""One self-contained HTML page from a receipt: no script, no network, light and dark, printable.

``render`` reads the receipt as ``run`` writes it, and shows only what stands in it: a number that is
absent is left out or called unmeasured, never guessed. Everything from outside (names, completions,
warnings) goes through Jinja's autoescape, and the page forbids scripts to itself besides.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rarefy.report import words
from rarefy.report.answers import Answers, answers_of, plain
from rarefy.report.curves import curves
from rarefy.report.mosaic import mosaic
from rarefy.report.ruler import Reading, ruler
from rarefy.report.summary import exit_rows
from rarefy.report.verdict import file_bytes, final, runtime_name, verdict

TEMPLATES = Path(__file__).parent / "templates"
LISTED = 600  # sites in the table of the page; the receipt has them all
DRIFT = 0.15  # relative difference between runs of the same file above which the page warns


@dataclass(frozen=True)
class Bar:
    """A horizontal bar: share of the longest one in percent."""

    name: str
    value: str
    share: float
    kind: str = "now"


@dataclass(frozen=True)
class Part:
    """One segment of the bar that says where the bytes are."""

    name: str
    style: str
    bytes: float
    share: float


def render(receipt: dict[str, Any]) -> str:
    """The report of one compression as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True, finalize=printable)
    for shown in (words.size, words.nats, words.percent, words.times, words.three, words.moment, words.count):
        environment.filters[shown.__name__] = shown
    return environment.get_template("report.html").render(view(receipt))


def view(receipt: dict[str, Any]) -> dict[str, Any]:
    """Everything that the template prints, computed from the receipt."""
    plan, model = receipt.get("plan") or [], receipt.get("model") or {}
    tied, weight, kind = bool(model.get("tied")), file_bytes(receipt), answers_of(receipt)
    measured = receipt.get("measured") or {}
    return {
        "receipt": receipt, "model": model, "verdict": verdict(receipt), "file_bytes": weight,
        "final": final(receipt), "map": mosaic(plan, weight, tied) if plan else None,
        "readings": _readings(receipt),
        "ruler": ruler(_readings(receipt), (receipt.get("budget") or {}).get("max_kl"), kind.bands),
        "kind": kind, "lowered": _lowered(plan, receipt.get("lowered") or {}),
        "table": _summaries(receipt), "runtime": measured.get("runtime"), "where": runtime_name(receipt),
        "predicted": _number(receipt.get("predicted_kl")), "data": receipt.get("data") or {},
        "weighed": _weighed(plan, model, weight), "roles": by_role(plan, tied),
        "speed": _speed(receipt.get("speed") or {}, kind), "memory": _memory(receipt),
        "peak": (receipt.get("memory") or {}).get("peak_rss_bytes"),
        "exits": _exits(receipt.get("exits") or {}), "exit_rows": exit_rows(receipt.get("exits") or {}),
        "completions": [_pair(c) for c in receipt.get("completions") or ()],
        "warnings": [*(receipt.get("warnings") or ()), *_busy(receipt.get("speed") or {}), *_notes(receipt)],
        "sites": _sites(plan, receipt.get("sites") or []), "unlisted": max(len(plan) - LISTED, 0),
        "axes": _axes(receipt.get("axes") or []), "curves": curves(receipt.get("training") or []),
        "unlisted_axes": max(len(receipt.get("axes") or ()) - LISTED, 0),
        "seconds": _seconds(receipt.get("seconds") or {}), "bands": _band_list(kind),
        "bits_per_weight": 8 * weight / model["weights"] if model.get("weights") else None,
    }


def printable(value: object) -> object:
    """Text without control characters, which HTML does not allow; anything else as it is.

    What a macro of the template made is Jinja's own kind of string, and its text has been here already.
    """
    if type(value) is not str:
        return value
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", value)


def _readings(receipt: dict[str, Any]) -> list[Reading]:
    """Rows of the drawing, prediction first."""
    measured, rows = receipt.get("measured") or {}, list[Reading]()
    predicted = _number(receipt.get("predicted_kl"))
    if predicted is not None:
        rows.append(Reading("predicted by the planner", predicted, measured=False))
    for name, key in (("measured in PyTorch", "float"), ("on a second kind of text", "second_domain"),
                      (f"measured in {runtime_name(receipt)}", "runtime")):
        summary = plain(measured.get(key))
        mean = _number(summary.get("mean"))
        if mean is not None:
            rows.append(Reading(name, mean, _number(summary.get("stderr")),
                                _number(summary.get("median")), _number(summary.get("p999"))))
    return rows


def _summaries(receipt: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Columns of the table of measurements."""
    measured = receipt.get("measured") or {}
    names = (("PyTorch", "float"), ("second text, PyTorch", "second_domain"),
             (runtime_name(receipt), "runtime"))
    return [(name, plain(measured[key])) for name, key in names if measured.get(key)]


def _exits(found: dict[str, Any]) -> list[Bar]:
    """Samples by the block that they leave behind."""
    left = found.get("left") or {}
    total = max(sum(left.values()), 1)
    return [Bar(f"after block {block}", f"{count:,}", 100 * count / total) for block, count in left.items()]


def _weighed(plan: list[dict[str, Any]], model: dict[str, Any], weight: int) -> dict[str, list[Part]]:
    """Two bars to one scale: the original file and the new one, by what the bytes are for.

    The original is assumed to spend the same bytes on every weight; its rest is what is left.
    """
    original = model.get("original_bytes") or 0
    now: dict[str, float] = defaultdict(float)
    weights: dict[str, float] = defaultdict(float)
    for row in plan:
        now[_purpose(row["role"])] += row["bytes"]
        weights[_purpose(row["role"])] += math.prod(row.get("shape") or (0,))
    rest = max(weight - sum(now.values(), 0.0), 0.0)
    each = max(original - rest, 0.0) / max(sum(weights.values()), 1)
    longest = max(original, weight, 1)

    def parts(amounts: dict[str, float]) -> list[Part]:
        rows = [(name, style, amounts.get(style, 0.0)) for name, style in PURPOSES]
        return [Part(name, style, value, 100 * value / longest) for name, style, value in rows if value]

    before = {**{kind: value * each for kind, value in weights.items()}, "rest": rest}
    return {"before": parts(before) if original else [], "after": parts({**now, "rest": rest})}


PURPOSES = (("token embedding and head", "embedding"), ("attention", "attention"),
            ("feed-forward", "feedforward"), ("other layers", "other"), ("tokenizer, norms, header", "rest"))


def _purpose(role: str) -> str:
    if role in ("embed", "head"):
        return "embedding"
    if role in words.ATTENTION:
        return "attention"
    return "feedforward" if role in words.FEED_FORWARD else "other"


def by_role(plan: list[dict[str, Any]], tied: bool) -> list[dict[str, Any]]:
    """One row per role: weights, bytes, bits per weight, formats with their counts, predicted damage."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in plan:
        groups[row["role"]].append(row)
    rows = []
    for name, members in groups.items():
        kinds: dict[str, int] = defaultdict(int)
        for row in members:
            kinds[row["format"]] += 1
        weights = sum(math.prod(row.get("shape") or (0,)) for row in members)
        total = sum(row["bytes"] for row in members)
        damages = [d for row in members if (d := _number(row.get("damage"))) is not None]
        often = [f"{n}\u00a0{kind}" if len(members) > 1 else kind
                 for kind, n in sorted(kinds.items(), key=lambda item: -item[1])]
        rows.append({"role": name, "name": words.role(name, tied), "tensors": len(members),
                     "weights": weights, "bytes": total, "bits": 8 * total / weights if weights else None,
                     "formats": ", ".join(often), "damage": sum(damages) if damages else None})
    return sorted(rows, key=lambda row: (-1 if row["role"] in ("embed", "head") else words.rank(row["role"])))


def _speed(speed: dict[str, Any], kind: Answers) -> list[tuple[str, str, list[Bar], float | None]]:
    """Every rate of original and compressed as a pair of bars."""
    shown = []
    for title, key, unit in kind.rates:
        values = [(name, style, _number((speed.get(name) or {}).get(key)))
                  for name, style in (("original", "before"), ("compressed", "now"))]
        known = [v for _, _, v in values if v]
        if known:
            bars = [Bar(name, f"{words.three(v)} {unit}", 100 * v / max(known), style)
                    for name, style, v in values if v]
            shown.append((title, key, bars, _number(speed.get(f"ratio_{key}"))))
    return shown


def _memory(receipt: dict[str, Any]) -> list[Bar]:
    """Resident memory of the runtime with either file."""
    speed, memory = receipt.get("speed") or {}, receipt.get("memory") or {}
    values = [("original", "before", (speed.get("memory_original") or {}).get("resident")),
              ("compressed", "now", (speed.get("memory_compressed") or {}).get("resident")
               or memory.get("runtime_rss_bytes"))]
    known = [value for _, _, value in values if value]
    return [Bar(name, words.size(value), 100 * value / max(known), kind)
            for name, kind, value in values if value]


def _busy(speed: dict[str, Any]) -> list[str]:
    """A speed that drifted while it was measured is worth little, and says so."""
    drift = _number(speed.get("drift"))
    if drift is None or drift <= DRIFT:
        return []
    return [f"the machine was busy while speed was measured: two runs of the same file differ by "
            f"{words.percent(drift)}"]


def _pair(completion: dict[str, str]) -> dict[str, Any]:
    """A completion of both models, split where they part."""
    original, now = completion.get("original") or "", completion.get("compressed") or ""
    shared = next((i for i, (a, b) in enumerate(zip(original, now, strict=False)) if a != b),
                  min(len(original), len(now)))
    ends = original[shared:shared + 1], now[shared:shared + 1]
    if all(end and not end.isspace() for end in ends):  # part between words, not inside one
        shared = max(original.rfind(space, 0, shared) for space in " \n") + 1
    start = _squeezed(re.sub(r"^(\n| (?=\S|$))", "", original[:shared]))
    return {"prompt": completion.get("prompt") or "", "shared": start,
            "original": _squeezed(original[shared:].rstrip()), "now": _squeezed(now[shared:].rstrip())}


def _squeezed(text: str) -> str:
    """Many empty lines as one that says so; a small model may write nothing else."""
    return re.sub(r"\n{4,}", lambda run: f"\n[{len(run[0]) - 1} empty lines]\n", text)


def _notes(receipt: dict[str, Any]) -> list[str]:
    """Fallbacks that steps noted, the same ones together."""
    sites: dict[tuple[str, str], list[str]] = defaultdict(list)
    for step in receipt.get("sites") or ():
        if step.get("note"):
            sites[step["technique"], step["note"]].append(step["site"])
    return [f"{technique}, {len(names)} tensor{'s' if len(names) > 1 else ''}: {note} "
            f"({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for (technique, note), names in sites.items()]


def _sites(plan: list[dict[str, Any]], steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the long table: the plan and the last receipt of each site."""
    last = {step["site"]: step for step in steps}
    rows = []
    for row in plan[:LISTED]:
        step = last.get(row["site"], {})
        rows.append({**row, "damage": _number(row.get("damage")), "error": _number(step.get("error")),
                     "technique": step.get("technique", ""), "note": step.get("note", ""),
                     "shape": " × ".join(str(n) for n in row.get("shape") or ())})
    return rows


def _axes(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was done to channels, heads and blocks before any weight was rewritten, step by step.

    Bits are None where a step neither adds nor saves a number (channels scaled or rotated).
    """
    return [{"site": step["site"], "technique": step["technique"], "note": step.get("note", ""),
             "error": _number(step.get("error")),
             "bits": (step["bits_before"] / 8, step["bits_after"] / 8) if step["bits_before"] else None}
            for step in steps[:LISTED]]


def _seconds(seconds: dict[str, float]) -> list[Bar]:
    longest = max(seconds.values(), default=0) or 1
    return [Bar(name, words.duration(value), 100 * value / longest) for name, value in seconds.items()]


def _lowered(plan: list[dict[str, Any]], lowered: dict[str, str]) -> list[dict[str, Any]]:
    """How the weights run, the most bytes first; what is only smaller is said to be so."""
    sizes = {row["site"]: row["bytes"] for row in plan}
    groups: dict[str, list[str]] = defaultdict(list)
    for path, how in lowered.items():
        groups[how].append(path)
    rows = [{"how": how, "tensors": len(paths), "bytes": sum(sizes.get(path, 0) for path in paths)}
            for how, paths in groups.items()]
    return sorted(rows, key=lambda row: -row["bytes"])


def _band_list(kind: Answers) -> list[tuple[str, str]]:
    """``below 0.005`` and what it is called."""
    finite = [limit for limit, _, _ in kind.bands if math.isfinite(limit)]
    labels = [f"below {limit:g}" for limit in finite] + [f"{finite[-1]:g} and above"]
    return [(label, name) for label, (_, name, _) in zip(labels, kind.bands, strict=True)]


def _number(value: object) -> float | None:
    """A finite number, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
