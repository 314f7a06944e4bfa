"""Colours for bits per weight: few bits are light and warm, many are dark and blue.

The ramp runs through OKLCH (Ottosson 2020), in which equal steps look equal, once for light pages and
once for dark ones. Each colour comes with the ink that is readable on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FEW, MANY = 2.0, 8.5  # bits per weight at the ends of the ramp

# (position on the ramp, hue in degrees, chroma)
HUES = ((0.0, 92.0, 0.130), (0.22, 130.0, 0.120), (0.385, 178.0, 0.100), (0.54, 228.0, 0.110),
        (0.72, 264.0, 0.150), (1.0, 300.0, 0.150))
LIGHT = (0.93, 0.33)  # lightness at the ends on a light page
DARK = (0.84, 0.44)   # ... and on a dark one


@dataclass(frozen=True)
class Swatch:
    """Fill and ink for light and dark pages, as ``#rrggbb``."""

    light: str
    light_ink: str
    dark: str
    dark_ink: str


def swatch(bits: float) -> Swatch:
    """The colours of ``bits`` per weight."""
    place = (min(max(bits, FEW), MANY) - FEW) / (MANY - FEW)
    light, light_ink = _colour(place, LIGHT)
    dark, dark_ink = _colour(place, DARK)
    return Swatch(light, light_ink, dark, dark_ink)


def _colour(place: float, ends: tuple[float, float]) -> tuple[str, str]:
    lightness = ends[0] + (ends[1] - ends[0]) * place
    after = next(i for i in range(1, len(HUES)) if place <= HUES[i][0])
    (p0, h0, c0), (p1, h1, c1) = HUES[after - 1], HUES[after]
    share = (place - p0) / (p1 - p0)
    fill = oklch(lightness, c0 + (c1 - c0) * share, h0 + (h1 - h0) * share)
    return fill, "#0b1118" if contrast(fill, "#0b1118") >= contrast(fill, "#ffffff") else "#ffffff"


def oklch(lightness: float, chroma: float, hue: float) -> str:
    """An OKLCH colour as ``#rrggbb``, clipped into sRGB."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
              -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
              -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short)
    return "#" + "".join(f"{round(255 * _gamma(min(max(v, 0.0), 1.0))):02x}" for v in linear)


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours (WCAG 2.2): 1 to 21."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _gamma(value: float) -> float:
    return 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055


def _luminance(colour: str) -> float:
    channels = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
