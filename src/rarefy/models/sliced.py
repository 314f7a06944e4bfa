"""A model whose stream between the blocks has fewer channels, as an ordinary model of a smaller width.

With Q [width, kept], orthonormal columns, what is written to the stream becomes Q^T W and what reads it W Q,
once the gains of all norms have moved into their readers. A norm divides by the root of the mean square, so
with fewer channels it divides by another number: of what it passed on, with second moment G of trace
``width``, the kept directions hold tr(Q^T G Q), and the gain

    g = sqrt(tr(Q^T G Q) / kept)

makes up for it on average over tokens.

Paper: Ashkboos et al. 2024, "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", sections
3.1 and 3.2.
"""

from __future__ import annotations

import copy
import math

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.core.errors import ModelError
from rarefy.models.axes import Coupling, couplings, folded
from rarefy.models.families import head_width
from rarefy.models.model import Model
from rarefy.models.rewritten import Fill, rewritten, untied
from rarefy.models.shrunk import Cut, ShrunkSource


def without_gains(model: Model) -> Model:
    """The same function with a head of its own and the gains of all norms in their readers.

    ModelError: a family whose norms do not allow it.
    """
    model = untied(model)
    if barrier := _stream(model).barrier:
        raise ModelError(f"{model.name}: the stream between its blocks cannot be narrowed, for {barrier}")
    return rewritten(model, folded(model))


def sliced(model: Model, basis: Float[Tensor, "width kept"], moment: Float[Tensor, "width width"]) -> Model:
    """The model of width ``kept``; ``model`` is one without gains, ``moment`` of what its norms pass on."""
    width, kept = basis.shape
    stream, turn = _stream(model), basis.T.contiguous()
    gain = math.sqrt(float((turn @ moment @ basis).trace()) / kept)
    cuts: dict[str, list[Cut]] = {}
    for member in (*stream.writers, *stream.readers):
        if member.channel.numel() != width:
            raise ModelError(f"{member.path}: has {member.channel.numel()} channels of a stream of {width}")
        cuts.setdefault(member.path, []).append(Cut(member.axis, torch.arange(kept), turn))
    norms = [each.writers[0] for each in couplings(model) if each.role == "norm"]
    for norm in norms:
        cuts[norm.path] = [Cut(0, torch.arange(kept), None)]
    view = rewritten(model, ((norm.path, Fill(gain - norm.offset)) for norm in norms))
    config = copy.deepcopy(model.config)
    config.head_dim = head_width(config)  # it can no longer be told from the width
    config.hidden_size = kept
    return Model(model.name, model.map.family, config,
                 ShrunkSource(view.source, cuts, model.map.by_path, {}), lambda: model.tokenizer)


def _stream(model: Model) -> Coupling:
    return next(each for each in couplings(model) if each.role == "residual")
