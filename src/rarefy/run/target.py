"""Where a compressed model goes: what the runtime there can store, the file it loads, the proof in it.

``to_llamacpp`` writes one GGUF file that llama.cpp runs; ``to_torch`` a native folder that keeps every tree,
run by PyTorch with the kernels that there are for it; ``to_onnx`` a traced graph with the codes in it, run by
ONNX Runtime or OpenVINO, and ``to_decoder`` the same for language models with their cache;
``to_transformers`` a checkpoint that transformers and vLLM read; ``to_integer`` a graph of integers alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rarefy.core.nodes import Node
from rarefy.core.nouns import Choice, Option, Step, Target
from rarefy.models.map import Site
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.planner.allocate import Plan
from rarefy.run.effort import Effort
from rarefy.run.progress import Stage
from rarefy.run.subject import Subject

Opened = Model | Network


@dataclass(frozen=True)
class Beside:
    """The export beside the original in the same runtime: speed, memory, answers, and how weights run."""

    speed: dict[str, Any]
    completions: list[dict[str, str]] = field(default_factory=list)
    lowered: dict[str, str] = field(default_factory=dict)


class Destination(Protocol):
    """One target."""

    target: Target

    def ready(self) -> None:
        """TargetError when the runtime is missing here."""
        ...

    def accepts(self, subject: Subject) -> None:
        """TargetError for a kind of network that the target does not run."""
        ...

    def given(self, subject: Subject, data: Any) -> Destination:
        """This target for a job whose examples are known: a graph is traced with some of them. TargetError
        when that cannot be done."""
        ...

    # ---- formats

    def choices(self, opened: Opened, site: Site) -> dict[str, Choice]:
        """Every format in which the target could store a site."""
        ...

    def held(self, opened: Opened, site: Site, option: Option) -> Option | None:
        """An option at the bytes that the target stores it in; None: it has no such form."""
        ...

    def untouched(self, opened: Opened, site: Site) -> Option:
        """A site that nothing is done to."""
        ...

    def asked(self, opened: Opened, site: Site, steps: Sequence[Step]) -> Option:
        """What a recipe's steps make of a site; RecipeError when the target cannot store it so."""
        ...

    def shown(self, option: Option, tree: Node | None) -> Option:
        """An option as it came out: its format in words and its exact bytes."""
        ...

    # ---- sizes

    def fixed_bytes(self, opened: Opened) -> int:
        """Bytes of the export that no choice of formats changes, as far as is known beforehand."""
        ...

    def original_bytes(self, opened: Opened) -> int:
        """Bytes of the uncompressed export, of which a budget may be a share."""
        ...

    def least_bytes(self, opened: Opened, site: Site) -> int:
        """The least that a site could take."""
        ...

    # ---- the export

    def place(self, folder: Path) -> Path:
        """Where the export of a job lies in its folder."""
        ...

    def export(self, opened: Opened, trees: Mapping[str, Node], plan: Plan, path: Path) -> None:
        """Write it, replacing an earlier one."""
        ...

    def reopened(self, subject: Subject, path: Path) -> Subject | None:
        """The export, read back as a subject of the same kind; None where it can only be run."""
        ...

    def prove(self, subject: Subject, path: Path, data: Any, effort: Effort, stage: Stage) -> dict[str, Any]:
        """``runtime`` of a receipt: the export in its runtime, against the original and against our own
        reading of it. TargetError when the latter two disagree."""
        ...

    def beside(self, subject: Subject, path: Path, data: Any, work: Path, effort: Effort, stage: Stage
               ) -> Beside:
        """Speed and answers of the export and of the original."""
        ...

    def how_to_run(self, out: Path) -> list[str]:
        """Commands to try it with."""
        ...
