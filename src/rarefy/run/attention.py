"""Techniques of scope ``attention`` in a recipe: a view of the model that computes attention otherwise.

No weight changes; what comes behind (training, rounding) works on the view. Only PyTorch runs it, as it does
keys and values that are made of a latent.
"""

from __future__ import annotations

import time

from rarefy.core.errors import RecipeError, TargetError
from rarefy.core.nouns import Receipt, Recipe, Step
from rarefy.core.structure import KeyValues
from rarefy.models.attending import attending
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.run.planning import attentions, build_attention, structures


def check_attention(recipe: Recipe, target: str) -> None:
    """Refuse targets whose kernels compute ordinary attention."""
    ours = {*attentions(), *(name for name, kind in structures().items() if kind.edits == (KeyValues,))}
    step = next((step for step in recipe.steps if step.technique in ours), None)
    if step is not None and target != "torch":
        raise TargetError(f"{step.technique}: {target} computes ordinary attention, which is another "
                          "function; use --for torch")


def attended(model: Model | Network, steps: tuple[Step, ...]) -> tuple[Model | Network, tuple[Receipt, ...]]:
    """``model`` with the attention that the last such step of a recipe names, and a receipt for each."""
    receipts: tuple[Receipt, ...] = ()
    for step in steps:
        if step.technique not in attentions():
            continue
        if step.where != ("*",):
            raise RecipeError(f"{step.technique}: has no weights to match; its setting blocks says where")
        started, technique = time.perf_counter(), build_attention(step)
        model = attending(model, step.technique, technique)
        bits = model.parameters * 16
        causal = isinstance(model, Model)
        note = ", ".join(f"{technique.keys(length, causal):.0f} of {length:,} keys a query"
                         for length in (512, 8192))
        receipts += (Receipt(model.name, step.technique, bits, bits, float("nan"),
                             time.perf_counter() - started, note=note),)
    return model, receipts
