"""Structure: parts of a network that can be taken out whole, leaving a smaller network of the same kind.

A *unit* is what goes or stays as one: a neuron of a feed-forward part, a head of attention with its keys and
values, a block. Units of one kind in one block form a group. They are written by rows of some matrices and
read by columns of one,

    y = W x = sum_u W[:, u] x[u],

so a technique of scope ``structure`` needs no more than W, what calibration saw arriving at it, and the
norms of what writes each unit. What leaving units out means for tensors and configuration is known to
``models.shrunk``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rarefy.core.nouns import Evidence

UNITS = ("neurons", "heads", "queries")


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """The units of one kind in one block.

    role: neurons, heads or queries. unit: [in] which unit each column of ``reader`` belongs to. reader: the
    matrix [out, in] that reads them. written: root of the summed squares of all rows that write each unit,
    [units]. evidence: of the reader, removal: predicted KL per token when that unit alone goes (None: the
    technique asked for none). runs: units stand in as many runs of neighbours, of which each keeps as many
    (queries that share keys and values).
    """

    site: str
    role: str
    block: int
    unit: Int64[Tensor, " in_"]
    reader: Float[Tensor, "out in_"]
    written: Float[Tensor, " units"]
    evidence: Evidence | None = None
    removal: Float[Tensor, " units"] | None = None
    runs: int = 1

    @property
    def units(self) -> int:
        """How many units there are."""
        return self.written.numel()

    @property
    def read(self) -> Float[Tensor, " units"]:
        """The norm of what each unit is read with."""
        columns = self.reader.square().sum(0)
        return torch.zeros(self.units).index_add_(0, self.unit, columns).sqrt()

    def dearest(self, scores: Float[Tensor, " units"], count: int) -> Int64[Tensor, " kept"]:
        """The ``count`` units of the highest scores, as many in every run, sorted; of equals the first.

        Of four queries the first two share keys and values, and so do the others:

        >>> ones = torch.ones(4)
        >>> group = UnitGroup("o_proj", "queries", 0, torch.arange(4), torch.diag(ones), ones, runs=2)
        >>> group.dearest(torch.tensor([1.0, 2.0, 9.0, 8.0]), 2)
        tensor([1, 2])
        """
        order = scores.view(self.runs, -1).argsort(dim=1, descending=True, stable=True)
        starts = torch.arange(0, self.units, self.units // self.runs)
        kept: Tensor = (order[:, :count // self.runs] + starts[:, None]).flatten().sort().values
        return kept


@dataclass(frozen=True, eq=False)
class Passage:
    """One block as what it does to the residual stream on calibration text.

    influence: 1 - mean cosine between what enters and what leaves.
    """

    block: int
    influence: float


Damage = Callable[[frozenset[int]], float]  # KL to the whole network when some blocks are left out


@dataclass(frozen=True, eq=False)
class Stack:
    """The weights of one role in several blocks, first to last, and what arrives at each (None: not seen)."""

    role: str
    sites: tuple[str, ...]
    weights: Float[Tensor, "layers out in_"]
    evidence: tuple[Evidence | None, ...]


@dataclass(frozen=True, eq=False)
class ExitAnswers:
    """What every exit says of some samples, the network's own answer last; labels where there are some."""

    logits: Float[Tensor, "exits samples classes"]
    labels: Int64[Tensor, " samples"] | None = None


@dataclass(frozen=True)
class ExitRule:
    """When to stop: where the certainty reaches ``threshold`` (infinity: never). loss: what it cost where it
    was calibrated, bound: what it is guaranteed to stay below, note: what happened if nothing qualified."""

    threshold: float
    loss: float
    bound: float
    note: str = ""


@dataclass(frozen=True, eq=False)
class KeyHeads:
    """The heads of keys and values of one block.

    key, value: their rows, [heads, width, in], biases as a last column where there are any.
    """

    site: str
    block: int
    key: Float[Tensor, "heads width in_"]
    value: Float[Tensor, "heads width in_"]


@dataclass(frozen=True, eq=False)
class KeyValues:
    """What makes the keys and the values of one block, as one matrix.

    weight: the rows of keys above those of values, [2 * heads * width, in]. evidence: what arrives, and what
    an error of each of these rows costs (None: the technique asked for neither).
    """

    site: str
    block: int
    weight: Float[Tensor, "rows in_"]
    evidence: Evidence | None = None


@dataclass(frozen=True, eq=False)
class Channels:
    """Channels of a network of any kind that go or stay together: filters, what normalises and reads them.

    absolute, square: sums of |w| and w^2 over all weights that write or read each channel. removal: predicted
    divergence of the answer, per sample, when that channel alone goes (None: not asked for). work:
    multiplications of one sample that go with one channel. reader: the matrix [out, in] of the only one that
    reads them, unit: [in] which channel each of its columns belongs to, evidence: of that reader (None:
    several read them, or nothing was asked for).
    """

    site: str
    absolute: Float[Tensor, " channels"]
    square: Float[Tensor, " channels"]
    work: float
    removal: Float[Tensor, " channels"] | None = None
    reader: Float[Tensor, "out in_"] | None = None
    unit: Int64[Tensor, " in_"] | None = None
    evidence: Evidence | None = None

    @property
    def count(self) -> int:
        """How many channels there are."""
        return self.square.numel()


@dataclass(frozen=True, eq=False)
class Residual:
    """The stream between the blocks: what its norms pass on, [width], as second moment over tokens and norms.

    The trace of ``moment`` is the width: every token counts alike.
    """

    site: str
    moment: Float[Tensor, "width width"]


@runtime_checkable
class Slicing(Protocol):
    """A technique that narrows the stream between the blocks.

    ``basis``: the directions that stay, [width, kept], orthonormal columns.
    """

    scope: ClassVar[str]
    edits: ClassVar[tuple[type[Residual], ...]]
    needs: ClassVar[frozenset[str]]

    def basis(self, stream: Residual) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Tokens:
    """The rows of an embedding: how often each token stands in a text, and which must stay in any case."""

    site: str
    counts: Int64[Tensor, " rows"]
    fixed: Bool[Tensor, " rows"]


@runtime_checkable
class Trimming(Protocol):
    """A technique that takes tokens out of the vocabulary: rows of the embedding and of the head.

    ``keep``: the tokens that stay, sorted. text: what shows which are used (empty: the data of the recipe).
    """

    scope: ClassVar[str]
    edits: ClassVar[tuple[type[Tokens], ...]]
    needs: ClassVar[frozenset[str]]

    @property
    def text(self) -> tuple[str, ...]: ...

    def keep(self, tokens: Tokens) -> Tensor: ...


@runtime_checkable
class Narrowing(Protocol):
    """A technique that takes channels out of a network of any kind.

    ``keep``: for every group the channels that stay, sorted. ``refit``: as ``Thinning``'s.
    """

    scope: ClassVar[str]
    edits: ClassVar[tuple[type[Channels], ...]]

    @property
    def needs(self) -> frozenset[str]: ...

    def keep(self, groups: tuple[Channels, ...]) -> tuple[Tensor, ...]: ...

    def refit(self, group: Channels, kept: Tensor) -> Tensor | None: ...


@runtime_checkable
class Sharing(Protocol):
    """A technique that lets several blocks use one weight.

    ``share``: what all of them use, and for each block behind the first its own correction as factors [out,
    rank] and [rank, in] (None: it has none).
    """

    scope: ClassVar[str]
    edits: ClassVar[tuple[type[Stack], ...]]

    @property
    def needs(self) -> frozenset[str]: ...

    def chosen(self, role: str) -> bool: ...

    def groups(self, blocks: int) -> tuple[range, ...]: ...

    def share(self, stack: Stack) -> tuple[Tensor, tuple[tuple[Tensor, Tensor] | None, ...]]: ...


@runtime_checkable
class Merging(Protocol):
    """A technique that makes several heads of keys and values one.

    ``merge``: the matrix [groups, heads] by which rows of heads are averaged, the same for every channel of a
    head; group g serves the queries of the heads that were at its place.
    """

    scope: ClassVar[str]
    edits: ClassVar[tuple[type[KeyHeads], ...]]
    needs: ClassVar[frozenset[str]]

    def merge(self, heads: KeyHeads) -> Tensor: ...


@runtime_checkable
class Remembering(Protocol):
    """A technique that makes keys and values of one latent a token, which is all that a cache then holds.

    ``energies``: what each component of a block's latent is worth, falling. ``ranks``: how many components
    each block of so many rows keeps, from these. ``factors``: [rows, rank] and [rank, in].
    """

    scope: ClassVar[str]
    edits: ClassVar[tuple[type[KeyValues], ...]]

    @property
    def needs(self) -> frozenset[str]: ...

    def energies(self, block: KeyValues) -> Tensor: ...

    def ranks(self, site: str, rows: int, energies: tuple[Tensor, ...]) -> tuple[int, ...]: ...

    def factors(self, block: KeyValues, rank: int) -> tuple[Tensor, Tensor]: ...


@runtime_checkable
class Thinning(Protocol):
    """A technique that takes out units: a frozen dataclass whose fields are its settings.

    needs: of {"gram", "fisher", "removal"}. ``scores``: what leaving each unit out costs, [units]. ``refit``:
    the matrix [kept columns, in] whose transpose, W @ refit.T, makes the kept columns do the work of all
    (None: they stay as they are). spread: uniform (``count`` in every block) or global (``counts`` of all
    blocks, from their scores).
    """

    scope: ClassVar[str]
    edits: ClassVar[tuple[type[UnitGroup], ...]]
    needs: ClassVar[frozenset[str]]

    @property
    def units(self) -> str: ...

    @property
    def spread(self) -> str: ...

    def count(self, group: UnitGroup) -> int: ...

    def counts(self, scores: tuple[Tensor, ...]) -> tuple[int, ...]: ...

    def scores(self, group: UnitGroup) -> Tensor: ...

    def refit(self, group: UnitGroup, kept: Tensor) -> Tensor | None: ...


@runtime_checkable
class Shortening(Protocol):
    """A technique that takes out blocks.

    ``drop``: which ones, in the order of the network; ``damage`` measures any choice. fold: what becomes of
    them: "" (nothing), or the block before takes over their difference ("merge") or a linear account of them
    ("bridge"). ``bridge``: what is added to the matrix W of that block, [out, in], where ``moment`` [in, in]
    is that of its inputs x and ``missing`` [out, in] the sum of (what is wanted - what comes out) x^T.
    """

    scope: ClassVar[str]
    edits: ClassVar[tuple[type[Passage], ...]]
    needs: ClassVar[frozenset[str]]

    @property
    def fold(self) -> str: ...

    def drop(self, passages: tuple[Passage, ...], damage: Damage) -> tuple[int, ...]: ...

    def bridge(self, moment: Tensor, missing: Tensor) -> Tensor: ...
