"""What every decomposition shares: how much it keeps, how factors are stored, what it has to say.

A decomposition is asked for a size in one of three ways: ``rank`` (how many components), ``energy`` (the
share of the squared singular values that they hold) or ``ratio`` (the share of the leaf's present bits that
the factors may cost). ``Extent`` is that question, put once; its errors name site, value and remedy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.core.edit import Edited, Leaf
from rarefy.core.errors import EditError, RecipeError
from rarefy.core.nodes import Dense, Node
from rarefy.core.nouns import Choice, Option, Step
from rarefy.numerics.decompose import whitening

SLACK = 1e-12  # float64 sums of energies: a share of 1 must be reached
LADDER = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # shares of the weight's size, for the planner
ALIGNED = 8  # the planner's ranks are multiples of this, which kernels like


@dataclass(frozen=True)
class Extent:
    """How much of a decomposition to keep: exactly one of ``rank``, ``energy`` and ``ratio``.

    rank: number of components (a pair or more where a decomposition has several ranks). energy: least share
    of the squared singular values, (0, 1]. ratio: share of the leaf's bits, (0, 1]. multiple: the rank is one
    of these multiples, so that groups of columns divide it. default: the ratio when none of the three is
    given.
    """

    rank: int | Sequence[int] | None = None
    energy: float | None = None
    ratio: float | None = None
    multiple: int = 1
    default: float = 0.8

    def __post_init__(self) -> None:
        given = {"rank": self.rank, "energy": self.energy, "ratio": self.ratio}
        told = [f"{name}={value}" for name, value in given.items() if value is not None]
        if len(told) > 1:
            raise RecipeError(f"{' and '.join(told)}: give one of rank, energy and ratio, not {len(told)}")
        for name, share in (("energy", self.energy), ("ratio", self.ratio)):
            if share is not None and not 0 < share <= 1:
                raise RecipeError(f"{name}={share}: a share must lie in (0, 1]")
        if self.multiple < 1:
            raise RecipeError(f"multiple={self.multiple}: must be 1 or more")
        ranks = (self.rank,) if isinstance(self.rank, int) else tuple(self.rank or ())
        for rank in ranks:
            if rank < 1 or rank % self.multiple:
                whole = "" if self.multiple == 1 else f" and a multiple of {self.multiple}"
                raise RecipeError(f"rank={self.rank}: a rank must be 1 or more{whole}")

    def allowed(self, leaf: Leaf) -> int | None:
        """Bits that the factors may cost; None when the size is given by rank or energy."""
        if self.rank is not None or self.energy is not None:
            return None
        return int((self.default if self.ratio is None else self.ratio) * leaf.node.bits())

    def rank_for(self, leaf: Leaf, full: int, unit: int,
                 energies: Float[Tensor, " side"] | None = None) -> int:
        """The rank: at most ``full``, ``unit`` bits each; energies: squared singular values."""
        if isinstance(self.rank, int):
            if self.rank > full:
                raise EditError(f"{leaf.site}: rank={self.rank} is above the full rank {full}; "
                                f"pass rank={full // self.multiple * self.multiple or 1} or less")
            return self.rank
        largest = full // self.multiple * self.multiple
        if largest == 0:
            raise EditError(f"{leaf.site}: the full rank {full} holds no multiple of {self.multiple}; "
                            "pass a smaller multiple")
        if self.energy is not None and energies is not None:
            wanted = rank_of_energy(energies, self.energy)
            return min(-(-wanted // self.multiple) * self.multiple, largest)
        allowed = self.allowed(leaf)
        assert allowed is not None
        self.afford(leaf, unit * self.multiple, allowed)
        return min(allowed // unit // self.multiple * self.multiple, largest)

    def afford(self, leaf: Leaf, least: int, allowed: int) -> None:
        """Refuse a budget below the ``least`` bits that any factors take."""
        if least <= allowed:
            return
        bits = leaf.node.bits()
        told = self.default if self.ratio is None else self.ratio
        remedy = (f"pass ratio={-(-least * 1000 // bits) / 1000:g} or more" if least <= bits
                  else "pass a smaller multiple" if self.multiple > 1
                  else "no factors are smaller than this weight, leave it as it is")
        raise EditError(f"{leaf.site}: ratio={told:g} of {bits} bits allows {allowed}, and the smallest "
                        f"factors take {least}; {remedy}")


def rank_of_energy(energies: Float[Tensor, " side"], share: float) -> int:
    """The fewest leading components that hold ``share`` of all energy; 1 of a weight that is zero."""
    held = energies.cumsum(0)
    enough = held >= share * held[-1] * (1 - SLACK)
    return int(enough.int().argmax()) + 1


def ladder(leaf: Leaf, choices: Mapping[str, Choice], technique: str, cost: Float[Tensor, " side"]
           ) -> Iterator[Option]:
    """The planner's options of low rank where a target holds any tree, factors in float16.

    cost: predicted damage of leaving each component out, by falling energy.
    """
    tail = cost.flip(0).cumsum(0).flip(0)
    out, columns = leaf.target.shape
    ranks = {int(share * out * columns / (out + columns)) // ALIGNED * ALIGNED for share in LADDER}
    for name, choice in choices.items():
        for rank in sorted(ranks - {0}):
            if choice.stored is None and rank < len(tail):
                steps = (Step(technique, (leaf.site,), {"rank": rank}),
                         Step("cast", (leaf.site,), {"dtype": "float16"}))
                yield Option(leaf.site, name, rank * (out + columns) * 2, float(tail[rank]), steps)


def wanted(leaf: Leaf) -> Float[Tensor, "out in_"]:
    """The leaf's target; rows and columns that a mask drops whole are zero, so that they take no rank."""
    if not bool(torch.isfinite(leaf.target).all()):
        raise EditError(f"{leaf.site}: the weight holds NaN or infinity and has no decomposition; "
                        "repair the model's file")
    if leaf.keep is None:
        return leaf.target
    return leaf.target * leaf.keep.any(1, keepdim=True) * leaf.keep.any(0)


def whitened(leaf: Leaf, damping: float) -> tuple[Float[Tensor, "in_ in_"] | None, tuple[str, ...]]:
    """C with ``C C^T`` the damped second moment of one input, and what there is to say about it.

    None without evidence, or when no rung of damping makes the Gram positive definite.
    """
    if leaf.evidence is None:
        return None, ("no calibration evidence: all inputs count alike",)
    tokens, columns = leaf.evidence.tokens, leaf.evidence.gram.shape[0]
    C, used = whitening(leaf.evidence.gram / max(tokens, 1), damping)
    notes = [f"{tokens} calibration tokens for a Gram of rank {columns}"] if tokens < columns else []
    if C is None:
        notes.append(f"Gram not positive definite at damping {used:g}: all inputs count alike")
    elif used > damping:
        notes.append(f"damping raised to {used:g}")
    return C, tuple(notes)


def dtype_of(leaf: Leaf) -> torch.dtype:
    """What factors of this leaf are stored in: what the leaf was stored in."""
    return leaf.node.values.dtype if isinstance(leaf.node, Dense) else torch.float32


def stored(site: str, values: Tensor, dtype: torch.dtype) -> Dense:
    """A factor in its stored type. Float16's range ends at 65504: what overflows is refused by name."""
    kept = values.to(dtype).contiguous()
    if not bool(torch.isfinite(kept).all()):
        name = str(dtype).removeprefix("torch.")
        raise EditError(f"{site}: a factor reaches {float(values.abs().max()):g} and does not fit {name}; "
                        "cast the weight to bfloat16 or float32 first")
    return Dense(kept)


def edited(leaf: Leaf, node: Node, *notes: str) -> Edited:
    """The node with its notes, and with those that hold for every decomposition."""
    said = [note for note in notes if note]
    before, after = leaf.node.bits(), node.bits()
    if after >= before:
        said.append(f"the factors take {after / before:.0%} of the bits they replace")
    if leaf.keep is not None:
        said.append("the factors lie under a mask: it costs its bits, and runtimes must multiply them out")
    return Edited(node, "; ".join(said))
