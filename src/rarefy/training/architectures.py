"""Students of another shape: encoders with bottlenecks, convolutions in two steps.

``bottleneck`` makes an encoder whose states are as wide as the teacher's, so that states can be compared, but
whose blocks work ``inner`` wide and stack several feed-forward parts behind one attention. Narrower than the
states it is MobileBERT's bottleneck, wider its inverted bottleneck (the shape of its teacher). Its table of
words is ``embedding`` wide, each word read with its neighbours; it begins as the best table of that width,
W ~ U_r (S V^T)_r of the teacher's. All else begins at random and learns by distillation.

``separable`` puts two cheap convolutions in the place of one,

    W[o, i, :] ~ sum_r P[o, i, r] D[i, r, :],        r <= multiplier:

a filter of its own for each channel (D), then a mixture of channels (P). For each input channel the best D
and P are a truncated SVD of W[:, i, :], so the student begins near the teacher; with multiplier = min(out,
k^2) it is the teacher. Multiplications fall from out k^2 to (k^2 + out) multiplier for every input channel.

Paper: Sun et al. 2020, "MobileBERT", sections 3.1 to 3.3; Howard et al. 2017, "MobileNets", section 3.1; Jin
et al. 2015, "Flattened CNNs", and Zhang et al. 2016, "Accelerating Very Deep Networks" (the start).
"""

from __future__ import annotations

import copy
import fnmatch
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rarefy.core.errors import ModelError, RecipeError, did_you_mean
from rarefy.models.network import Network
from rarefy.models.opening import form_of_config, network_class
from rarefy.models.sources import ModuleSource

# ---- encoders


def bottleneck(teacher: Network, *, inner: int = 128, feedforwards: int = 4, embedding: int = 128,
               blocks: int = 0, seed: int = 0) -> Network:
    """A student for an encoder of text, in transformers' MobileBERT architecture.

    inner: width inside the blocks. feedforwards: in each. embedding: width of the table of words. blocks:
    how many (0: as many as the teacher). RecipeError: sizes that do not go together.
    """
    from transformers import MobileBertConfig

    config = teacher.config
    heads = getattr(config, "num_attention_heads", 0)
    if config is None or teacher.form.takes != "text" or not heads:
        raise ModelError(f"{teacher.name}: bottlenecks are for transformers' encoders of text")
    if inner < 1 or inner % heads or feedforwards < 1 or embedding < 1:
        raise RecipeError(f"inner={inner}, feedforwards={feedforwards}, embedding={embedding}: inner must "
                          f"be a multiple of the {heads} heads, the others 1 or more")
    settings = {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "embedding_size": embedding,
        "num_hidden_layers": blocks or config.num_hidden_layers, "num_attention_heads": heads,
        "intermediate_size": 4 * inner, "intra_bottleneck_size": inner,
        "num_feedforward_networks": feedforwards, "normalization_type": "layer_norm",
        "max_position_embeddings": config.max_position_embeddings,
        "type_vocab_size": getattr(config, "type_vocab_size", 2), "pad_token_id": config.pad_token_id}
    own: Any = MobileBertConfig(**settings)
    if teacher.form.labels:
        own.id2label = dict(enumerate(teacher.form.labels))
        own.label2id = {label: k for k, label in own.id2label.items()}
    kind = network_class(own, teacher.form.loader)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = kind(own)
    _begin(module, teacher)
    module = module.float().eval().requires_grad_(False)
    form = form_of_config(own, kind.__name__)
    name = f"{teacher.name}-bottleneck{inner}"
    return Network(name, module, ModuleSource(module), form, config=own, files=teacher.files,
                   tokenizer=lambda: teacher.tokenizer)


@torch.no_grad()
def _begin(module: Any, teacher: Network) -> None:
    """Give the student the teacher's tables as far as they fit."""
    table = next((teacher.weight(site.path) for site in teacher.map.sites if site.role == "embed"), None)
    embeddings = next(part for part in module.modules() if hasattr(part, "embedding_transformation"))
    if table is not None:
        left, right = _best(table, embeddings.word_embeddings.weight.shape[1])
        width = left.shape[1]
        embeddings.word_embeddings.weight[:, :width] = left
        embeddings.word_embeddings.weight[:, width:] = 0
        size = embeddings.word_embeddings.weight.shape[1]
        mix = embeddings.embedding_transformation
        mix.weight.zero_()  # neighbours are learnt
        mix.weight[:, size:size + width] = right.T
        mix.bias.zero_()
    for name, role in (("position_embeddings", "positions"), ("token_type_embeddings", "token_types")):
        own = getattr(embeddings, name).weight
        theirs = next((teacher.weight(site.path) for site in teacher.map.sites if site.role == role), None)
        if theirs is not None and theirs.shape == own.shape:
            own.copy_(theirs)


def _best(table: Float[Tensor, "words width"], size: int
          ) -> tuple[Float[Tensor, "words size"], Float[Tensor, "size width"]]:
    """The nearest product of that rank: right has orthonormal rows."""
    values, vectors = torch.linalg.eigh(table.T @ table)
    right = vectors[:, values.argsort(descending=True)[:size]].T.contiguous()
    return table @ right.T, right


# ---- convolutions


def separable(network: Network, *, multiplier: int = 1, where: tuple[str, ...] = ("*",)) -> Network:
    """``network`` with two convolutions in the place of each that mixes channels over more than one pixel.

    multiplier: filters for each input channel. where: globs over the names of modules. RecipeError: nothing
    to replace.
    """
    if multiplier < 1:
        raise RecipeError(f"multiplier={multiplier}: must be 1 or more")
    module = copy.deepcopy(network.module)
    names = [name for name, part in module.named_modules() if _mixes(part)]
    chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in where)]
    missing = next((pattern for pattern in where if not fnmatch.filter(names, pattern)), None)
    if missing is not None:
        raise RecipeError(f"pattern {missing!r} matches no convolution that mixes channels over several "
                          f"pixels{did_you_mean(missing, names)}")
    for name in chosen:
        module.set_submodule(name, in_two(module.get_submodule(name), multiplier))
    module = module.eval().requires_grad_(False)
    return Network(f"{network.name}-separable", module, ModuleSource(module), network.form,
                   files=network.files)


@torch.no_grad()
def in_two(conv: Any, multiplier: int) -> nn.Sequential:
    """A filter for each channel, then a mixture; as near to ``conv`` as ``multiplier`` filters can be."""
    rank = min(multiplier, conv.out_channels, conv.kernel_size[0] * conv.kernel_size[1])
    matrices = conv.weight.flatten(2).transpose(0, 1).float()  # [in, out, k * k]
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    filters = right[:, :rank] * values[:, :rank, None].sqrt()
    mixture = left[:, :, :rank] * values[:, None, :rank].sqrt()
    depthwise = nn.Conv2d(conv.in_channels, conv.in_channels * rank, conv.kernel_size, conv.stride,
                          conv.padding, conv.dilation, conv.in_channels, bias=False,
                          padding_mode=conv.padding_mode)
    pointwise = nn.Conv2d(conv.in_channels * rank, conv.out_channels, 1, bias=conv.bias is not None)
    depthwise.weight.copy_(filters.reshape(depthwise.weight.shape))
    pointwise.weight.copy_(mixture.permute(1, 0, 2).reshape(pointwise.weight.shape))
    if conv.bias is not None and pointwise.bias is not None:
        pointwise.bias.copy_(conv.bias)
    return nn.Sequential(depthwise, pointwise)


def _mixes(part: nn.Module) -> bool:
    return (isinstance(part, nn.Conv2d) and part.groups == 1 and part.in_channels > 1
            and max(part.kernel_size) > 1)
