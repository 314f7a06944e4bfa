"""From what the user named to a subject and a destination."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from rarefy.core.errors import ModelError, OutputError, TargetError, did_you_mean
from rarefy.core.nodes import Dense
from rarefy.export.native import is_native
from rarefy.export.networks import native_folder, opened, stored_trees
from rarefy.models.families import FAMILIES
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.models.opening import open_any
from rarefy.run.engines import ENGINES
from rarefy.run.language import Language
from rarefy.run.samples import Samples
from rarefy.run.subject import Subject
from rarefy.run.target import Destination
from rarefy.run.to_decoder import Writing
from rarefy.run.to_integer import IntegersAlone
from rarefy.run.to_llamacpp import LlamaCpp
from rarefy.run.to_onnx import Traced
from rarefy.run.to_torch import Torch
from rarefy.run.to_transformers import Transformers

AUTO = "auto"
_ALL: tuple[Destination, ...] = (LlamaCpp(), Torch(), *(Traced(engine) for engine in ENGINES),
                                  Transformers(), IntegersAlone())
TARGETS: dict[str, Destination] = {each.target.name: each for each in _ALL}
WRITING: dict[str, Destination] = {each.target.name: each for each in map(Writing, ENGINES)}


def subject_of(model: str | Path | Model | Network, *, dequantize: bool = False) -> Subject:
    """The model that a job names, or has."""
    found = model if isinstance(model, Model | Network) else _opened(model, dequantize)
    return Language(found) if isinstance(found, Model) else Samples(found)


def _opened(ref: str | Path, dequantize: bool) -> Model | Network:
    """What a name stands for. dequantize: also where the weights in a native folder are rounded already."""
    if native_folder(ref) is None:
        return open_any(ref, dequantize=dequantize)
    found = opened(ref)
    changed = [path for path, tree in stored_trees(found).items() if not isinstance(tree, Dense)]
    if changed and not dequantize:
        raise ModelError(f"{ref}: already compressed ({len(changed)} weights, {changed[0]} first); start "
                         "from the original, or pass --dequantize (dequantize=True) to take these weights as "
                         "the original")
    return found


def in_memory(model: Any, tokenizer: Any = None, gives: str = "") -> Model | Network:
    """A network that Python has in memory. gives: what its outputs are, where it does not say."""
    if isinstance(model, Model | Network):
        return model
    if not isinstance(model, nn.Module):
        raise ModelError(f"{type(model).__name__}: not a model; pass a name, a folder or a torch module")
    kind = getattr(getattr(model, "config", None), "model_type", None)
    language = any(kind in family.model_types for family in FAMILIES)
    if language and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return Model.from_module(model, tokenizer)
    network = Network.from_module(model, tokenizer=tokenizer)
    match gives:
        case "classes" | "embedding":
            network.form = replace(network.form, gives=gives)
        case "":
            pass
        case _:
            raise ModelError(f"gives {gives!r}: choose classes or embedding")
    return network


def named(target: str) -> Destination | None:
    """The target of that name; None for ``auto``, which waits for the model."""
    if target == AUTO:
        return None
    if target not in TARGETS:
        known = [AUTO, *TARGETS]
        raise TargetError(f"target {target!r}: choose one of {', '.join(known)}{did_you_mean(target, known)}")
    return TARGETS[target]


def destination_for(target: str, subject: Subject) -> Destination:
    """The target for a model; TargetError when it does not run such models, or is missing here."""
    found = suited(named(target) or TARGETS[subject.usual], subject)
    found.accepts(subject)
    found.ready()
    return found


def suited(found: Destination, subject: Subject) -> Destination:
    """The same target as it takes this kind of network: graphs of language models have a cache."""
    if isinstance(subject.opened, Model):
        return WRITING.get(found.target.name, found)
    return found


def exported(out: Path) -> tuple[Destination, Path]:
    """The exported file or folder that ``out`` is or holds, and the target that it is for."""
    llama, torch = TARGETS["llama.cpp"], TARGETS["torch"]
    for engine in ENGINES:  # a folder, whichever part of it is named
        for place in (out.parent if out.is_file() else out, TARGETS[engine.target.name].place(out)):
            if (place / engine.file).is_file():
                return TARGETS[engine.target.name], place
    if out.is_file():
        return llama, out
    for place in (out, torch.place(out)):
        if is_native(place):
            return torch, place
    found = sorted(out.glob("*.gguf")) if out.is_dir() else []
    if len(found) != 1:
        raise OutputError(f"{out}: holds {len(found)} .gguf files and no native folder or graph; pass the "
                          "file, or a folder that rarefy compress wrote")
    return llama, found[0]
