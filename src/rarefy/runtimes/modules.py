"""What computes ``y = W x`` without the matrix W: a small module for every kind of node with a faster way.

All are given tokens as rows, [tokens, in] float32, and return [tokens, out] float32; ``Linear`` and ``Rows``
put them in the place of a ``torch.nn.Linear`` and a ``torch.nn.Embedding``. They run on the CPU and do not
train.

Kernels that round on the way say so: ``Int8`` rounds activations to 8 bits, one scale for each token;
``Int4`` computes in bfloat16. Everything else is exact to the order of the sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.core.codebooks import Hashed
from rarefy.core.nodes import Node
from rarefy.core.tensors import TensorTrain

TINY = 1e-30
CHUNK = 1 << 17  # weights of a hashed matrix that exist at once, so that they stay in cache
FEW = 8  # tokens up to which a sparse matrix is read by rows, without tokens as columns
BLOCK_TOKENS = 16  # tokens that the block-sparse kernel works on at once; it falls off a cliff in between


class Matrix(nn.Module):
    """``forward``: [tokens, in] -> [tokens, out]. Abstract."""

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Whole(Matrix):
    """The matrix itself."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.values: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.values)


class Factors(Matrix):
    """``left (right x)``: two thin products for a fat one."""

    def __init__(self, left: Matrix, right: Matrix) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.left(self.right(x))
        return y


class Total(Matrix):
    """The terms of a sum, each in its own way."""

    def __init__(self, terms: list[Matrix]) -> None:
        super().__init__()
        self.terms = nn.ModuleList(terms)

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.terms
        y: Tensor = first(x)
        for term in rest:
            y = y + term(x)
        return y


class Narrow(Matrix):
    """A matrix whose other rows and columns are zero: inputs are picked, outputs put in their places."""

    def __init__(self, inner: Matrix, rows: Tensor, columns: Tensor, out: int) -> None:
        super().__init__()
        self.inner, self.out = inner, out
        self.rows: Tensor
        self.columns: Tensor
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x.index_select(1, self.columns))
        if self.rows.numel() == self.out:
            return y
        return x.new_zeros(x.shape[0], self.out).index_copy_(1, self.rows, y)


class Int8(Matrix):
    """Integer codes times activations rounded to 8 bits, one scale for each token: sums of whole numbers.

    A scale per token, not per batch, so that an answer does not depend on what it is batched with.
    """

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor) -> None:
        """codes [out, in] int8; scale and zero point [out]: a weight is ``scale * (code - zero)``."""
        super().__init__()
        self.codes: Tensor
        self.scale: Tensor
        self.zero: Tensor
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.shifted = bool(zero.any())

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(1, keepdim=True).clamp_min(TINY) / 127
        rounded = (x / scale).round_().to(torch.int8)
        y = torch._int_mm(rounded, self.codes.t()).float()
        if self.shifted:
            y -= rounded.sum(1, keepdim=True, dtype=torch.float32) * self.zero
        return y.mul_(scale).mul_(self.scale)


class Int4(Matrix):
    """Codes of 4 bits in groups of columns, unpacked in registers: one token reads an eighth of the bytes."""

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> None:
        """codes 0..15; a weight is ``scale * (code - 8) + zero``, both [out, groups]."""
        super().__init__()
        self.group = group
        self.packed: Tensor
        self.scales: Tensor
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1))
        self.register_buffer("scales", torch.stack([scale.T, zero.T], 2).bfloat16().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        y: Tensor = multiply(x.bfloat16(), self.packed, self.group, self.scales)
        return y.float()


class Sparse(Matrix):
    """Compressed sparse rows, and blocks for many tokens where zeros come in tiles."""

    def __init__(self, values: Tensor, tile: tuple[int, int] | None) -> None:
        super().__init__()
        self.shape, self.tiled = tuple(values.shape), tile is not None
        self.parts = {"rows": values.to_sparse_csr()}
        if tile is not None:
            self.parts["tiles"] = values.to_sparse_bsr(tile)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[0]
        if tokens <= FEW:
            return F.linear(x, self.parts["rows"])
        if not self.tiled:
            return torch.mm(self.parts["rows"], x.T).T
        return torch.mm(self.parts["tiles"], F.pad(x, (0, 0, 0, -tokens % BLOCK_TOKENS)).T).T[:tokens]

    def __getstate__(self) -> dict[str, Any]:
        """Sparse tensors have no storage that torch could copy, so they travel as what they are made of."""
        parts = {name: (part.crow_indices(), part.col_indices(), part.values())
                 for name, part in self.parts.items()}
        return {**self.__dict__, "parts": parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        makers = {"rows": torch.sparse_csr_tensor, "tiles": torch.sparse_bsr_tensor}
        self.parts = {name: makers[name](starts, columns, values, size=self.shape, check_invariants=True)
                      for name, (starts, columns, values) in state["parts"].items()}


class HashedRows(Matrix):
    """A hashed matrix, some rows at a time: what is in memory are the buckets."""

    def __init__(self, node: Hashed) -> None:
        super().__init__()
        self.node = node

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.linear(x, self.node.rows(rows)) for rows in self.chunks()], 1)

    def chunks(self) -> Iterator[Tensor]:
        out, columns = self.node.size
        return iter(torch.arange(out).split(max(1, CHUNK // columns)))


class Train(Matrix):
    """A tensor train: one digit of the inputs after the other becomes a digit of the outputs."""

    def __init__(self, node: TensorTrain) -> None:
        super().__init__()
        self.cores = cores_of(node)

    def forward(self, x: Tensor) -> Tensor:
        y = x.view(x.shape[0], 1, 1, -1)  # [tokens, digits made, rank, digits to come]
        for core in self.cores:
            rank, rows, columns, after = core.shape
            y = y.view(y.shape[0], y.shape[1], rank, columns, -1)
            y = torch.einsum("tmrnc,rans->tmasc", y, core)
            y = y.reshape(y.shape[0], y.shape[1] * rows, after, -1)
        return y.flatten(1)


def cores_of(node: TensorTrain) -> list[Tensor]:
    """[rank, rows, columns, next rank] each."""
    matrices = [core.dense() for core in node.cores]
    return [matrix.view(matrix.shape[0] // rows, rows, columns, matrix.shape[1] // columns).contiguous()
            for matrix, rows, columns in zip(matrices, node.row_digits, node.column_digits, strict=True)]


class Linear(nn.Module):
    """In the place of a ``torch.nn.Linear``: any leading axes, a bias, the input's type."""

    def __init__(self, matrix: Matrix, bias: Tensor | None, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.matrix = matrix
        self.out_features, self.in_features = shape
        self.bias: Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def weight(self) -> Tensor:
        """The matrix that this computes with, made at each call: to be looked at, not to compute with."""
        y: Tensor = self.matrix(torch.eye(self.in_features))
        return y.T.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.matrix(x.reshape(-1, self.in_features).float()).to(x.dtype)
        if self.bias is not None:
            y = y + self.bias.to(x.dtype)
        return y.view(*x.shape[:-1], self.out_features)


class NarrowConv(nn.Module):
    """A convolution whose other filters and input channels are zero; ``inner`` has no bias."""

    def __init__(self, inner: nn.Module, filters: Tensor, channels: Tensor, bias: Tensor | None,
                 out: int, axes: int) -> None:
        super().__init__()
        self.inner, self.out, self.axes = inner, out, axes
        self.filters: Tensor
        self.channels: Tensor
        self.bias: Tensor
        self.register_buffer("filters", filters)
        self.register_buffer("channels", channels)
        self.register_buffer("bias", torch.zeros(out) if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        axis = x.ndim - self.axes - 1  # an image may come without a batch
        y = self.inner(x.index_select(axis, self.channels))
        shape = list(y.shape)
        shape[axis] = self.out
        whole = self.bias.to(y.dtype).view(-1, *[1] * self.axes).expand(shape)
        return whole.index_add(axis, self.filters, y)


class Rows(nn.Module):
    """In the place of a ``torch.nn.Embedding``: rows are made when they are looked up."""

    def __init__(self, node: Node, dtype: torch.dtype, padding: int | None, scale: Tensor | None) -> None:
        super().__init__()
        self.node, self.dtype, self.padding_idx = node, dtype, padding
        self.num_embeddings, self.embedding_dim = node.shape
        self.scale: Tensor | None
        self.register_buffer("scale", scale)

    @property
    def weight(self) -> Tensor:
        """The whole table, made at each call."""
        return self.node.dense().to(self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.node.rows(ids.reshape(-1)).to(self.dtype).view(*ids.shape, self.embedding_dim)
        return rows if self.scale is None else rows * self.scale.to(rows.dtype)
