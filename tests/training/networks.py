"""Small networks for training: a convolutional one, an encoder that classifies texts of numbers."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from rarefy.models.network import Network
from rarefy.training.examples import Rows

WORDS, LENGTH = 40, 12


def encoder(seed: int = 0, **more: object) -> Network:
    config = BertConfig(**{"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 4,
                           "num_attention_heads": 4, "intermediate_size": 48, "num_labels": 3,
                           "max_position_embeddings": LENGTH, **more})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Network.from_module(BertForSequenceClassification(config), "tiny")


def texts(count: int = 96, seed: int = 0) -> Rows:
    """The label is the third of the vocabulary that most words are from."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    own = torch.randint(13, (count, LENGTH), generator=generator) + 1 + 13 * labels[:, None]
    other = torch.randint(1, WORDS, (count, LENGTH), generator=generator)
    words = torch.where(torch.rand(count, LENGTH, generator=generator) < 0.6, own, other)
    ends = torch.randint(5, LENGTH + 1, (count, 1), generator=generator)
    mask = (torch.arange(LENGTH) < ends).long()
    return Rows({"input_ids": words * mask, "attention_mask": mask, "labels": labels})


def convolutional() -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                               nn.Linear(8 * 36, 4))
    return Network.from_module(module, "convolutional")
