"""Tokenizers without some tokens: text of kept tokens is cut as before, whatever kind the tokenizer is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

from rarefy.core.errors import ModelError
from rarefy.models.model import Model, open_model
from rarefy.models.narrowed import token_table
from rarefy.models.narrowed import with_tokens as encoder_with_tokens
from rarefy.models.opening import open_network
from rarefy.models.runner import Runner
from rarefy.models.shrunk import with_tokens
from rarefy.models.tokens import components, fixed_tokens, without_tokens
from rarefy.runtimes.llamacpp import Session

SPECIAL = ["<unk>", "<s>", "</s>", "[PAD]"]


def paragraphs() -> list[str]:
    from pydoc_data.topics import topics

    return [" ".join(part.split()) for _, text in sorted(topics.items()) for part in text.split("\n\n")
            if 40 < len(part) < 400]


def trained(kind: str) -> Any:
    """A tokenizer of 700 tokens of that kind, trained on half of the paragraphs."""
    special = {"special_tokens": SPECIAL, "vocab_size": 700, "show_progress": False}
    match kind:
        case "wordpiece":
            backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
            backend.normalizer = normalizers.BertNormalizer()
            backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            trainer: Any = trainers.WordPieceTrainer(**special)
        case "unigram":
            backend = Tokenizer(models.Unigram())
            backend.pre_tokenizer = pre_tokenizers.Metaspace()
            trainer = trainers.UnigramTrainer(unk_token="<unk>", **special)
        case "byte-level":
            backend = Tokenizer(models.BPE())
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **special)
        case _:
            backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
            backend.normalizer = normalizers.Replace(" ", "\u2581")
            trainer = trainers.BpeTrainer(**{**special, "special_tokens": [
                *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))], "vocab_size": 1000})
    backend.train_from_iterator(paragraphs()[::2], trainer)
    if kind == "pieces":  # bytes are no special tokens
        parts = json.loads(backend.to_str())
        parts["added_tokens"] = [each for each in parts["added_tokens"] if each["content"] in SPECIAL]
        backend = Tokenizer.from_str(json.dumps(parts))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[
        (token, backend.token_to_id(token)) for token in ("<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>",
                                   eos_token="</s>", pad_token="[PAD]")


def chosen(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """The tokens of some texts, those that never go, and what they are merged from."""
    used = {token for ids in tokenizer(texts)["input_ids"] for token in ids}
    config = AutoConfig.for_model("llama", bos_token_id=1, eos_token_id=[2], pad_token_id=3)
    return torch.tensor(sorted(components(tokenizer, used | fixed_tokens(tokenizer, config))))


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "byte-level", "pieces"])
def test_text_of_kept_tokens_is_cut_as_before(kind: str, tmp_path: Path) -> None:
    tokenizer, texts = trained(kind), paragraphs()
    kept = chosen(tokenizer, texts[:40])
    assert len(kept) < len(tokenizer)
    without_tokens(tokenizer, kept).save_pretrained(tmp_path)
    fewer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert len(fewer) == len(kept)
    assert fewer.all_special_tokens == tokenizer.all_special_tokens
    held, whole = set(kept.tolist()), 0
    for text in texts:
        before, after = tokenizer(text)["input_ids"], fewer(text)["input_ids"]
        if held >= set(before):
            whole += 1
            assert kept[after].tolist() == before
        elif kind in ("byte-level", "pieces"):
            assert fewer.unk_token_id not in after  # bytes stand for everything
        assert (fewer.unk_token_id in after) == (tokenizer.unk_token_id in before)
    assert whole >= 60, "some that were not looked at are among them"


def test_a_token_brings_what_it_is_merged_from() -> None:
    vocabulary = {token: k for k, token in enumerate(["a", "b", "c", "ab", "bc", "abc", "x"])}
    backend = Tokenizer(models.BPE(vocabulary, [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert components(tokenizer, {5}) == {0, 1, 2, 4, 5}  # b + c goes first, so ab is never met
    assert components(tokenizer, {6}) == {6}


def test_special_tokens_stay() -> None:
    tokenizer = trained("byte-level")
    with pytest.raises(ModelError, match="'<unk>' is a special token and cannot be removed"):
        without_tokens(tokenizer, torch.arange(1, 300))
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(ModelError, match="cannot be removed from a WordLevel model"):
        components(PreTrainedTokenizerFast(tokenizer_object=words), {0})


def logits(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    runner = Runner(model)
    hidden, context = runner.stem(tokens)
    for block in range(runner.blocks):
        hidden = runner.block(block, hidden, context)
    return runner.logits(runner.norm(hidden))


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gemma3"])
def test_a_model_answers_as_before(name: str, tiny_trained: Any, tmp_path: Path) -> None:
    """Own head or tied: logits of the tokens that stay; llama.cpp cuts text as our tokenizer does."""
    from rarefy.export.gguf import export_gguf

    model, texts = open_model(tiny_trained(name)), paragraphs()[:3]
    kept = chosen(model.tokenizer, texts)
    fewer = with_tokens(model, kept)
    assert fewer.config.vocab_size == len(kept) == len(fewer.tokenizer) < model.config.vocab_size
    tokens = torch.tensor([fewer.tokenizer(texts[0])["input_ids"]])
    torch.testing.assert_close(logits(fewer, tokens), logits(model, kept[tokens])[..., kept])
    path, again = tmp_path / "model.gguf", tmp_path / "again.gguf"
    export_gguf(fewer, {}, {site.path: "F16" for site in fewer.map.sites}, path)
    reopened = open_model(path)
    assert reopened.parameters == fewer.parameters
    twice = with_tokens(reopened, torch.arange(len(kept) - 1))  # of a file, whose tokenizer is rebuilt
    export_gguf(twice, {}, {site.path: "F16" for site in twice.map.sites}, again)
    for file, held in ((path, fewer), (again, twice)):
        with Session(file, threads=1) as session:
            session.check_tokens(texts, [held.tokenizer(text)["input_ids"] for text in texts])


def test_an_encoder_answers_as_before(tiny_encoder: Path) -> None:
    network, texts = open_network(tiny_encoder, "tiny"), ["the film was not good", "the story , the plot"]
    kept = torch.tensor(sorted(components(network.tokenizer, {
        token for ids in network.tokenizer(texts)["input_ids"] for token in ids}
        | fixed_tokens(network.tokenizer, network.config))))
    fewer = encoder_with_tokens(network, kept)
    assert token_table(fewer).shape[0] == len(kept) < token_table(network).shape[0]
    for text in texts:
        before, after = (dict(each.tokenizer(text, return_tensors="pt")) for each in (network, fewer))
        torch.testing.assert_close(fewer.run(after), network.run(before))
