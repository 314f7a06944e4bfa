"""The form of a network: what it is called with, and how its answer is read.

A classifier answers with logits, one row per sample; any other network with one vector per sample, made of
the states of its tokens by pooling where it is an encoder of text. Two answers are compared as what they
are: distributions over classes, or directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.core.errors import ModelError

Takes = Literal["text", "images", "tensors"]
Gives = Literal["classes", "embedding"]
Pooling = Literal["", "mean", "cls", "max"]
MASK = "attention_mask"


@dataclass(frozen=True)
class Form:
    """What goes in and what comes out.

    takes: text (tokens by the names of transformers), images (``pixel_values``), or plain tensors (the first
    argument, or arguments by name). gives: classes (logits) or an embedding. pooling: how the states of
    tokens become one vector ("": the network gives one itself). length: tokens at most. labels: names of the
    classes, where they have names. loader: transformers' auto class that builds it ("": the user's own).
    """

    takes: Takes = "tensors"
    gives: Gives = "classes"
    pooling: Pooling = ""
    length: int = 0
    labels: tuple[str, ...] = ()
    loader: str = ""

    def answer(self, out: Any, inputs: Mapping[str, Tensor]) -> Float[Tensor, "samples _"]:
        """One row per sample, from whatever the network returned."""
        match out:
            case Tensor() as values:
                rows = values
            case {"logits": Tensor() as values}:
                rows = values
            case {"last_hidden_state": Tensor() as states}:
                rows = self._pooled(states, inputs.get(MASK))
            case [Tensor() as values, *_]:
                rows = values
            case _:
                raise ModelError(f"the network returns a {type(out).__name__}; wrap it so that it returns "
                                 "one tensor, [samples, ...]")
        if self.gives == "classes" and (rows.ndim != 2 or rows.shape[1] < 2):
            raise ModelError(f"the network returns a tensor of shape {list(rows.shape)}, which is no table "
                             "of logits [samples, classes]; pass gives='embedding' to compare its outputs "
                             "as vectors")
        return rows.flatten(1).float()

    def _pooled(self, states: Tensor, mask: Tensor | None) -> Tensor:
        if states.ndim != 3:  # feature maps
            return states.flatten(2).mean(2) if states.ndim > 3 else states
        real = states.new_ones(states.shape[:2]) if mask is None else mask.to(states.dtype)
        match self.pooling:
            case "cls":
                return states[:, 0]
            case "max":
                return states.masked_fill(real[..., None] == 0, -torch.inf).amax(1)
            case _:
                return (states * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp_min(1e-9)
