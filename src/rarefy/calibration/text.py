"""Text that the model is shown: windows of tokens, cut the same way every time.

Calibration and evaluation both look at windows of one length: BOS, then consecutive tokens of a text.
A text is any mix of UTF-8 files, folders and the built-in ``python-docs``; only as much of it is read as
the windows need, spread over the whole (so a corpus of gigabytes costs what a megabyte does), in an
order that the seed decides.

What a window holds decides what the numbers mean, so bad text is refused, by name: none, too little,
not UTF-8, the same passage over and over. Text that was calibrated on is no evidence: ``refuse_overlap``
compares runs of 13 tokens (the decontamination of GPT-3, Brown et al. 2020, appendix C) and names the
passage that both sides hold.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rarefy.core.errors import DataError, did_you_mean

PYTHON_DOCS = "python-docs"
SUFFIXES = frozenset({".txt", ".text", ".md", ".rst", ".py", ".html", ".tex", ".csv", ".json", ".jsonl",
                      ".c", ".h", ".cpp", ".java", ".js", ".ts", ".go", ".rs", ".sh", ".sql", ".xml",
                      ".yaml", ".yml", ".toml"})
PIECE = 1 << 20      # bytes of text that are cut into tokens at once, where all of it is
NGRAM = 13
PASSAGE = 32         # shared tokens in a row that make an overlap; shorter runs are idiom and boilerplate
FEWEST_DISTINCT = 8  # different tokens a passage must hold: rulers and tables of zeros are no overlap
REPETITIVE = 0.5     # share of distinct 13-grams below which a text repeats itself too much to measure on

Ref = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Document:
    """One text: a file that is read in pieces, or ``held`` bytes."""

    name: str
    size: int
    path: Path | None = None
    held: bytes = b""

    def read(self, start: int, stop: int) -> str:
        """The characters that begin in bytes ``start`` to ``stop``: neighbouring reads join exactly."""
        if self.path is None:
            data = self.held[start:stop + 3]
        else:
            try:
                with self.path.open("rb") as file:
                    file.seek(start)
                    data = file.read(stop + 3 - start)
            except OSError as error:
                raise DataError(f"{self.name}: cannot be read ({error.strerror}); check the file") from error
        first = _continuation(data, 0) if start else 0
        last = stop - start + _continuation(data, stop - start)
        try:
            text = data[first:last].decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.name}: byte {start + first + error.start} is not UTF-8; "
                            "save the text as UTF-8") from None
        if "\0" in text:
            raise DataError(f"{self.name}: holds NUL bytes, so it is no text file; pass UTF-8 text")
        text = text.replace("\r\n", "\n")
        return text.removeprefix("\ufeff") if start == 0 else text


@dataclass(frozen=True)
class Section:
    """Bytes ``start`` to ``stop`` of one document; ``order`` is where it stands in the whole text."""

    order: int
    document: Document
    start: int
    stop: int


def windows(ref: Ref, tokenizer: PreTrainedTokenizerBase, *, length: int, count: int,
            seed: int | None, minimum: int | None = None,
            avoid: Int64[Tensor, "seen _"] | None = None) -> Int64[Tensor, "count_ length"]:
    """``count`` different windows of ``length`` tokens, BOS first where the tokenizer has one.

    ref: a file, a folder, ``python-docs``, or a list of those, each giving an equal share as long as it
    lasts. seed: decides what is taken; None takes the text from its beginning, in order. minimum: accept
    that few windows from a short text (default: all ``count``). avoid: windows that share a passage with
    these are passed over.
    """
    if count < 1 or length < NGRAM + 1:
        raise DataError(f"{count} windows of {length} tokens: ask for at least 1 of {NGRAM + 1}")
    name, sections = _name(ref), _ordered(ref, 12 * length, seed)
    total = sum(section.stop - section.start for section in sections)
    budget, found = 16 * count * length, 0
    while True:
        chosen, used = _prefix(sections, budget)
        found, kept = _pick(_streams(chosen, tokenizer), tokenizer, length, count, seed, avoid)
        if len(kept) == count or used == total:
            break
        budget *= 2
    if len(kept) < (count if minimum is None else min(minimum, count)) or not len(kept):
        raise DataError(f"{name}: gives {len(kept)} different windows of {length} tokens, {count} are needed "
                        f"({found} tokens); pass more text")
    if (share := distinct_share(kept)) < REPETITIVE:
        raise DataError(f"{name}: repeats itself (only {share:.0%} of its {NGRAM}-token runs are distinct); "
                        "pass more varied text")
    return kept


def split_windows(tokens: Int64[Tensor, "count length"], held_out: int, *, seed: int
                  ) -> tuple[Int64[Tensor, "rest length"], Int64[Tensor, "held_out length"]]:
    """Set ``held_out`` windows aside, only such as share no passage with any other window."""
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed)).tolist()
    hashes = _hashes(tokens.numpy())
    free = [row for row in order if not _longest(tokens[row], np.delete(hashes, row, axis=0))[1]]
    if not 0 < held_out < len(tokens) or len(free) < held_out:
        raise DataError(f"{held_out} of {len(tokens)} windows cannot be held out: {len(free)} share no "
                        "passage with the others; pass more or more varied text")
    aside = sorted(free[:held_out])
    rest = sorted(set(range(len(tokens))) - set(aside))
    return tokens[rest], tokens[aside]


def refuse_overlap(evaluation: Int64[Tensor, "count length"], calibration: Int64[Tensor, "seen _"],
                   tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError, naming the passage, when evaluation text occurs in the calibration text."""
    hashes = _hashes(calibration.numpy())
    rows = [(*_longest(row, hashes), row) for row in evaluation]
    shared = [(stop - start, start, stop, row) for start, stop, row in rows if stop]
    if shared:
        _, start, stop, row = max(shared, key=lambda each: each[0])
        passage = " ".join(str(tokenizer.decode(row[start:stop][:24].tolist())).split())
        raise DataError(f"evaluation text was calibrated on: {len(shared)} of {len(evaluation)} windows "
                        f"share a passage with it, {stop - start} tokens from {passage!r}; pass other text")


def distinct_share(tokens: Int64[Tensor, "count length"]) -> float:
    """How many of the windows' 13-grams are different from one another, as a share."""
    hashes = _hashes(tokens.numpy())
    return len(np.unique(hashes)) / max(hashes.size, 1)


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What every window begins with: BOS, or nothing for a tokenizer that has none."""
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]


def token_streams(ref: Ref, tokenizer: PreTrainedTokenizerBase) -> Iterator[Int64[Tensor, " tokens"]]:
    """All of a text as tokens, a piece at a time."""
    for section in _ordered(ref, PIECE, None):
        yield from map(torch.from_numpy, _streams([section], tokenizer))


# ---- from a reference to sections ----------------------------------------------------------------------


def _name(ref: Ref) -> str:
    return str(ref) if isinstance(ref, str | Path) else " + ".join(str(one) for one in ref)


def _groups(ref: Ref) -> Iterator[list[Document]]:
    """The documents that ``ref`` stands for, in groups that share the windows equally."""
    if not isinstance(ref, str | Path):
        if not ref:
            raise DataError("no text: the list of files is empty; pass a file, a folder or 'python-docs'")
        for one in ref:
            yield from _groups(one)
    elif str(ref) == PYTHON_DOCS:
        yield _topics()
        yield _standard_library()
    else:
        yield _files(Path(ref))


def _files(path: Path) -> list[Document]:
    if path.is_file():
        return [Document(str(path), path.stat().st_size, path)]
    if not path.is_dir():
        hint = did_you_mean(str(path), [PYTHON_DOCS, *_siblings(path)])
        raise DataError(f"{path}: no such text file or folder{hint}")
    found = sorted(Path(root, file) for root, folders, files in os.walk(path) for file in files
                   if Path(file).suffix.lower() in SUFFIXES and not file.startswith("."))
    if not found:
        raise DataError(f"{path}: no text files in this folder; known are {', '.join(sorted(SUFFIXES))}")
    return [Document(str(file), file.stat().st_size, file) for file in found]


def _siblings(path: Path) -> list[str]:
    return [str(each) for each in path.parent.iterdir()] if path.parent.is_dir() else []


def _topics() -> list[Document]:
    """The language reference that ``help()`` prints."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(f"{PYTHON_DOCS}: this Python has no pydoc_data; pass a text file or folder") from None
    held = [(key, text.encode()) for key, text in sorted(topics.items())]
    return [Document(f"{PYTHON_DOCS}:{key}", len(data), held=data) for key, data in held]


def _standard_library() -> list[Document]:
    """The library's own modules: code and prose half and half. No tests, which repeat themselves."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data",
            "__pycache__", "encodings", "ensurepip", "turtledemo"}
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(each for each in folders if each not in skip)
        found += [Path(folder, file) for file in sorted(files)
                  if file.endswith(".py") and not file.startswith("_sysconfigdata")]
    return [Document(f"{PYTHON_DOCS}:{file.relative_to(root)}", file.stat().st_size, file) for file in found]


def _ordered(ref: Ref, span: int, seed: int | None) -> list[Section]:
    """Every section of about ``span`` bytes, groups taking turns, each group in the seed's order."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    lanes: list[list[Section]] = []
    order = 0
    for documents in _groups(ref):
        lane = []
        for document in documents:
            for start in range(0, document.size, span):
                lane.append(Section(order, document, start, min(start + span, document.size)))
                order += 1
            order += 1  # a gap, so that the end of one document and the start of the next never merge
        if generator is not None:
            lane = [lane[k] for k in torch.randperm(len(lane), generator=generator).tolist()]
        lanes.append(lane)
    sections = [lane[turn] for turn in range(max(map(len, lanes), default=0)) for lane in lanes
                if turn < len(lane)]
    if not sections:
        raise DataError(f"{_name(ref)}: the text is empty; pass text with some tokens in it")
    return sections


def _prefix(sections: list[Section], budget: int) -> tuple[list[Section], int]:
    """The first sections that make up ``budget`` bytes, back in text order, neighbours merged."""
    chosen, used = [], 0
    for section in sections:
        if used >= budget:
            break
        chosen.append(section)
        used += section.stop - section.start
    merged: list[Section] = []
    for section in sorted(chosen, key=lambda each: each.order):
        if merged and section.order == merged[-1].order + 1:
            merged[-1] = replace(merged[-1], order=section.order, stop=section.stop)
        else:
            merged.append(section)
    return merged, used


def _continuation(data: bytes, at: int) -> int:
    """How many bytes from ``at`` on continue a UTF-8 character that began before."""
    count = 0
    while count < 3 and at + count < len(data) and data[at + count] & 0xC0 == 0x80:
        count += 1
    return count


# ---- from sections to windows --------------------------------------------------------------------------


def _streams(sections: Iterable[Section], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """The tokens of each run of text. What looks like a special token is spelt out: a stray ``<s>`` in a
    text is markup, and BOS belongs at the front alone."""
    texts = [text for each in sections if (text := _whole_words(each)).strip()]
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True,
                        return_attention_mask=False, verbose=False)["input_ids"]
    return [np.asarray(ids, dtype=np.int64) for ids in encoded]


def _whole_words(section: Section) -> str:
    """The text of a section, without the rest of a word that began before it."""
    text = section.document.read(section.start, section.stop)
    return text if section.start == 0 else re.sub(r"\A\S{0,64}\s", "", text, count=1)


def _pick(streams: list[np.ndarray], tokenizer: PreTrainedTokenizerBase, length: int, count: int,
          seed: int | None, avoid: Tensor | None) -> tuple[int, Tensor]:
    """Cut, shuffle, drop repeats: the number of tokens seen and the windows kept.

    Windows inside one run of text come first; what is left at the ends of the runs is joined and used
    only when they do not suffice.
    """
    front = opening(tokenizer)
    body = length - len(front)
    inside = [run[:len(run) // body * body].reshape(-1, body) for run in streams]
    ends = np.concatenate([run[len(run) // body * body:] for run in streams] or [np.empty(0, np.int64)])
    joined = ends[:len(ends) // body * body].reshape(-1, body)
    first = np.concatenate([*inside, np.empty((0, body), np.int64)])
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        first = first[torch.randperm(len(first), generator=generator).numpy()]
    avoided = np.empty(0, np.uint64) if avoid is None else _hashes(avoid.numpy())
    seen: set[bytes] = set()
    kept: list[np.ndarray] = []
    for row in np.concatenate([first, joined]):
        if len(kept) == count:
            break
        if (key := row.tobytes()) in seen:
            continue
        seen.add(key)
        if avoid is None or not _longest(torch.from_numpy(row), avoided)[1]:
            kept.append(np.concatenate([np.asarray(front, dtype=np.int64), row]))
    stacked = np.stack(kept) if kept else np.empty((0, length), np.int64)
    return sum(map(len, streams)), torch.from_numpy(stacked)


# ---- passages that two texts share ---------------------------------------------------------------------


def _hashes(tokens: np.ndarray) -> np.ndarray:
    """A 64-bit hash of every run of 13 tokens, [count, length - 12]."""
    mixed = tokens.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    total = np.zeros((*tokens.shape[:-1], max(tokens.shape[-1] - NGRAM + 1, 0)), dtype=np.uint64)
    for k in range(NGRAM):  # polynomial in an odd base, modulo 2**64
        total = total * np.uint64(0xD6E8FEB86659FD93) + mixed[..., k:k + total.shape[-1]]
    return total


def _longest(row: Tensor, hashes: np.ndarray) -> tuple[int, int]:
    """Where the longest passage of ``row`` found among ``hashes`` starts and stops; (0, 0): none counts."""
    tokens = row.numpy()
    hit = np.isin(_hashes(tokens), hashes)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], hit.astype(np.int8), [0]])))
    best = (0, 0)
    for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        stop = end + NGRAM - 1
        if (stop - begin >= PASSAGE and stop - begin > best[1] - best[0]
                and len(np.unique(tokens[begin:stop])) >= FEWEST_DISTINCT):
            best = (begin, stop)
    return best
