"""Fake quantization: the network in floats, each value rounded where integers hold it in 8 bits.

It knows no fixed-point factors, no polynomials and no sums of 32 bits. So it says what rounding to 8 bits
does to the answers, and how far integers are from it says what the rest of their arithmetic does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rarefy.core.nodes import Node
from rarefy.export.program import Program, Values
from rarefy.runtimes.integer.network import IntegerNetwork


class Fake:
    """What ``network``, compiled from ``program`` and ``trees``, would answer in floats."""

    def __init__(self, network: IntegerNetwork, program: Program, trees: Mapping[str, Node]) -> None:
        self.program, self.tensors = program, program.tensors(trees)
        self.eight = {name: code for name, code in network.codes_of.items() if code.dtype == torch.uint8}
        self.reads = readers(network, program)

    def answers(self, inputs: Values) -> Tensor:
        """The answer, float32."""
        return self.program.run(inputs, self.tensors, value=self._rounded,
                                argument=lambda name, values: self._rounded(self.reads[name], values))

    def _rounded(self, name: str, values: Tensor) -> Tensor:
        return self.eight[name].values(self.eight[name].of(values)) if name in self.eight else values


def readers(network: IntegerNetwork, program: Program) -> dict[str, str]:
    """What the step of each operator reads, "" for those without one; a Relu that a layer swallowed gives
    the step its name."""
    steps = {step.name: step.reads[0] for step in network.steps if step.reads}
    found = {}
    for op in program.exported.graph.nodes:
        names = [op.name, *(user.name for user in op.users)]
        found[op.name] = next((steps[name] for name in names if name in steps), "")
    return found
