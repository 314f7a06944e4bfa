"""Networks in the native format, and whatever was exported as something that runs.

A native folder of a network that is no language model holds, beside its trees, how it is called, how its
answer is read (``Form``) and the ranges in which training rounded its activations. One of transformers is
laid out again from its configuration. The user's own comes back into a module of the same class, which the
user passes: code does not travel with weights.

    rarefy.load("OUT")                 an encoder or image network of transformers, weights decoded
    rarefy.load("OUT", into=MyNet())   the user's own: a copy of that module, with the weights of OUT
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from math import isfinite, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.errors import ModelError
from rarefy.core.nodes import Dense, Node
from rarefy.export.native import (
    MODEL_TYPE,
    TreeSource,
    config_of,
    is_native,
    network_of,
    open_native,
    tokenizer_in,
    trees_of,
    write_native,
)
from rarefy.formats.native import CONFIG, Native, load_native
from rarefy.models.form import Form
from rarefy.models.model import Model
from rarefy.models.narrowed import sized_like
from rarefy.models.network import Network, map_network, tied
from rarefy.models.opening import fill, laid_out, network_class, open_any
from rarefy.models.recurrent import class_name, rolled, unrolled
from rarefy.numerics.ranges import Range

INSIDE = "model"  # what a job calls the native folder in its output
EXITS = "exits.safetensors"  # heads beside the network, which ``runtimes.exits`` writes and reads


def export_network(network: Network, trees: Mapping[str, Node], folder: Path | str, *,
                   params: Mapping[str, Tensor] | None = None, ranges: Mapping[str, Range] | None = None
                   ) -> int:
    """Write the native folder of a network and return its bytes; ``trees`` and ``params`` as for models.

    ranges: of activations, by layer, in place of the network's (``Tuned.ranges``).
    """
    spans = network.ranges if ranges is None else ranges
    config = {"model_type": MODEL_TYPE, "architectures": ["RarefyNetwork"], "name": network.name,
              "form": asdict(network.form), "class": class_name(network.module),
              "network": None if network.config is None else network.config.to_dict(),
              "ranges": {layer: asdict(span) for layer, span in spans.items()}}
    tokenizer = network.tokenizer if network.form.takes == "text" else None
    return write_native(network, trees, params or {}, config, folder, tokenizer, network.files)


def native_folder(ref: Path | str) -> Path | None:
    """The native folder that ``ref`` is, or that the job's folder ``ref`` holds."""
    return next((place for place in (Path(ref), Path(ref) / INSIDE) if is_native(place)), None)


def opened(ref: Path | str, into: nn.Module | None = None) -> Model | Network:
    """What a native folder, the folder of a job, a ``.gguf`` file or any other model holds.

    into: a module of the class of which the network in a native folder is, where that is the user's own.
    """
    path, found = Path(ref), native_folder(ref)
    if found is not None:
        held = load_native(found)
        return open_native(found) if "form" not in held.config else _network(found, held, into)
    inside = sorted(path.glob("*.gguf")) if (path / "receipt.json").is_file() else []
    return open_any(inside[0] if len(inside) == 1 else ref, dequantize=True)


def live(model: Model | Network, dtype: torch.dtype = torch.float32) -> Any:
    """A torch network of one's own, every weight decoded."""
    if isinstance(model, Model):
        return network_of(model, dtype)
    return copy.deepcopy(model.module).to(dtype).requires_grad_(True)


def load(ref: Path | str, *, into: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A network, ready to run, with the weights that ``ref`` stands for; arguments as for ``opened``."""
    model = opened(ref, into)
    tell_unrounded(model)
    network: Any = live(model, dtype)
    if isinstance(model.source, TreeSource):
        tied(network, model.source.trees)
    return rolled(network)


def tell_unrounded(model: Model | Network, where: str = "PyTorch") -> None:
    """Warn that what training rounded is computed otherwise."""
    if isinstance(model, Network) and model.ranges:
        warnings.warn(f"{model.name}: training rounded the inputs of {len(model.ranges)} layers in ranges "
                      f"that {where} does not use; rarefy compress of the same folder hands them on to --for "
                      "integer, onnxruntime or openvino", stacklevel=1)


def stored_trees(model: Model | Network) -> dict[str, Node]:
    """The trees of the sites of whatever was opened, not decoded."""
    if isinstance(model, Model):
        return trees_of(model)
    match model.source:
        case TreeSource(trees=trees):
            return trees
        case _:
            return {site.path: Dense(model.weight(site.path)) for site in model.map.sites}


def has_exits(ref: Path | str) -> bool:
    """Whether a folder, or that of a job, holds a network with exits."""
    folder = native_folder(ref)
    return folder is not None and (folder / EXITS).is_file()


def _network(folder: Path, held: Native, into: nn.Module | None) -> Network:
    name = str(held.config.get("name") or folder.name)
    form = _form(folder, held.config.get("form"))
    inner = held.config.get("network")
    config = config_of(folder, inner) if isinstance(inner, dict) else None
    module = _laid_out(folder, held, form, config, into)
    sites, _ = map_network(module)
    layout = {site.path: site for site in sites.sites if site.transposed or site.kernel}
    source = TreeSource(folder, held.trees, held.params, layout)
    fill(module, source, name)
    prepared = tuple(path for path in held.files if path.name == "preprocessor_config.json")
    return Network(name, module, source, form, config=config, files=prepared,
                   ranges=_ranges(folder, held.config.get("ranges", {})),
                   tokenizer=partial(tokenizer_in, folder, config) if form.takes == "text" else None)


def _laid_out(folder: Path, held: Native, form: Form, config: Any, into: nn.Module | None) -> nn.Module:
    """The network without its weights: transformers' by its configuration, or a copy of the user's own."""
    kind = held.config.get("class")
    if config is None:
        if into is None:
            raise ModelError(f"{folder}: holds a {kind}, whose code is not in it; pass a module of that "
                             f"class, rarefy.load({str(folder)!r}, into={kind}())")
        own = unrolled(copy.deepcopy(into)).float().eval().requires_grad_(False)
        return sized_like(own, _shapes(own, held))
    maker = network_class(config, form.loader)
    pooler = any("pooler." in path for path in held.trees)
    return unrolled(laid_out(config, maker, str(held.config.get("name")), pooler=pooler))


def _shapes(module: nn.Module, held: Native) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a folder, as layers have them: channels may have been taken out."""
    found = {path: tuple(values.shape) for path, values in held.params.items()}
    own = dict(module.named_parameters(remove_duplicate=False))
    for path, tree in held.trees.items():
        shape, kernel = tree.shape, tuple(own[path].shape[2:]) if path in own else ()
        if kernel:
            shape = (shape[0], shape[1] // prod(kernel), *kernel)
        found[path] = shape
    return found


def _ranges(folder: Path, said: Any) -> dict[str, Range]:
    """The ranges of activations that a folder's configuration lists, by layer."""
    try:
        found = {layer: Range(**span) for layer, span in said.items()}
        sound = all(span.low <= span.high and isfinite(span.high - span.low) and span.bits in range(2, 9)
                    for span in found.values())
    except (TypeError, AttributeError):
        sound = False
    if not sound:
        raise ModelError(f"{folder / CONFIG}: ranges of activations are not numbers low <= high with 2 to 8 "
                         "bits; export it again")
    return found


def _form(folder: Path, said: Any) -> Form:
    try:
        return Form(**{**said, "labels": tuple(said["labels"])})
    except (TypeError, KeyError):
        raise ModelError(f"{folder / CONFIG}: does not say how the network is called; export it "
                         "again") from None
