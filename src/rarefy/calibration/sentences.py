"""Sentences and their labels, from tables with a header or plain text.

    .tsv, .csv    columns ``sentence`` (or ``text``; ``sentence1`` and ``sentence2`` for pairs), and ``label``
                  if there is one
    other text    one sentence a line
    python-docs   paragraphs of the language reference that comes with Python
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from rarefy.calibration.text import PYTHON_DOCS
from rarefy.core.errors import DataError, did_you_mean

Sentence = tuple[str, ...]  # one text, or a pair
Labels = list[str] | None
TABLES = {".tsv": "\t", ".csv": ","}
SHORTEST, LONGEST = 20, 600  # characters of a paragraph that is worth reading


def read_sentences(ref: str | Path) -> tuple[list[Sentence], Labels]:
    """Sentences and their labels as they are written."""
    if str(ref) == PYTHON_DOCS:
        return _paragraphs(), None
    path = Path(ref)
    if not path.is_file():
        known = [str(each) for each in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file{did_you_mean(str(path), [PYTHON_DOCS, *known])}; pass a .tsv, "
                        ".csv or text file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the file") from None
    if path.suffix.lower() in TABLES:
        return _table(path, text)
    found: list[Sentence] = [(line.strip(),) for line in text.splitlines() if line.strip()]
    if not found:
        raise DataError(f"{path}: the text is empty; pass some sentences")
    return found, None


def _paragraphs() -> list[Sentence]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(f"{PYTHON_DOCS}: this Python has no pydoc_data; pass a file of sentences") from None
    parts = [part for _, text in sorted(topics.items()) for part in re.split(r"\n\s*\n", text)]
    return [(" ".join(part.split()),) for part in parts if SHORTEST <= len(part) <= LONGEST]


def _table(path: Path, text: str) -> tuple[list[Sentence], Labels]:
    # tab-separated files of this kind do not quote: a quotation mark is part of a sentence
    mark = TABLES[path.suffix.lower()]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark,
                        quoting=csv.QUOTE_NONE if mark == "\t" else csv.QUOTE_MINIMAL)
    header = [name.strip().lower() for name in next(reader, [])]
    places = [header.index(name) for name in _columns(path, header)]
    label = header.index("label") if "label" in header else None
    found: list[Sentence] = []
    labels: list[str] = []
    for row in reader:
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(header):
            raise DataError(f"{path}: line {reader.line_num} has {len(row)} columns, the header "
                            f"{len(header)}; correct the line")
        found.append(tuple(row[place].strip() for place in places))
        if label is not None:
            labels.append(row[label].strip())
    if not found:
        raise DataError(f"{path}: has a header and no lines; pass some sentences")
    return found, None if label is None else labels


def _columns(path: Path, header: list[str]) -> tuple[str, ...]:
    for columns in (("sentence1", "sentence2"), ("sentence",), ("text",)):
        if set(columns) <= set(header):
            return columns
    raise DataError(f"{path}: its first line names no column 'sentence' or 'text', but {header[:6]}; "
                    "add a header")
