"""A tokenizer without some of its tokens, that cuts text of kept tokens exactly as before.

Removing tokens can only take ways of cutting a text away. Whatever a tokenizer chooses is the best of what is
possible, so a text whose own way is left keeps it:

    WordPiece    the longest token at each place: it is still there, and nothing longer came
    Unigram      the cut of the highest score: the same (the lowest score stays, unknown text is priced by it)
    BPE          the first merge of the list that fits: the same, if every merge on the way is left

so BPE needs, besides a token, all those that it is merged from (``components``). Other text is cut into
smaller tokens, down to bytes or characters, which never go; nor do special tokens and those that users added.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from rarefy.core.errors import ModelError

BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def fixed_tokens(tokenizer: Any, config: Any) -> set[int]:
    """The tokens that never go: special and added ones, those a configuration names, bytes or characters."""
    parts = _parts(tokenizer)
    model, vocabulary = parts["model"], _vocabulary(parts)
    fixed = {int(added["id"]) for added in parts["added_tokens"]} | set(tokenizer.all_special_ids)
    fixed |= {vocabulary[token] for token in (model.get("unk_token"),) if token in vocabulary}
    fixed |= named_tokens(config)
    match model:
        case {"byte_fallback": True}:
            fixed |= {index for token, index in vocabulary.items() if BYTE.fullmatch(token)}
        case {"type": "BPE" | "Unigram"}:
            fixed |= {index for token, index in vocabulary.items() if len(token) == 1}
        case {"type": "WordPiece", "continuing_subword_prefix": prefix}:
            fixed |= {index for token, index in vocabulary.items() if len(token.removeprefix(prefix)) == 1}
    if model["type"] == "Unigram":
        scores = [score for _, score in model["vocab"]]
        fixed |= {index for index in (model["unk_id"], scores.index(min(scores))) if index is not None}
    return fixed


def named_tokens(config: Any) -> set[int]:
    """The tokens that a configuration names by their number."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if name.endswith("_token_id"):
            found |= {each for each in (value if isinstance(value, list) else [value])
                      if isinstance(each, int) and each >= 0}
    return found


def components(tokenizer: Any, wanted: Iterable[int]) -> set[int]:
    """``wanted`` and every token that one of them is merged from."""
    parts, closed = _parts(tokenizer), set(wanted)
    if parts["model"]["type"] != "BPE":
        return closed
    prefix = parts["model"].get("continuing_subword_prefix") or ""
    vocabulary = _vocabulary(parts)
    token_of = {index: token for token, index in vocabulary.items()}
    ranks = {pair: rank for rank, pair in enumerate(_merges(parts))}
    for index in sorted(closed):
        made = _merged_from(token_of.get(index, ""), ranks, prefix)
        closed |= {vocabulary[token] for token in made if token in vocabulary}
    return closed


def _merged_from(token: str, ranks: Mapping[tuple[str, str], int], prefix: str) -> set[str]:
    """All that stands on the way from characters to ``token``; nothing if merges do not lead there."""
    body = token.removeprefix(prefix)
    pieces = [body[:1] if not prefix or body == token else token[:len(prefix) + 1],
              *(prefix + letter for letter in body[1:])]
    met = set(pieces)
    while len(pieces) > 1:
        rank, place = min(((ranks[pair], k) for k, pair in enumerate(pairwise(pieces))
                           if pair in ranks), default=(-1, -1))
        if rank < 0:
            return set()
        pieces[place:place + 2] = [pieces[place] + pieces[place + 1].removeprefix(prefix)]
        met.add(pieces[place])
    return met


def without_tokens(tokenizer: Any, kept: Int64[Tensor, " kept"]) -> Any:
    """The tokenizer with the tokens ``kept`` alone, renumbered in their order."""
    from tokenizers import Tokenizer

    parts = _parts(tokenizer)
    place = {old: new for new, old in enumerate(kept.tolist())}
    left = [added["content"] for added in parts["added_tokens"] if added["id"] not in place]
    if left:
        raise ModelError(f"tokenizer: {left[0]!r} is a special token and cannot be removed")
    model = parts["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in place]
        model["unk_id"] = None if model["unk_id"] is None else place[model["unk_id"]]
    else:
        model["vocab"] = {token: place[index] for token, index in model["vocab"].items() if index in place}
    if model["type"] == "BPE":
        prefix, held = model.get("continuing_subword_prefix") or "", model["vocab"]
        model["merges"] = [[left, right] for left, right in _merges(parts)
                           if {left, right, left + right.removeprefix(prefix)} <= held.keys()]
    for added in parts["added_tokens"]:
        added["id"] = place[added["id"]]
    if parts["padding"] is not None:
        parts["padding"]["pad_id"] = place[parts["padding"]["pad_id"]]
    _renumber(parts["post_processor"], place)
    done = copy.copy(tokenizer)
    done._tokenizer = Tokenizer.from_str(json.dumps(parts))
    return done


def _renumber(processor: dict[str, Any] | None, place: Mapping[int, int]) -> None:
    """The tokens that are put in front of a text and behind it."""
    match processor:
        case {"type": "Sequence", "processors": inner}:
            for each in inner:
                _renumber(each, place)
        case {"type": "TemplateProcessing", "special_tokens": named}:
            for each in named.values():
                each["ids"] = [place[index] for index in each["ids"]]
        case {"type": "BertProcessing" | "RobertaProcessing", "sep": end, "cls": start}:
            start[1], end[1] = place[start[1]], place[end[1]]
        case _:
            pass  # it adds no tokens


def _parts(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer as ``tokenizer.json`` has it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"tokenizer {type(tokenizer).__name__}: has no tokenizer.json form, so it is not "
                         "known what its tokens are made of; start from a model that has one")
    parts: dict[str, Any] = json.loads(backend.to_str())
    if parts["model"]["type"] not in ("BPE", "WordPiece", "Unigram"):
        raise ModelError(f"tokenizer: tokens cannot be removed from a {parts['model']['type']} model; "
                         "supported are BPE, WordPiece and Unigram")
    return parts


def _vocabulary(parts: Mapping[str, Any]) -> dict[str, int]:
    held = parts["model"]["vocab"]
    return held if isinstance(held, dict) else {token: index for index, (token, _) in enumerate(held)}


def _merges(parts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(pair[0], pair[1]) if isinstance(pair, list) else tuple(pair.split(" "))
            for pair in parts["model"]["merges"]]
