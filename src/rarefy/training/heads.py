"""A new head on an encoder: for people who arrive with labelled data and a model that has no classes yet.

The encoder is put below transformers' own classification head of its family, so that the result is an
ordinary folder; the head, and the pooler where the encoder came without one, start at random from the seed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from rarefy.core.errors import ModelError
from rarefy.models.network import Network
from rarefy.models.opening import CLASSES, form_of_config, network_class
from rarefy.models.sources import ModuleSource


def with_head(network: Network, labels: tuple[str, ...], seed: int) -> tuple[Network, tuple[str, ...]]:
    """``network`` as a classifier of ``labels``, and globs over the paths of what is new in it."""
    if network.config is None or network.form.takes != "text":
        raise ModelError(f"{network.name}: has no classes, and a head can only be put on encoders of text; "
                         "pass a classifier")
    config = copy.deepcopy(network.config)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: k for k, label in enumerate(labels)}
    kind: Any = network_class(config, CLASSES)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = kind(config)
    body = module.base_model_prefix
    state = {f"{body}.{name}": values for name, values in network.module.state_dict().items()}
    done = module.load_state_dict(state, strict=False)
    if done.unexpected_keys:
        raise ModelError(f"{network.name}: {done.unexpected_keys[0]} has no place under a classification "
                         "head; pass a classifier")
    form = form_of_config(config, kind.__name__)
    module = module.float().eval().requires_grad_(False)
    found = Network(network.name, module, ModuleSource(module), form, config=config, files=network.files,
                    tokenizer=lambda: network.tokenizer)
    return found, tuple(sorted(done.missing_keys))
