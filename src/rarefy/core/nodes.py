"""The algebra: a weight is an expression tree of small frozen values.

Every compression technique rewrites such a tree. A node knows its shape, the dense matrix it stands
for, how many bits it costs, how to keep a subset of an axis, and its children. It knows no file
format, no kernel, and no class but those it is made of.

Weights are written "out in": a linear layer computes ``y = W x``; an embedding has one row per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from rarefy.numerics.coding import code_symbols
from rarefy.numerics.grids import Grid, Stored
from rarefy.numerics.masks import mask_size
from rarefy.numerics.rounding import Fit, Number


class Node:
    """What every node of a weight's tree can do. Abstract; the concrete nodes are final."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor this node stands for."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The tensor this node stands for, in float32; differentiable in the floating leaves."""
        raise NotImplementedError

    def bits(self) -> int:
        """Bits that storing this node takes: codes, scales, masks and all, container header aside."""
        raise NotImplementedError

    def select(self, axis: int, index: Tensor) -> Node:
        """The node that keeps only ``index`` (int64) along ``axis``."""
        raise NotImplementedError

    def rows(self, index: Tensor) -> Tensor:
        """Some rows of ``dense()``, without the others where the node can."""
        return self.select(0, index).dense()

    def kept_bits(self, keep: Tensor) -> int:
        """Bits that storing this node takes where only the entries under ``keep`` matter."""
        return self.bits()

    def children(self) -> tuple[Node, ...]:
        """The weight nodes directly below, in a fixed order; empty for a leaf."""
        return ()

    def rebuilt(self, children: tuple[Node, ...]) -> Node:
        """This node with other children, of the same shapes and in the same order."""
        return self

    def fitted(self, index: int, target: Tensor) -> Tensor:
        """The value of child ``index`` with which this node stands best for ``target``, the others fixed."""
        raise NotImplementedError

    def behind(self, index: int) -> Tensor | None:
        """The matrix through which inputs reach child ``index``; None where that is no matrix product."""
        return None


@final
@dataclass(frozen=True, eq=False)
class Dense(Node):
    """Plain values, stored in their own dtype."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def dense(self) -> Tensor:
        return self.values.to(torch.float32)

    def bits(self) -> int:
        return self.values.numel() * self.values.element_size() * 8

    def kept_bits(self, keep: Tensor) -> int:
        return int(keep.sum()) * self.values.element_size() * 8

    def select(self, axis: int, index: Tensor) -> Dense:
        return Dense(self.values.index_select(axis, index))


@final
@dataclass(frozen=True, eq=False)
class Quantized(Node):
    """Codes on a grid: ``scale * levels[codes] + zero`` per group of columns.

    ``codes`` has one byte per weight in memory whatever the grid: packing belongs to the formats.
    ``scale`` and ``zero`` stand for [out, groups] matrices; under double quantization they are
    ``Quantized`` themselves. ``coded``: codes are stored by how often each occurs (``numerics.coding``),
    not at the grid's bits.
    """

    codes: UInt8[Tensor, "out in_"]
    scale: Node
    zero: Node | None
    grid: Grid
    coded: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def dense(self) -> Float[Tensor, "out in_"]:
        rows, columns = self.codes.shape
        group = self.grid.group or columns
        scale = self.scale.dense().unsqueeze(-1)
        values = self._levels().view(rows, columns // group, group) * scale
        if self.zero is not None:
            zero = self.zero.dense().unsqueeze(-1)
            assert self.grid.zero is not None
            values += zero * scale if self.grid.zero.relative else zero
        return values.view(rows, columns)

    def _levels(self) -> Float[Tensor, "out in_"]:
        """What the codes stand for, in steps of the scale. Even steps are counted, not looked up: faster."""
        if self.grid.uniform:
            return self.codes.to(torch.float32).add_(self.grid.levels[0])
        levels = torch.tensor(self.grid.levels, dtype=torch.float32, device=self.codes.device)
        return levels.index_select(0, self.codes.reshape(-1).int()).view(self.codes.shape)

    @classmethod
    def of(cls, codes: UInt8[Tensor, "out in_"], fit: Fit) -> Quantized:
        """The node of codes under fitted scales and zeros."""
        zero = None
        if fit.zero is not None and fit.grid.zero is not None:
            zero = _number_node(fit.zero, fit.grid.zero)
        return cls(codes, _number_node(fit.scale, fit.grid.scale), zero, fit.grid)

    def fit(self) -> Fit:
        """The stored scales and zeros, as ``numerics`` works on them."""
        zero = None if self.zero is None else _node_number(self.zero)
        return Fit(_node_number(self.scale), zero, self.grid)

    def bits(self) -> int:
        return self._bits

    @cached_property
    def _bits(self) -> int:
        return self._number_bits + (_coded_bits(self.codes, self.grid) if self.coded
                                    else self.codes.numel() * self.grid.code_bits)

    def kept_bits(self, keep: Tensor) -> int:
        return self._number_bits + (_coded_bits(self.codes[keep], self.grid) if self.coded
                                    else int(keep.sum()) * self.grid.code_bits)

    @property
    def _number_bits(self) -> int:
        return self.scale.bits() + (0 if self.zero is None else self.zero.bits())

    def select(self, axis: int, index: Tensor) -> Quantized:
        if axis == 0:
            zero = None if self.zero is None else self.zero.select(0, index)
            return replace(self, codes=self.codes.index_select(0, index), scale=self.scale.select(0, index),
                           zero=zero)
        group = self.grid.group or self.codes.shape[1]
        whole = index.view(-1, group) if index.numel() % group == 0 else None
        first = None if whole is None else whole[:, :1]
        if (whole is None or first is None or bool((first % group).any())
                or not torch.equal(whole, first + torch.arange(group, device=index.device))):
            raise ValueError(f"columns of a grid of group {group} can only be kept in whole groups; "
                             "select before quantizing")
        groups = whole[:, 0] // group
        zero = None if self.zero is None else self.zero.select(1, groups)
        return replace(self, codes=self.codes.index_select(1, index), scale=self.scale.select(1, groups),
                       zero=zero)


def _coded_bits(codes: Tensor, grid: Grid) -> int:
    return 8 * len(code_symbols(codes, len(grid.levels)))


def _number_node(number: Number, stored: Stored) -> Node:
    """One stored number per group as a node; double quantization gives a ``Quantized`` node."""
    plain = Dense(number.plain)
    if number.codes is None:
        return plain
    return Quantized(number.codes, plain, None, steps_grid(stored))


def _node_number(node: Node) -> Number:
    match node:
        case Quantized(codes=codes, scale=Dense(values=plain)):
            return Number(plain, codes)
        case Dense(values=plain):
            return Number(plain, None)
        case _:
            raise TypeError(f"a scale cannot be a {type(node).__name__}")


def steps_grid(stored: Stored) -> Grid:
    """The grid of scales that are integer steps of a coarser number."""
    levels = tuple(float(stored.low + k) for k in range(1 << stored.bits))
    return Grid(f"steps{stored.bits}", levels, stored.over, Stored(stored.dtype))


@final
@dataclass(frozen=True, eq=False)
class Masked(Node):
    """What was dropped stays dropped: ``keep * inner``."""

    keep: Bool[Tensor, "out in_"]
    inner: Node

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    def dense(self) -> Tensor:
        return torch.where(self.keep, self.inner.dense(), 0.0)

    def bits(self) -> int:
        return self._bits

    def kept_bits(self, keep: Tensor) -> int:
        return self._mask_bits + self.inner.kept_bits(self.keep & keep)

    @cached_property
    def _bits(self) -> int:
        return self._mask_bits + self.inner.kept_bits(self.keep)

    @cached_property
    def _mask_bits(self) -> int:
        return 8 * mask_size(self.keep)

    def select(self, axis: int, index: Tensor) -> Masked:
        return Masked(self.keep.index_select(axis, index), self.inner.select(axis, index))

    def rows(self, index: Tensor) -> Tensor:
        return torch.where(self.keep.index_select(0, index), self.inner.rows(index), 0.0)

    def children(self) -> tuple[Node, ...]:
        return (self.inner,)

    def rebuilt(self, children: tuple[Node, ...]) -> Masked:
        return replace(self, inner=children[0])


@final
@dataclass(frozen=True, eq=False)
class Product(Node):
    """A low-rank weight: ``left @ right`` with left [out, rank] and right [rank, in]."""

    left: Node
    right: Node

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.left.shape[0], self.right.shape[1])

    def dense(self) -> Tensor:
        return self.left.dense() @ self.right.dense()

    def bits(self) -> int:
        return self.left.bits() + self.right.bits()

    def select(self, axis: int, index: Tensor) -> Product:
        if axis == 0:
            return replace(self, left=self.left.select(0, index))
        return replace(self, right=self.right.select(1, index))

    def rows(self, index: Tensor) -> Tensor:
        return self.left.rows(index) @ self.right.dense()

    def children(self) -> tuple[Node, ...]:
        return (self.left, self.right)

    def rebuilt(self, children: tuple[Node, ...]) -> Product:
        return Product(*children)

    def fitted(self, index: int, target: Tensor) -> Tensor:
        # in float64, so that what LAPACK leaves to chance lies below the bits that are kept
        other: Tensor = torch.linalg.pinv(self.children()[1 - index].dense().double())
        fitted: Tensor = target.double() @ other if index == 0 else other @ target.double()
        return fitted.float()


@final
@dataclass(frozen=True, eq=False)
class Sum(Node):
    """A sum of weights of one shape: quantized + low-rank repair, base + adapter."""

    terms: tuple[Node, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.terms[0].shape

    def dense(self) -> Tensor:
        total = self.terms[0].dense()
        for term in self.terms[1:]:
            total = total + term.dense()
        return total

    def bits(self) -> int:
        return sum(term.bits() for term in self.terms)

    def select(self, axis: int, index: Tensor) -> Sum:
        return Sum(tuple(term.select(axis, index) for term in self.terms))

    def rows(self, index: Tensor) -> Tensor:
        total = self.terms[0].rows(index)
        for term in self.terms[1:]:
            total = total + term.rows(index)
        return total

    def children(self) -> tuple[Node, ...]:
        return self.terms

    def rebuilt(self, children: tuple[Node, ...]) -> Sum:
        return Sum(children)

    def fitted(self, index: int, target: Tensor) -> Tensor:
        return target - sum((term.dense() for k, term in enumerate(self.terms) if k != index),
                            torch.zeros_like(target))


@final
@dataclass(frozen=True, eq=False)
class Shared(Node):
    """Another site's weight, stored there: tied embeddings, layers that share parameters."""

    path: str
    of: Node

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    def dense(self) -> Tensor:
        return self.of.dense()

    def bits(self) -> int:
        return 0

    def select(self, axis: int, index: Tensor) -> Node:
        raise ValueError(f"a shared weight is edited where it is stored: {self.path}")

    def rows(self, index: Tensor) -> Tensor:
        return self.of.rows(index)
