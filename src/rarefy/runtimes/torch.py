"""Run trees in PyTorch on the CPU: every leaf by the fastest kernel that there is for it, the rest expanded.

    network = rarefy.load("OUT", fast=True)         network.lowered says how each weight runs
    attach(copy.deepcopy(network), trees)           the same for any network and trees

A weight that is smaller on disk is not faster by itself. ``lower`` estimates the time of each way to compute
with a tree, as a share of the time that the expanded weight takes, and takes the shortest: low rank is two
thin products, Tucker and CP are three and four small convolutions, what is left of a mask is a smaller dense
or a sparse product, integer codes run in integer kernels. Where none is faster the weight is expanded, once,
when loading, and the string that comes back says so. Which is faster depends on how many tokens a call has:
one where text is generated, many in all other networks. The times are measured by ``benchmarks/kernels.py``.

Recurrent layers compute step by step, which takes longer by itself; so they become torch's own again, in
8-bit integers or with expanded weights, unless faster products save more than the steps cost
(``benchmarks/recurrent.py``).

Two kernels round on the way (``exact=True`` leaves them out): 8-bit codes also round the activations to 8
bits, which moves a layer's output by about 1%; 4-bit codes compute in bfloat16, about 0.3%.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.codebooks import Hashed
from rarefy.core.errors import TargetError, did_you_mean
from rarefy.core.nodes import Dense, Masked, Node, Product, Quantized, Shared, Sum
from rarefy.core.tensors import CP, TensorTrain, Tucker
from rarefy.models.network import tied
from rarefy.models.recurrent import Cell, Layer, Recurrent, rolled, unrolled
from rarefy.numerics.masks import tile_of
from rarefy.runtimes.modules import (
    Factors,
    HashedRows,
    Int4,
    Int8,
    Linear,
    Matrix,
    Narrow,
    NarrowConv,
    Rows,
    Sparse,
    Total,
    Train,
    Whole,
)
from rarefy.runtimes.recurrent import Int8Recurrent, runs_in_integers

BLOCK = 4  # side of the tiles; larger ones are slower
STEPS = 1 << 20  # multiplications of a step, in one layer, that must be saved for steps to be worth it
TWO_CONVS, THREE_CONVS, CP_CONVS = 1.28, 1.37, 2.23  # as below, times the share of the multiplications


@dataclass(frozen=True)
class Speed:
    """Times of kernels as shares of the dense product's, as docs/benchmarks/kernels.md has them.

    low_rank: times the share of the multiplications. sparse, blocks: times the density. narrow: picking
    inputs and placing outputs, beside the share of rows and columns.
    """

    int8: float
    int4: float
    low_rank: float
    sparse: float
    blocks: float
    narrow: float


ONE = Speed(int8=0.68, int4=0.44, low_rank=0.9, sparse=5.0, blocks=4.8, narrow=0.02)     # token in a call
MANY = Speed(int8=0.23, int4=1.93, low_rank=1.07, sparse=4.65, blocks=3.4, narrow=0.09)  # 128

AS_IS = "as it is"
EXPANDED = "expanded once: smaller on disk, not faster"
LOOKED_UP = "rows are made when they are looked up: smaller in memory, not faster"
INT8 = "int8: activations rounded to 8 bits as well"
HASHED = "hashed: the matrix is never stored; smaller in memory, slower than dense"


@dataclass(frozen=True)
class _Way:
    """One way to compute with a weight. time: as a share of the dense one's."""

    time: float
    how: str
    build: Callable[[], Any]


def attach(network: nn.Module, trees: Mapping[str, Node], *, exact: bool = False,
           tokens: int | None = None) -> dict[str, str]:
    """Put trees in the place of a network's weights, each in its fastest way; says how, by path.

    ``network`` is changed: pass a copy to keep it; one that is a recurrent layer itself must be ``unrolled``
    and ``rolled``. trees: by the path of the parameter, as in ``model.layers.0.mlp.up_proj.weight``; where
    modules share a parameter, all of them get the tree. exact: leave out kernels that round on the way.
    tokens: that a call mostly has; None: 1 for a network of transformers that generates text, else many.
    """
    if tokens is None:
        tokens = 1 if getattr(network, "can_generate", lambda: False)() else 128
    speed = _speed(exact, tokens)
    owners: dict[int, list[tuple[str, str]]] = {}
    for name, module in unrolled(network).named_modules():
        for key, value in module._parameters.items():
            if value is not None:
                owners.setdefault(id(value), []).append((name, key))
    known = dict(network.named_parameters(remove_duplicate=False))
    missing = [path for path in trees if path not in known]
    if missing:
        raise TargetError(f"{missing[0]}: the network has no such parameter"
                          f"{did_you_mean(missing[0], list(known))}")
    held = {name: tree for path, tree in trees.items() for name, _ in owners[id(known[path])]}
    done = _in_integers(network, held, speed)
    fixed = _at_once(network, held, speed)
    hows = {path: INT8 if all(name in done for name, _ in owners[id(known[path])]) else
            _attach(network, path, tree, owners[id(known[path])], speed, fixed)
            for path, tree in trees.items()}
    tied(network, trees)
    rolled(network)
    return hows


def _attach(network: nn.Module, path: str, tree: Node, places: list[tuple[str, str]], speed: Speed,
            whole: frozenset[str] = frozenset()) -> str:
    """One tree in all the modules that own the parameter of that path. whole: those that need it expanded."""
    hows, shared = [], None
    for name, key in places:
        module = network.get_submodule(name)
        parent = network.get_submodule(name.rpartition(".")[0])
        # the root has no place to be replaced in; torch's own encoder layer hands the weights themselves on
        fixed = (key != "weight" or not name or name in whole
                 or isinstance(parent, nn.TransformerEncoderLayer))
        way = None if fixed else _way_of(tree, module, speed)
        if way is None or way.how in (AS_IS, EXPANDED):
            values = _laid_out(tree, module, key, path) if shared is None else shared
            shared = values if isinstance(module, nn.Linear | nn.Embedding) else shared  # a tie stays a tie
            module._parameters[key] = values
            hows.append(AS_IS if isinstance(_inside(tree), Dense) else EXPANDED)
        else:
            network.set_submodule(name, way.build().train(module.training))
            hows.append(way.how)
    return hows[0] if len(set(hows)) == 1 else "; ".join(f"{name}: {how}" for (name, _), how
                                                           in zip(places, hows, strict=True))


def lower(node: Node, module: nn.Module, *, exact: bool = False, tokens: int = 1) -> tuple[nn.Module, str]:
    """A module that computes what ``module`` would with the weight that ``node`` stands for, and how it does.

    module: Linear, a convolution, Embedding or transformers' Conv1D; its bias, strides and padding are kept.
    """
    holder = nn.ModuleDict({"it": module})
    how = _attach(holder, "weight", node, [("it", "weight")], _speed(exact, tokens))
    return holder["it"], how


def load(ref: Path | str, *, into: nn.Module | None = None, dtype: torch.dtype = torch.float32,
         exact: bool = False, tokens: int | None = None) -> Any:
    """The network in a native folder, a ``.gguf`` file or any other model, run by the fastest kernels.

    into: as for ``export.networks.opened``. exact, tokens: as for ``attach``.
    """
    from rarefy.export.networks import live, opened, stored_trees, tell_unrounded

    model = opened(ref, into)
    tell_unrounded(model)
    network: Any = live(model, dtype).requires_grad_(False)
    lowered = attach(network, stored_trees(model), exact=exact, tokens=tokens)
    network = rolled(network)
    network.lowered = lowered
    return network


# ---- the ways of a module

def _speed(exact: bool, tokens: int) -> Speed:
    """The times for so many tokens; an exact network never takes the kernels that round."""
    speed = ONE if tokens < 16 else MANY
    return replace(speed, int8=math.inf, int4=math.inf) if exact else speed


def _way_of(node: Node, module: Any, speed: Speed) -> _Way | None:
    """The fastest way of a tree in the place of a module; None where only an expanded weight will do."""
    node = _inside(node)
    kind = type(module)
    if kind is nn.Linear or kind.__name__ == "Conv1D":  # transformers' own, with the weight transposed
        way = _matrix(node, speed)
        return _Way(way.time, way.how, lambda: Linear(way.build(), module.bias, node.shape))
    if kind is nn.Embedding or kind.__name__.endswith("ScaledWordEmbedding"):
        return _rows(node, module)
    if kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and module.groups == 1 and module.padding_mode == "zeros":
        return min((_whole(node), *_convolutions(node, module)), key=lambda way: way.time)
    return None


def _in_integers(network: nn.Module, trees: Mapping[str, Node], speed: Speed) -> frozenset[str]:
    """Put recurrent layers whose weights are all codes of 8 bits into one kernel each; gives the ``Linear``s
    that went. trees: as for ``_at_once``."""
    found = set[str]()
    for name, part in list(network.named_modules()):
        if not isinstance(part, Recurrent) or not name or speed.int8 >= 1 or not runs_in_integers(part):
            continue
        codes = {below: row_codes(trees.get(f"{name}.{below}")) for below, each in part.named_modules()
                 if isinstance(each, nn.Linear)}
        whole = {below: each for below, each in codes.items() if each is not None}
        if len(whole) == len(codes):
            network.set_submodule(name, Int8Recurrent(part, whole))
            found |= {f"{name}.{below}" for below in codes}
    return frozenset(found)


def row_codes(tree: Node | None) -> tuple[Tensor, Tensor] | None:
    """Codes and one scale a row, if that is what a tree is."""
    match None if tree is None else _inside(tree):
        case Masked(keep=keep, inner=Quantized() as node):
            found = _int8_codes(node, keep)
        case Quantized() as node:
            found = _int8_codes(node, None)
        case _:
            return None
    if found is None or node.zero is not None or node.grid.group not in (0, node.shape[1]):
        return None
    return found[:2]


def _at_once(network: nn.Module, trees: Mapping[str, Node], speed: Speed) -> frozenset[str]:
    """The ``Linear``s of recurrent layers that are faster as torch's own. trees: by the module's name."""
    found = set[str]()
    for name, part in network.named_modules():
        if not isinstance(part, Recurrent | Cell):
            continue
        inside = {f"{name}.{below}" if name else below: each for below, each in part.named_modules()
                  if type(each) is nn.Linear}
        ways = [(way, each) for place, each in inside.items() if place in trees
                if (way := _way_of(trees[place], each, speed)) is not None]
        saved = sum((1 - way.time) * each.weight.numel() for way, each in ways)
        layers = sum(isinstance(each, Layer) for each in part.modules()) or 1
        if saved < STEPS * layers and not any(way.how == HASHED for way, _ in ways):
            found |= set(inside)
    return frozenset(found)


def _inside(node: Node) -> Node:
    return _inside(node.of) if isinstance(node, Shared) else node


def _whole(node: Node) -> _Way:
    return _Way(1.0, AS_IS if isinstance(node, Dense) else EXPANDED, lambda: Whole(node.dense().contiguous()))


def _rows(node: Node, module: Any) -> _Way | None:
    if isinstance(node, Dense) or module.max_norm is not None:
        return None
    scale = getattr(module, "embed_scale", None)
    if scale is not None:
        scale = torch.as_tensor(scale, dtype=torch.float32)
    dtype = module.weight.dtype
    return _Way(1.0, LOOKED_UP, lambda: Rows(node, dtype, module.padding_idx, scale))


def _laid_out(tree: Node, module: nn.Module, key: str, path: str) -> nn.Parameter:
    """The expanded weight, as the module has it."""
    old = module._parameters[key]
    assert old is not None
    values = tree.dense()
    if type(module).__name__ == "Conv1D":
        values = values.T
    elif values.shape[0] == old.shape[0]:
        values = values.reshape(old.shape) if values.numel() == old.numel() else values
    if values.shape != old.shape:
        raise TargetError(f"{path}: a tree of {tree.shape} for a parameter of {tuple(old.shape)}; it belongs "
                          "to another network")
    return nn.Parameter(values.to(old.dtype).contiguous(), requires_grad=False)


# ---- matrices

def _matrix(node: Node, speed: Speed) -> _Way:
    """The fastest way of ``y = W x``. A whole matrix wins where nothing is faster."""
    ways = [_whole(node)]
    match node:
        case Shared(of=of):
            return _matrix(of, speed)
        case Product(left=left, right=right):
            ways.append(_low_rank(left, right, speed))
        case Sum(terms=terms):
            parts = [_matrix(term, speed) for term in terms]
            how = " + ".join(part.how for part in parts)
            ways.append(_Way(sum(part.time for part in parts), how,
                             lambda: Total([part.build() for part in parts])))
        case Masked(keep=keep, inner=Quantized() as inner) if inner.zero is None:
            ways += [*_integers(inner, keep, speed), _sparse(node, keep, speed)]
        case Masked(keep=keep):
            ways.append(_sparse(node, keep, speed))
        case Quantized():
            ways += _integers(node, None, speed)
        case Hashed():  # always: the matrix may not fit
            return _Way(0.0, HASHED, lambda: HashedRows(node))
        case TensorTrain():
            ways.append(_Way(speed.low_rank * _train_share(node), "tensor train: one small product per digit",
                             lambda: Train(node)))
    return min(ways, key=lambda way: way.time)


def _low_rank(left: Node, right: Node, speed: Speed) -> _Way:
    (out, rank), columns = left.shape, right.shape[1]
    first, second = _matrix(right, speed), _matrix(left, speed)
    time = (rank * columns * first.time + out * rank * second.time) / (out * columns)
    hows = [way.how for way in (first, second) if way.how not in (AS_IS, EXPANDED)]
    how = f"two products of rank {rank}" + (f" ({'; '.join(dict.fromkeys(hows))})" if hows else "")
    return _Way(speed.low_rank * time, how, lambda: Factors(second.build(), first.build()))


def _sparse(node: Node, keep: Tensor, speed: Speed) -> _Way:
    """What a mask leaves: fewer rows and columns, or few entries."""
    rows, columns = keep.any(1).nonzero().view(-1), keep.any(0).nonzero().view(-1)
    inner = keep[rows][:, columns]
    if not inner.numel():
        return _Way(speed.narrow, "nothing is kept: zeros",
                    lambda: Narrow(Whole(torch.zeros(0, 0)), rows, columns, keep.shape[0]))
    density = float(inner.float().mean())
    blocked = all(each % BLOCK == 0 for each in (*tile_of(inner), *inner.shape))
    how = f"{f'blocks of {BLOCK} x {BLOCK}' if blocked else 'sparse'}, {density:.0%} kept"
    time = density * (speed.blocks if blocked else speed.sparse)
    time = min(1.0, time) if torch.backends.mkl.is_available() else 1.0

    def build() -> Matrix:
        values = node.dense()[rows][:, columns].contiguous()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse .* is in beta state")
            return Sparse(values, (BLOCK, BLOCK) if blocked else None) if time < 1 else Whole(values)

    if inner.shape == keep.shape:
        return _Way(time, how, build)
    share = inner.numel() / keep.numel()
    narrow = f"{inner.shape[0]} x {inner.shape[1]} of {keep.shape[0]} x {keep.shape[1]}"
    return _Way(speed.narrow + share * time, f"{narrow}, {how}" if time < 1 else f"dense, {narrow}",
                lambda: Narrow(build(), rows, columns, keep.shape[0]))


def _integers(node: Quantized, keep: Tensor | None, speed: Speed) -> list[_Way]:
    """The integer kernels that can run these codes; what a mask drops becomes the code of zero."""
    out, columns = node.shape
    levels, group = node.grid.levels, node.grid.group or columns
    ways = []
    if group == columns and _has_int8() and (code := _int8_codes(node, keep)) is not None:
        ways.append(_Way(speed.int8, INT8, lambda: Int8(*code)))
    if (group in (32, 64, 128, 256) and out % 16 == 0 and node.grid.uniform and len(levels) <= 16
            and (keep is None or (levels[0] >= -8 and levels[-1] <= 7 and 0.0 in levels)) and _has_int4()):
        how = "int4 in bfloat16: fast for few tokens"
        ways.append(_Way(speed.int4, how, lambda: _int4(node, keep, group)))
    return ways


def _int8_codes(node: Quantized, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """Codes, scale and zero point of each row, if 8 bits hold them: ``scale * (code - zero)``."""
    scale, levels = node.fit().values()[0][:, 0].contiguous(), torch.tensor(node.grid.levels)
    points = torch.zeros_like(scale)
    if node.zero is not None:
        points = -node.zero.dense()[:, 0]
        if not (node.grid.zero is not None and node.grid.zero.relative):
            return None
    whole = all(bool((each == each.round()).all()) for each in (points, levels))
    if not whole or any(float(each.min()) < -128 or float(each.max()) > 127 for each in (levels, points)):
        return None
    codes = levels.to(torch.int8)[node.codes.int()]
    return codes if keep is None else codes * keep, scale, points


def _int4(node: Quantized, keep: Tensor | None, group: int) -> Matrix:
    scale, zero = node.fit().values()
    low, codes = node.grid.levels[0], node.codes
    if low >= -8 and node.grid.levels[-1] <= 7:  # then a code is its level, and zero stays zero
        codes, low = codes + int(low + 8), -8.0
    if keep is not None:
        codes = torch.where(keep, codes, 8)
    shift = scale * (low + 8)
    return Int4(codes, scale, shift if zero is None else zero + shift, group)


def _has_int8() -> bool:
    return torch.backends.mkldnn.is_available()  # elsewhere the product of integers is a plain loop


def _has_int4() -> bool:
    return torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2")


def _train_share(node: TensorTrain) -> float:
    """Multiplications per token, over those of the matrix."""
    total, rank = 0, 1
    for k, (rows, columns) in enumerate(zip(node.row_digits, node.column_digits, strict=True)):
        after = node.cores[k].shape[1] // columns
        total += prod(node.row_digits[:k]) * rank * rows * columns * after * prod(node.column_digits[k + 1:])
        rank = after
    return total / prod(node.shape)


# ---- convolutions

def _convolutions(node: Node, conv: Any) -> list[_Way]:
    """Chains of smaller convolutions; multiplications per output, over those of the whole kernel."""
    out, inputs, window = conv.out_channels, conv.in_channels, prod(conv.kernel_size)
    whole, stride = out * inputs * window, prod(conv.stride)
    match node:
        case Product(left=left, right=right):
            rank = left.shape[1]
            return [_Way(TWO_CONVS * (rank * inputs * window + out * rank) / whole,
                         f"two convolutions, {rank} channels in between", lambda: _two(left, right, conv))]
        case Tucker(left=left, right=right) if node.window == conv.kernel_size:
            a, b = left.shape[1], right.shape[1]
            return [_Way(THREE_CONVS * (inputs * b * stride + a * b * window + out * a) / whole,
                         f"three convolutions, {b} and {a} channels in between", lambda: _three(node, conv))]
        case CP(factors=factors) if len(factors) == 2 + len(conv.kernel_size):
            rank, depth, pixels = factors[0].shape[1], 0, stride
            for size, step in zip(conv.kernel_size, conv.stride, strict=True):
                pixels //= step
                depth += pixels * size
            return [_Way(CP_CONVS * rank * (inputs * stride + depth + out) / whole,
                         f"{len(factors)} convolutions of {rank} channels", lambda: _four(node, conv))]
        case Masked(keep=keep):
            return _narrow_conv(node, keep, conv)
        case _:
            return []


def _like(conv: Any, weight: Tensor, *, axis: int | None = None, groups: int = 1, pointwise: bool = False,
          bias: Tensor | None = None) -> nn.Module:
    """A convolution with ``weight``; strides and padding of ``conv``, along one axis only if one is given."""
    axes = range(len(conv.kernel_size))
    there = [not pointwise and axis in (None, k) for k in axes]

    def along(values: tuple[int, ...], other: int) -> tuple[int, ...]:
        return tuple(value if here else other for value, here in zip(values, there, strict=True))

    padding = conv.padding if isinstance(conv.padding, str) else along(conv.padding, 0)
    made = type(conv)(weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]),
                      along(conv.stride, 1), padding, along(conv.dilation, 1), groups, bias is not None,
                      dtype=conv.weight.dtype)
    made.weight = nn.Parameter(weight.to(conv.weight.dtype).contiguous(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return made


def _point(conv: Any, matrix: Tensor, bias: Tensor | None = None) -> nn.Module:
    """A matrix over channels, [to, from], as a convolution of one pixel."""
    return _like(conv, matrix.view(*matrix.shape, *[1] * len(conv.kernel_size)), pointwise=True, bias=bias)


def _two(left: Node, right: Node, conv: Any) -> nn.Module:
    kernel = right.dense().view(-1, conv.in_channels, *conv.kernel_size)
    return nn.Sequential(_like(conv, kernel), _point(conv, left.dense(), conv.bias))


def _three(node: Tucker, conv: Any) -> nn.Module:
    core = node.core.dense().view(node.left.shape[1], node.right.shape[1], *conv.kernel_size)
    return nn.Sequential(_point(conv, node.right.dense().T), _like(conv, core),
                         _point(conv, node.left.dense(), conv.bias))


def _four(node: CP, conv: Any) -> nn.Module:
    """One pixel, then one axis after the other for each channel by itself, then one pixel."""
    last, first, *spatial = (factor.dense() for factor in node.factors)
    rank, axes, along = first.shape[1], len(spatial), []
    for axis, factor in enumerate(spatial):
        shape = [rank, 1, *[1] * axes]
        shape[2 + axis] = factor.shape[0]
        along.append(_like(conv, factor.T.reshape(shape), axis=axis, groups=rank))
    return nn.Sequential(_point(conv, first.T), *along, _point(conv, last, conv.bias))


def _narrow_conv(node: Node, keep: Tensor, conv: Any) -> list[_Way]:
    """Whole filters or input channels that a mask drops are not computed."""
    kernel = keep.view(conv.out_channels, conv.in_channels, -1)
    filters, channels = kernel.any(2).any(1).nonzero().view(-1), kernel.any(2).any(0).nonzero().view(-1)
    share = filters.numel() * channels.numel() / (conv.out_channels * conv.in_channels)
    if not 0 < share < 1:
        return []

    def build() -> nn.Module:
        weight = node.dense().view(conv.weight.shape)[filters][:, channels]
        return NarrowConv(_like(conv, weight), filters, channels, conv.bias,
                          conv.out_channels, len(conv.kernel_size))

    how = (f"dense, {filters.numel()} of {conv.out_channels} filters, "
           f"{channels.numel()} of {conv.in_channels} channels")
    return [_Way(MANY.narrow + share, how, build)]
