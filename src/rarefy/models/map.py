"""The map of a model: its sites, what else it holds, and where its blocks are.

A *site* is a weight matrix that techniques rewrite; everything else (norms, biases, learnt positions)
is a *param* and is carried along. A path is the matrix's name in the state dict of transformers. When
input embedding and output head are one matrix there is one site, of role ``embed``, and ``tied`` says so.

Techniques see every weight as a matrix [out, in]; ``matrix`` and ``stored`` of a site go there and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod

from torch import Tensor

from rarefy.core.errors import ModelError
from rarefy.models.families import Family


@dataclass(frozen=True)
class Site:
    """One matrix: ``shape`` is (out, in) whatever the file's order; ``block`` is None outside the blocks.

    transposed: the file holds [in, out]. kernel: the axes that a row of a convolution is flattened from,
    (in / groups, height, width).
    """

    path: str
    role: str
    shape: tuple[int, int]
    block: int | None
    transposed: bool = False
    kernel: tuple[int, ...] = ()

    @property
    def layer(self) -> str:
        """The module that holds it, by name."""
        return self.path.removesuffix("weight").removesuffix(".")

    def matches(self, pattern: str) -> bool:
        """Whether a pattern means it: a glob over paths, or ``role:NAME``."""
        if pattern.startswith("role:"):
            return self.role == pattern.removeprefix("role:")
        return fnmatchcase(self.path, pattern)

    def matrix(self, values: Tensor) -> Tensor:
        """The weight as a matrix [out, in], from how the file holds it."""
        return values.T if self.transposed else values.flatten(1) if self.kernel else values

    def stored(self, matrix: Tensor) -> Tensor:
        """The weight as the file holds it, from a matrix [out, in]."""
        if self.transposed:
            return matrix.T
        return matrix.reshape(self.shape[0], *self.kernel) if self.kernel else matrix


@dataclass(frozen=True)
class Param:
    """One tensor that no technique rewrites."""

    path: str
    shape: tuple[int, ...]


class Map:
    """Sites and params in the order of the network. Abstract."""

    sites: tuple[Site, ...]
    params: tuple[Param, ...]
    blocks: int

    @cached_property
    def by_path(self) -> dict[str, Site]:
        """The sites by their paths."""
        return {site.path: site for site in self.sites}

    @property
    def parameters(self) -> int:
        """How many numbers the model holds, a shared weight counted once."""
        return sum(prod(site.shape) for site in self.sites) + sum(prod(param.shape) for param in self.params)

    def in_block(self, index: int) -> tuple[Site, ...]:
        """The sites of one block."""
        return tuple(site for site in self.sites if site.block == index)


@dataclass(frozen=True)
class ModelMap(Map):
    """The map of a causal language model: embedding first, head last."""

    family: Family
    sites: tuple[Site, ...]
    params: tuple[Param, ...]
    blocks: int
    tied: bool

    @property
    def head(self) -> Site:
        """The site that makes the logits: the head, or the embedding when they are tied."""
        return next(site for site in self.sites if site.role == ("embed" if self.tied else "head"))


def map_model(family: Family, shapes: Mapping[str, tuple[int, ...]], blocks: int, tied: bool) -> ModelMap:
    """The map of a model of ``family`` whose state dict has these ``shapes`` (names of transformers)."""
    sites, params = [], []
    for path, shape in shapes.items():
        role = _role(family, path)
        if role is None:
            params.append(Param(path, shape))
        elif role != "head" or not tied:
            inside = family.inside(path)
            flip = family.transposed and inside is not None
            rows, columns = shape[::-1] if flip else shape
            sites.append(Site(path, role, (rows, columns), inside[0] if inside else None, flip))
    tables = dict(family.tables)
    missed = [p.path for p in params if len(p.shape) > 1 and p.path.rpartition(".")[0] not in tables]
    if missed:
        raise ModelError(f"{missed[0]}: a matrix that the {family.name} family does not have; "
                         "this variant of the architecture is not supported")
    return ModelMap(family, tuple(sites), tuple(params), blocks, tied)


def _role(family: Family, path: str) -> str | None:
    matrix = family.matrix(path)
    if matrix is not None:
        return matrix.role
    return {f"{family.embed}.weight": "embed", f"{family.head}.weight": "head"}.get(path)
