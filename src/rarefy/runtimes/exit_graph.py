"""A classifier with exits as one ONNX file: every sample leaves where it is sure, in any ONNX runtime.

    file = export_exits(exits, trees, "model.onnx", inputs=example)
    file.verify(batches)        logits [samples, classes] and blocks [samples] are what the exits say

Network and heads are traced together, with every exit computed; the weights become what their trees are
(``export.onnx``), and then the graph is cut into branches (``export.branches``). The threshold is the one
that was calibrated, and it is in the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.calibration.examples import PIXELS
from rarefy.core.errors import TargetError
from rarefy.core.nodes import Node
from rarefy.core.structure import ExitAnswers
from rarefy.export.branches import Door, nested
from rarefy.export.onnx import Exported, OnnxSettings, export_onnx
from rarefy.export.program import Values, trace
from rarefy.formats.onnx import onnx_package
from rarefy.models.form import MASK
from rarefy.models.network import TENSOR
from rarefy.runtimes.exits import Exits
from rarefy.runtimes.session import Session
from rarefy.runtimes.verify import Agreement, bound_of

ANSWER, DEPTH = "logits", "blocks"
INSIDE = "network."  # what the wrapper puts before the paths of weights
BORDER = 0.02        # share of samples so near the threshold that arithmetic sends them to another exit


class Flat(nn.Module):
    """The network's logits, then the logits of every exit, then who is sure there. Takes one tensor."""

    def __init__(self, exits: Exits) -> None:
        super().__init__()
        self.exits, self.network, self.heads = exits, exits.stepped.network.module, exits.heads

    def forward(self, values: Tensor) -> tuple[Tensor, ...]:
        """Every block and every exit, whoever is sure."""
        return self.all({TENSOR: values})

    def all(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The same of inputs by name."""
        exits, said, sure = self.exits, list[Tensor](), list[Tensor]()
        answer, read = exits.stepped.taught(self._called, inputs, exits.after)
        for place, numbers in enumerate(read):
            said.append(self.heads(place, numbers))
            certain = exits.technique.certainty(torch.stack(said), len(exits.after) + 1)
            sure.append(certain >= exits.rule.threshold)
        return (answer, *said, *sure)

    def _called(self, inputs: Mapping[str, Tensor]) -> Any:
        named = {name: values for name, values in inputs.items() if name != TENSOR}
        return self.network(*[inputs[name] for name in inputs if name == TENSOR], **named)


class FlatText(Flat):
    """The same of an encoder of text."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                token_type_ids: Tensor | None = None) -> tuple[Tensor, ...]:
        """Every block and every exit, whoever is sure."""
        given = {"input_ids": input_ids, MASK: attention_mask, "token_type_ids": token_type_ids}
        return self.all({name: values for name, values in given.items() if values is not None})


class FlatImages(Flat):
    """The same of a network of transformers for images."""

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Every block and every exit, whoever is sure."""
        return self.all({PIXELS: pixel_values})


FLAT: dict[str, type[Flat]] = {"text": FlatText, "images": FlatImages, "tensors": Flat}


@dataclass(frozen=True, eq=False)
class ExitFile:
    """A file that was written, and the exits that it is to answer like. flat: the graph before it was cut
    into branches."""

    path: Path
    bytes: int
    exits: Exits
    flat: Exported

    def expected(self, inputs: Values) -> tuple[Tensor, Tensor]:
        """Logits and blocks by our own evaluation of the same trees, activations rounded where the file
        rounds them."""
        program, after = self.flat.program, self.exits.after
        values = [*(program.others[f"answer{place}"] for place in range(len(after))), program.answer]
        logits = torch.stack([replace(self.flat, program=replace(program, answer=value)).expected(inputs)
                              for value in values])
        leaves = self.exits.technique.leaves(ExitAnswers(logits, None), self.exits.rule.threshold)
        depths = torch.tensor([*(block + 1 for block in after), len(self.exits.stepped.blocks)])
        return logits[leaves, torch.arange(len(leaves))], depths[leaves]

    def verify(self, batches: Iterable[Values]) -> Agreement:
        """The runtime, in a fresh process, against ``expected``: nearly all samples leave at the same exit,
        and those have the same logits. TargetError else."""
        found, expected, depths = [], [], []
        with Session(self.path, "onnxruntime") as session:
            for inputs in batches:
                told, (logits, blocks) = session.run(inputs), self.expected(inputs)
                found.append(torch.from_numpy(told[ANSWER].copy()))
                expected.append(logits)
                depths.append(torch.stack([torch.from_numpy(told[DEPTH].copy()), blocks]))
            version = session.version
        together = torch.cat(depths, 1)
        same = together[0] == together[1]
        apart = float((~same).double().mean())
        if apart > BORDER:
            raise TargetError(f"{self.path}: {version} lets {apart:.1%} of the samples leave elsewhere than "
                              f"the exits say (allowed {BORDER:.0%}); the file is not to be used")
        agreed = Agreement.of(torch.cat(found)[same], torch.cat(expected)[same], bound_of(self.flat), version)
        return agreed.check(self.path)


def export_exits(exits: Exits, trees: Mapping[str, Node], path: Path | str, *, inputs: Values,
                 settings: OnnxSettings | None = None, calibration: Sequence[Values] = ()) -> ExitFile:
    """Write a network with exits for ONNX Runtime.

    trees: what to store for each site of the network; a site without one is stored as it is, heads are
    float32. inputs: an example. settings, calibration: as of ``export_onnx``.
    """
    onnx, path, settings = onnx_package(), Path(path), settings or OnnxSettings()
    kind = FLAT[exits.stepped.network.form.takes]
    flat, after = kind(exits).eval().requires_grad_(False), exits.after
    program = trace(flat, inputs, (0, 1) if MASK in inputs else (0,))
    values = [each.name for each in program.proto.graph.output]
    names = [f"{kind}{place}" for kind in ("answer", "sure") for place in range(len(after))]
    program = replace(program, key=ANSWER, others=dict(zip(names, values[1:], strict=True)))
    done = export_onnx(flat, {INSIDE + site: tree for site, tree in trees.items()}, path, inputs=inputs,
                       settings=settings, calibration=calibration, program=program)
    doors = [Door(f"answer{place}", f"sure{place}", block + 1) for place, block in enumerate(after)]
    proto = nested(onnx.load(done.path), doors, ANSWER, len(exits.stepped.blocks), DEPTH)
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString())
    return ExitFile(path, path.stat().st_size, exits, done)
