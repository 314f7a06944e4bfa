"""Numbers as people read them, and colours that can be read."""

from __future__ import annotations

import pytest

from rarefy.report import words
from rarefy.report.palette import contrast, swatch
from rarefy.report.ruler import Reading, ruler


@pytest.mark.parametrize(("value", "text"), [
    (158_123_456, "158.1 MB"), (160_000_000, "160 MB"), (999, "999 B"), (1.5e9, "1.5 GB"), (None, "unknown")])
def test_size(value: float | None, text: str) -> None:
    assert words.size(value) == text


@pytest.mark.parametrize(("value", "text"), [
    (0.0931, "0.0931"), (1.214, "1.21"), (60.81, "60.8"), (420.4, "420"), (12345.6, "12,346"), (0, "0"),
    (float("nan"), "n/a")])
def test_three(value: float, text: str) -> None:
    assert words.three(value) == text


@pytest.mark.parametrize(("value", "text"), [
    (0.0931, "0.0931"), (0.000042, "0.000042"), (1e-12, "0.00000000"), (0.0, "0.0000"), (None, "n/a")])
def test_nats(value: float | None, text: str) -> None:
    assert words.nats(value) == text


@pytest.mark.parametrize(("value", "text"), [
    (3.2, "3.2 s"), (59, "59 s"), (754, "12 min 34 s"), (7260, "2 h 01 min")])
def test_duration(value: float, text: str) -> None:
    assert words.duration(value) == text


@pytest.mark.parametrize(("value", "text"), [
    (268_100_000, "268M"), (1_235_814_400, "1.24B"), (5_570_000, "5.57M"), (7, "7")])
def test_count(value: int, text: str) -> None:
    assert words.count(value) == text


def test_moment() -> None:
    assert words.moment("2026-03-04T17:20:11+01:00") == "2026-03-04 16:20 UTC"
    assert words.moment("yesterday") == "yesterday"


def test_bands_cover_every_kl() -> None:
    assert [words.band(kl)[0] for kl in (0, 0.01, 0.05, 0.2, 0.5, 9, float("inf"))] == [
        "practically the same", "nearly the same", "very close", "close", "different", "damaged", "damaged"]


@pytest.mark.parametrize("bits", [1.5, 2.0, 2.25, 3.4, 4.25, 4.5, 5.0, 5.5, 6.0, 6.56, 8.5, 16.0])
def test_labels_can_be_read_on_every_colour(bits: float) -> None:
    colours = swatch(bits)
    assert contrast(colours.light, colours.light_ink) >= 4.5
    assert contrast(colours.dark, colours.dark_ink) >= 4.5


def test_neighbouring_formats_differ_in_colour() -> None:
    fills = [swatch(bits).light for bits in (2.25, 3.4, 4.5, 5.5, 6.56, 8.5)]
    assert len(set(fills)) == len(fills)


def test_ruler_places_by_logarithm() -> None:
    drawn = ruler([Reading("a", 0.01), Reading("b", 0.1), Reading("c", 1.0)], bound=0.1)
    assert drawn is not None
    a, b, c = (row.mean for row in drawn.rows)
    assert b - a == pytest.approx(c - b)
    assert drawn.bound == b
    assert drawn.left <= a
    assert c <= drawn.right


def test_ruler_survives_zero_and_nothing() -> None:
    assert ruler([], None) is None
    assert ruler([Reading("a", 0.0)], None) is None
    drawn = ruler([Reading("a", 1e-9, stderr=1.0, median=0.0, p999=50.0)], None)
    assert drawn is not None
    assert drawn.left <= drawn.rows[0].mean <= drawn.right
