"""The tokenizer of a GGUF file, rebuilt from its metadata for transformers.

A file lists tokens with their kinds, and either merges (byte-level vocabularies, ``gpt2``) or scores
(SentencePiece vocabularies, ``llama``), from which the merges follow: a token with a better score is
merged first, whichever two tokens it is made of. How a byte-level vocabulary cuts text into words is only
named (``tokenizer.ggml.pre``); the wrong cut tokenises wrongly in silence, so an unknown name is an error.

Built here, from the library ``tokenizers``, because transformers' own reader guesses where it does not know
the name of a cut, and gives a byte-level vocabulary without ``<|endoftext|>`` an extra token of that name,
which has no row in the embedding.
"""

from __future__ import annotations

from typing import Any

from rarefy.core.errors import ModelError
from rarefy.formats.gguf import GgufFile
from rarefy.models.sources import in_one_line

CONTROL, USER_DEFINED = 3, 4  # llama.cpp's kinds of tokens that matter here

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_LLAMA3 = rf"{_ENDING}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_ENDING}|{_LETTERS}|\p{{N}}|{_REST}"
_TEKKEN = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
           rf"|\p{{N}}|{_REST_SLASH}")
_GPT4O = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}?"
          rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}?|\p{{N}}{{1,3}}|{_REST_SLASH}")

# How text is cut into words, by ``tokenizer.ggml.pre``: a pattern, or GPT-2's own, with single digits or not.
SPLITS = {"gpt-2": "whole numbers", "smollm": "single digits", "llama-bpe": _LLAMA3, "llama3": _LLAMA3,
          "llama-v3": _LLAMA3, "smaug-bpe": _LLAMA3, "dbrx": _LLAMA3, "qwen2": _QWEN2,
          "deepseek-r1-qwen": _QWEN2, "tekken": _TEKKEN, "gpt-4o": _GPT4O}
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")  # a word that is a token needs no merges


def gguf_tokenizer(file: GgufFile) -> Any:
    """The tokenizer that the metadata of ``file`` describes."""
    tokens, kinds = _lists(file)
    named = {f"{role}_token": _token(file, tokens, key) for role, key in (
        ("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))}
    try:
        backend = (_byte_level if _get(file, "model") == "gpt2" else _sentencepiece)(file, tokens)
        _add_special(backend, tokens, kinds)
        _add_ends(file, backend, named)
        return _wrapped(backend, file.metadata.get("tokenizer.chat_template"), named)
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001  ``tokenizers`` raises plain Exception
        raise ModelError(f"{file.path.name}: the metadata makes no tokenizer ({in_one_line(error)}); start "
                         "from the Hugging Face folder") from None


def _wrapped(backend: Any, template: str | None, named: dict[str, str | None]) -> Any:
    """The tokenizer as transformers has it."""
    from transformers import PreTrainedTokenizerFast

    # transformers copies what it is given, seconds for a large vocabulary; nobody else holds this one
    backend.__deepcopy__ = lambda memo: backend
    try:
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, clean_up_tokenization_spaces=False, chat_template=template,
            **{role: token for role, token in named.items() if token is not None})
    finally:
        del backend.__deepcopy__


def _get(file: GgufFile, key: str, default: Any = None) -> Any:
    return file.metadata.get(f"tokenizer.ggml.{key}", default)


def _lists(file: GgufFile) -> tuple[list[str], list[int]]:
    """Tokens and their kinds, after the checks that need no library."""
    model, pre, tokens = (_get(file, key) for key in ("model", "pre", "tokens"))
    if model not in ("llama", "gpt2"):
        raise ModelError(f"{file.path.name}: tokenizer.ggml.model is {model!r} and should be 'llama' or "
                         "'gpt2'; start from the Hugging Face folder")
    if model == "gpt2" and pre not in SPLITS:
        raise ModelError(f"{file.path.name}: tokenizer.ggml.pre is {pre!r}, so it is unknown how text is cut "
                         f"into words (known: {', '.join(SPLITS)}); start from the Hugging Face folder")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise ModelError(f"{file.path.name}: holds no tokenizer.ggml.tokens; convert the model again")
    kinds = _get(file, "token_type", [1] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise ModelError(f"{file.path.name}: tokenizer.ggml.token_type does not match the {len(tokens)} "
                         "tokens; convert the model again")
    return tokens, kinds


def _token(file: GgufFile, tokens: list[str], key: str) -> str | None:
    index = _get(file, f"{key}_token_id")
    if index is None:
        return None
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise ModelError(f"{file.path.name}: tokenizer.ggml.{key}_token_id is {index!r} and there are "
                         f"{len(tokens)} tokens; convert the model again")
    return tokens[index]


def _byte_level(file: GgufFile, tokens: list[str]) -> Any:
    """Byte-pair encoding over GPT-2's printable stand-ins for bytes, with the merges of the file."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre, merges = str(_get(file, "pre")), [tuple(merge.split(" ")) for merge in _get(file, "merges", [])]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges,
                                   ignore_merges=pre in _WHOLE_WORDS))
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=bool(_get(file, "add_space_prefix", False)))
    match SPLITS[pre]:
        case "whole numbers":
            backend.pre_tokenizer = gpt2
        case "single digits":
            backend.pre_tokenizer = pre_tokenizers.Sequence([
                pre_tokenizers.Digits(individual_digits=True), gpt2])
        case pattern:
            backend.pre_tokenizer = pre_tokenizers.Sequence([
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(file: GgufFile, tokens: list[str]) -> Any:
    """Byte-pair encoding over text whose spaces are written as ``▁``, bytes for what has no token."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    # Gemma's files write runs of spaces as spaces, where the text that reaches the merges has ▁
    spelled = ["▁" * len(token) if len(token) > 1 and not token.strip(" ") else token for token in tokens]
    vocab = {token: index for index, token in enumerate(spelled)}
    prefix = bool(_get(file, "add_space_prefix", True))
    backend = Tokenizer(models.BPE(vocab, _merges(file, spelled, vocab), byte_fallback=True, fuse_unk=True,
                                   unk_token=_token(file, spelled, "unknown")))
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _merges(file: GgufFile, tokens: list[str], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best token first.

    Best is the highest score; Gemma's scores are not in the order of its merges, its tokens are.
    """
    scores, order = _get(file, "scores"), list(range(len(tokens)))
    if not str(file.metadata.get("general.architecture")).startswith("gemma"):
        if not isinstance(scores, list) or len(scores) != len(tokens):
            raise ModelError(f"{file.path.name}: tokenizer.ggml.scores does not match the {len(tokens)} "
                             "tokens; convert the model again")
        order.sort(key=lambda index: -scores[index])
    merges = []
    for index in order:
        token = tokens[index]
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))
                 if token[:cut] in vocab and token[cut:] in vocab]
        if len(pairs) > 1:
            pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += pairs
    return merges


def _add_special(backend: Any, tokens: list[str], kinds: list[int]) -> None:
    """Tokens that are found whole in the text: control tokens, which decoding may skip, and others."""
    from tokenizers import AddedToken

    for kind, add in ((CONTROL, backend.add_special_tokens), (USER_DEFINED, backend.add_tokens)):
        add([AddedToken(token, normalized=False, special=kind == CONTROL)
             for token, own in zip(tokens, kinds, strict=True)
             if own == kind and backend.token_to_id(token) is not None])


def _add_ends(file: GgufFile, backend: Any, named: dict[str, str | None]) -> None:
    """The first and last token that every text gets."""
    from tokenizers import processors

    # llama.cpp's defaults where a file does not say
    usual = _get(file, "model") == "llama" or _get(file, "pre") in ("llama-bpe", "llama3", "llama-v3")
    ends = [(role, named[role]) for role, default in (("bos_token", usual), ("eos_token", False))
            if _get(file, f"add_{role}", default) and named[role] is not None]
    if not ends:
        return
    pieces = [token for role, token in ends if role == "bos_token"], [
        token for role, token in ends if role == "eos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=[*pieces[0], "$A", *pieces[1]],
        pair=[*pieces[0], "$A", *pieces[1], *(f"{token}:1" for token in pieces[0]), "$B:1",
              *(f"{token}:1" for token in pieces[1])],
        special_tokens=[(token, backend.token_to_id(token)) for _, token in ends])
