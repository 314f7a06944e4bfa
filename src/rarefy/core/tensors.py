"""Nodes of tensor decompositions: Tucker, CP and tensor-train.

They stand for matrices "out in" like every weight. A convolution's row is its kernel flattened, (in,
height, width); a decomposition sees the axes again. All factors are matrices, so whatever edits a matrix
edits a factor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import final

import torch
from torch import Tensor

from rarefy.core.nodes import Node
from rarefy.numerics.decompose import khatri_rao


@final
@dataclass(frozen=True, eq=False)
class Tucker(Node):
    """Tucker-2 of a convolution: channels through ``right``, a small kernel, channels through ``left``.

    left [out, rank_out]; core [rank_out, rank_in * window]; right [in, rank_in]; window: the kernel's
    spatial axes, (height, width). ``W[o, i, w] = sum_ab left[o, a] core[a, b, w] right[i, b]``.
    """

    left: Node
    core: Node
    right: Node
    window: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.left.shape[0], self.right.shape[0] * prod(self.window))

    def dense(self) -> Tensor:
        return self.left.dense() @ self._inner()

    def rows(self, index: Tensor) -> Tensor:
        return self.left.rows(index) @ self._inner()

    def _inner(self) -> Tensor:
        return torch.einsum("abw,ib->aiw", self._core(), self.right.dense()).flatten(1)

    def _core(self) -> Tensor:
        return self.core.dense().view(self.core.shape[0], self.right.shape[1], -1)

    def bits(self) -> int:
        return sum(child.bits() for child in self.children())

    def select(self, axis: int, index: Tensor) -> Tucker:
        if axis == 0:
            return replace(self, left=self.left.select(0, index))
        window = prod(self.window)
        whole = index.view(-1, window) if index.numel() % window == 0 else None
        if whole is None or not torch.equal(whole, whole[:, :1] // window * window + torch.arange(window)):
            raise ValueError(f"columns of a kernel of {window} can only be kept channel by channel")
        return replace(self, right=self.right.select(0, whole[:, 0] // window))

    def children(self) -> tuple[Node, ...]:
        return (self.left, self.core, self.right)

    def rebuilt(self, children: tuple[Node, ...]) -> Tucker:
        left, core, right = children
        return Tucker(left, core, right, self.window)

    def behind(self, index: int) -> Tensor | None:
        if index == 0:
            return self._inner()
        if index == 1:
            return torch.kron(self.right.dense().T.contiguous(), torch.eye(prod(self.window)))
        return None

    def fitted(self, index: int, target: Tensor) -> Tensor:
        tensor = target.double().view(target.shape[0], self.right.shape[0], -1)
        left, right, core = self.left.dense().double(), self.right.dense().double(), self._core().double()
        if index == 0:
            inner = torch.einsum("abw,ib->aiw", core, right).flatten(1)
            outer: Tensor = tensor.flatten(1) @ torch.linalg.pinv(inner)
            return outer.float()
        if index == 1:
            fitted = torch.einsum("ao,oiw,bi->abw", torch.linalg.pinv(left), tensor, torch.linalg.pinv(right))
            return fitted.flatten(1).float()
        inner = torch.einsum("oa,abw->bow", left, core).flatten(1)
        mixing: Tensor = tensor.permute(1, 0, 2).flatten(1) @ torch.linalg.pinv(inner)
        return mixing.float()


@final
@dataclass(frozen=True, eq=False)
class CP(Node):
    """A sum of ``rank`` outer products: ``W[o, i, h, w] = sum_r A[o, r] B[i, r] C[h, r] D[w, r]``.

    factors: one matrix [axis, rank] per axis of the kernel, the output's first.
    """

    factors: tuple[Node, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.factors[0].shape[0], prod(factor.shape[0] for factor in self.factors[1:]))

    def dense(self) -> Tensor:
        return self.factors[0].dense() @ khatri_rao([f.dense() for f in self.factors[1:]]).T

    def rows(self, index: Tensor) -> Tensor:
        return self.factors[0].rows(index) @ khatri_rao([f.dense() for f in self.factors[1:]]).T

    def bits(self) -> int:
        return sum(factor.bits() for factor in self.factors)

    def select(self, axis: int, index: Tensor) -> CP:
        if axis == 0:
            return CP((self.factors[0].select(0, index), *self.factors[1:]))
        raise ValueError("columns of a CP decomposition cannot be kept one by one; select before decomposing")

    def children(self) -> tuple[Node, ...]:
        return self.factors

    def rebuilt(self, children: tuple[Node, ...]) -> CP:
        return CP(children)

    def behind(self, index: int) -> Tensor | None:
        return khatri_rao([f.dense() for f in self.factors[1:]]).T if index == 0 else None

    def fitted(self, index: int, target: Tensor) -> Tensor:
        tensor = target.double().view([factor.shape[0] for factor in self.factors])
        others = [f.dense().double() for k, f in enumerate(self.factors) if k != index]
        unfolded = tensor.movedim(index, 0).flatten(1)
        fitted: Tensor = unfolded @ torch.linalg.pinv(khatri_rao(others)).T
        return fitted.float()


@final
@dataclass(frozen=True, eq=False)
class TensorTrain(Node):
    """A matrix with rows and columns cut into digits: ``W[(o1..od), (i1..id)] = G1[o1,i1] ... Gd[od,id]``.

    cores: core k is the matrix [rank_k * rows_k, columns_k * rank_k+1], the first and last rank being 1.
    rows, columns: the digits' bases; their products are out and in.
    """

    cores: tuple[Node, ...]
    row_digits: tuple[int, ...]
    column_digits: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (prod(self.row_digits), prod(self.column_digits))

    def _core(self, k: int) -> Tensor:
        """[rank, rows, columns, next rank]"""
        m, n = self.row_digits[k], self.column_digits[k]
        values = self.cores[k].dense()
        return values.view(values.shape[0] // m, m, n, values.shape[1] // n)

    def dense(self) -> Tensor:
        return _chain([self._core(k) for k in range(len(self.cores))])[0, :, :, 0]

    def rows(self, index: Tensor) -> Tensor:
        """Rows by their digits: every distinct prefix is multiplied out once, never the matrix."""
        out = torch.ones(1, 1, 1, device=index.device)  # [prefixes, columns so far, rank]
        known = torch.zeros(1, dtype=torch.int64, device=index.device)
        place = torch.zeros_like(index)
        for k, base in enumerate(self.row_digits):
            prefixes, place = torch.unique(index // prod(self.row_digits[k + 1:]), return_inverse=True)
            out = out[torch.searchsorted(known, prefixes // base)]
            # prefixes that end in the same digit meet the same slice of the core: one product for all
            order = (prefixes % base).argsort(stable=True)
            counts = torch.bincount(prefixes % base, minlength=base).tolist()
            core = self._core(k)
            pieces = [torch.einsum("pcr,rns->pcns", piece, core[:, digit]).flatten(1, 2)
                      for digit, piece in enumerate(torch.split(out[order], counts))]
            out, known = torch.cat(pieces)[order.argsort()], prefixes
        return out[place, :, 0]

    def bits(self) -> int:
        return sum(core.bits() for core in self.cores)

    def select(self, axis: int, index: Tensor) -> Node:
        raise ValueError("rows and columns of a tensor train cannot be kept one by one; "
                         "select before decomposing")

    def children(self) -> tuple[Node, ...]:
        return self.cores

    def rebuilt(self, children: tuple[Node, ...]) -> TensorTrain:
        return replace(self, cores=children)

    def fitted(self, index: int, target: Tensor) -> Tensor:
        cores = [self._core(k).double() for k in range(len(self.cores))]
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        before, after = _chain([one, *cores[:index]]), _chain([*cores[index + 1:], one])
        m, n = self.row_digits[index], self.column_digits[index]
        tensor = target.double().view(before.shape[1], m, after.shape[1], before.shape[2], n, after.shape[2])
        unfolded = tensor.permute(0, 3, 1, 4, 2, 5).reshape(before.shape[1] * before.shape[2], m * n, -1)
        left = torch.linalg.pinv(before[0].flatten(0, 1))  # [rank, before]
        right = torch.linalg.pinv(after[..., 0].flatten(1))  # [after, rank]
        fitted = torch.einsum("rp,pmq,qs->rms", left, unfolded, right)
        rank, follow = left.shape[0], right.shape[1]
        return fitted.reshape(rank * m, n * follow).float()


def _chain(cores: list[Tensor]) -> Tensor:
    """Cores [r, m, n, s] joined to one [first r, prod m, prod n, last s]."""
    return reduce(lambda a, b: torch.einsum("rmns,sopt->rmonpt", a, b).reshape(
        a.shape[0], a.shape[1] * b.shape[1], a.shape[2] * b.shape[2], b.shape[3]), cores)
