"""Techniques of scope ``means``: biases moved so that channels come to what they came to before.

One pass for every bias, with calibration samples, behind those that were corrected; positions of padding do
not count. Networks that are no language models: those have normalizations without biases.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.calibration.examples import Examples
from rarefy.calibration.observe import BATCH, positions
from rarefy.core.errors import RecipeError
from rarefy.core.means import Correcting, Means
from rarefy.core.nodes import Node
from rarefy.core.nouns import Receipt
from rarefy.measure.task import divergences
from rarefy.models.form import MASK
from rarefy.models.hooks import hooked
from rarefy.models.network import Network

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True, eq=False)
class Corrected:
    """Biases by their paths (none: corrections would have done harm), and a receipt for each."""

    params: dict[str, Tensor]
    receipts: tuple[Receipt, ...]


@torch.no_grad()
def corrected(original: Network, network: Network, trees: Mapping[str, Node], technique: Correcting,
              examples: Examples, name: str) -> Corrected:
    """Biases of ``network``, whose weights are ``trees``, after ``technique``. name: for receipts.

    Modules that ``original`` does not have, or has with another width, stay as they are; RecipeError where
    no bias is left.
    """
    others = biased(original)
    places = {path: module for path, module in biased(network).items()
              if path in others and others[path].bias.shape == module.bias.shape}
    if not places:
        raise RecipeError(f"{name}: {network.name} has no bias that the original has, too; take the step out")
    examples = examples.by_length()
    started, order = time.perf_counter(), _order(network, places, examples)
    wanted = _means(original, {path: others[path] for path in order}, examples, {})
    tensors, params, receipts = network.tensors(trees.get), dict[str, Tensor](), []
    for path in order:
        bias = network.param(path)
        found = _means(network, {path: places[path]}, examples, {**tensors, **params})[path]
        params[path] = technique.corrected(Means(path, bias, wanted[path], found))
        apart = float((wanted[path] - found).norm() / wanted[path].norm().clamp_min(1e-12))
        seconds, started = time.perf_counter() - started, time.perf_counter()
        receipts.append(Receipt(path, name, bias.numel() * 32, bias.numel() * 32, float("nan"), seconds,
                                note=f"its mean was {apart:.2%} off"))
    before, after = (_distance(original, network, {**tensors, **more}, examples) for more in ({}, params))
    return Corrected(params, tuple(receipts)) if after < before else Corrected({}, ())


def biased(network: Network) -> dict[str, nn.Module]:
    """The modules whose mean a bias of their own can move, by the path of the bias."""
    own, found = {param.path for param in network.map.params}, dict[str, nn.Module]()
    for name, module in network.module.named_modules():
        bias, path = module._parameters.get("bias"), f"{name}.bias" if name else "bias"
        if isinstance(module, NORMS + LAYERS) and bias is not None and bias.ndim == 1 and path in own:
            found[path] = module
    return found


def _order(network: Network, places: Mapping[str, nn.Module], examples: Examples) -> list[str]:
    """The biases to correct, in the order in which one sample meets them: of normalizations, where several
    layers come together, and of the layers behind the last one."""
    met: dict[str, nn.Module] = {}

    def meet(path: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        met.setdefault(path, module)

    with hooked((module, partial(meet, path)) for path, module in places.items()):
        network.run(next(examples.batches(1)))
    last = max((place for place, module in enumerate(met.values()) if isinstance(module, NORMS)), default=-1)
    return [path for place, (path, module) in enumerate(met.items())
            if isinstance(module, NORMS) or place > last]


def _means(network: Network, places: Mapping[str, nn.Module], examples: Examples,
           tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean of every module's output over samples and real positions, [channels]."""
    sums, counts = dict[str, Tensor](), dict.fromkeys(places, 0)
    mask: Tensor | None = None

    def add(path: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        rows = positions(_channels_last(module, output), mask)
        sums[path] = sums.get(path, 0.0) + rows.sum(0, dtype=torch.float64)
        counts[path] += len(rows)

    with hooked((module, partial(add, path)) for path, module in places.items()):
        for batch in examples.batches(BATCH):
            mask = batch.get(MASK)
            network.run(batch, tensors)
    return {path: (total / counts[path]).float() for path, total in sums.items()}


def _distance(original: Network, network: Network, tensors: Mapping[str, Tensor], examples: Examples
              ) -> float:
    """How far the answers to calibration samples are from the original's: KL, or 1 - cosine."""
    parts = [divergences(original.run(batch), network.run(batch, tensors), network.form)
             for batch in examples.batches(BATCH)]
    return float(torch.cat(parts).mean())


def _channels_last(module: nn.Module, output: Tensor) -> Tensor:
    """An output with its channels behind its positions."""
    if isinstance(module, nn.Linear):
        return output
    if isinstance(module, nn.LayerNorm) and getattr(module, "data_format", "") != "channels_first":
        return output
    return output.movedim(1, -1)
