"""``rarefy export``: a compressed model in another target's file, from the codes that it has."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rarefy.cli.chat import gguf_in
from rarefy.cli.options import SHOWN, Data, Json, Overwrite, Target
from rarefy.cli.progress import progress
from rarefy.cli.terminal import dump, guarded, show, tell
from rarefy.core.errors import DataError, OutputError, TargetError, did_you_mean
from rarefy.report import words

if TYPE_CHECKING:
    from rarefy.models.model import Model
    from rarefy.models.network import Network

SAMPLES = 256  # of every --data
SMALL = 1_000_000  # bytes that a graph or a tokenizer may take
OURS = re.compile("no form as small|inputs that training rounded")

Place = Annotated[Path, typer.Option(
    "--out", "-o", metavar="PATH", rich_help_panel=SHOWN, show_default=False,
    help="File (llama.cpp) or folder (the others) to create.")]


@guarded
def export(
    source: Annotated[Path, typer.Argument(metavar="OUT", show_default=False,
                                           help="A folder that rarefy wrote, or a .gguf file.")],
    *, target: Target = "llama.cpp", out: Place, data: Data = None, overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a language model for another target: llama.cpp (one .gguf file, also for auto), native,
    transformers, onnxruntime or openvino (a folder); an encoder or image network for onnxruntime or
    openvino; or a classifier with exits for onnxruntime.

    Codes and scales go over as they are; nothing is rounded a second time. Samples (--data) say how
    activations are rounded, and the file is compared on them; texts need none.
    """
    from rarefy.export.compressed_tensors import TRANSFORMERS
    from rarefy.export.gguf import LLAMA_CPP
    from rarefy.export.native import NATIVE
    from rarefy.export.networks import has_exits
    from rarefy.export.onnx import ONNXRUNTIME
    from rarefy.measure.resources import bytes_on_disk
    from rarefy.run.exits import export_early
    from rarefy.run.resolve import AUTO, WRITING

    known = [AUTO, LLAMA_CPP.name, NATIVE.name, TRANSFORMERS.name, *WRITING]
    if target not in known:
        raise TargetError(f"target {target!r}: choose one of {', '.join(known)}{did_you_mean(target, known)}")
    target = LLAMA_CPP.name if target == AUTO else target
    if target in WRITING:
        WRITING[target].ready()
    exits = has_exits(source)
    if exits and target != ONNXRUNTIME.name:
        raise TargetError(f"{source}: a classifier with exits goes into files for {ONNXRUNTIME.name} alone; "
                          f"pass --for {ONNXRUNTIME.name}")
    with staged(out, overwrite=overwrite) as partial, progress().stage(f"export for {target}"):
        held = bytes_on_disk(source)
        size = export_early(source, partial) if exits else _exported(source, partial, target, data or [])
    if grown(size, held):
        tell(f"warning: {words.size(size)}, where {source} has {words.size(held)}: what {target} has no form "
             "for as small is there in full, such as masks and codes stored by how often each occurs")
    if as_json:
        dump({"path": out, "bytes": size, "target": target})
    else:
        show(f"{out}  {words.size(size)}")


def grown(size: int, held: int) -> bool:
    """Whether a file is larger than what it was made from, by more than a graph or a tokenizer takes."""
    return size - held > max(SMALL, held / 10)


def _exported(source: Path, partial: Path, target: str, data: list[str]) -> int:
    """Whatever the source holds, for a target; bytes."""
    from rarefy.export.compressed_tensors import TRANSFORMERS
    from rarefy.export.native import NATIVE, export_native
    from rarefy.export.networks import stored_trees
    from rarefy.models.network import Network
    from rarefy.run.resolve import WRITING

    model = _opened(source)
    if isinstance(model, Network):
        return _network(model, source, partial, target, data)
    trees = stored_trees(model)
    if target == NATIVE.name:
        return export_native(model, trees, partial)
    if target == TRANSFORMERS.name:
        return _transformers(model, trees, partial)
    if target in WRITING:
        return _graph(model, trees, partial, target)
    return _gguf(model, trees, partial)


def _opened(source: Path) -> Model | Network:
    """What the source holds, its trees as they are stored."""
    from rarefy.export.networks import native_folder, opened
    from rarefy.models.model import open_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is quantized is the point here
        return opened(source) if native_folder(source) else open_model(gguf_in(source), dequantize=True)


def _network(network: Network, source: Path, folder: Path, target: str, data: list[str]) -> int:
    """A graph of an encoder or image network, compared on samples with our own evaluation of it."""
    from rarefy.calibration.examples import read_examples
    from rarefy.calibration.text import PYTHON_DOCS
    from rarefy.core.nodes import Dense
    from rarefy.export.networks import stored_trees
    from rarefy.measure.resources import bytes_on_disk
    from rarefy.run.engines import ENGINES
    from rarefy.run.samples import Shown, joined
    from rarefy.run.to_onnx import Traced

    engine = next((each for each in ENGINES if each.target.name == target), None)
    if engine is None:
        raise TargetError(f"{source}: an encoder or image network is written for "
                          f"{' or '.join(each.target.name for each in ENGINES)}, not {target}; pass one of "
                          f"these, or rarefy compress {source} --dequantize --for {target}")
    refs = data or ([PYTHON_DOCS] if network.form.takes == "text" else [])
    if not refs:
        raise DataError(f"{source}: how its activations are rounded is found on samples; pass --data")
    samples = joined([read_examples(network, ref, count=SAMPLES, seed=0) for ref in refs])
    traced = Traced(engine, Shown(samples, samples, {}))
    trees = {path: tree for path, tree in stored_trees(network).items() if not isinstance(tree, Dense)}
    with _told():
        traced.export(network, trees, dict.fromkeys(trees), folder)
    traced.check(folder)
    return bytes_on_disk(folder)


def _gguf(model: Model, trees: dict[str, Any], path: Path) -> int:
    """The file; what llama.cpp has no format for goes over as F16, and is said."""
    from rarefy.core.nodes import Dense
    from rarefy.export.gguf import export_gguf
    from rarefy.export.native import formats_of

    formats = formats_of(trees)
    wide = [name for name, tree in trees.items() if formats[name] == "F16" and not isinstance(tree, Dense)]
    if wide:
        tell(f"warning: {len(wide)} weights are in no format of llama.cpp and go over as F16, "
             f"{wide[0]} first")
    return export_gguf(model, trees, formats, path)


def _transformers(model: Model, trees: dict[str, Any], folder: Path) -> int:
    """The checkpoint, loaded back by transformers; what it cannot hold goes over as floats, and is said."""
    import torch

    from rarefy.export.compressed_tensors import export_transformers
    from rarefy.export.native import network_of
    from rarefy.runtimes.session import require
    from rarefy.runtimes.transformers import verify_checkpoint

    require("compressed_tensors")
    network = network_of(model).eval().requires_grad_(False)
    done = export_transformers(network, trees, folder, tokenizer=model.tokenizer)
    if done.notes:
        tell(f"warning: {len(done.notes)} weights go over as floats: {done.notes[0]}")
    if done.adapter is not None:
        require("peft")
    tokens = {"input_ids": torch.arange(16)[None] % model.config.vocab_size}
    with torch.no_grad():
        expected = network(**tokens, use_cache=False).logits
    verify_checkpoint(folder, tokens, expected, adapter=done.adapter)
    return done.bytes


def _graph(model: Model, trees: dict[str, Any], folder: Path, target: str) -> int:
    """A graph with its cache, read again by its runtime; what it holds only as floats is said."""
    from rarefy.measure.resources import bytes_on_disk
    from rarefy.run.engines import ENGINES
    from rarefy.run.to_decoder import Writing

    writing = Writing(next(engine for engine in ENGINES if engine.target.name == target))
    with _told():
        writing.export(model, trees, dict.fromkeys(trees), folder)
    writing.check(folder)
    return bytes_on_disk(folder)


@contextmanager
def _told() -> Iterator[None]:
    """While this lasts, our own warnings of what goes over otherwise are said, and no others."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        yield
    for each in heard:
        if issubclass(each.category, UserWarning) and OURS.search(str(each.message)):
            tell(f"warning: {each.message}")


@contextmanager
def staged(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A path to write to, which takes the final name when all went well and is removed when not."""
    from rarefy.run.journal import written

    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists already; choose another name or pass --overwrite")
    partial = out.with_name(out.name + ".partial")
    with written(out):
        _remove(partial)
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            _remove(out)
            partial.rename(out)
        finally:
            _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
