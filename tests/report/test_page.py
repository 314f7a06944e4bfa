"""The report page: complete, offline, light, safe with text from outside, and silent about what is absent."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from rarefy.report import render
from rarefy.report.page import printable, view
from rarefy.report.verdict import verdict

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects tags and text, and checks that every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.stack, f"left open: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def test_says_what_matters(receipt: dict[str, Any]) -> None:
    words = Page(render(receipt)).words
    assert "gemma-3-270m fits in 160 MB and stays very close to the original." in words
    for fact in ("159.7 MB", "3.4× smaller than 543 MB", "0.0948 nats", "± 0.0041", "84.9%", "60.8 tokens/s",
                 "2.4×", "0.0874", "262,144 × 640", "damping raised to 0.1", "a1" * 32, "16.91",
                 "2026-03-04 16:20 UTC", "rarefy chat out", "6 min 42 s"):
        assert fact in words, fact


def test_stands_alone(receipt: dict[str, Any]) -> None:
    """Opens offline: no script, nothing fetched, small, every rule in the page itself."""
    html = render(receipt)
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert "&lt;div" not in html  # nothing of the template was taken for text
    assert len(html.encode()) < 400_000
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not [a for _, a in page.tags if {"src", "href"} & set(a)]
    assert "url(" not in html
    assert "@import" not in html
    assert "http://" not in html
    assert "https://" not in html
    assert ("meta", {"http-equiv": "Content-Security-Policy",
                     "content": "default-src 'none'; style-src 'unsafe-inline'"}) in page.tags


ATTACK = "</style></svg><script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}\x1b[31m\x00"


def poisoned(value: Any, key: str = "") -> Any:
    """The receipt with every string turned into an attack."""
    if isinstance(value, dict):
        return {k: poisoned(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(v, key) for v in value]
    return value + ATTACK if isinstance(value, str) else value


def test_text_from_outside_stays_text(receipt: dict[str, Any]) -> None:
    html = render(poisoned(receipt))
    page = Page(html)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert "\x1b" not in html
    assert "\x00" not in html
    assert "{{ 7*7 }}" in page.words  # shown, not evaluated


@pytest.mark.parametrize("gone", [
    "plan", "sites", "measured", "speed", "memory", "seconds", "completions", "warnings", "how_to_run",
    "predicted_kl", "versions", "inputs", "outputs", "command"])
def test_absent_parts_are_left_out(receipt: dict[str, Any], gone: str) -> None:
    """A receipt may lack any measurement: the page then says less, and never fails or guesses."""
    empty = copy.deepcopy(receipt)
    empty[gone] = None
    Page(render(empty))


def test_unmeasured_is_called_unmeasured(receipt: dict[str, Any]) -> None:
    receipt["measured"], receipt["speed"] = {"float": None, "second_domain": None, "runtime": None}, None
    html = render(receipt)
    assert html.count('<div class="big soft">not measured</div>') == 3
    assert "how far its answers moved was not measured" in Page(html).words


def test_a_missed_bound_comes_first(receipt: dict[str, Any]) -> None:
    receipt["budget"] = {"to": "150MB", "max_kl": 0.05, "limit_bytes": 150_000_000}
    said = verdict(receipt)
    assert not said.kept
    assert "does not keep to its budget" in said.headline
    assert "more than allowed" in said.headline
    assert "over the bound of 0.05" in said.headline
    assert "your bound" in render(receipt)


def test_nan_from_a_step_is_no_number(receipt: dict[str, Any]) -> None:
    receipt["sites"][0]["error"] = float("nan")
    receipt["plan"][0]["damage"] = float("nan")
    assert "nan" not in Page(render(receipt)).words.lower().split()


def test_map_is_to_scale(receipt: dict[str, Any]) -> None:
    """Areas are proportional to bytes, cells do not overlap their strip, and all bytes are there."""
    picture = view(receipt)["map"]
    cells = [c for c in picture.cells if c.style != "rest"]
    assert len(cells) == len(receipt["plan"])
    by_title = {c.title.split(",")[0]: c.width * c.height for c in cells}
    scale = {by_title[r["site"]] / r["bytes"] for r in receipt["plan"]}
    assert max(scale) / min(scale) == pytest.approx(1)
    rest = next(c for c in picture.cells if c.style == "rest")
    assert rest.width * rest.height / 9_300_000 == pytest.approx(max(scale))


def test_map_of_a_large_model_stays_light(receipt: dict[str, Any]) -> None:
    """80 blocks of 64 experts: cells are joined by role, the table is cut, the page stays under 400 kB."""
    experts = [{**row, "site": f"{row['site']}.{n}"} for row in receipt["plan"][1:8] for n in range(64)]
    receipt["plan"] = [{**row, "block": block, "site": f"{block}.{row['site']}"}
                       for block in range(80) for row in experts]
    receipt["sites"] = []
    html = render(receipt)
    assert len(html.encode()) < 400_000
    assert "receipt.json has all" in html


def test_says_what_was_done_before_the_weights(receipt: dict[str, Any]) -> None:
    """Neurons left out, blocks dropped, heads grouped, channels scaled or left alone, each with why."""
    assert "Before any weight" not in render(receipt)
    none = {"seconds": 0.1, "format": ""}
    receipt["axes"] = [
        {"site": "model.layers.3.mlp.down_proj.weight", "technique": "units", "bits_before": 16_000_000,
         "bits_after": 12_000_000, "error": 0.0417, "note": "512 of 2048 neurons left out", **none},
        {"site": "model.layers.7", "technique": "drop", "bits_before": 80_000_000, "bits_after": 0,
         "error": float("nan"), "note": "left out at a cost of 0.021", **none},
        {"site": "model.layers.0.self_attn.k_proj.weight", "technique": "grouped", "bits_before": 4_000_000,
         "bits_after": 1_000_000, "error": 0.2, "note": "4 heads of keys and values became 1", **none},
        {"site": "model.layers.0.input_layernorm", "technique": "smoothquant", "bits_before": 0,
         "bits_after": 0, "error": None, "note": "", **none},
        {"site": "encoder.layer.0.output.LayerNorm", "technique": "awq", "bits_before": 0, "bits_after": 0,
         "error": None, "note": "left as it is: a residual <connection> adds it", **none}]
    words = Page(render(receipt)).words
    for fact in ("channels, heads and blocks (5)", "512 of 2048 neurons left out 2 MB 1.5 MB 4.2%",
                 "left out at a cost of 0.021 10 MB 0 B –", "4 heads of keys and values became 1",
                 "smoothquant changed; what it computes stays – – –", "a residual <connection> adds it"):
        assert fact in words, fact
    receipt["axes"] = receipt["axes"] * 300
    html = render(receipt)
    assert "600 of 1500; receipt.json has all" in html


def test_completions_part_where_they_differ(receipt: dict[str, Any]) -> None:
    html = render(receipt)
    assert "Paris. It is the largest city in <mark>the country" in html
    assert "Paris. It is the largest city in <mark>France" in html
    assert len(re.findall("return fibonacci", html)) == 2
    assert "<mark>\n    if" not in html


def test_many_empty_lines_are_counted_instead(receipt: dict[str, Any]) -> None:
    receipt["completions"] = [{"prompt": "p", "original": "a" + "\n" * 9 + "b", "compressed": "c"}]
    html = render(receipt)
    assert "[8 empty lines]" in html
    assert "\n\n\n\n" not in html


def test_same_receipt_same_page(receipt: dict[str, Any]) -> None:
    assert render(receipt) == render(json.loads(json.dumps(receipt)))


def test_printable_keeps_lines_and_drops_controls() -> None:
    assert printable("a\tb\nc\x07\x9bd") == "a\tb\nc\ufffd\ufffdd"


def test_a_distance_too_small_to_draw_is_drawn_at_the_end(receipt: dict[str, Any]) -> None:
    """Weights that are stored as they were move nothing but rounding."""
    receipt["predicted_kl"] = 1e-12
    for each in receipt["measured"].values():
        each |= {"kl_mean": 1e-12, "kl_stderr": 1e-13, "kl_median": 0.0, "kl_p999": 1e-11}
    assert "0.00000000" in Page(render(receipt)).words


@pytest.mark.parametrize(("answers", "summary", "words"), [
    ("classes", {"kl_mean": 0.004, "kl_stderr": 0.0004, "top1": 0.991, "samples": 872,
                 "task": {"accuracy": 0.91, "accuracy_original": 0.925, "accuracy_stderr": 0.004, "f1": 0.9,
                          "f1_original": 0.92, "by": "labels"}},
     ("Same class 99.1%", "Accuracy 91.0%, the original's 92.5%.", "nats per sample",
      "answers nearly like the original")),
    ("embedding", {"distance_mean": 0.0121, "distance_stderr": 0.0004, "cosine": 0.9879, "samples": 872,
                   "task": {"accuracy": 0.74, "accuracy_original": 0.742, "accuracy_stderr": 0.002,
                            "f1": 0.74, "f1_original": 0.74, "by": "probe"}},
     ("Same direction 0.9879", "Accuracy of a probe on its vectors 74.0%", "1 − cosine",
      "stays very close to the original")),
])
def test_speaks_of_samples(answers: str, summary: dict[str, Any], words: tuple[str, ...],
                           receipt: dict[str, Any]) -> None:
    receipt["model"]["answers"], receipt["completions"] = answers, []
    receipt["measured"] = {"float": summary, "second_domain": None}
    receipt["speed"] = {"original": {"batch": 50.0}, "compressed": {"batch": 100.0}, "ratio_batch": 2.0}
    receipt["lowered"] = {receipt["plan"][0]["site"]: "expanded once: smaller on disk, not faster"}
    text = Page(render(receipt)).words
    for word in (*words, "100 samples/s", "It runs 2.0× as fast.", "smaller on disk, not faster"):
        assert word in text, word
    assert "token first" not in text and "next token" not in text
