"""Tiny networks that were really trained: one that judges sentences, others that read digits.

``tiny_encoder`` is a folder in the layout of Hugging Face: a BERT of two layers with a classification head,
and beside it ``train.tsv`` and ``dev.tsv``, sentences of a made-up language of praise and complaint whose
label takes two words together (``not`` turns the word behind it). ``tiny_cnn`` is a plain torch module
with ordinary, depthwise and pointwise convolutions, trained on the digits that come with scikit-learn;
``tiny_lstm`` and ``tiny_gru`` read the same digits row by row.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

GOOD = ("good", "bright", "warm", "moving", "sharp", "funny")
BAD = ("bad", "dull", "cold", "empty", "flat", "slow")
THINGS = ("story", "film", "music", "acting", "ending", "dialogue", "camera", "plot")


# ---- an encoder ----------------------------------------------------------------------------------------


def sentences(count: int, seed: int) -> list[tuple[str, int]]:
    """Different sentences with their labels: one judgement among things that are merely there."""
    draw, found = random.Random(seed), dict[str, int]()
    while len(found) < count:
        good, negated = draw.random() < 0.5, draw.random() < 0.3
        word = draw.choice(GOOD if good else BAD)
        judged = ["the", draw.choice(THINGS), *(["not"] if negated else []), word]
        idle = [["the", draw.choice(THINGS)] for _ in range(draw.choice((0, 1, 2)))]
        parts = [*idle, judged]
        draw.shuffle(parts)
        found[" , ".join(" ".join(part) for part in parts)] = int(good != negated)
    return list(found.items())


def write_tsv(path: Path, rows: list[tuple[str, int]]) -> None:
    path.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))


@pytest.fixture(scope="session")
def tiny_encoder(cached: Callable[..., Path], tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A trained BERT classifier of sentences, with train.tsv and dev.tsv beside it."""
    return cached("tiny_encoder", lambda folder: _train_encoder(folder, tiny_tokenizer))


def _train_encoder(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = sentences(1000, seed=0)
    train, dev = rows[:800], rows[800:]
    batch = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt",
                      return_token_type_ids=False)
    labels = torch.tensor([label for _, label in rows])
    config = AutoConfig.for_model("bert", vocab_size=512, hidden_size=64, intermediate_size=128,
                                  num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
                                  pad_token_id=2, num_labels=2, initializer_range=0.1,
                                  hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).train()
    generator = torch.Generator().manual_seed(0)

    def logits(index: Tensor) -> Tensor:
        return network(**{name: values[index] for name, values in batch.items()}).logits

    _fit(network, 180, lambda: (index := torch.randint(0, 800, (32,), generator=generator),
                                nn.functional.cross_entropy(logits(index), labels[index]))[1])
    network.eval()
    with torch.no_grad():
        right = (logits(torch.arange(800, 1000)).argmax(1) == labels[800:]).float().mean()
    assert right > 0.9, f"the tiny encoder did not learn: accuracy {right:.2f}"
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_tsv(folder / "train.tsv", train)
    write_tsv(folder / "dev.tsv", dev)


# ---- a CNN ---------------------------------------------------------------------------------------------


class TinyCNN(nn.Module):
    """Ordinary, depthwise and pointwise convolutions with BatchNorm, then a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16),
                                  nn.ReLU(inplace=True))
        self.conv = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.pointwise = nn.Conv2d(32, 32, 1)
        self.fc = nn.Linear(32 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x))
        x = x + torch.relu(self.pointwise(self.depthwise(x)))
        return self.fc(x.flatten(1))


@dataclass(frozen=True, eq=False)
class Digits:
    """A trained network with the images and labels it was trained and judged on."""

    module: Any
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@pytest.fixture(scope="session")
def tiny_cnn(cached: Callable[..., Path]) -> Digits:
    """A CNN trained on the digits of scikit-learn, [N, 1, 8, 8] in 0..1."""
    return _digits(cached, "tiny_cnn", TinyCNN, 150)


def _digits(cached: Callable[..., Path], name: str, build: Callable[[], nn.Module], steps: int,
            rate: float = 3e-3) -> Digits:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    def train(place: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            fresh = build()
        _train_digits(place, fresh, steps, rate, x, y)

    folder = cached(name, train)
    module = build()
    module.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return Digits(module.eval(), (x[:1297], y[:1297]), (x[1297:], y[1297:]))


def _train_digits(folder: Path, module: nn.Module, steps: int, rate: float, x: Tensor, y: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    _fit(module.train(), steps, lambda: (index := torch.randint(0, 1297, (64,), generator=generator),
                                         nn.functional.cross_entropy(module(x[index]), y[index]))[1], rate)
    with torch.no_grad():
        right = (module.eval()(x[1297:]).argmax(1) == y[1297:]).float().mean()
    assert right > 0.9, f"{type(module).__name__} did not learn: accuracy {right:.2f}"
    torch.save(module.state_dict(), folder / "weights.pt")


# ---- recurrent networks --------------------------------------------------------------------------------


class TinyRNN(nn.Module):
    """Three recurrent layers that read an image row by row, then a linear head."""

    def __init__(self, kind: str = "LSTM") -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(8, 32, 3, batch_first=True)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x.squeeze(1))[0][:, -1])


@pytest.fixture(scope="session")
def tiny_lstm(cached: Callable[..., Path]) -> Digits:
    """An LSTM trained on the same digits."""
    return _digits(cached, "tiny_lstm", TinyRNN, 500, 1e-2)


@pytest.fixture(scope="session")
def tiny_gru(cached: Callable[..., Path]) -> Digits:
    """The same with a GRU."""
    return _digits(cached, "tiny_gru", partial(TinyRNN, "GRU"), 300, 1e-2)


def _fit(module: Any, steps: int, loss: Callable[[], Tensor], rate: float = 3e-3) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
