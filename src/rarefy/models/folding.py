"""Folding: a batch normalisation that follows a convolution or linear layer becomes part of it.

After training, normalisation is a fixed affine map of every channel, and so is what precedes it:

    W' = g / sqrt(v + e) W,        b' = g / sqrt(v + e) (b - m) + t,

with mean m, variance v, gain g and offset t. Weights are then rounded as they will be used; rounded before
folding, every channel's gain would stretch the rounding of another.

What follows what is seen, not read from names: the network runs once on an example, and a normalisation
whose input *is* the output of a layer belongs to it. A fold that changes the answers (because somebody else
looks at the layer's output too) is undone, and listed.

Paper: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 3.2, eq. 14.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rarefy.core.errors import ModelError
from rarefy.core.nodes import Dense, Masked, Node, Product, Quantized, Sum
from rarefy.models.hooks import hooked

Layer = nn.Linear | nn.Conv1d | nn.Conv2d
Norm = nn.BatchNorm1d | nn.BatchNorm2d
CLOSE = 1e-4  # by which answers may differ, relative to the largest


@dataclass(frozen=True, eq=False)
class Folded:
    """A copy of the network in eval mode; pairs (layer, normalisation) that were folded; normalisations that
    were not, and why."""

    module: nn.Module
    pairs: tuple[tuple[str, str], ...]
    left: Mapping[str, str]


def fold(module: nn.Module, *example: Tensor) -> Folded:
    """Fold every batch normalisation that can be. example: inputs of the network, two samples or more."""
    own = copy.deepcopy(module).eval().requires_grad_(False)
    names = {part: name for name, part in own.named_modules()}
    norms = [part for part in own.modules() if isinstance(part, Norm)]
    before, wanted = _followed(own, example)
    pairs, left = list[tuple[str, str]](), dict[str, str]()
    for norm in norms:
        layer = before.get(norm)
        if layer is None:
            left[names[norm]] = "its input is not the output of one convolution or linear layer"
        elif norm.running_mean is None or norm.running_var is None:
            left[names[norm]] = "it keeps no statistics: its answers depend on the batch"
        elif not _folded(own, names[layer], names[norm], example, wanted):
            left[names[norm]] = f"something else uses what {names[layer]} computes"
        else:
            pairs.append((names[layer], names[norm]))
    return Folded(own, tuple(pairs), left)


def _followed(module: nn.Module, example: tuple[Tensor, ...]) -> tuple[dict[nn.Module, nn.Module], Tensor]:
    """The layer before every normalisation that has one of its own, and the network's answer."""
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # tensors are kept, so that no identity comes twice
    before: dict[nn.Module, nn.Module | None] = {}
    calls: dict[nn.Module, int] = {}

    def layer_hook(part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        made[id(output)] = (part, output)
        calls[part] = calls.get(part, 0) + 1

    def norm_hook(part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found = made.get(id(inputs[0]))
        calls[part] = calls.get(part, 0) + 1
        before[part] = None if found is None else found[0]

    layers = [(part, layer_hook) for part in module.modules() if isinstance(part, Layer)]
    norms = [(part, norm_hook) for part in module.modules() if isinstance(part, Norm)]
    with hooked(layers, norms):
        answer = _answer(module, example)
    once = {part for part, count in calls.items() if count == 1}
    return {norm: layer for norm, layer in before.items()
            if layer is not None and layer in once and norm in once}, answer


def _folded(module: nn.Module, layer_name: str, norm_name: str, example: tuple[Tensor, ...],
            wanted: Tensor) -> bool:
    """Fold one pair in place; False, and nothing changed, if that moves the answers."""
    layer, norm = module.get_submodule(layer_name), module.get_submodule(norm_name)
    assert isinstance(layer, Layer) and isinstance(norm, Norm)
    _put(module, layer_name, merged(layer, norm))
    _put(module, norm_name, nn.Identity())
    moved = float((_answer(module, example) - wanted).abs().max())
    if moved <= CLOSE * max(1.0, float(wanted.abs().max())):
        return True
    _put(module, layer_name, layer)
    _put(module, norm_name, norm)
    return False


def gains(norm: Norm) -> Tensor:
    """What a normalisation in eval mode multiplies each channel by."""
    assert norm.running_var is not None
    own = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight.detach()
    return own / (norm.running_var + norm.eps).sqrt()


def merged(layer: Layer, norm: Norm) -> Layer:
    """A layer that computes what ``layer`` and then ``norm`` (in eval mode) compute."""
    mean = norm.running_mean
    assert mean is not None
    offset = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach()
    factor = gains(norm)
    bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.detach()
    done = copy.deepcopy(layer)
    weight = layer.weight.detach() * factor.view(-1, *[1] * (layer.weight.ndim - 1))
    done.weight = nn.Parameter(weight, requires_grad=False)
    done.bias = nn.Parameter((bias - mean) * factor + offset, requires_grad=False)
    return done


def folded_rows(tree: Node, factor: Tensor) -> Node:
    """``diag(factor) W``: scales of rows change, codes do not."""
    match tree:
        case Quantized(codes=codes, scale=scale, zero=zero, grid=grid):
            wide = replace(grid, scale=replace(grid.scale, bits=0, low=0, over=0, dtype=torch.float32))
            if zero is not None and grid.zero is not None and not grid.zero.relative:
                zero = Dense(zero.dense() * factor[:, None])
                wide = replace(wide, zero=replace(grid.zero, bits=0, low=0, over=0, dtype=torch.float32))
            return Quantized(codes, Dense(scale.dense() * factor[:, None]), zero, wide)
        case Masked(keep=keep, inner=inner):
            return Masked(keep, folded_rows(inner, factor))
        case Product(left=left, right=right):
            return Product(folded_rows(left, factor), right)
        case Sum(terms=terms):
            return Sum(tuple(folded_rows(term, factor) for term in terms))
        case _:
            return Dense(tree.dense() * factor[:, None])


def _answer(module: nn.Module, example: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        out = module(*example)
    if not isinstance(out, Tensor):
        raise ModelError(f"folding: the network returns a {type(out).__name__}; wrap it so that it returns "
                         "one tensor")
    return out


def _put(module: nn.Module, path: str, part: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, part)
