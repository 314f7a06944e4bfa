"""What tree.json of the native format says: which node stands where, its shape, its grid.

Nothing in it points anywhere: the streams' names follow from a node's way down its tree. Whatever is not
named here is refused, and so is what is named but of another type.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

Shape = Annotated[tuple[PositiveInt, ...], Field(max_length=8)]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StoredSpec(_Spec):
    """``numerics.grids.Stored`` in JSON."""

    dtype: str
    bits: int = Field(ge=0, le=8)
    low: int
    over: NonNegativeInt
    relative: bool


class GridSpec(_Spec):
    """``numerics.grids.Grid`` in JSON."""

    name: str
    levels: tuple[float, ...] = Field(min_length=2, max_length=256)
    group: NonNegativeInt
    scale: StoredSpec
    zero: StoredSpec | None


class DenseSpec(_Spec):
    node: Literal["dense"] = "dense"
    shape: Shape
    dtype: str


class QuantizedSpec(_Spec):
    """coded: the codes are coded as ``numerics.coding`` says, not packed at the grid's bits."""

    node: Literal["quantized"] = "quantized"
    shape: tuple[PositiveInt, PositiveInt]
    grid: NonNegativeInt
    coded: bool = False
    scale: NodeSpec
    zero: NodeSpec | None


class MaskedSpec(_Spec):
    node: Literal["masked"] = "masked"
    shape: Shape
    inner: NodeSpec


class ProductSpec(_Spec):
    node: Literal["product"] = "product"
    left: NodeSpec
    right: NodeSpec


class SumSpec(_Spec):
    node: Literal["sum"] = "sum"
    terms: tuple[NodeSpec, ...] = Field(min_length=1)


class SharedSpec(_Spec):
    node: Literal["shared"] = "shared"
    path: str


class ClusteredSpec(_Spec):
    """shape: of the index. codebook: [books, values, d]."""

    node: Literal["clustered"] = "clustered"
    shape: tuple[PositiveInt, PositiveInt]
    codebook: DenseSpec


class HashedSpec(_Spec):
    node: Literal["hashed"] = "hashed"
    shape: tuple[PositiveInt, PositiveInt]
    seed: int = Field(ge=0, lt=1 << 32)
    buckets: DenseSpec


class TuckerSpec(_Spec):
    node: Literal["tucker"] = "tucker"
    window: Shape
    left: NodeSpec
    core: NodeSpec
    right: NodeSpec


class CPSpec(_Spec):
    node: Literal["cp"] = "cp"
    factors: tuple[NodeSpec, ...] = Field(min_length=2, max_length=8)


class TensorTrainSpec(_Spec):
    node: Literal["tensor_train"] = "tensor_train"
    rows: Shape
    columns: Shape
    cores: tuple[NodeSpec, ...] = Field(min_length=1, max_length=8)


NodeSpec = Annotated[DenseSpec | QuantizedSpec | MaskedSpec | ProductSpec | SumSpec | SharedSpec
                     | ClusteredSpec | HashedSpec | TuckerSpec | CPSpec | TensorTrainSpec,
                     Field(discriminator="node")]


class TreeFile(_Spec):
    """tree.json as a whole."""

    format: Literal["rarefy"] = "rarefy"
    version: Literal[2] = 2
    sha256: str
    grids: tuple[GridSpec, ...]
    trees: dict[str, NodeSpec]
    params: dict[str, DenseSpec]
    files: tuple[str, ...]


for _spec in (QuantizedSpec, MaskedSpec, ProductSpec, SumSpec, TuckerSpec, CPSpec, TensorTrainSpec, TreeFile):
    _spec.model_rebuild()
