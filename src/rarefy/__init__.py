"""Compress a trained network under a budget, with proof.

    network = rarefy.load("OUT")        a transformers network with the weights that OUT stands for
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__version__ = "0.1.0"


def load(ref: Path | str, **settings: Any) -> Any:
    """A transformers network, ready to run, from a native folder, a ``.gguf`` file or any other model.

    ``dtype``: torch's type of the weights, float32 if not given.
    """
    from rarefy.export.native import load as load_network  # importing rarefy must not import torch

    return load_network(ref, **settings)
