"""A network in integers, and the interpreter that runs it: one step after another, no floats anywhere.

Floats exist at its two ends alone: ``codes`` is what a camera or microphone would deliver, ``answers`` says
what the last codes stand for. Texts arrive as integers anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rarefy.runtimes.integer.steps import Attention, Code, Convolution, Linear, Made, Step


@dataclass(frozen=True, eq=False)
class IntegerNetwork:
    """inputs: names, in the network's order. codes_of: what the codes of each value stand for. constants:
    whole numbers that steps read (positions). answer: the value that is the answer. key: what the network
    calls it. trained: values whose codes training found."""

    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    codes_of: Mapping[str, Code]
    constants: Mapping[str, Tensor]
    answer: str
    key: str
    trained: frozenset[str] = frozenset()

    def codes(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs as integers, by the names of the steps."""
        given = dict(zip(self.inputs, inputs.values(), strict=True))
        return {name: self.codes_of[name].of(values) if values.is_floating_point() else values
                for name, values in given.items()}

    def run(self, codes: Mapping[str, Tensor]) -> Tensor:
        """The codes of the answer."""
        found: Tensor = self.values(codes)[self.answer]
        return found

    def values(self, codes: Mapping[str, Tensor]) -> dict[str, Any]:
        """Every value on the way, by name."""
        held: dict[str, Any] = {**self.constants, **codes}
        for step in self.steps:
            held[step.name] = step.compute(*(held[name] for name in step.reads))
        return held

    def answers(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the codes of the answer stand for."""
        return self.codes_of[self.answer].values(self.run(self.codes(inputs)))

    def places(self) -> tuple[int, int]:
        """How many values multiplications read in codes that training found, and how many in calibrated
        ones."""
        read = {name for step in self.steps if isinstance(step, Linear | Convolution | Attention)
                for name in step.reads if name in self.codes_of}
        return len(read & self.trained), len(read - self.trained)

    def makers(self) -> dict[str, Made]:
        """The steps whose results are codes, by name."""
        return {step.name: step for step in self.steps if isinstance(step, Made)}
