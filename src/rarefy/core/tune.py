"""``tune``'s leaf rules: a tree becomes a module that trains, and becomes a tree again.

``soften`` walks a weight's tree as ``edit`` does and turns its leaves into ``Soft`` modules; calling the
result gives the dense matrix, differentiable in what moves. What moves is a choice of *movers*: any of

    weights    the values of Dense leaves that are no factor (under a mask: those that it keeps)
    factors    the values of Dense leaves below a product or a tensor decomposition
    adapters   the same where the product is a further term of a sum: base + adapter, rounded + repair
    scales     scales and zeros of Quantized leaves, codes fixed
    codebooks  values of Clustered leaves, indices fixed
    buckets    values of Hashed leaves

or a technique that trains: it says itself how its leaves soften (a straight-through estimator, mask
scores, gates). ``harden`` gives the tree back, of the same shape and with what training found.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rarefy.core.codebooks import Clustered, Hashed
from rarefy.core.edit import Leaf
from rarefy.core.errors import EditError, RecipeError, did_you_mean
from rarefy.core.nodes import Dense, Masked, Node, Product, Quantized, Shared, Sum

MOVERS = ("weights", "factors", "adapters", "scales", "codebooks", "buckets")
PACE = 10.0  # how much faster than weights scales learn: a rate of 1e-4 moves them by a thousandth a step


class Soft(nn.Module):
    """A weight in training: ``forward()`` gives its matrix [out, in] in float32. Abstract.

    What lasts from one step to the next is a parameter or a persistent buffer: these are what a checkpoint
    holds. Noise comes from torch's default generator, which the loop seeds anew for every batch. note: what
    was done otherwise than asked; it goes to the receipt.
    """

    note: str = ""

    def forward(self) -> Tensor:
        raise NotImplementedError

    def penalty(self) -> Tensor:
        """What is added to the loss (regularisers that make gates close); in nats per example."""
        return torch.zeros(())

    def update(self, step: int, total: int) -> None:
        """Called after optimizer step ``step`` of ``total``: schedules (masks that grow) move here."""

    def settled(self) -> bool:
        """Whether this is what was asked for. Not while masks grow: what a gate likes best then is a network
        of which nothing has been dropped."""
        return True

    def paces(self) -> dict[str, float]:
        """By name of a parameter of this very module: how much faster than weights it learns (default 1).

        The optimizer's steps are of one size for all numbers; what is much smaller or larger than a weight
        says so here. These parameters are not decayed.
        """
        return {}

    def harden(self) -> Node:
        """The node that this module has become."""
        raise NotImplementedError


@runtime_checkable
class Trainer(Protocol):
    """A technique that works during training: one file under ``techniques/``, a frozen dataclass."""

    edits: ClassVar[tuple[type[Node], ...]]
    scope: ClassVar[str]  # "training"

    def soften(self, leaf: Leaf, generator: torch.Generator) -> Soft: ...


class Fixed(Soft):
    """A leaf that does not move."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.node = node
        self.register_buffer("values", node.dense(), persistent=False)

    def forward(self) -> Tensor:
        values: Tensor = self.get_buffer("values")
        return values

    def harden(self) -> Node:
        return self.node


class Moving(Soft):
    """A leaf whose own numbers move."""

    def __init__(self, node: Dense | Clustered | Hashed) -> None:
        super().__init__()
        self.node: Node = node
        for name, value in _numbers(node).items():
            self.register_parameter(f"moving_{name}", nn.Parameter(value.detach().to(torch.float32).clone()))

    def forward(self) -> Tensor:
        moving: dict[str, Tensor] = {name: self.get_parameter(f"moving_{name}")
                                     for name in _numbers(self.node)}
        self.node = on(self.node, next(iter(moving.values())).device)
        return _with_numbers(self.node, moving).dense()

    def harden(self) -> Node:
        return _with_numbers(self.node, {
            name: self.get_parameter(f"moving_{name}").detach().to(value.dtype).clone()
            for name, value in _numbers(self.node).items()})


class Rescaled(Soft):
    """Codes whose scales, and zeros stored as plain numbers, move in parts of a scale:

        s = s0 (1 + m),      z = z0 + s0 n      (z0 + n, where a zero is a multiple of the scale)

    m and n are as the stored scales [out, groups], and begin at 0. A step means the same to a group of small
    weights as to one of large ones; and gradients, which are sums over a group, get the size of others, so
    that one bound on the norm of them all suits all. pace: how much faster than weights they learn.
    """

    def __init__(self, node: Quantized, pace: float = PACE) -> None:
        super().__init__()
        self.pace = pace
        self.node: Node = node
        self.relative = node.grid.zero is not None and node.grid.zero.relative
        for name, value in _numbers(node).items():
            self.register_parameter(f"moving_{name}", nn.Parameter(torch.zeros_like(value.float())))

    def forward(self) -> Tensor:
        return _with_numbers(self.node, self._now()).dense()

    def paces(self) -> dict[str, float]:
        """They are parts of a scale, and most weights are small."""
        return {f"moving_{name}": self.pace for name in _numbers(self.node)}

    def harden(self) -> Node:
        now = {name: value.detach() for name, value in self._now().items()}
        return _with_numbers(self.node, {name: now[name].to(value.dtype)
                                         for name, value in _numbers(self.node).items()})

    def _now(self) -> dict[str, Tensor]:
        """The numbers as they are at this step, in float32."""
        moved = {name: self.get_parameter(f"moving_{name}") for name in _numbers(self.node)}
        self.node = on(self.node, moved["scale"].device)
        first = _numbers(self.node)
        scale = first["scale"].float()
        return {name: first[name].float() + (m if name == "zero" and self.relative else scale * m)
                for name, m in moved.items()}


class Bucketed(Moving):
    """A hashed leaf whose buckets move. Positions are hashed once: that costs far more than the look-up."""

    def __init__(self, node: Hashed) -> None:
        super().__init__(node)
        place, sign = node.places(torch.arange(node.size[0], device=node.buckets.device))
        self.register_buffer("place", place, persistent=False)
        self.register_buffer("sign", sign, persistent=False)

    def forward(self) -> Tensor:
        buckets: Tensor = self.get_parameter("moving_buckets")
        return buckets[self.get_buffer("place")] * self.get_buffer("sign")


class Following(Soft):
    """A weight that is stored at another site: it has no numbers of its own and moves with its owner."""

    def __init__(self, node: Shared) -> None:
        super().__init__()
        self.node = node
        self.owner: tuple[Soft, ...] = ()  # no submodule: it is trained and saved where it is stored

    def forward(self) -> Tensor:
        values: Tensor = self.owner[0]() if self.owner else self.node.dense()
        return values

    def harden(self) -> Node:
        return Shared(self.node.path, self.owner[0].harden()) if self.owner else self.node


class Composed(Soft):
    """An inner node over softened children."""

    def __init__(self, node: Node, children: list[Soft]) -> None:
        super().__init__()
        self.node, self.below = node, nn.ModuleList(children)

    def forward(self) -> Tensor:
        below = tuple(Dense(child()) for child in self.below)
        self.node = on(self.node, below[0].values.device)
        return self.node.rebuilt(below).dense()

    def penalty(self) -> Tensor:
        return sum((child.penalty() for child in self._children()), torch.zeros(()))

    def update(self, step: int, total: int) -> None:
        for child in self._children():
            child.update(step, total)

    def settled(self) -> bool:
        return all(child.settled() for child in self._children())

    def harden(self) -> Node:
        after = tuple(child.harden() for child in self._children())
        match self.node, after:
            case Masked(keep=own), (Masked(keep=further, inner=rest),):  # two masks in a row are one
                return Masked(own & further, rest)
        return self.node.rebuilt(after)

    def _children(self) -> list[Soft]:
        return [child for child in self.below if isinstance(child, Soft)]


def soften(leaf: Leaf, moves: frozenset[str], technique: Trainer | None = None,
           generator: torch.Generator | None = None, *, still: bool = False) -> Soft:
    """The tree ``leaf.node`` as a module. moves: a choice of MOVERS, for the leaves that ``technique`` (if
    any) does not edit. ``leaf.target``: the original weight. still: a weight in which nothing moves is given
    back as ``Fixed``; without it that is an EditError."""
    wrong = sorted(moves - set(MOVERS))
    if wrong:
        raise RecipeError(f"nothing called {wrong[0]!r} can be trained{did_you_mean(wrong[0], list(MOVERS))}")
    walk = _Softening(moves, technique, generator or torch.Generator())
    soft = walk.node(leaf, "weights")
    if not any(True for _ in soft.parameters()):
        if still:
            follows = any(isinstance(part, Following) for part in soft.modules())
            return soft if follows else Fixed(leaf.node)
        what = ", ".join(sorted(moves)) or "this technique"
        raise EditError(f"{leaf.site}: nothing in it moves under {what}")
    return soft


class _Softening:
    def __init__(self, moves: frozenset[str], technique: Trainer | None, generator: torch.Generator) -> None:
        self.moves, self.technique, self.generator = moves, technique, generator

    def node(self, leaf: Leaf, inside: str) -> Soft:
        """inside: which mover moves the plain values here."""
        node = leaf.node
        if self.technique is not None and isinstance(node, self.technique.edits):
            return self.technique.soften(leaf, self.generator)
        match node:
            case Shared():
                return Following(node)
            case Dense():
                return Moving(node) if inside in self.moves else Fixed(node)
            case Quantized():
                return Rescaled(node) if "scales" in self.moves else Fixed(node)
            case Clustered():
                return Moving(node) if "codebooks" in self.moves else Fixed(node)
            case Hashed():
                return Bucketed(node) if "buckets" in self.moves else Fixed(node)
        below = node.children()
        if not below:
            return Fixed(node)
        return Composed(node, [self.node(self._below(leaf, k), _inside(node, k, inside))
                               for k in range(len(below))])

    def _below(self, leaf: Leaf, index: int) -> Leaf:
        """One child as a leaf, with what it should stand for given the others."""
        child = leaf.node.children()[index]
        match leaf.node:
            case Masked(keep=own):
                keep = own if leaf.keep is None else own & leaf.keep
                return replace(leaf, node=child, keep=keep)
            case Sum():
                return replace(leaf, node=child, target=leaf.node.fitted(index, leaf.target))
            case Product():
                return replace(leaf, node=child, target=child.dense(), keep=None, evidence=None, kernel=())
        return replace(leaf, node=child, target=child.dense(), keep=None, evidence=None, kernel=())


def on(node: Node, device: torch.device) -> Node:
    """The same node with its tensors on a device; itself, if they are there."""
    moved: dict[str, object] = {}
    for each in fields(node):  # type: ignore[arg-type]
        match getattr(node, each.name):
            case Tensor() as value if value.device != device:
                moved[each.name] = value.to(device)
            case Node() as child if (there := on(child, device)) is not child:
                moved[each.name] = there
            case tuple() as several if several and isinstance(several[0], Node):
                there_too = tuple(on(child, device) for child in several)
                if any(a is not b for a, b in zip(there_too, several, strict=True)):
                    moved[each.name] = there_too
    return replace(node, **moved) if moved else node  # type: ignore[type-var]


def _inside(node: Node, index: int, above: str) -> str:
    """The mover of the plain values in child ``index`` of ``node``."""
    match node:
        case Masked():
            return above
        case Sum(terms=terms):
            return "adapters" if index and isinstance(terms[index], Product) else above
    return "factors" if above == "weights" else above


def _numbers(node: Node) -> dict[str, Tensor]:
    """The floating tensors of a leaf that can move, by name."""
    match node:
        case Dense(values=values):
            return {"values": values}
        case Quantized(scale=Dense(values=scale), zero=zero):
            if isinstance(zero, Dense) and zero.values.is_floating_point():
                return {"scale": scale, "zero": zero.values}
            return {"scale": scale}
        case Quantized(scale=Quantized(scale=Dense(values=coarse))):  # double quantization: the coarse scales
            return {"scale": coarse}
        case Clustered(codebook=codebook):
            return {"codebook": codebook}
        case Hashed(buckets=buckets):
            return {"buckets": buckets}
    return {}


def _with_numbers(node: Node, numbers: dict[str, Tensor]) -> Node:
    match node:
        case Dense():
            return Dense(numbers["values"])
        case Quantized(scale=Dense(), zero=zero):
            return replace(node, scale=Dense(numbers["scale"]),
                           zero=Dense(numbers["zero"]) if "zero" in numbers else zero)
        case Quantized(scale=Quantized() as scale):
            return replace(node, scale=replace(scale, scale=Dense(numbers["scale"])))
        case Clustered():
            return replace(node, codebook=numbers["codebook"])
        case Hashed():
            return replace(node, buckets=numbers["buckets"])
    return node
