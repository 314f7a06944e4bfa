"""A transformers network as a checkpoint that plain transformers, vLLM and PEFT load.

Codes of linear layers go over as compressed-tensors (``formats.compressed``), with the smallest configuration
that describes them; everything else, pruned weights included, as ordinary floats. A low-rank repair, a
``Sum`` of codes and a ``Product``, becomes a LoRA adapter over the compressed base: the two factors as they
are, scaled by one.

    AutoModelForCausalLM.from_pretrained("OUT")                    the base
    PeftModel.from_pretrained(base, "OUT/adapter")                 with the repair
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rarefy.core.errors import TargetError, did_you_mean
from rarefy.core.nodes import Node, Product, Sum
from rarefy.core.nouns import Target
from rarefy.export.onnx import GRIDS
from rarefy.formats.compressed import Scheme, scheme_of, stored
from rarefy.formats.integers import integers
from rarefy.models.attending import said
from rarefy.models.map import Site
from rarefy.models.network import map_network

TRANSFORMERS = Target("transformers", (*GRIDS, "F16", "F32"), "",
                      description="Checkpoints of compressed-tensors for transformers and vLLM: 2 to 8 bits "
                                  "in groups, 8 bits with dynamic activations; low-rank repair for PEFT")
ADAPTER = "adapter"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A folder that was written. schemes: how the modules are stored that are; adapter: the folder of the
    low-rank repair, if any. notes: trees that went over as floats."""

    folder: Path
    bytes: int
    schemes: Mapping[str, Scheme]
    adapter: Path | None = None
    notes: tuple[str, ...] = ()


@dataclass(eq=False)
class _Parts:
    """What goes into the files, module by module."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    schemes: dict[str, Scheme] = field(default_factory=dict)
    repairs: dict[str, Product] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def export_transformers(network: Any, trees: Mapping[str, Node], folder: Path | str, *, tokenizer: Any = None,
                        activations: bool = False, dtype: torch.dtype = torch.float32,
                        params: Mapping[str, Tensor] | None = None) -> Checkpoint:
    """Write the checkpoint of a transformers network.

    trees: what to store for each site; a site without one is stored as the network has it. activations: let
    8-bit weights with one scale a row be multiplied by activations of 8 bits. dtype: of scales and floats;
    float32 keeps all that the trees hold. params: norms or biases in place of the network's.
    """
    folder = Path(folder)
    if not hasattr(network, "config") or not hasattr(network.config, "to_dict"):
        raise TargetError(f"{type(network).__name__}: not a transformers network (it has no config); export "
                          "it for onnxruntime or openvino")
    if said(network.config):
        raise TargetError(f"{type(network).__name__}: has {said(network.config)} attention, and transformers "
                          "alone would compute another; choose the native format")
    found, _ = map_network(network)
    for key in trees:
        if key not in found.by_path:
            raise TargetError(f"{key}: no such weight{did_you_mean(key, list(found.by_path))}")
    parts, changed = _Parts(), dict(params or {})
    for path, values in network.state_dict().items():
        if path in found.shared:
            continue
        site, tree = found.by_path.get(path), trees.get(path)
        if site is None or tree is None:
            parts.tensors[path] = _floats(changed.get(path, values), dtype)
        else:
            linear = isinstance(network.get_submodule(path.rpartition(".")[0]), nn.Linear)
            alone = linear and path not in found.shared.values()  # a tied table is read as floats
            _place(parts, site, tree, alone=alone, activations=activations, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, network, parts, dtype)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    adapter = _write_adapter(folder / ADAPTER, parts.repairs, dtype) if parts.repairs else None
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Checkpoint(folder, size, parts.schemes, adapter, tuple(parts.notes))


def _floats(values: Tensor, dtype: torch.dtype) -> Tensor:
    return (values.detach().to(dtype) if values.is_floating_point() else values.detach()).contiguous()


def _place(parts: _Parts, site: Site, tree: Node, *, alone: bool, activations: bool,
           dtype: torch.dtype) -> None:
    module, base = site.path.removesuffix(".weight"), tree
    match tree:
        case Sum(terms=(first, Product() as repair)) if alone and integers(first) is not None:
            parts.repairs[module], base = repair, first
    found = integers(base) if alone else None
    scheme = None if found is None else scheme_of(found, activations=activations)
    if found is None or scheme is None:
        if found is not None or base.bits() < 16 * site.shape[0] * site.shape[1]:
            parts.notes.append(f"{site.path}: a {type(base).__name__} that compressed-tensors cannot hold; "
                               f"stored as {str(dtype).removeprefix('torch.')}")
        parts.tensors[site.path] = _floats(site.stored(base.dense()), dtype)
        return
    parts.schemes[module] = scheme
    parts.tensors |= {f"{module}.{name}": values for name, values in stored(found, scheme, dtype).items()}


def quantization_config(network: nn.Module, schemes: Mapping[str, Scheme], *, adapted: bool = False
                        ) -> dict[str, Any]:
    """The smallest configuration: one group for all linear layers but those listed, or groups by name.

    adapted: whether PEFT puts an adapter on it, for which layers must have a ``weight``: decoded at load.
    Without ``quantization_status`` transformers would load random weights and say nothing.
    """
    by_scheme: dict[Scheme, list[str]] = defaultdict(list)
    for module, scheme in schemes.items():
        by_scheme[scheme].append(module)
    left = [name for name, part in network.named_modules()
            if isinstance(part, nn.Linear) and name not in schemes]
    zeros = [scheme for scheme in by_scheme if not scheme.symmetric]
    if adapted and len(by_scheme) > 1:
        raise TargetError(f"{next(iter(schemes))}: transformers decodes codes at load, as an adapter needs, "
                          f"only where all layers are stored alike, and here are {len(by_scheme)} ways; "
                          "choose one grid for all")
    if zeros and len(by_scheme) > 1:
        raise TargetError(f"{by_scheme[zeros[0]][0]}: transformers loads zero points only where all layers "
                          f"are stored alike, and here are {len(by_scheme)} ways; choose symmetric grids, or "
                          "one for all")
    groups = {f"group_{k}": scheme.config(["Linear"] if len(by_scheme) == 1 else modules)
              for k, (scheme, modules) in enumerate(by_scheme.items())}
    formats = {scheme.format for scheme in by_scheme}
    return {"quant_method": "compressed-tensors", "quantization_status": "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision", "config_groups": groups,
            "ignore": left,
            # transformers lays out packed zero points as if they were not; decoding at load avoids that
            **({"dequantize": True} if zeros or adapted else {})}


def _write(folder: Path, network: Any, parts: _Parts, dtype: torch.dtype) -> None:
    save_file(parts.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = network.config.to_dict()
    config |= {"architectures": [type(network).__name__], "dtype": str(dtype).removeprefix("torch.")}
    config.pop("quantization_config", None)
    if parts.schemes:
        config["quantization_config"] = quantization_config(network, parts.schemes,
                                                            adapted=bool(parts.repairs))
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")


def _write_adapter(folder: Path, repairs: Mapping[str, Product], dtype: torch.dtype) -> Path:
    """LoRA: ``W x + B A x``; alpha is the rank, so that nothing is scaled."""
    ranks = {module: repair.left.shape[1] for module, repair in repairs.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    other = {module: rank for module, rank in ranks.items() if rank != common}
    config = {"peft_type": "LORA", "base_model_name_or_path": "..", "r": common, "lora_alpha": common,
              "target_modules": sorted(ranks), "rank_pattern": other, "alpha_pattern": other,
              "lora_dropout": 0.0, "bias": "none", "inference_mode": True, "task_type": None}
    tensors = {}
    for module, repair in repairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = _floats(repair.right.dense(), dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = _floats(repair.left.dense(), dtype)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder
