"""Fewer tokens: those that a text uses, and what must stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rarefy.core.errors import DataError, EditError, RecipeError
from rarefy.core.nouns import Step
from rarefy.core.structure import Tokens
from rarefy.export.native import export_native, open_native
from rarefy.export.networks import export_network, opened
from rarefy.models.model import Model, open_model
from rarefy.models.narrowed import token_table
from rarefy.models.network import Network
from rarefy.models.opening import open_network
from rarefy.run.job import Job, compress, evaluate
from rarefy.run.progress import Silent
from rarefy.run.trim import trimmed
from rarefy.techniques.prune.vocabulary import Vocabulary

TEXT = "The with statement wraps the execution of a block.\nNames refer to objects.\n"


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def step(**settings: object) -> Step:
    return Step("vocabulary", settings=settings)


def test_the_tokens_of_a_text_stay(tiny_llama: Path, text: str, tmp_path: Path) -> None:
    model = open_model(tiny_llama)
    done = trimmed(model, (step(text=[text]), Step("drop")), ())
    fewer, (receipt,) = done.opened, done.receipts
    assert isinstance(fewer, Model)
    assert fewer.config.vocab_size < model.config.vocab_size
    for line in TEXT.splitlines():
        assert fewer.tokenizer.tokenize(line) == model.tokenizer.tokenize(line)
    assert receipt.bits_before - receipt.bits_after == 16 * (model.parameters - fewer.parameters)
    assert "100.00% of the text's stay" in receipt.note
    export_native(fewer, {}, tmp_path / "native")
    again = open_native(tmp_path / "native")
    assert again.tokenizer(TEXT)["input_ids"] == fewer.tokenizer(TEXT)["input_ids"]


def test_of_an_encoder_too(tiny_encoder: Path, tmp_path: Path) -> None:
    network = open_network(tiny_encoder, "tiny")
    fewer = trimmed(network, (step(),), (str(tiny_encoder / "dev.tsv"),)).opened
    assert isinstance(fewer, Network)
    assert token_table(fewer).shape[0] < token_table(network).shape[0]
    export_network(fewer, {}, tmp_path / "native")
    again = opened(tmp_path / "native")
    assert isinstance(again, Network)
    line = (tiny_encoder / "dev.tsv").read_text().splitlines()[3].split("\t")[0]
    before, after = (dict(each.tokenizer(line, return_tensors="pt")) for each in (network, again))
    torch.testing.assert_close(again.run(after), network.run(before))


def test_the_most_frequent_stay() -> None:
    tokens = Tokens("embed", torch.tensor([0, 5, 1, 9, 3]), torch.tensor([True, *[False] * 4]))
    assert Vocabulary().keep(tokens).tolist() == [0, 1, 2, 3, 4]
    assert Vocabulary(least=2).keep(tokens).tolist() == [0, 1, 3, 4]
    assert Vocabulary(most=1).keep(tokens).tolist() == [0, 3]
    with pytest.raises(EditError, match="no token occurs 10 times"):
        Vocabulary(least=10).keep(tokens)
    with pytest.raises(RecipeError, match="least must be 1 or more"):
        Vocabulary(least=0)


def test_what_cannot_be_done(tiny_llama: Path, tiny_cnn: object, text: str) -> None:
    model = open_model(tiny_llama)
    with pytest.raises(DataError, match="which tokens are used must be seen"):
        trimmed(model, (step(),), ())
    with pytest.raises(RecipeError, match="must be the first step"):
        trimmed(model, (Step("drop"), step(text=[text])), ())
    with pytest.raises(EditError, match="the text uses all"):
        trimmed(model, (step(text=["python-docs"]),), ())


@pytest.mark.filterwarnings("ignore:.*already quantized")
def test_a_job_keeps_the_vocabulary_of_a_text(tiny_llama: Path, tmp_path: Path) -> None:
    """The budget is a share of the whole original; the file is judged by the tokens it has."""
    from pydoc_data.topics import topics

    text = tmp_path / "text.txt"
    text.write_text("\n".join(topics[key] for key in sorted(topics)[:30]).translate(
        {ord(letter): "" for letter in "jqxzJQXZ"}))
    result = compress(Job(str(tiny_llama), tmp_path / "out", to="30%", effort="quick", data=(str(text),),
                          keep_vocabulary=(str(text),)), Silent())
    receipt, model = result.receipt, open_model(result.exported, dequantize=True)
    assert model.config.vocab_size < 512
    assert receipt["model"]["parameters"] == open_model(tiny_llama).parameters > model.parameters
    assert receipt["bytes"] <= receipt["budget"]["limit_bytes"] < 0.31 * receipt["model"]["original_bytes"]
    assert "tokens left out" in receipt["axes"][0]["note"]
    assert "technique: vocabulary" in (result.out / "recipe.yaml").read_text()
    assert receipt["measured"]["float"]["kl_mean"] < 0.5
    found = evaluate(result.out, str(tiny_llama), Silent(), eval_data=(str(text),), effort="quick")
    assert found["measured"]["float"]["kl_mean"] < 0.5
