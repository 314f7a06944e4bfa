"""What ONNX Runtime's own optimizer would put together, and had better not.

    Gelu(Add(y, bias)), bias [n]    -> the same with bias [1, n]

As it stands the optimizer makes BiasGelu of the two, an operator that takes twice their time. Others that it
offers for an encoder were tried and left out, all on AVX-512 and in 1.32: SkipLayerNormalization for sums and
norms (a third slower for the whole network), MultiHeadAttention (a fifth slower for attention), one product
for queries, keys and values (a tenth faster for one text, as much slower for eight).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rarefy.formats.onnx import Graph, onnx_package


def keep_apart(graph: Graph, stored: Mapping[str, Any]) -> None:
    """Make rows of the biases before a Gelu. stored: constants that the graph may read besides its own."""
    makers = {name: node for node in graph.nodes for name in node.output}
    known = {**stored, **graph.constants}
    for node in graph.nodes:
        total = makers.get(node.input[0]) if node.op_type == "Gelu" else None
        if total is not None and total.op_type == "Add":
            for place, bias in enumerate(total.input):
                if bias in known and len(known[bias].dims) == 1:
                    values = np.array(onnx_package().numpy_helper.to_array(known[bias]))[None]
                    total.input[place] = graph.constant(f"{bias}.row", values)
