"""Recurrent layers in 8-bit integers: torch's own kernel, which takes all steps in one call, with our codes.

Weights are ``scale * code``, one scale a row. What a step reads has one range for the whole batch, so answers
depend a little, by the last of 8 bits, on what they are batched with.

torch still carries these kernels, but not for good; where they are missing, codes are expanded as elsewhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rarefy.models.recurrent import Layer, Recurrent

WIDE = {"LSTM": 192, "GRU": 128}  # from this width on integers are faster (docs/benchmarks/recurrent.md)
Codes = tuple[Tensor, Tensor]  # [out, in] int8 and one scale a row


def runs_in_integers(part: Recurrent) -> bool:
    """Whether there is a kernel for such a layer here, and it is worth it."""
    return (torch.backends.quantized.engine in ("x86", "fbgemm") and not part.proj_size
            and hasattr(torch.ops.quantized, "make_quantized_cell_params_dynamic")
            and part.hidden_size >= WIDE.get(part.mode, part.hidden_size + 1))


class Int8Recurrent(nn.Module):
    """In the place of a recurrent layer. codes: by the name of the ``Linear`` in it."""

    def __init__(self, part: Recurrent, codes: Mapping[str, Codes]) -> None:
        super().__init__()
        self.mode, self.hidden_size, self.num_layers = part.mode, part.hidden_size, part.num_layers
        self.batch_first, self.bidirectional = part.batch_first, part.bidirectional
        self.input_size = part.input_size
        suffixes = ("", "_reverse") if part.bidirectional else ("",)
        self.cells = [_cell(layer, f"layers.{index}", suffix, codes)
                      for index, layer in enumerate(part.layers) for suffix in suffixes]

    def flatten_parameters(self) -> None:
        """Nothing: kept because networks call it."""

    def forward(self, x: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """As ``models.recurrent.Recurrent``."""
        match x:
            case PackedSequence():
                states = self._states(x.data, hx, int(x.batch_sizes[0]))
                if hx is not None and x.sorted_indices is not None:
                    states = [state.index_select(1, x.sorted_indices) for state in states]
                y, *last = self._called((x.data, x.batch_sizes), states)
                if x.unsorted_indices is not None:
                    last = [state.index_select(1, x.unsorted_indices) for state in last]
                out: Any = PackedSequence(y, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
            case _ if x.ndim == 2:
                axis = 0 if self.batch_first else 1
                given = None if hx is None else [each.unsqueeze(1) for each in _several(hx)]
                y, *last = self._called((x.unsqueeze(axis),), self._states(x, given, 1))
                out, last = y.squeeze(axis), [state.squeeze(1) for state in last]
            case _:
                batch = x.shape[0 if self.batch_first else 1]
                out, *last = self._called((x,), self._states(x, hx, batch))
        return out, tuple(last) if self.mode == "LSTM" else last[0]

    def _states(self, x: Tensor, hx: Any, batch: int) -> list[Tensor]:
        if hx is not None:
            return [state.contiguous() for state in _several(hx)]
        zeros = x.new_zeros(len(self.cells), batch, self.hidden_size)
        return [zeros, zeros] if self.mode == "LSTM" else [zeros]

    def _called(self, x: tuple[Tensor, ...], states: list[Tensor]) -> tuple[Tensor, ...]:
        settings: list[Any] = [self.cells, True, self.num_layers, 0.0, False, self.bidirectional]
        settings += [] if len(x) > 1 else [self.batch_first]
        found: tuple[Tensor, ...]
        if self.mode == "LSTM":
            found = torch.quantized_lstm(*x, states, *settings, dtype=torch.qint8, use_dynamic=True)
        else:
            found = torch.quantized_gru(*x, states[0], *settings)
        return found


def _several(hx: Any) -> list[Tensor]:
    return [hx] if isinstance(hx, Tensor) else list(hx)


def _cell(layer: nn.Module, name: str, suffix: str, codes: Mapping[str, Codes]) -> Any:
    """What the kernel wants of one direction of one layer."""
    assert isinstance(layer, Layer)
    ih, hh, _ = layer.linears(suffix)
    biases = [torch.zeros(each.out_features) if each.bias is None else each.bias.detach().float()
              for each in (ih, hh)]
    packed = [_packed(*codes[f"{name}.{kind}{suffix}"], bias)
              for kind, bias in zip(("ih", "hh"), biases, strict=True)]
    # without these instructions sums of products overflow 16 bits, and activations must have 7
    vnni = any(on for name, on in torch.cpu.get_capabilities().items() if "vnni" in name)
    return torch.ops.quantized.make_quantized_cell_params_dynamic(*packed, *biases, not vnni)


def _packed(codes: Tensor, scale: Tensor, bias: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its quantized tensors will go
        weight = torch._make_per_channel_quantized_tensor(
            codes.contiguous(), scale.double(), torch.zeros(len(scale), dtype=torch.int64), 0)
        return torch.ops.quantized.linear_prepack(weight, bias)
