"""``rarefy inspect``: what is in a model and where its bytes are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from math import prod
from typing import TYPE_CHECKING, Any

from rarefy.cli.options import Dequantize, Json, Model
from rarefy.cli.terminal import bar, dump, guarded, show, table
from rarefy.report import words

if TYPE_CHECKING:
    from rarefy.models.model import Model as Language
    from rarefy.models.network import Network

SIZES = (8.5, 6.5, 4.5, 3.5, 2.5)  # bits per weight of the whole file


@guarded
def inspect(model: Model, dequantize: Dequantize = False, as_json: Json = False) -> None:
    """Show what a model holds, where its bytes are, and which formats its rows fit."""
    from rarefy.models.opening import open_any

    found = facts(open_any(model, dequantize=dequantize))
    if as_json:
        dump(found)
        return
    _head(found)
    _parts("By role", found["roles"], found["bytes"])
    if found["blocks"]:
        _blocks(found["blocks"], found["bytes"])
    sizes = ", ".join(f"{words.size(s['bytes'])} at {s['bits_per_weight']:g} bpw" for s in found["sizes"])
    gguf = found["gguf"]
    if gguf is None:
        show(f"\nWhole exports: {sizes}.")
        return
    _formats(found["formats"])
    show(f"\nA llama.cpp file of it takes {words.size(gguf['f16'])} in F16, and at least "
         f"{words.size(gguf['smallest'])}; {words.size(gguf['fixed'])} of that is tokenizer, norms and "
         "header.\n"
         f"Whole files: {sizes}.")


def facts(model: Language | Network) -> dict[str, Any]:
    """Everything that ``inspect`` shows, as plain data. Bytes are those in the model's own files."""
    sites, params = model.map.sites, model.map.params
    parts: list[Any] = [*sites, *params]
    held = {part.path: _bytes(model.source.dtype(part.path), part.shape) for part in parts}
    weights = sum(prod(site.shape) for site in sites)
    total = sum(held.values())
    groups: dict[str, list[Any]] = defaultdict(list)
    for site in sites:
        groups[site.role].append(site)
    roles = [{"role": role, "name": words.role(role, model.map.tied), "tensors": len(members),
              "shapes": sorted({site.shape for site in members}),
              "weights": sum(prod(site.shape) for site in members),
              "bytes": sum(held[s.path] for s in members), "stored": _stored(model, members)}
             for role, members in groups.items()]
    roles.append({"role": None, "name": "norms, biases and tables", "tensors": len(params), "shapes": [],
                  "weights": sum(prod(p.shape) for p in params), "bytes": sum(held[p.path] for p in params),
                  "stored": _stored(model, params)})
    inside = [model.map.in_block(index) for index in range(model.map.blocks)]
    blocks = [{"block": index, "weights": sum(prod(site.shape) for site in members),
               "bytes": sum(held[site.path] for site in members)} for index, members in enumerate(inside)]
    return {"model": model.name, "parameters": model.parameters,
            "weights": weights, "tied": model.map.tied, "bytes": total,
            "file_bytes": sum(path.stat().st_size for path in model.source.files()) or total,
            "roles": roles, "blocks": blocks, **_kind(model),
            "sizes": [{"bits_per_weight": bits, "bytes": int(model.parameters * bits / 8)} for bits in SIZES]}


def _kind(model: Language | Network) -> dict[str, Any]:
    """What is known of one kind of network only; llama.cpp runs language models."""
    from rarefy.models.model import Model

    if isinstance(model, Model):
        return {"family": model.map.family.name, "formats": _fits(model), "gguf": _range(model)}
    return {"family": getattr(model.config, "model_type", ""), "formats": [], "gguf": None}


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor as it is stored: in one of ggml's formats or as plain numbers."""
    import torch

    from rarefy.formats.ggml import CODECS

    if dtype in CODECS:
        return prod(shape[:-1]) * CODECS[dtype].row_bytes(shape[-1])
    kind: torch.dtype = getattr(torch, dtype)
    return prod(shape) * kind.itemsize


def _stored(model: Language | Network, parts: Iterable[Any]) -> list[str]:
    return sorted({model.source.dtype(part.path) for part in parts})


def _fits(model: Language) -> list[dict[str, Any]]:
    """For each row length: who has it and which of llama.cpp's quantized formats can store it."""
    from rarefy.export.gguf import LLAMA_CPP, loadable
    from rarefy.formats.ggml import CODECS

    lengths: dict[int, list[Any]] = defaultdict(list)
    for site in model.map.sites:
        lengths[site.shape[1]].append(site)
    quantized = sorted((name for name in LLAMA_CPP.formats if CODECS[name].grid is not None),
                       key=lambda name: CODECS[name].block_bytes / CODECS[name].block)
    rows = []
    for columns, sites in sorted(lengths.items()):
        fitting = set.intersection(*(set(loadable(model, site)) for site in sites))
        rows.append({"columns": columns, "roles": list(dict.fromkeys(site.role for site in sites)),
                     "fits": [name for name in quantized if name in fitting],
                     "does_not_fit": [name for name in quantized if name not in fitting]})
    return rows


def _range(model: Language) -> dict[str, int]:
    """Bytes of a llama.cpp file with every tensor in its smallest format, and in F16."""
    from rarefy.export.gguf import fixed_bytes, held, loadable, site_bytes

    fixed = fixed_bytes(model)
    smallest = sum(min(site_bytes(held(model, site), name) for name in loadable(model, site))
                   for site in model.map.sites)
    return {"fixed": fixed, "smallest": fixed + smallest,
            "f16": fixed + sum(site_bytes(held(model, site), "F16") for site in model.map.sites)}


def _head(found: dict[str, Any]) -> None:
    tie = "embedding and head are one matrix" if found["tied"] else "embedding and head are two matrices"
    if found["gguf"] is None:
        tie = "some weights are shared" if found["tied"] else "no weight is shared"
    show(f"{found['model']}: {found['family']}, {words.count(found['parameters'])} parameters, "
         f"{len(found['blocks'])} blocks, {words.size(found['file_bytes'])} on disk; {tie}\n")


def _parts(title: str, rows: list[dict[str, Any]], total: int) -> None:
    longest = max(row["bytes"] for row in rows)
    table(title, ("role", "tensors", "shape", "weights", "bytes", "share", "", "stored as"),
          [(row["name"], str(row["tensors"]), ", ".join(f"{a} x {b}" for a, b in row["shapes"]),
            words.count(row["weights"]), words.size(row["bytes"]), words.percent(row["bytes"] / total),
            bar(row["bytes"] / longest), ", ".join(row["stored"])) for row in rows], right=(1, 3, 4, 5))


def _blocks(blocks: list[dict[str, Any]], total: int) -> None:
    """Equal neighbours are one line."""
    runs: list[list[dict[str, Any]]] = []
    for block in blocks:
        if runs and (runs[-1][-1]["bytes"], runs[-1][-1]["weights"]) == (block["bytes"], block["weights"]):
            runs[-1].append(block)
        else:
            runs.append([block])
    show()
    table("By block", ("blocks", "weights each", "bytes each", "bytes", "share"),
          [(str(run[0]["block"]) if len(run) == 1 else f"{run[0]['block']} to {run[-1]['block']}",
            words.count(run[0]["weights"]), words.size(run[0]["bytes"]),
            words.size(sum(b["bytes"] for b in run)), words.percent(sum(b["bytes"] for b in run) / total))
           for run in runs], right=(1, 2, 3, 4))


def _formats(rows: list[dict[str, Any]]) -> None:
    show()
    table("What llama.cpp can store them as", ("row length", "roles", "fits", "does not fit"),
          [(str(row["columns"]), ", ".join(row["roles"]), " ".join(row["fits"]),
            " ".join(row["does_not_fit"]) or "-") for row in rows], right=(0,))
