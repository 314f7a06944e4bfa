"""The picture of the file: every area is proportional to its bytes, every colour says bits per weight.

Strips from top to bottom fill one rectangle of fixed width: what stands outside the blocks (embedding,
head), the blocks, and the rest of the file (tokenizer, norms, header). A strip's height is its share of
the bytes. Inside the blocks' strip a column is a block, as wide as its share of the strip, and a cell is a
role, as high as its share of the column. So area = bytes holds everywhere, and a wide or high piece is
where the file's bytes are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rarefy.report import words
from rarefy.report.palette import Swatch, swatch

WIDTH = 1000.0
GUTTER = 132.0  # for labels left of the picture
BODY = 210.0    # the blocks' strip is at least this high, so that its cells can be read
HEIGHT = (380.0, 640.0)
DETAILED = 900  # cells; above that each one's tooltip is shortened, to keep the page light
CHARACTER = 6.1  # width of a character of a cell's label at its font size


@dataclass(frozen=True)
class Cell:
    """One rectangle: place and size in picture units, its class in the style sheet, label and tooltip."""

    x: float
    y: float
    width: float
    height: float
    style: str
    label: str
    title: str
    detail: str = ""


@dataclass(frozen=True)
class Caption:
    """Text beside the picture."""

    x: float
    y: float
    text: str
    detail: str = ""
    anchor: str = "end"


@dataclass(frozen=True)
class Format:
    """One line of the legend."""

    name: str
    style: str
    swatch: Swatch
    bits: float
    tensors: int
    bytes: int


@dataclass(frozen=True)
class Mosaic:
    """The whole picture with its legend."""

    width: float
    height: float
    cells: tuple[Cell, ...]
    captions: tuple[Caption, ...]
    legend: tuple[Format, ...]


def mosaic(plan: list[dict[str, Any]], file_bytes: int, tied: bool) -> Mosaic:
    """Lay out the plan's rows (site, role, block, shape, format, bytes, bits_per_weight, damage)."""
    legend = _legend(plan)
    styles = {line.name: line.style for line in legend}
    outside = [row for row in plan if row.get("block") is None]
    body = [row for row in plan if row.get("block") is not None]
    rest = max(file_bytes - sum(row["bytes"] for row in plan), 0)
    total = max(sum(row["bytes"] for row in plan) + rest, 1)
    share = sum(row["bytes"] for row in body) / total
    height = min(max(BODY / share if share else 0.0, HEIGHT[0]), HEIGHT[1])
    cells: list[Cell] = []
    captions: list[Caption] = []
    y = 0.0
    for row in sorted(outside, key=lambda row: -row["bytes"]):
        tall = height * row["bytes"] / total
        cells.append(_slab(y, tall, styles[row["format"]], words.role(row["role"], tied), _title(row),
                           f"{_shape(row)}, {row['format']}, {words.size(row['bytes'])}"))
        captions.append(_share(y, tall, words.ROLES.get(row["role"], row["role"]), row["bytes"] / total))
        y += tall
    if body:
        tall = height * share
        columns, beside = _blocks(body, y, tall, styles, detailed=len(plan) <= DETAILED)
        cells += columns
        captions += beside
        y += tall
    if rest:
        tall = height * rest / total
        y += 18 if body else 0  # the block numbers stand between
        cells.append(_slab(y, tall, "rest", "tokenizer, norms and header", f"the rest, {words.size(rest)}",
                           words.size(rest)))
        captions.append(_share(y, tall, "the rest", rest / total))
        y += tall
    return Mosaic(GUTTER + WIDTH, y, tuple(cells), _apart(captions), legend)


def _slab(y: float, tall: float, style: str, name: str, title: str, detail: str) -> Cell:
    """A strip over the whole width; its label is left out where it would not fit."""
    return Cell(GUTTER, y, WIDTH, tall, style, name if tall >= 17 else "", title, detail)


def _share(y: float, tall: float, name: str, share: float) -> Caption:
    """Name and share of a strip, in two lines where it is high enough."""
    if tall < 34:
        return Caption(GUTTER - 10, y + tall / 2, f"{name}, {words.percent(share)}")
    return Caption(GUTTER - 10, y + tall / 2 - 8, name, words.percent(share))


def _blocks(body: list[dict[str, Any]], top: float, tall: float, styles: dict[str, str], *,
            detailed: bool) -> tuple[list[Cell], list[Caption]]:
    """One column per block, one cell per role and format in it, and the names beside and below."""
    columns: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in body:
        columns[row["block"]].append(row)
    whole = sum(row["bytes"] for row in body) or 1
    every = max(1, -(-len(columns) * 22 // int(WIDTH)))  # number every n-th block where columns are thin
    cells: list[Cell] = []
    captions: list[Caption] = []
    x = GUTTER
    for place, (block, rows) in enumerate(sorted(columns.items())):
        own = sum(row["bytes"] for row in rows) or 1  # a block that uses another's weights stores none
        wide, y = WIDTH * own / whole, top
        for group in _pieces(rows):
            high = tall * sum(row["bytes"] for row in group) / own
            kind = group[0]["format"]
            fits = wide >= CHARACTER * len(kind) + 4 and high >= 12
            title = _title(group[0]) if detailed and len(group) == 1 else _summary(group)
            cells.append(Cell(x, y, wide, high, styles[kind], kind if fits else "", title))
            if place == 0:
                captions.append(Caption(GUTTER - 10, y + high / 2, words.role(group[0]["role"])))
            y += high
        if place % every == 0:
            captions.append(Caption(x + wide / 2, top + tall + 12, str(block), anchor="middle"))
        x += wide
    return cells, captions


def _pieces(rows: list[dict[str, Any]]) -> Iterable[list[dict[str, Any]]]:
    """Rows of one block by role, top to bottom; experts of one role and format are one piece."""
    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[words.rank(row["role"]), row["role"], row["format"]].append(row)
    return (groups[key] for key in sorted(groups))


def _apart(captions: list[Caption]) -> tuple[Caption, ...]:
    """Captions at the left join into one where they would overlap: ``key, value``."""
    placed: list[Caption] = []
    for caption in captions:
        last = next((c for c in reversed(placed) if c.anchor == "end"), None)
        if caption.anchor == "end" and last is not None and caption.y - last.y < 12 and not caption.detail:
            joined = f"{last.text}, {caption.text}"
            placed[placed.index(last)] = Caption(last.x, (last.y + caption.y) / 2, joined, last.detail)
        else:
            placed.append(caption)
    return tuple(placed)


def _shape(row: dict[str, Any]) -> str:
    return " × ".join(f"{n:,}" for n in row.get("shape") or ())


def _title(row: dict[str, Any]) -> str:
    damage = row.get("damage")
    told = "" if damage is None else f", predicted KL {words.nats(damage)}"
    return (f"{row['site']}, {_shape(row)}: {row['format']}, {row['bits_per_weight']:.2f} bits per weight, "
            f"{words.size(row['bytes'])}{told}")


def _summary(group: list[dict[str, Any]]) -> str:
    first = group[0]
    return (f"block {first['block']} {first['role']}{f' ({len(group)} tensors)' if len(group) > 1 else ''}: "
            f"{first['format']}, {words.size(sum(row['bytes'] for row in group))}")


def _legend(plan: list[dict[str, Any]]) -> tuple[Format, ...]:
    """Formats from few to many bits. Class names are numbers: names of formats come from outside."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in plan:
        found[row["format"]].append(row)
    bits = {name: sum(r["bits_per_weight"] for r in rows) / len(rows) for name, rows in found.items()}
    order = sorted(found, key=lambda name: (bits[name], name))
    return tuple(Format(name, f"f{index}", swatch(bits[name]), bits[name], len(found[name]),
                        sum(row["bytes"] for row in found[name])) for index, name in enumerate(order))
