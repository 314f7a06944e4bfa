"""Tokenizers of every kind that is written, cut by llama.cpp as by Hugging Face, token for token."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from rarefy.core.errors import TargetError
from rarefy.export import tokenizer as kinds
from rarefy.export.gguf import export_gguf
from rarefy.export.tokenizer import TokenType, pre_tokenizer_name, safe_name, tokenizer_metadata
from rarefy.models.model import Model
from rarefy.runtimes.llamacpp import Session

ENGLISH = ("It's we'll THEY'RE the year 2024, 12345678 times: costs $3.50 (about 10%)...\n\n\tdef f(x):\n"
           "        return x  # no-op\r\n if a!=b: print('hello   world')   \n")
WORLD = "Größe naïve façade, 漢字とかな ελληνικά русский العربية हिन्दी 🙂🙃 e\u0301 ½ Ⅷ\u00a0x\u3000y"
PROBES = [ENGLISH, WORLD, "x", " leading", "trailing ", "CamelCaseWords HTTPServer/to", "a<end>b <tool>c",
          "a\n\n\n\nb", "1 22 333 4444 55555"]
ROWS = 700


def byte_level(steps: list[Any], *, ignore_merges: bool = False, bos: bool = False) -> Any:
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator([ENGLISH * 20, WORLD * 5], trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    made.add_tokens([AddedToken("<tool>", normalized=False)])
    if bos:
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<end>")


def sentencepiece(prefix: bool, *, metaspace: bool = False) -> Any:
    """Merges in the order of the scores, bytes as a fallback, spaces visible."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if metaspace:
        scheme = "first" if prefix else "never"
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    else:
        before = [normalizers.Prepend("▁")] if prefix else []
        made.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    lines = [line.strip() for line in (ENGLISH * 2 + WORLD[:20]).splitlines()]
    made.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=600, show_progress=False, max_token_length=8,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]))
    parts = json.loads(made.to_str())
    parts["added_tokens"] = parts["added_tokens"][:3]  # bytes are ordinary tokens
    made = Tokenizer.from_str(json.dumps(parts))
    made.add_special_tokens(["<end>"])
    made.add_tokens([AddedToken("<tool>", normalized=False)])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>")


def split(regex: str) -> list[Any]:
    return [pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
KINDS: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: byte_level([GPT2]),
    "smollm": lambda: byte_level([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "llama-bpe": lambda: byte_level(split(kinds.THREE_DIGITS), ignore_merges=True, bos=True),
    "dbrx": lambda: byte_level(split(kinds.THREE_DIGITS)),
    "qwen2": lambda: byte_level(split(kinds.ONE_DIGIT)),
    "qwen35": lambda: byte_level(split(kinds.WITH_MARKS)),
    "gpt-4o": lambda: byte_level(split(kinds.O200K)),
    "tekken": lambda: byte_level(split(kinds.TEKKEN), ignore_merges=True, bos=True),
    "sentencepiece": lambda: sentencepiece(prefix=False),
    "sentencepiece with a space in front": lambda: sentencepiece(prefix=True),
    "metaspace": lambda: sentencepiece(prefix=True, metaspace=True),
    "metaspace without a space in front": lambda: sentencepiece(prefix=False, metaspace=True),
}
# What llama.cpp is known to do otherwise: it stands in for the classes of upper- and lower-case letters with
# a-z and A-Z, and it puts a space in front of texts that begin with one and behind control tokens.
KNOWN_APART = {"gpt-4o": [WORLD], "tekken": [WORLD], "metaspace": [" leading", "a<end>b <tool>c"]}


def test_every_known_pre_tokenizer_is_tried():
    assert set(kinds.PRE_TOKENIZERS.values()) <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_cuts_alike(kind, build, tmp_path):
    tokenizer = KINDS[kind]()
    small = build("llama", vocab_size=ROWS, num_hidden_layers=1, hidden_size=32, head_dim=8,
                  intermediate_size=32)
    model = Model.from_module(_network(small), tokenizer, name=kind)
    path = tmp_path / "model.gguf"
    export_gguf(model, {}, {site.path: "F16" for site in model.map.sites}, path)
    probes = [text for text in PROBES if text not in KNOWN_APART.get(kind, [])]
    with Session(path, threads=1) as session:
        assert session.vocabulary == ROWS
        for text in probes:
            expected = tokenizer(text)["input_ids"]
            assert session.tokenize(text, special=True) == expected, text
        session.check_tokens(probes[:2], [tokenizer(text)["input_ids"] for text in probes[:2]])
        with pytest.raises(TargetError, match="cuts 'x' into other tokens"):
            session.check_tokens(["x"], [[0, 0]])


def _network(model: Model) -> Any:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_config(model.config)
    network.load_state_dict({site.path: model.weight(site.path) for site in model.map.sites}, strict=False)
    return network.eval()


def test_kinds_of_tokens_and_named_tokens():
    found = {entry[0]: entry[1] for entry in tokenizer_metadata(KINDS["sentencepiece"](), ROWS)}
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(found["tokenizer.ggml.scores"]) == ROWS
    assert types[:4] == [TokenType.CONTROL] * 3 + [TokenType.BYTE]
    assert types[tokens.index("<0x41>")] == TokenType.BYTE
    assert types[tokens.index("<tool>")] == TokenType.USER_DEFINED
    assert types[tokens.index("<end>")] == TokenType.CONTROL
    assert tokens[-1] == f"[PAD{ROWS - 1}]" and types[-1] == TokenType.UNUSED
    assert found["tokenizer.ggml.bos_token_id"] == 1 and found["tokenizer.ggml.eos_token_id"] == 2
    assert found["tokenizer.ggml.add_bos_token"] is True and found["tokenizer.ggml.add_eos_token"] is False
    scores, merges = found["tokenizer.ggml.scores"], json.loads(
        KINDS["sentencepiece"]().backend_tokenizer.to_str())["model"]["merges"]
    first, later = ("".join(merges[k]) for k in (0, 50))
    assert scores[tokens.index(first)] == 0 > scores[tokens.index(later)] > scores[tokens.index("x")]


def test_a_chat_template_comes_along():
    tokenizer = KINDS["gpt-2"]()
    tokenizer.chat_template = "{{ messages }}"
    found = {entry[0]: entry[1] for entry in tokenizer_metadata(tokenizer, ROWS)}
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    assert found["tokenizer.ggml.add_bos_token"] is False


def test_the_config_names_the_end_where_the_tokenizer_does_not():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS["gpt-2"]().backend_tokenizer)
    with pytest.raises(TargetError, match="neither a begin- nor an end-of-text token"):
        tokenizer_metadata(tokenizer, ROWS)
    found = {entry[0]: entry[1] for entry in tokenizer_metadata(tokenizer, ROWS, eos=7)}
    assert found["tokenizer.ggml.bos_token_id"] == found["tokenizer.ggml.eos_token_id"] == 7


@pytest.mark.parametrize(("steps", "message"), [
    ([pre_tokenizers.Split(Regex(r"\p{L}+"), "isolated"), GPT2], "not one whose name in llama.cpp we know"),
    ([pre_tokenizers.Whitespace(), GPT2], "no pre-tokenizer with a step like"),
    ([pre_tokenizers.ByteLevel(add_prefix_space=True)], "no pre-tokenizer with a step like"),
    ([pre_tokenizers.Whitespace()], "neither on bytes nor falls back"),
])
def test_a_pre_tokenizer_that_is_not_known_is_refused(steps, message):
    parts = json.loads(byte_level(steps).backend_tokenizer.to_str())
    with pytest.raises(TargetError, match=message) as caught:
        pre_tokenizer_name(parts)
    assert "start from a GGUF file of this model" in str(caught.value)


def test_other_models_of_text_are_refused():
    pieces = Tokenizer(models.Unigram([("a", 0.0), ("<s>", 0.0)], 0))
    unigram = PreTrainedTokenizerFast(tokenizer_object=pieces)
    with pytest.raises(TargetError, match="a Unigram model of this kind"):
        tokenizer_metadata(unigram, 2)
    lowered = KINDS["gpt-2"]()
    lowered.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(TargetError, match="no normalizer like"):
        tokenizer_metadata(lowered, ROWS)
    squeezed = KINDS["sentencepiece"]()
    squeezed.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(TargetError, match="no step like"):
        tokenizer_metadata(squeezed, ROWS)


def test_a_name_is_changed_only_where_it_would_break_loading():
    bare, full = ["a"], ["</s>", "<unk>", "<s>", "<|endoftext|>"]
    assert safe_name("My-Phi-3-mini", bare) == "My-Phi 3-mini"
    assert safe_name("Phi-3-mini", full) == "Phi-3-mini"
    assert safe_name("Llama-3", bare) == "Llama-3"
