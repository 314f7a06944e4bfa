"""Codes as compressed-tensors stores them, which transformers and vLLM read.

    pack-quantized   weight_packed int32 [out, in * bits / 32], low bits first; weight_scale [out, groups];
                     weight_shape int64 [2]; weight_zero_point int32, packed down the rows
    int-quantized    weight int8 [out, in]; weight_scale [out, groups]

Codes are unsigned in the packed form; a missing zero point is the middle. A scheme says which of both, and is
what a group of the configuration describes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.formats.integers import Integers, packed


@dataclass(frozen=True)
class Scheme:
    """bits; group: columns under one scale (0: the row); symmetric: no zero points; activations: rounded to 8
    bits as they come, a token at a time (then codes are plain int8)."""

    bits: int
    group: int
    symmetric: bool = True
    activations: bool = False

    @property
    def format(self) -> str:
        """The name of the form."""
        return "int-quantized" if self.activations else "pack-quantized"

    def config(self, targets: list[str]) -> dict[str, Any]:
        """The group of the configuration for the modules ``targets``; no field that has a default."""
        weights: dict[str, Any] = {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric,
                                   "strategy": "group" if self.group else "channel"}
        if self.group:
            weights["group_size"] = self.group
        rounding = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        return {"targets": targets, "weights": weights, "format": self.format,
                **({"input_activations": rounding} if self.activations else {})}


def scheme_of(found: Integers, *, activations: bool) -> Scheme | None:
    """How these codes can be stored; None: zero points that are no codes, rows cut within a word."""
    rounded = activations and found.bits == 8 and found.symmetric and found.by_row
    if not found.whole or (found.codes.shape[1] * found.bits % 32 and not rounded):
        return None
    return Scheme(found.bits, 0 if found.by_row else found.group, found.symmetric, rounded)


def stored(found: Integers, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one module, by their names in it."""
    scale = found.scale.to(dtype)
    if scheme.activations:
        return {"weight": (found.codes ^ 128).view(torch.int8), "weight_scale": scale}
    tensors = {"weight_packed": _words(found.codes, found.bits), "weight_scale": scale,
               "weight_shape": torch.tensor(found.codes.shape)}
    if not scheme.symmetric:
        down = found.zero.to(torch.uint8).T.contiguous()
        tensors["weight_zero_point"] = _words(down, found.bits).T.contiguous()
    return tensors


def _words(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes in 32-bit words, the last one padded."""
    data = packed(codes, bits)
    padded = np.pad(data, ((0, 0), (0, -data.shape[1] % 4)))
    return torch.from_numpy(np.ascontiguousarray(padded).view("<i4").astype(np.int32))
