"""Store codes by how often each occurs, in place of as many bits for all.

The scale of a group fits its largest weight, so most codes lie near zero and the outer ones are rare. A code
c that occurs with frequency p_c takes

    -log2 p_c bits

under asymmetric numeral systems, the entropy of the codes in all, where a grid of K levels takes log2 K for
each. What the weight stands for does not change, nor how it runs: codes are decoded once, when the file is
read. It gains most where one scale serves a whole row, and little where groups are short and scales fit
tightly.

Only the native format stores codes so; in others the step changes nothing.

Paper: Han et al. 2016, "Deep Compression", section 4 (there with Huffman's code); Duda 2013, "Asymmetric
numeral systems".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from rarefy.core.edit import Edited, Leaf
from rarefy.core.nodes import Node, Quantized


@dataclass(frozen=True)
class Entropy:
    """Entropy coding of a grid's codes.

    Shapes: leaf Quantized [out, in] -> Quantized [out, in] of the same values. Codes that come out no shorter
    stay as they are, which the receipt says.
    """

    edits: ClassVar[tuple[type[Node], ...]] = (Quantized,)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        assert isinstance(leaf.node, Quantized)
        coded = replace(leaf.node, coded=True)
        before, after = (node.bits() if leaf.keep is None else node.kept_bits(leaf.keep)
                         for node in (leaf.node, coded))
        if after >= before:
            return Edited(leaf.node, "its codes occur too evenly to be coded shorter: packed")
        return Edited(coded)
