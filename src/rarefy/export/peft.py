"""Adapters in PEFT's format: a folder that PEFT loads onto the base model, and that is read back.

Trees that are ``Sum(.., Product)`` become pairs ``lora_B``, ``lora_A``. The scale is in the factors already,
so ``lora_alpha`` equals the rank everywhere, and PEFT's own scaling is one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rarefy.core.errors import ModelError, TargetError, did_you_mean
from rarefy.core.nodes import Dense, Node, Product, Sum
from rarefy.models.map import Map

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def export_adapter(trees: Mapping[str, Node], map_: Map, folder: Path, *, base: str, task: str | None = None,
                   saved: Mapping[str, Tensor] | None = None) -> int:
    """Write the adapters among ``trees`` and return the folder's bytes.

    base: the model that they belong to, as PEFT shall load it. task: PEFT's word for what the model does.
    saved: tensors that were trained whole, by path (a new head), all of some modules.
    """
    found = {path: adapter for path, tree in trees.items() if (adapter := adapter_of(tree)) is not None}
    if not found:
        raise TargetError("no weight has an adapter; train some with --adapter lora")
    embeds = [path for path in found if "embed" in map_.by_path[path].role]
    if embeds:
        raise TargetError(f"{embeds[0]}: adapters of embeddings have another form in PEFT; leave them out "
                          "with where=, or export the merged model")
    tensors = {}
    for path, adapter in found.items():
        name = PREFIX + path.removesuffix(".weight")
        tensors[f"{name}.lora_A.weight"] = adapter.right.dense().contiguous()
        tensors[f"{name}.lora_B.weight"] = adapter.left.dense().contiguous()
    whole = {PREFIX + path: value.contiguous() for path, value in (saved or {}).items()}
    modules = sorted({path.rpartition(".")[0] for path in saved or {}})
    ranks = {path.removesuffix(".weight"): adapter.right.shape[0] for path, adapter in found.items()}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    pattern = {name: rank for name, rank in ranks.items() if rank != usual}
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": task, "base_model_name_or_path": base, "r": usual,
        "lora_alpha": usual, "rank_pattern": pattern, "alpha_pattern": pattern, "lora_dropout": 0.0,
        "target_modules": sorted(ranks), "modules_to_save": modules or None, "bias": "none",
        "fan_in_fan_out": any(map_.by_path[path].transposed for path in found), "inference_mode": True}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({**tensors, **whole}, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=1))
    return sum(path.stat().st_size for path in folder.iterdir())


def adapter_of(tree: Node) -> Product | None:
    """The product that is a tree's last term."""
    match tree:
        case Sum(terms=(_, *_, Product() as last)):
            return last
        case _:
            return None


def read_adapter(folder: Path, map_: Map) -> dict[str, Product]:
    """The adapters of a PEFT folder as products, scale included, by path of the site that they belong to."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: no adapter of PEFT ({str(error).splitlines()[0]}); pass a folder with "
                         f"{CONFIG} and {WEIGHTS}") from None
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise ModelError(f"{folder}: {kind} is no sum of low rank; merge it with PEFT first")
    found = {}
    for key, down in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        path = f"{name}.weight"
        if path not in map_.by_path:
            raise ModelError(f"{folder}: {name} is no weight of this model"
                             f"{did_you_mean(path, list(map_.by_path))}")
        rank = down.shape[0]
        alpha = (config.get("alpha_pattern") or {}).get(name, config["lora_alpha"])
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        up = tensors[key.replace("lora_A", "lora_B")].to(torch.float32)
        found[path] = Product(Dense(scale * up), Dense(down.to(torch.float32)))
    return found
