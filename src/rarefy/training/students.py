"""Students made from their teacher: some of its blocks, with their weights.

A student begins best as part of its teacher (Sanh et al. 2019, "DistilBERT", section 3: every second layer).
Width, heads and vocabulary stay, so that logits and states can be compared without learned maps. A student of
another shape is any network of the user's own, with the same labels or vocabulary.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from torch import nn

from rarefy.core.errors import RecipeError
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.models.sources import ModuleSource
from rarefy.training.student import module_of

DEPTH = "num_hidden_layers"  # transformers' alias of what each family calls it
LISTS = ("layer_types", "layers_block_type", "no_rope_layers", "mlp_layer_types")


def every_second(blocks: int) -> tuple[int, ...]:
    """Half of the blocks: 0, 2, 4, ... and so on, the first always."""
    return tuple(range(0, blocks, 2))


def shallower(teacher: Model | Network, keep: tuple[int, ...], name: str = "") -> Model | Network:
    """The network of some of ``teacher``'s blocks, in their order, with its weights; ``keep`` counts from 0.

    RecipeError: blocks that there are not, or a network whose blocks are no plain list.
    """
    whole = module_of(teacher)
    lists = [(path, part) for path, part in whole.named_modules()
             if isinstance(part, nn.ModuleList) and len(part) == getattr(teacher.config, DEPTH, -1)]
    if not lists:
        raise RecipeError(f"{teacher.name}: its blocks are no list; make the student yourself")
    path, blocks = lists[0]
    wrong = [index for index in keep if not 0 <= index < len(blocks)]
    if not keep or wrong or list(keep) != sorted(set(keep)):
        raise RecipeError(f"blocks {list(keep)}: choose rising numbers from 0 to {len(blocks) - 1}")
    config = shorter_config(teacher.config, keep)
    kind: Any = type(whole)  # transformers' networks take their configuration
    module = kind(config)
    state = _renumbered(whole.state_dict(), path, keep)
    missing, unexpected = module.load_state_dict(state, strict=False)
    if unexpected or set(missing) - _tied(module):
        raise RecipeError(f"{teacher.name}: the shorter network has other tensors "
                          f"({[*missing, *unexpected][:3]}); make the student yourself")
    name = name or f"{teacher.name}-{len(keep)}"
    module = module.eval().requires_grad_(False)
    if isinstance(teacher, Model):
        return Model.from_module(module, teacher.tokenizer, name)
    return Network(name, module, ModuleSource(module), teacher.form, config=config, files=teacher.files,
                   tokenizer=lambda: teacher.tokenizer)


def shorter_config(config: Any, keep: tuple[int, ...]) -> Any:
    """The configuration of some blocks: the depth, and every list with an entry per block."""
    found = copy.deepcopy(config)
    depth = getattr(config, DEPTH)
    for key in LISTS:
        values = getattr(config, key, None)
        if isinstance(values, list) and len(values) == depth:
            setattr(found, key, [values[index] for index in keep])
    setattr(found, DEPTH, len(keep))
    return found


def _renumbered(state: dict[str, Any], path: str, keep: tuple[int, ...]) -> dict[str, Any]:
    """The tensors of the kept blocks under their new numbers, and all that is in no block."""
    place = {old: new for new, old in enumerate(keep)}
    found = {}
    for name, values in state.items():
        inside = re.fullmatch(rf"{re.escape(path)}\.(\d+)\.(.+)", name)
        if inside is None:
            found[name] = values
        elif int(inside[1]) in place:
            found[f"{path}.{place[int(inside[1])]}.{inside[2]}"] = values
    return found


def _tied(module: nn.Module) -> set[str]:
    """Names under which a weight appears a second time."""
    first: dict[int, str] = {}
    return {name for name, values in module.state_dict(keep_vars=True).items()
            if first.setdefault(id(values), name) != name}
