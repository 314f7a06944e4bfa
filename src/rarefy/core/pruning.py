"""What prunings share: the settings ``pattern`` and ``sparsity``, and the way from costs to a masked leaf.

A pruning technique says what dropping each weight would cost. A ``Rule`` says how many go and which of them
only together; both come from the settings as a user writes them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rarefy.core.edit import Edited, Leaf
from rarefy.core.errors import EditError, RecipeError, did_you_mean
from rarefy.core.nodes import Dense, Masked
from rarefy.numerics.patterns import NM, Pattern, Tiles, Unstructured

Scope = Literal["layer", "row"]

WORDS = ("unstructured", "unstructured per layer", "unstructured per row", "2:4", "4:8", "block 16x16", "row",
         "row 8", "column", "column 8")


@dataclass(frozen=True)
class Rule:
    """Which share of a leaf's weights goes, and in what pattern."""

    pattern: Pattern
    sparsity: float

    @classmethod
    def of(cls, pattern: object, sparsity: object, scope: Scope) -> Rule:
        """The rule that settings ask for. scope: what plain ``unstructured`` means to the technique."""
        found = pattern_named(pattern, scope)
        given = 1 - found.n / found.m if isinstance(found, NM) else None
        if sparsity is None:
            return cls(found, 0.5 if given is None else given)
        if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 < sparsity < 1:
            share = isinstance(sparsity, int | float) and 1 < sparsity < 100
            hint = f"; did you mean {sparsity / 100:g}?" if share else ""  # type: ignore[operator]
            raise RecipeError(f"sparsity {sparsity!r}: must be a share above 0 (nothing dropped) and below 1 "
                              f"(everything dropped){hint}")
        if given is not None and abs(sparsity - given) > 1e-6:
            raise RecipeError(f"sparsity {sparsity:g}: the pattern {found} drops {given:g}; "
                              "leave sparsity out")
        return cls(found, float(sparsity))

    def fitted(self, leaf: Leaf) -> tuple[Rule, str]:
        """This rule as the leaf's shape allows it, and what had to be changed; EditError if it cannot be."""
        rows, columns = leaf.target.shape
        if misfit := self.pattern.misfit(rows, columns):
            raise EditError(f"{leaf.site}: pattern {self.pattern}: {misfit}")
        dropped = round(self.sparsity * columns)
        if self.pattern == Unstructured("row") and dropped in (0, columns):
            return (replace(self, pattern=Unstructured("layer")),
                    f"no part of {self.sparsity:g} of rows of {columns}: chosen over the whole weight")
        return self, ""

    def keep(self, cost: Float[Tensor, "out in_"],
             allowed: Bool[Tensor, "out in_"] | None = None) -> Bool[Tensor, "out in_"]:
        """True where the dearest weights are."""
        return self.pattern.keep(cost, self.sparsity, allowed)


def pattern_named(text: object, scope: Scope) -> Pattern:
    """The pattern that a setting names; RecipeError for what is none."""
    if isinstance(text, int):  # YAML 1.1 reads 2:4 as a number to base 60
        n, m = divmod(text, 60)
        raise RecipeError(f"pattern {text}: YAML reads {n}:{m} without quotes as a number; write \"{n}:{m}\"")
    words = " ".join(str(text).lower().split())
    numbers = [int(number) for number in re.findall(r"\d+", words)]
    match re.sub(r"\d+", "#", words):
        case "unstructured":
            return Unstructured(scope)
        case "unstructured per layer":
            return Unstructured("layer")
        case "unstructured per row":
            return Unstructured("row")
        case "#:#" if 0 < numbers[0] < numbers[1]:
            return NM(*numbers)
        case "#:#":
            raise RecipeError(f"pattern {text!r}: n:m keeps n of every m weights, 0 < n < m")
        case "block #x#" if min(numbers) > 0:
            return Tiles(*numbers)
        case "row" | "column" | "row #" | "column #" if 0 not in numbers:
            count = numbers[0] if numbers else 1
            return Tiles(count, 0) if words.startswith("row") else Tiles(0, count)
    raise RecipeError(f"pattern {text!r}: there is unstructured (per layer, per row), n:m, block RxC, row G "
                      f"and column G{did_you_mean(words, list(WORDS))}")


def lost(leaf: Leaf) -> Float[Tensor, "out in_"]:
    """What dropping each weight adds to the squared error, every weight taken by itself.

    ``v^2`` for plain values v. What codes stand for is off the target t already: ``t^2 - (t - v)^2``.
    """
    values = leaf.node.dense()
    return values.square() if isinstance(leaf.node, Dense) else values * (2 * leaf.target - values)


def masked(leaf: Leaf, rule: Rule, stakes: Float[Tensor, "#out in_"] | None = None, note: str = "") -> Edited:
    """The leaf without the weights whose loss costs least. Those that stay are stored as they were.

    stakes: what a squared error of one weight costs at each place (None: the same everywhere).
    """
    rule, fallback = rule.fitted(leaf)
    cost = lost(leaf)
    if stakes is not None and not bool(stakes.any()):
        note = noted(note, "nothing that calibration saw depends on this weight: chosen by magnitude")
    elif stakes is not None:
        cost = cost * stakes
    refuse_unfit(leaf.site, cost)
    keep = rule.keep(cost, leaf.keep)
    return Edited(Masked(keep, leaf.node), noted(note, fallback, outcome(leaf, keep, rule)))


def refuse_unfit(site: str, cost: Tensor) -> None:
    """EditError when costs are no numbers to compare."""
    if not bool(torch.isfinite(cost).all()):
        raise EditError(f"{site}: cannot tell what to drop: the weight or its calibration evidence holds "
                        "infinities or NaN; check the model, and calibrate in float32")


def outcome(leaf: Leaf, keep: Tensor, rule: Rule) -> str:
    """What the receipt has to say of a mask; EditError when nothing is left."""
    kept, before = int(keep.sum()), keep.numel() if leaf.keep is None else int(leaf.keep.sum())
    asked = f"sparsity {rule.sparsity:g}, {rule.pattern}"
    if kept == 0:
        raise EditError(f"{leaf.site}: {asked} leaves none of {keep.numel()} weights; lower it, or leave "
                        "this weight out")
    if kept == before:
        already = f" ({1 - before / keep.numel():.1%} were dropped before)" if before < keep.numel() else ""
        return f"nothing to drop at {asked}{already}"
    return ""


def noted(*notes: str) -> str:
    """The notes that say something, in one line."""
    return "; ".join(note for note in notes if note)
