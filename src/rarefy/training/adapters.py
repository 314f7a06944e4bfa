"""Adapters that are no sum of matrices, trained by the one loop: PEFT's own layers, and bottlenecks.

    dora         W' = m (W + B A) / |W + B A|, column by column; a magnitude m beside the direction
    ia3          keys, values and inner activations times a learned vector each
    prefix       learned keys and values in front of those of the text
    bottleneck   y' = y + U gelu(D y) behind attention and behind the feed-forward part (Houlsby)
    pfeiffer     the same behind the feed-forward part alone

Nothing of a tree can express these, so they lie on a copy of the network in which every weight is decoded,
whatever it is stored as. PEFT has all but the bottlenecks: its layers are used, and its files are written by
itself. The first two can be merged into the weights; the others stay beside them.

Paper: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation"; Liu et al. 2022, "Few-Shot
Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning"; Li & Liang 2021,
"Prefix-Tuning"; Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1; Pfeiffer
et al. 2021, "AdapterFusion", section 3.3.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rarefy.core.errors import ModelError, RecipeError, TargetError
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.training.loop import Advance, Curve, Examples, Settings, fit, held_out
from rarefy.training.student import Learning, Objective, Student, module_of

MERGED = ("dora", "ia3")
BESIDE = ("prefix", "bottleneck", "pfeiffer")
KINDS = (*MERGED, *BESIDE)
BEHIND = {"bottleneck": ("o", "down"), "pfeiffer": ("down",)}  # roles whose outputs go through a bottleneck
CONFIG, WEIGHTS = "bottleneck.json", "bottleneck.safetensors"


class Bottleneck(nn.Module):
    """A layer, and a narrow correction of what it gives: [.., width] -> [.., width].

    width: of the layer's output. narrow: of the bottleneck. It begins as the layer alone.
    """

    def __init__(self, layer: nn.Module, width: int, narrow: int) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(width, narrow), nn.Linear(narrow, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Float[Tensor, "*batch in_"]) -> Float[Tensor, "*batch width"]:
        y: Tensor = self.layer(x)
        corrected: Tensor = y + self.up(nn.functional.gelu(self.down(y)))
        return corrected


@dataclass(frozen=True, eq=False)
class Adapted:
    """A copy of a network with adapters in it; all else stands still but what is trained whole."""

    kind: str
    module: Any
    width: int

    def train(self, objective: Objective, examples: Examples, settings: Settings, *, held: Examples,
              folder: Path, advance: Advance | None = None) -> Curve:
        """Train the adapters; arguments as for ``tune``."""
        task = Learning(Student(self.module, {}), objective)
        identity = {"adapter": f"{self.kind} {self.width}"}
        return fit(task, examples, settings, gate=held_out(task, held, settings), folder=folder,
                   identity=identity, advance=advance)

    def save(self, folder: Path, base: str) -> None:
        """The adapters alone: a folder that PEFT reads, or that ``with_bottlenecks`` does. base: of which
        model they are."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.kind not in BEHIND:
            self.module.peft_config["default"].base_model_name_or_path = base
            self.module.save_pretrained(folder)
            return
        moved = {name: value.detach().contiguous() for name, value in self.module.named_parameters()
                 if value.requires_grad}
        places = [name for name, part in self.module.named_modules() if isinstance(part, Bottleneck)]
        save_file(moved, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps({"base": base, "narrow": self.width, "behind": places}))

    def merged(self) -> nn.Module:
        """The network with its adapters in its weights."""
        if self.kind not in MERGED:
            raise TargetError(f"{self.kind}: is no change of weights and cannot be merged; keep it beside "
                              "them")
        whole: nn.Module = copy.deepcopy(self.module).merge_and_unload()
        return whole


def adapted(network: Model | Network, kind: str, *, rank: int = 8, alpha: float = 16.0,
            whole: tuple[str, ...] = (), seed: int = 0) -> Adapted:
    """Adapters of a kind on ``network``, which begins as it is.

    rank: of DoRA; the width of bottlenecks; the length of a prefix. whole: modules that train as they are.
    """
    module = copy.deepcopy(module_of(network)).requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind in BEHIND:
            places = _layers(network, BEHIND[kind])
            _put(module, places, rank)
            for name, value in module.named_parameters():
                inside = any(name.startswith(f"{each}.") for each in whole)
                value.requires_grad_(inside or any(f"{each}.{end}." in name for each in places
                                                   for end in ("down", "up")))
            return Adapted(kind, module, rank)
        try:
            from peft import get_peft_model
        except ImportError:
            raise TargetError(f"{kind}: is made of PEFT's layers, which are not installed; run: "
                              "pip install 'rarefy[transformers]'") from None
        wrapped = get_peft_model(module, _config(network, kind, rank, alpha, whole))
    return Adapted(kind, wrapped, rank)


def with_bottlenecks(module: nn.Module, folder: Path) -> nn.Module:
    """A copy of ``module`` with the bottlenecks, and what was trained whole beside them, of a folder."""
    try:
        said = json.loads((folder / CONFIG).read_text())
        values = load_file(folder / WEIGHTS)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: holds no bottlenecks ({str(error).splitlines()[0]}); pass the folder "
                         "that finetune --adapter bottleneck wrote") from None
    found = copy.deepcopy(module)
    names = dict(found.named_modules())
    missing = [name for name in said["behind"] if name not in names]
    if missing:
        raise ModelError(f"{folder}: {missing[0]} is no layer of this network; pass its base, "
                         f"{said['base']}")
    _put(found, said["behind"], said["narrow"])
    unknown = found.load_state_dict(values, strict=False).unexpected_keys
    if unknown:
        raise ModelError(f"{folder}: {unknown[0]} is no tensor of this network; pass its base, "
                         f"{said['base']}")
    return found.eval()


def _put(module: nn.Module, places: list[str], narrow: int) -> None:
    """A bottleneck behind every layer of these names."""
    for name in places:
        parent, _, last = name.rpartition(".")
        layer = module.get_submodule(name)
        width = getattr(layer, "out_features", None) or layer.get_parameter("weight").shape[1]
        setattr(module.get_submodule(parent), last, Bottleneck(layer, int(width), narrow))


def _config(network: Model | Network, kind: str, rank: int, alpha: float, whole: tuple[str, ...]) -> Any:
    """PEFT's configuration."""
    from peft import IA3Config, LoraConfig, PrefixTuningConfig

    task = "CAUSAL_LM" if isinstance(network, Model) else "SEQ_CLS"
    also = sorted(whole) or None
    turned = any(site.transposed for site in network.map.sites)
    match kind:
        case "dora":
            return LoraConfig(task_type=task, r=rank, lora_alpha=alpha, use_dora=True,
                              target_modules=_layers(network), modules_to_save=also, fan_in_fan_out=turned)
        case "ia3":
            inner = _layers(network, ("down",))
            return IA3Config(task_type=task, target_modules=[*_layers(network, ("k", "v")), *inner],
                             feedforward_modules=inner, modules_to_save=also, fan_in_fan_out=turned)
        case "prefix":
            return PrefixTuningConfig(task_type=task, num_virtual_tokens=rank)
    raise RecipeError(f"adapter {kind!r}: choose one of {', '.join(KINDS)}")


def _layers(network: Model | Network, roles: tuple[str, ...] | None = None) -> list[str]:
    """Layers in blocks, of some roles (None: all)."""
    found = [site.layer for site in network.map.sites
             if site.block is not None and (roles is None or site.role in roles)]
    if not found:
        raise RecipeError(f"{network.name}: has no blocks with {' and '.join(roles or ('weights',))} to put "
                          "adapters into; use --adapter lora, or none")
    return found
