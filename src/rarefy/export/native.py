"""A whole model in the native format, and any model as a transformers network that runs.

The native folder holds every tree as it is (codes, masks, factors), so nothing is lost, whatever technique
made it. It says ``"model_type": "rarefy"``: transformers refuses it by that name until ``rarefy.hf`` is
imported, where a folder that looked ordinary would load with random weights and a warning.

    rarefy.load("OUT")                                        a network with the weights the trees stand for
    import rarefy.hf; AutoModelForCausalLM.from_pretrained("OUT")        the same
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import ModelError, TargetError, did_you_mean
from rarefy.core.nodes import Dense, Node, Quantized
from rarefy.core.nouns import Target
from rarefy.export.gguf import LLAMA_CPP
from rarefy.formats.ggml import CODECS
from rarefy.formats.native import CONFIG, TREE, WEIGHTS, load_native, save_native
from rarefy.models.families import family_of
from rarefy.models.map import Site
from rarefy.models.model import Model, open_model, skeleton
from rarefy.models.network import Network
from rarefy.models.sources import GgufSource, Source

MODEL_TYPE = "rarefy"
NATIVE = Target("native", LLAMA_CPP.formats, "",
                description="A folder of safetensors and JSON that keeps every tree; rarefy.load reads it")


class TreeSource(Source):
    """The weights that trees stand for, decoded row by row as they are asked for.

    sites: those that the network does not hold as matrices (transposed ones, convolutions), by path.
    """

    def __init__(self, folder: Path, trees: Mapping[str, Node], params: Mapping[str, Tensor],
                 sites: Mapping[str, Site]) -> None:
        super().__init__()
        self.trees, self.params = dict(trees), dict(params)
        self._folder, self._sites = folder, dict(sites)

    def names(self) -> tuple[str, ...]:
        return (*self.trees, *self.params)

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.params:
            return tuple(self.params[name].shape)
        shape = self.trees[name].shape
        site = self._sites.get(name)
        return shape if site is None else tuple(site.stored(torch.empty(shape, device="meta")).shape)

    def dtype(self, name: str) -> str:
        match self.params.get(name, self.trees.get(name)):
            case Tensor() as values:
                return str(values.dtype).removeprefix("torch.")
            case Dense(values=values):
                return str(values.dtype).removeprefix("torch.")
            case Quantized(grid=grid):
                return grid.name
            case other:
                return type(other).__name__

    def files(self) -> tuple[Path, ...]:
        return tuple(self._folder / name for name in (CONFIG, TREE, WEIGHTS))

    def _rows(self, name: str, index: slice | Tensor) -> Tensor:
        if name in self.params:
            whole = self.params[name]
            return whole[index] if whole.ndim else whole
        tree, site = self.trees[name], self._sites.get(name)
        if site is not None:
            return site.stored(tree.dense())[index]
        rows = torch.arange(tree.shape[0])[index] if isinstance(index, slice) else index
        return tree.dense() if len(rows) == tree.shape[0] else tree.rows(rows)


def export_native(model: Model, trees: Mapping[str, Node], folder: Path | str, *,
                  params: Mapping[str, Tensor] | None = None) -> int:
    """Write the native folder and return its bytes.

    trees: what to store for each site; a site without one is stored as the model has it, in its dtype.
    params: norms or biases to store in place of the model's.
    """
    config = {"model_type": MODEL_TYPE, "architectures": ["RarefyForCausalLM"], "name": model.name,
              "network": model.config.to_dict()}
    return write_native(model, trees, params or {}, config, folder, model.tokenizer)


def write_native(model: Model | Network, trees: Mapping[str, Node], params: Mapping[str, Tensor],
                 config: Mapping[str, Any], folder: Path | str, tokenizer: Any = None,
                 files: tuple[Path, ...] = ()) -> int:
    """Write a native folder of what ``trees`` and ``params`` change, and of the rest as the model has it."""
    for key, known in (*((key, list(model.map.by_path)) for key in trees),
                       *((key, [param.path for param in model.map.params]) for key in params)):
        if key not in known:
            raise TargetError(f"{key}: no such weight{did_you_mean(key, known)}")
    whole = {site.path: trees[site.path] if site.path in trees else _as_stored(model, site)
             for site in model.map.sites}
    rest = {param.path: params.get(param.path, model.source.read(param.path)) for param in model.map.params}
    with tempfile.TemporaryDirectory() as staged:
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        copied = sorted(path for path in Path(staged).iterdir() if path.is_file() and path.name != CONFIG)
        save_native(folder, whole, rest, config, [*copied, *files])
    return sum(path.stat().st_size for path in Path(folder).iterdir())


def is_native(folder: Path | str) -> bool:
    """Whether a folder is of the native format."""
    return (Path(folder) / TREE).is_file()


def open_native(folder: Path | str) -> Model:
    """The model in a native folder, as strict as any other; its ``source.trees`` are the trees."""
    folder = Path(folder)
    held = load_native(folder)
    inner = held.config.get("network")
    if "form" in held.config:
        raise ModelError(f"{folder}: holds a network that is no causal language model; rarefy.load opens it")
    if held.config.get("model_type") != MODEL_TYPE or not isinstance(inner, dict):
        raise ModelError(f"{folder / CONFIG}: not the configuration of a native model; export it again")
    family = family_of(str(inner.get("model_type")))
    flipped = {path: Site(path, "", (tree.shape[0], tree.shape[1]), None, transposed=True)
               for path, tree in held.trees.items() if family.transposed and family.matrix(path) is not None}
    source = TreeSource(folder, held.trees, held.params, flipped)
    name, config = held.config.get("name"), config_of(folder, inner)
    return Model(name if isinstance(name, str) else folder.name, family, config, source,
                 lambda: tokenizer_in(folder, config))


def trees_of(model: Model) -> dict[str, Node]:
    """The trees of an opened model's sites: the codes of a GGUF file or of a native folder, not decoded."""
    return {site.path: _tree(model, site) for site in model.map.sites}


def formats_of(trees: Mapping[str, Node]) -> dict[str, str]:
    """The llama.cpp format that each tree is in already; F16 or F32 where it is in none."""
    return {path: _format(tree) for path, tree in trees.items()}


def load(ref: Path | str, *, dtype: torch.dtype = torch.float32) -> Any:
    """A transformers network, ready to run, with the weights that a native folder, a ``.gguf`` file or any
    other model stands for. Compressed weights are decoded: this is for evaluation and for further training.
    """
    model = open_native(ref) if is_native(ref) else open_model(ref, dequantize=True)
    return network_of(model, dtype)


def network_of(model: Model, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers network of an opened model, every weight in place or an error."""
    network = skeleton(model.config)
    state = {path: values.to(dtype) for path, values in _state(model)}
    done = network.load_state_dict(state, strict=False, assign=True)
    if model.map.tied:
        network.tie_weights()
    left = [name for name, value in network.named_parameters() if value.is_meta]
    if left or done.unexpected_keys:
        raise ModelError(f"{model.name}: {(left or done.unexpected_keys)[0]} found no place in the network")
    for owner in (network.config, getattr(network, "generation_config", None)):
        if owner is not None:
            owner.use_cache = True
    return network.requires_grad_(True)


def _state(model: Model) -> Iterator[tuple[str, Tensor]]:
    for site in model.map.sites:
        values = model.weight(site.path)
        yield site.path, site.stored(values).contiguous().clone()
    for param in model.map.params:
        yield param.path, model.param(param.path).clone()


def _tree(model: Model, site: Site) -> Node:
    match model.source:
        case TreeSource(trees=trees):
            return trees[site.path]
        case GgufSource(file=file):
            node = file.tensor(model.map.family.gguf_name(site.path))
            if node.shape != site.shape:  # a narrower block, with zeros behind
                return Dense(model.weight(site.path))
            order = model.map.family.row_order(site.path, model.config)
            return node if order is None else node.select(0, torch.tensor(order).argsort())
        case _:
            return _as_stored(model, site)


def _as_stored(model: Model | Network, site: Site) -> Dense:
    return Dense(site.matrix(model.source.read(site.path)).contiguous())


def _format(tree: Node) -> str:
    match tree:
        case Quantized(grid=grid):
            known = (codec.name for codec in CODECS.values() if grid in (codec.grid, codec.wide))
            return next(known, "F16")
        case Dense(values=values):
            plain = (codec for codec in CODECS.values() if codec.grid is None)
            return next((codec.name for codec in plain if codec.dtype == values.dtype), "F32")
        case _:
            return "F16"


def config_of(folder: Path, inner: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    fields = {key: value for key, value in inner.items() if key != "model_type"}
    try:
        return AutoConfig.for_model(inner["model_type"], **fields)
    except Exception as error:  # noqa: BLE001 - transformers raises whatever its field validators raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder / CONFIG}: not a valid configuration ({first})") from None


def tokenizer_in(folder: Path, config: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True,
                                             trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - a dozen kinds, from missing files to wrapped Rust panics
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder}: its tokenizer cannot be loaded ({first}); export it again") from None
