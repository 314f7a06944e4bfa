"""The target llama.cpp: one GGUF file, proven in the runtime itself."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rarefy.core.errors import RecipeError, TargetError
from rarefy.core.nodes import Node
from rarefy.core.nouns import Choice, Option, Step
from rarefy.export.gguf import (
    LLAMA_CPP,
    export_gguf,
    fixed_bytes,
    gguf_bytes,
    held,
    loadable,
    site_bytes,
)
from rarefy.formats.ggml import CODECS
from rarefy.models.map import Site
from rarefy.models.model import Model, open_model
from rarefy.planner.allocate import Plan
from rarefy.run import proof
from rarefy.run.effort import Effort
from rarefy.run.language import Language
from rarefy.run.planning import build
from rarefy.run.progress import Stage
from rarefy.run.subject import Subject
from rarefy.run.target import Beside, Destination, Opened
from rarefy.runtimes.llamacpp import runtime

PLAIN = "F16"


class LlamaCpp:
    """GGUF files."""

    target = LLAMA_CPP

    def ready(self) -> None:
        runtime()

    def accepts(self, subject: Subject) -> None:
        _model(subject.opened)

    def given(self, subject: Subject, data: Any) -> Destination:
        return self

    # ---- formats

    def choices(self, opened: Opened, site: Site) -> dict[str, Choice]:
        stored = held(_model(opened), site)
        return {name: Choice(CODECS[name].grid or CODECS[name].dtype, site_bytes(stored, name))
                for name in loadable(_model(opened), site)}

    def held(self, opened: Opened, site: Site, option: Option) -> Option | None:
        return option

    def untouched(self, opened: Opened, site: Site) -> Option:
        return self.asked(opened, site, ())

    def asked(self, opened: Opened, site: Site, steps: Sequence[Step]) -> Option:
        chain = tuple(steps) or (Step("cast", (site.path,), {"dtype": "float16"}, PLAIN),)
        name = next((step.format for step in reversed(chain) if step.format), "")
        fitting = loadable(_model(opened), site)
        if not name:
            raise RecipeError(f"{site.path}: no step says in which format llama.cpp is to store it; add "
                              f"`format:` to the last step, one of {', '.join(fitting)}")
        if name not in fitting:
            raise RecipeError(f"{site.path}: format {name!r} cannot store rows of {site.shape[1]} weights; "
                              f"choose one of {', '.join(fitting)}")
        if any(map(_prunes, chain)) and not _stores_zeros(name):
            raise RecipeError(f"{site.path}: {name} has no code for zero, so it cannot store what is pruned: "
                              f"choose one of {', '.join(filter(_stores_zeros, fitting))}")
        return Option(site.path, name, site_bytes(held(_model(opened), site), name), float("nan"), chain)

    def shown(self, option: Option, tree: Node | None) -> Option:
        return option

    # ---- sizes

    def fixed_bytes(self, opened: Opened) -> int:
        return fixed_bytes(_model(opened))

    def original_bytes(self, opened: Opened) -> int:
        """Matrices in F16, the rest in F32."""
        model = _model(opened)
        return gguf_bytes(model, {site.path: PLAIN for site in model.map.sites})

    def least_bytes(self, opened: Opened, site: Site) -> int:
        return min(choice.bytes for choice in self.choices(opened, site).values())

    # ---- the export

    def place(self, folder: Path) -> Path:
        return folder / f"model{LLAMA_CPP.suffix}"

    def export(self, opened: Opened, trees: Mapping[str, Node], plan: Plan, path: Path) -> None:
        export_gguf(_model(opened), trees, {site: option.format for site, option in plan.items()}, path)

    def reopened(self, subject: Subject, path: Path) -> Subject:
        with warnings.catch_warnings():  # that its weights are quantized is no news here
            warnings.filterwarnings("ignore", message=".*already quantized.*")
            return Language(open_model(path, dequantize=True))

    def prove(self, subject: Subject, path: Path, data: Any, effort: Effort, stage: Stage) -> dict[str, Any]:
        model = _model(subject.opened)
        proof.tokens_agree(model, path)
        return proof.in_runtime(model, path, data.evaluation, *effort.positions, stage)

    def beside(self, subject: Subject, path: Path, data: Any, work: Path, effort: Effort, stage: Stage
               ) -> Beside:
        """The original as F16."""
        model, original = _model(subject.opened), work / "original.gguf"
        stage.line("the original as F16")
        export_gguf(model, {}, {site.path: PLAIN for site in model.map.sites}, original)
        found = Beside(proof.speeds(original, path, effort.repeats), proof.completions(original, path))
        original.unlink()
        return found

    def how_to_run(self, out: Path) -> list[str]:
        return [f"llama-cli -m {self.place(out)}", f"rarefy chat {out}"]


def _prunes(step: Step) -> bool:
    return ".prune." in type(build(step)).__module__


def _stores_zeros(name: str) -> bool:
    grid = CODECS[name].grid
    return grid is None or (grid.zero is None and 0.0 in grid.levels)


def _model(opened: Opened) -> Model:
    if isinstance(opened, Model):
        return opened
    raise TargetError(f"{opened.name}: llama.cpp runs causal language models, and this is none; "
                      "pass --for torch")
