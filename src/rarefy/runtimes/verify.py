"""Is the file what its trees say? Reload it in a fresh process and compare with our own evaluation.

For each sample the error is relative to the answer's own size,

    error = |found - expected| / |expected|         (root of the sums of squares),

and the largest must lie below a bound: 0.001 where everything is computed in floats, 0.03 where activations
are rounded to 8 bits, because a last bit that a different order of sums flips moves a value by a whole code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rarefy.core.errors import TargetError
from rarefy.export.onnx import Exported
from rarefy.models.network import call
from rarefy.runtimes.session import Session

FLOAT, ROUNDED = 1e-3, 0.03


@dataclass(frozen=True)
class Agreement:
    """How far a runtime's answers are from ours. error: the largest over samples; cosine: the smallest."""

    samples: int
    error: float
    cosine: float
    bound: float
    runtime: str

    @classmethod
    def of(cls, found: Tensor, expected: Tensor, bound: float, runtime: str) -> Agreement:
        """Compare answers [samples, ...]."""
        if found.shape != expected.shape:
            raise TargetError(f"{runtime} answers with the shape {list(found.shape)}, not "
                              f"{list(expected.shape)}; the export is wrong")
        a, b = found.double().flatten(1), expected.double().flatten(1)
        error = (a - b).norm(dim=1) / b.norm(dim=1).clamp_min(1e-30)
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=1)
        worst = float("inf") if not bool(torch.isfinite(a).all()) else float(error.max())
        return cls(len(a), worst, float(cosine.min()), bound, runtime)

    def check(self, path: Path) -> Agreement:
        """This, or a TargetError when the bound is missed."""
        if not self.error <= self.bound:
            raise TargetError(f"{path}: {self.runtime} answers otherwise than its own weights say: relative "
                              f"error {self.error:.3g}, allowed {self.bound:.3g}; the file is not to be used")
        return self


def bound_of(exported: Exported) -> float:
    """How far an intact file may be from our evaluation."""
    rounded = exported.settings.compute != "float" or exported.settings.accuracy == 4
    return ROUNDED if rounded else FLOAT


def verify(exported: Exported, batches: Iterable[Mapping[str, Tensor]], *, engine: str = "onnxruntime",
           module: nn.Module | None = None, tolerance: float | None = None) -> Agreement:
    """Compare an exported file with what its trees should answer; TargetError when they are too far apart.

    batches: inputs, best of other lengths and padding than the example that was traced. module: the network
    itself, to be compared with the traced program as well.
    """
    bound = bound_of(exported) if tolerance is None else tolerance
    worst: list[Agreement] = []
    with Session(exported.path, engine) as session:
        for inputs in batches:
            found = Agreement.of(session.answer(inputs), exported.expected(inputs), bound, session.version)
            worst.append(found.check(exported.path))
            if module is not None:
                _check_program(exported, module, inputs)
    if not worst:
        raise TargetError(f"{exported.path}: cannot be verified without inputs; pass at least one batch")
    return Agreement(sum(each.samples for each in worst), max(each.error for each in worst),
                     min(each.cosine for each in worst), bound, worst[0].runtime)


def _check_program(exported: Exported, module: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Tracing itself: the program and the network, both with the weights of the trees, in floats."""
    tensors = {**exported.program.tensors(exported.trees), **dict(exported.params or {})}
    with torch.no_grad():
        out = call(module, inputs, tensors)
    direct = out if isinstance(out, Tensor) else next(
        each for each in (out.values() if isinstance(out, Mapping) else out) if isinstance(each, Tensor))
    traced = exported.program.run(inputs, tensors)
    Agreement.of(traced, direct, FLOAT, "the traced program").check(exported.path)
