"""Windows of text: BOS once, the seed decides, bad text is refused by name, overlap is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rarefy.calibration.text import (
    NGRAM,
    PASSAGE,
    PYTHON_DOCS,
    Document,
    distinct_share,
    refuse_overlap,
    split_windows,
    windows,
)
from rarefy.core.errors import DataError

LIST = """
time year people way day man thing woman life child world school state family student group country problem
hand part place case week company system program question work government number night point home water room
mother area money story fact month lot right study book eye job word business
"""
WORDS = LIST.split()


def prose(words: int, seed: int = 0) -> str:
    """Text that never repeats a passage."""
    picks = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(WORDS[k] + ("." if n % 11 == 10 else "") for n, k in enumerate(picks))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus.txt").write_text(prose(6000), encoding="utf-8")
    return tmp_path / "corpus.txt"


def test_shape_bos_and_determinism(corpus: Path, tiny_tokenizer: Any) -> None:
    first = windows(corpus, tiny_tokenizer, length=64, count=20, seed=3)
    assert first.shape == (20, 64) and first.dtype == torch.int64
    assert bool((first[:, 0] == tiny_tokenizer.bos_token_id).all())
    assert int((first == tiny_tokenizer.bos_token_id).sum()) == 20
    assert torch.equal(first, windows(corpus, tiny_tokenizer, length=64, count=20, seed=3))
    assert not torch.equal(first, windows(corpus, tiny_tokenizer, length=64, count=20, seed=4))
    assert len(torch.unique(first, dim=0)) == 20


def test_without_a_seed_the_text_is_taken_in_order(corpus: Path, tiny_tokenizer: Any) -> None:
    rows = windows(corpus, tiny_tokenizer, length=64, count=2, seed=None)
    assert corpus.read_text().startswith(tiny_tokenizer.decode(rows[:, 1:].flatten().tolist()))


def test_special_tokens_in_the_text_are_spelt_out(tmp_path: Path, tiny_tokenizer: Any) -> None:
    file = tmp_path / "markup.txt"
    file.write_text("<bos> begin <eos> " + prose(2000))
    rows = windows(file, tiny_tokenizer, length=32, count=4, seed=None)
    assert int((rows < 3).sum()) == 4
    assert tiny_tokenizer.decode(rows[0, 1:].tolist()).startswith("<bos> begin <eos>")


def test_a_tokenizer_without_bos(corpus: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tiny_tokenizer), "bos_token_id", property(lambda self: None), raising=False)
    rows = windows(corpus, tiny_tokenizer, length=64, count=2, seed=None)
    assert corpus.read_text().startswith(tiny_tokenizer.decode(rows.flatten().tolist()))


def test_every_token_of_a_short_text_is_used(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Many short documents are joined: nothing is lost but the last incomplete window."""
    for k in range(50):
        (tmp_path / f"{k:02}.txt").write_text(prose(9, seed=k))
    tokens = sum(len(tiny_tokenizer(prose(9, seed=k), add_special_tokens=False)["input_ids"])
                 for k in range(50))
    rows = windows(tmp_path, tiny_tokenizer, length=40, count=1000, seed=0, minimum=1)
    assert len(rows) == tokens // 39


def test_reading_pieces_joins_exactly() -> None:
    text = "naïve façade — 日本語 🙂 end" * 40
    document = Document("x", len(text.encode()), held=text.encode())
    for step in (1, 2, 3, 7, 64):
        pieces = [document.read(at, min(at + step, document.size)) for at in range(0, document.size, step)]
        assert "".join(pieces) == text


def test_sources_share_the_windows(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "small.txt").write_text(prose(3000))
    rows = windows([tmp_path / "small.txt", PYTHON_DOCS], tiny_tokenizer, length=64, count=60, seed=0)
    texts = [tiny_tokenizer.decode(row[1:].tolist()).replace(".", "").split()[1:-1] for row in rows]
    small = sum(set(words) <= set(WORDS) for words in texts)
    assert 8 <= small <= 32  # a third by turns (python-docs is two groups), within the luck of the draw


def test_python_docs_holds_prose_and_code(tiny_tokenizer: Any) -> None:
    rows = windows(PYTHON_DOCS, tiny_tokenizer, length=128, count=40, seed=0)
    texts = [tiny_tokenizer.decode(row[1:].tolist()) for row in rows]
    code = sum("self" in text or "def " in text or "return " in text or "import " in text for text in texts)
    assert 8 <= code <= 38 and distinct_share(rows) > 0.8


@pytest.mark.parametrize(("content", "cause"), [
    (b"", "empty"), (b" \n\n\t ", "0 different windows"), (b"two words", "0 different windows"),
    (b"caf\xe9 " * 400, "byte 3 is not UTF-8"), ("text".encode("utf-16") * 99, "not UTF-8"),
    (b"a\0b " * 400, "NUL"), (b"the same words again. " * 3000, "repeats itself"),
    (b"zzz " * 9000, "windows of 64"),
])
def test_bad_text_is_refused(tmp_path: Path, tiny_tokenizer: Any, content: bytes, cause: str) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=cause) as caught:
        windows(file, tiny_tokenizer, length=64, count=8, seed=0)
    assert "notes.txt" in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_missing_is_named(tmp_path: Path, tiny_tokenizer: Any, corpus: Path) -> None:
    with pytest.raises(DataError, match=r"corpus\.txt'\?"):
        windows(tmp_path / "corups.txt", tiny_tokenizer, length=64, count=8, seed=0)
    with pytest.raises(DataError, match="did you mean 'python-docs'"):
        windows("python-doc", tiny_tokenizer, length=64, count=8, seed=0)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match="no text files"):
        windows(tmp_path / "pictures", tiny_tokenizer, length=64, count=8, seed=0)
    with pytest.raises(DataError, match="list of files is empty"):
        windows((), tiny_tokenizer, length=64, count=8, seed=0)


def test_a_short_text_is_accepted_only_on_request(tmp_path: Path, tiny_tokenizer: Any) -> None:
    file = tmp_path / "short.txt"
    file.write_text(prose(150))
    with pytest.raises(DataError, match=r"gives \d+ different windows of 64 tokens, 40 are needed"):
        windows(file, tiny_tokenizer, length=64, count=40, seed=0)
    assert 2 <= len(windows(file, tiny_tokenizer, length=64, count=40, seed=0, minimum=2)) < 40


def test_held_out_windows_share_nothing_with_the_rest(corpus: Path, tiny_tokenizer: Any) -> None:
    rows = windows(corpus, tiny_tokenizer, length=64, count=12, seed=0)
    doubled = torch.cat([rows, rows[:2]])
    rest, aside = split_windows(doubled, 4, seed=1)
    assert rest.shape == (10, 64) and aside.shape == (4, 64)
    refuse_overlap(aside, rest, tiny_tokenizer)
    with pytest.raises(DataError, match="cannot be held out"):
        split_windows(rows[:1].repeat(6, 1), 2, seed=0)


def test_overlap_is_refused_and_the_passage_named(corpus: Path, tiny_tokenizer: Any) -> None:
    rows = windows(corpus, tiny_tokenizer, length=64, count=12, seed=0)
    refuse_overlap(rows[:6], rows[6:], tiny_tokenizer)
    leak = rows[:6].clone()
    leak[2, 10:10 + PASSAGE] = rows[7, 20:20 + PASSAGE]
    passage = tiny_tokenizer.decode(rows[7, 20:28].tolist()).split()[1]
    with pytest.raises(DataError, match=rf"1 of 6 windows share a passage.* {PASSAGE} tokens.*{passage}"):
        refuse_overlap(leak, rows[6:], tiny_tokenizer)


def test_idiom_and_rulers_are_no_overlap(corpus: Path, tiny_tokenizer: Any) -> None:
    rows = windows(corpus, tiny_tokenizer, length=64, count=12, seed=0)
    idiom, ruler = rows.clone(), rows.clone()
    idiom[0, 10:10 + NGRAM + 4] = rows[7, 10:10 + NGRAM + 4]
    ruler[[0, 7], 5:60] = 14
    refuse_overlap(idiom[:6], idiom[6:], tiny_tokenizer)
    refuse_overlap(ruler[:6], ruler[6:], tiny_tokenizer)


def test_avoided_passages_are_passed_over(corpus: Path, tiny_tokenizer: Any) -> None:
    seen = windows(corpus, tiny_tokenizer, length=64, count=30, seed=0)
    fresh = windows(corpus, tiny_tokenizer, length=64, count=30, seed=1, avoid=seen)
    refuse_overlap(fresh, seen, tiny_tokenizer)
    with pytest.raises(DataError, match="share a passage"):
        refuse_overlap(windows(corpus, tiny_tokenizer, length=64, count=30, seed=1), seen, tiny_tokenizer)
