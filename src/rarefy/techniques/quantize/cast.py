"""Cast: store the weight as it is, in a shorter floating type.

float16 keeps 11 bits of mantissa up to 65504, bfloat16 8 bits over float32's range. What overflows
float16 is refused by name rather than stored as infinity.

Paper: Micikevicius et al. 2018, "Mixed Precision Training", section 3 (the range of float16).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from rarefy.core.edit import Edited, Leaf
from rarefy.core.errors import EditError
from rarefy.core.nodes import Dense, Node
from rarefy.core.nouns import Choice, Option, Step

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Cast:
    """Round to ``dtype``: float16, bfloat16 or float32.

    Shapes: leaf target [out, in] -> Dense [out, in].
    """

    dtype: str = "float16"

    edits: ClassVar[tuple[type[Node], ...]] = (Dense,)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        values = leaf.target.to(FLOATS[self.dtype])
        if not bool(torch.isfinite(values).all()):
            peak = float(leaf.target.abs().max())
            raise EditError(f"{leaf.site}: {peak:g} does not fit {self.dtype}; use bfloat16 or float32")
        return Edited(Dense(values))

    @classmethod
    def options(cls, leaf: Leaf, choices: Mapping[str, Choice]) -> Iterator[Option]:
        """One option per floating format; the damage is what rounding the sample costs."""
        assert leaf.evidence is not None
        for name, choice in choices.items():
            if not isinstance(choice.stored, torch.dtype):
                continue
            step = Step("cast", (leaf.site,), {"dtype": str(choice.stored).removeprefix("torch.")}, name)
            delta = leaf.target.to(choice.stored).float() - leaf.target
            if bool(torch.isfinite(delta).all()):
                yield Option(leaf.site, name, choice.bytes, leaf.evidence.damage(delta), (step,))
