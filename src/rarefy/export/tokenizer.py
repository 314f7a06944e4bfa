"""A Hugging Face tokenizer as the ``tokenizer.*`` metadata of a GGUF file.

llama.cpp has two tokenizers that matter here. ``llama`` is SentencePiece: pieces with scores, the pair
whose union scores highest is merged first, bytes as a fallback. ``gpt2`` is byte-level BPE: a regular
expression cuts the text into words, ranked merges build tokens inside a word; the expression is not in
the file, only a *name* for it (``tokenizer.ggml.pre``). A wrong or missing name loads without complaint
and tokenises wrongly, so a tokenizer whose own expressions are not in the table below is refused.

Hugging Face stores both kinds as ranked merges. Scores are recovered from them: a merge list made from
SentencePiece orders the pairs by the score of their union, so minus the rank at which a piece first
appears is its score up to a monotone map, and only the order matters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from enum import IntEnum
from typing import Any

from rarefy.core.errors import TargetError
from rarefy.formats.gguf import Entry, ValueType

REMEDY = "start from a GGUF file of this model, whose tokenizer is copied as it is"
MARK = "\u2581"  # SentencePiece's visible space
UNMERGED = -1e6  # the score of pieces that no merge makes: below every other


class TokenType(IntEnum):
    """llama.cpp's kinds of tokens."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# The expressions of published tokenizers, as their tokenizer.json states them.
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASH_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
THREE_DIGITS = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
ONE_DIGIT = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
WITH_MARKS = (rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
              r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
O200K = rf"{_CASED[0]}{_SHORT}?|{_CASED[1]}{_SHORT}?|\p{{N}}{{1,3}}|{_SLASH_TAIL}"
TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SLASH_TAIL}"

# What a pre-tokenizer does, step by step, and whether words that are tokens skip the merges -> llama.cpp's
# name for it.
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    (("digits", GPT2), False): "smollm",
    ((THREE_DIGITS,), True): "llama-bpe",
    ((THREE_DIGITS,), False): "dbrx",
    ((ONE_DIGIT,), False): "qwen2",
    ((WITH_MARKS,), False): "qwen35",
    ((O200K,), False): "gpt-4o",
    ((TEKKEN,), True): "tekken",
}


def tokenizer_metadata(tokenizer: Any, rows: int, eos: int | None = None) -> list[Entry]:
    """Everything under ``tokenizer.``, for an embedding of ``rows`` rows.

    eos: the end-of-text token of the model's config, for tokenizers that name none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TargetError(f"tokenizer {type(tokenizer).__name__}: has no tokenizer.json form; {REMEDY}")
    parts = json.loads(backend.to_str())
    model = parts["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise TargetError(f"tokenizer: a {model['type']} model of this kind has no form in llama.cpp that we "
                          f"write; {REMEDY}")
    entries = _sentencepiece(parts, rows) if model["byte_fallback"] else _byte_level(parts, rows)
    return entries + _special(tokenizer, rows, eos) + _template(tokenizer)


def _sentencepiece(parts: Mapping[str, Any], rows: int) -> list[Entry]:
    tokens, types = _tokens(parts, rows, MARK)
    ranks: dict[str, int] = {}
    for pair in parts["model"]["merges"]:
        left, right = pair if isinstance(pair, list) else pair.split(" ")
        ranks.setdefault(left + right, len(ranks))
    kept = (TokenType.NORMAL, TokenType.BYTE)
    scores = [-float(ranks[token]) if kind in kept and token in ranks else 0.0 if kind == TokenType.BYTE
              else UNMERGED for token, kind in zip(tokens, types, strict=True)]
    return [("tokenizer.ggml.model", "llama", ValueType.STRING),
            ("tokenizer.ggml.pre", "default", ValueType.STRING),
            ("tokenizer.ggml.tokens", tokens, ValueType.ARRAY, ValueType.STRING),
            ("tokenizer.ggml.scores", scores, ValueType.ARRAY, ValueType.FLOAT32),
            ("tokenizer.ggml.token_type", types, ValueType.ARRAY, ValueType.INT32),
            ("tokenizer.ggml.add_space_prefix", _space_prefix(parts), ValueType.BOOL)]


def _space_prefix(parts: Mapping[str, Any]) -> bool:
    """Whether a visible space is put before the text; refuses what llama.cpp's SentencePiece cannot do."""
    prefix = marked = False
    for step in _steps(parts["normalizer"], "normalizers") + _steps(parts["pre_tokenizer"], "pretokenizers"):
        match step:
            case {"type": "Prepend", "prepend": "\u2581"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                marked = True
            case {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}:
                marked, prefix = True, prefix or scheme != "never"
            case {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"} if marked:
                pass  # no spaces are left to split at
            case _:
                raise TargetError(f"tokenizer: llama.cpp's SentencePiece has no step like {_brief(step)}; "
                                  f"{REMEDY}")
    if not marked:
        raise TargetError(f"tokenizer: does not write spaces as {MARK}; {REMEDY}")
    return prefix


def _byte_level(parts: Mapping[str, Any], rows: int) -> list[Entry]:
    tokens, types = _tokens(parts, rows, "")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in parts["model"]["merges"]]
    return [("tokenizer.ggml.model", "gpt2", ValueType.STRING),
            ("tokenizer.ggml.pre", pre_tokenizer_name(parts), ValueType.STRING),
            ("tokenizer.ggml.tokens", tokens, ValueType.ARRAY, ValueType.STRING),
            ("tokenizer.ggml.token_type", types, ValueType.ARRAY, ValueType.INT32),
            ("tokenizer.ggml.merges", merges, ValueType.ARRAY, ValueType.STRING)]


def pre_tokenizer_name(parts: Mapping[str, Any]) -> str:
    """llama.cpp's name for how this byte-level tokenizer cuts text into words."""
    for step in _steps(parts["normalizer"], "normalizers"):
        if step["type"] != "NFC":  # composes accents, which nearly all text is already
            raise TargetError(f"tokenizer: llama.cpp has no normalizer like {_brief(step)}; {REMEDY}")
    does: list[str] = []
    steps = _steps(parts["pre_tokenizer"], "pretokenizers")
    if all(step["type"] != "ByteLevel" for step in steps):
        raise TargetError(f"tokenizer: BPE that works neither on bytes nor falls back to them has no form in "
                          f"llama.cpp; {REMEDY}")
    for step in steps:
        match step:
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
                does.append(regex.replace("\r", r"\r").replace("\n", r"\n"))
            case {"type": "Digits", "individual_digits": True}:
                does.append("digits")
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
                does += [GPT2] if regex else []
            case _:
                raise TargetError("tokenizer: llama.cpp has no pre-tokenizer with a step like "
                                  f"{_brief(step)}; {REMEDY}")
    name = PRE_TOKENIZERS.get((tuple(does), bool(parts["model"].get("ignore_merges"))))
    if name is None:
        raise TargetError(f"tokenizer: its pre-tokenizer ({_brief(does)}) is not one whose name in llama.cpp "
                          f"we know, and a wrong one would tokenise wrongly in silence; {REMEDY}")
    return name


def _steps(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """A component of tokenizer.json as a flat list, sequences opened."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for each in part[inner] for step in _steps(each, inner)]
    return [part]


def _tokens(parts: Mapping[str, Any], rows: int, mark: str) -> tuple[list[str], list[int]]:
    """The text and the kind of every row of the embedding.

    mark: what stands for a space inside the pieces; tokens added by the user are written with the space
    itself, for llama.cpp looks for them in the raw text.
    """
    tokens = [f"[PAD{row}]" for row in range(rows)]
    types: list[int] = [TokenType.UNUSED] * rows
    for token, row in parts["model"]["vocab"].items():
        if row < rows and token != tokens[row]:  # a file that was padded before stays padded
            byte = mark and re.fullmatch(r"<0x[0-9A-F]{2}>", token)
            tokens[row], types[row] = token, TokenType.BYTE if byte else TokenType.NORMAL
    unknown = parts["model"]["vocab"].get(parts["model"].get("unk_token"))
    if unknown is not None and unknown < rows:
        types[unknown] = TokenType.UNKNOWN
    for added in parts["added_tokens"]:
        row, text = added["id"], added["content"]
        if row < rows and types[row] != TokenType.BYTE:
            tokens[row] = text if added["special"] or not mark else text.replace(mark, " ")
            types[row] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    return tokens, types


def _special(tokenizer: Any, rows: int, eos: int | None) -> list[Entry]:
    """The named tokens, and whether text gets one in front or behind.

    Both ids are always written: where one is missing llama.cpp takes a token of its own choice.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else eos
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
    end = begin if end is None else end
    if begin is None or end is None or max(begin, end) >= rows:
        raise TargetError("tokenizer: names neither a begin- nor an end-of-text token inside the vocabulary; "
                          "set eos_token in tokenizer_config.json")
    entries: list[Entry] = [("tokenizer.ggml.bos_token_id", int(begin), ValueType.UINT32),
                            ("tokenizer.ggml.eos_token_id", int(end), ValueType.UINT32)]
    for key, row in (("unknown", tokenizer.unk_token_id), ("padding", tokenizer.pad_token_id)):
        if row is not None and row < rows:
            entries.append((f"tokenizer.ggml.{key}_token_id", int(row), ValueType.UINT32))
    marked = tokenizer("a")["input_ids"]
    entries += [("tokenizer.ggml.add_bos_token", marked[0] == tokenizer.bos_token_id, ValueType.BOOL),
                ("tokenizer.ggml.add_eos_token", marked[-1] == tokenizer.eos_token_id, ValueType.BOOL)]
    return entries


def _template(tokenizer: Any) -> list[Entry]:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    return [("tokenizer.chat_template", template, ValueType.STRING)] if template else []


def safe_name(name: str, tokens: Collection[str]) -> str:
    """``name``, unless llama.cpp would read more into it than a name.

    In a model whose name holds "phi-3" it looks up that family's special tokens, and fails to load when
    they are not there.
    """
    if {"</s>", "<unk>", "<s>", "<|endoftext|>"} <= set(tokens):
        return name
    return re.sub(r"(?i)(phi)-?(3)", r"\1 \2", name)


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else ", ".join(value)
    return text if len(text) <= 100 else text[:97] + "..."
