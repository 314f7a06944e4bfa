"""Numbers as people read them: sizes, ratios, rates, and what a KL divergence means in plain words."""

from __future__ import annotations

import math
from datetime import UTC, datetime

# Upper ends of mean KL (nats per token) and what a reader notices, from about the drift of 8-bit files up to
# where text falls apart.
BANDS: tuple[tuple[float, str, str], ...] = (
    (0.005, "practically the same", "answers practically like the original"),
    (0.03, "nearly the same", "answers nearly like the original"),
    (0.1, "very close", "stays very close to the original"),
    (0.25, "close", "stays close to the original; open-ended answers take other turns"),
    (0.6, "different", "answers noticeably differently from the original"),
    (math.inf, "damaged", "no longer behaves like the original"),
)


def band(kl: int | float) -> tuple[str, str]:
    """A short name for a mean KL and a clause that says it."""
    return next((name, clause) for limit, name, clause in BANDS if kl < limit or limit == math.inf)


def size(count: int | float | None) -> str:
    """``158_123_456`` -> ``158.1 MB``. Decimal units, as ``--to`` takes them."""
    if count is None:
        return "unknown"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{f'{count / factor:.1f}'.removesuffix('.0')} {unit}"
    return f"{count:.0f} B"


def three(value: int | float) -> str:
    """About three significant digits, never an exponent for everyday numbers: 0.093, 1.21, 60.8, 420."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "n/a"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:,.{min(max(digits, 0), 7)}f}"


def nats(value: int | float | None) -> str:
    """A KL with four decimals, or as many (up to eight) as it takes to show two digits."""
    if value is None or not math.isfinite(value):
        return "n/a"
    if abs(value) >= 0.001 or value == 0:
        return f"{value:.4f}"
    return f"{value:.{min(1 - math.floor(math.log10(abs(value))), 8)}f}"


def percent(share: int | float | None) -> str:
    """``0.8513`` -> ``85.1%``."""
    return "n/a" if share is None or not math.isfinite(share) else f"{100 * share:.1f}%"


def times(ratio: int | float) -> str:
    """``3.39`` -> ``3.4×``; ``12.6`` -> ``13×``; two digits below one, where they matter."""
    return f"{ratio:.2f}×" if ratio < 1 else f"{ratio:.1f}×" if ratio < 10 else f"{ratio:.0f}×"


def moment(stamp: str) -> str:
    """``2026-03-04T16:20:11+00:00`` -> ``2026-03-04 16:20 UTC``; what is no ISO time is shown as it is."""
    try:
        time = datetime.fromisoformat(stamp)
    except ValueError:
        return stamp
    if time.tzinfo is None:
        return f"{time:%Y-%m-%d %H:%M}"
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def duration(seconds: int | float) -> str:
    """``754`` -> ``12 min 34 s``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def count(number: int) -> str:
    """``268_100_000`` -> ``268M``."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            value = number / factor
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}{unit}"
    return str(number)


ROLES = {
    "embed": "token embedding", "head": "output head",
    "q": "query", "k": "key", "v": "value", "o": "attention output", "qkv": "query, key, value",
    "kv": "latent of keys and values",
    "gate": "gate", "up": "up", "down": "down", "gate_up": "gate and up",
    "positions": "position embedding", "token_types": "segment embedding", "pooler": "pooler",
    "conv": "convolution", "pointwise": "pointwise convolution", "depthwise": "depthwise convolution",
    "linear": "linear layer",
}
ATTENTION = ("q", "kv", "k", "v", "qkv", "o")
FEED_FORWARD = ("gate", "up", "gate_up", "down")
ORDER = (*ATTENTION, *FEED_FORWARD)


def role(name: str, tied: bool = False) -> str:
    """A role in plain words; a role this table does not know is shown as it is."""
    return "token embedding, also the output head" if name == "embed" and tied else ROLES.get(name, name)


def rank(name: str) -> int:
    """Where a role stands inside a block, top to bottom; unknown ones come last."""
    return ORDER.index(name) if name in ORDER else len(ORDER)
