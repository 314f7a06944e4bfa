"""``edit``: the one function that knows the tree.

It walks to the leaves that a technique can rewrite and hands each one a ``Leaf``: the node itself,
the *target* (the original weight minus what the siblings supply, so that errors made earlier are
repaired by whoever comes later), what the masks above let through, and the evidence as it arrives at
that leaf. The technique returns a new node of the same shape; it never sees the rest of the tree.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rarefy.core.errors import EditError
from rarefy.core.nodes import Masked, Node, Product, Sum
from rarefy.core.nouns import Evidence, Receipt

CHUNK = 1 << 22  # weights whose error is measured at once
LOOKED_AT = 1 << 25  # weights whose error is measured at all


@dataclass(frozen=True, eq=False)
class Leaf:
    """One leaf as a technique sees it.

    target: what this leaf should stand for, [out, in] float32, dropped weights included, so that error
    feedback repairs the damage of dropping them. keep: where masks above let weights through (None:
    everywhere); elsewhere the leaf counts as zero whatever it holds. evidence: what arrives at this leaf
    (None: none was collected). kernel: the axes that a row is flattened from, ``(in, height, width)`` for a
    convolution (empty: a row is a row). sampled_from: the rows of the whole weight when a planner looks at a
    sample of them (0: these are all).
    """

    site: str
    node: Node
    target: Float[Tensor, "out in_"]
    keep: Bool[Tensor, "out in_"] | None
    evidence: Evidence | None
    kernel: tuple[int, ...] = ()
    sampled_from: int = 0


@dataclass(frozen=True, eq=False)
class Edited:
    """The node a technique made and what it has to say about it (fallbacks; empty: nothing)."""

    node: Node
    note: str = ""


@runtime_checkable
class Technique(Protocol):
    """One file under ``techniques/``: a frozen dataclass whose fields are its settings."""

    edits: ClassVar[tuple[type[Node], ...]]
    needs: ClassVar[frozenset[str]]

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited: ...


def edit(site: str, tree: Node, original: Tensor, technique: Technique, name: str,
         evidence: Evidence | None, generator: torch.Generator,
         kernel: tuple[int, ...] = ()) -> tuple[Node, Receipt]:
    """Apply ``technique`` to every leaf of ``tree`` that it can edit; ``kernel`` as in ``Leaf``.

    Returns the new tree, of the same shape, and a receipt. Raises EditError when the technique needs
    evidence that is missing, or finds nothing to edit.
    """
    for need in sorted(technique.needs):
        if evidence is None or getattr(evidence, need) is None:
            raise EditError(f"{site}: {name} needs calibration evidence ({need}) and there is none; "
                            "pass calibration data or a data-free technique")
    started = time.perf_counter()
    walk = _Walk(site, technique, generator)
    after = walk.node(tree, original, None, evidence, kernel)
    if walk.edited == 0:
        kinds = ", ".join(kind.__name__ for kind in technique.edits)
        raise EditError(f"{site}: {name} edits {kinds} and found none in {_outline(tree)}")
    if after.shape != tree.shape:
        raise EditError(f"{site}: {name} changed the shape {tree.shape} to {after.shape}")
    error = float("nan") if evidence is None else relative_error(original, after, evidence)
    return after, Receipt(site, name, tree.bits(), after.bits(), error,
                          time.perf_counter() - started, note="; ".join(walk.notes))


class _Walk:
    """Depth-first, left to right; each child's target accounts for the children already rewritten."""

    def __init__(self, site: str, technique: Technique, generator: torch.Generator) -> None:
        self.site, self.technique, self.generator = site, technique, generator
        self.edited = 0
        self.notes: list[str] = []

    def node(self, node: Node, target: Tensor, keep: Tensor | None, evidence: Evidence | None,
             kernel: tuple[int, ...] = ()) -> Node:
        if isinstance(node, self.technique.edits):
            self.edited += 1
            leaf = Leaf(self.site, node, target, keep, evidence, kernel)
            done = self.technique.rewrite(leaf, self.generator)
            if done.note:
                self.notes.append(done.note)
            return done.node
        match node:
            case Masked(keep=own, inner=inner):
                both = own if keep is None else own & keep
                match self.node(inner, target, both, evidence, kernel):
                    case Masked(keep=further, inner=rest):  # two masks in a row are one
                        return Masked(own & further, rest)
                    case after:
                        return Masked(own, after)
            case Sum(terms=terms):
                for index, term in enumerate(terms):
                    wanted = node.fitted(index, target)
                    node = _with_child(node, index, self.node(term, wanted, keep, evidence, kernel))
                return node
            case Product(left=left, right=right):
                return self._product(left, right, target, evidence)
            case _:
                return self._factors(node, target, evidence)

    def _factors(self, node: Node, target: Tensor, evidence: Evidence | None) -> Node:
        """The factors of a tensor decomposition, from the inputs' side to the outputs', as in a product.

        A factor K that inputs reach through a matrix M (``node.behind``) is fitted at the outputs, with the
        output's factor L in front of it: ``K = L^+ T H M^T (M H M^T)^+``. The others have no such fit; what
        they hold may have been chosen for the data, so they stand for that. Without evidence, or where no
        factor is reached so, each is fitted to what the others leave, in plain norm.
        """
        for index in reversed(range(len(node.children()))):
            child, behind = node.children()[index], node.behind(index)
            if evidence is None or node.behind(0) is None:
                wanted, seen = node.fitted(index, target), None
            elif behind is None:
                wanted, seen = child.dense(), None
            else:
                wanted, seen = _regressed(target, behind, evidence.gram), evidence.through(behind)
                if index > 0:
                    front = node.children()[0].dense()
                    wanted, seen = torch.linalg.pinv(front.double()) @ wanted, seen.before(front)
            seen = _plain(wanted, evidence) if seen is None else seen
            node = _with_child(node, index, self.node(child, wanted.float(), None, seen))
        return node

    def _product(self, left: Node, right: Node, target: Tensor,
                 evidence: Evidence | None) -> Node:
        """Each factor's target is its least-squares fit given the other one.

        left: argmin_L ||(L R - T) X||, that is T H R^T (R H R^T)^+; right: argmin_R ||L R - T|| = L^+ T.
        The right factor goes first, so the left one, fitted in the outputs' metric, has the last word.
        """
        fitted = Product(left, right).fitted(1, target)
        right = self.node(right, fitted, None, None if evidence is None else evidence.before(left.dense()))
        matrix = right.dense()
        wanted = _regressed(target, matrix, None if evidence is None else evidence.gram)
        left = self.node(left, wanted.float(), None,
                         None if evidence is None else evidence.through(matrix))
        return Product(left, right)


def _regressed(target: Tensor, matrix: Tensor, gram: Tensor | None) -> Tensor:
    """argmin_L ||(L matrix - target) X||, in float64."""
    onward = matrix.T if gram is None else gram @ matrix.T
    inner = (matrix @ onward).double()
    fitted: Tensor = (target @ onward).double() @ torch.linalg.pinv(inner, hermitian=True)
    return fitted


def _plain(wanted: Tensor, evidence: Evidence | None) -> Evidence:
    """Evidence of a factor whose columns and rows all count alike."""
    rows, columns = wanted.shape
    fisher = None if evidence is None or evidence.fisher is None else torch.ones(rows)
    return Evidence(columns * torch.eye(columns), columns, fisher)


def _with_child(node: Node, index: int, child: Node) -> Node:
    children = node.children()
    return node.rebuilt((*children[:index], child, *children[index + 1:]))


def relative_error(original: Tensor, tree: Node, evidence: Evidence) -> float:
    """tr(D H D^T) / tr(W H W^T): the share of the output's energy that an edit loses.

    Row by row in chunks: an embedding's difference, whole, would be most of the memory of a run. Of matrices
    with more than LOOKED_AT weights evenly spaced rows stand for all.
    """
    lost = energy = 0.0
    index = torch.arange(0, original.shape[0], -(-original.numel() // LOOKED_AT))
    for rows in index.tensor_split(-(-index.numel() * original.shape[1] // CHUNK)):
        part = original[rows]
        lost += evidence.error(part - tree.rows(rows))
        energy += evidence.error(part)
    return lost / energy if energy > 0 else float(lost > 0)


def _outline(node: Node) -> str:
    """``Sum(Quantized, Product(Dense, Dense))``: a tree in one line, for messages."""
    below = node.children()
    name = type(node).__name__
    return f"{name}({', '.join(_outline(child) for child in below)})" if below else name


def leaves(node: Node) -> tuple[Node, ...]:
    """Every leaf below ``node``, left to right."""
    below = node.children()
    return (node,) if not below else tuple(leaf for child in below for leaf in leaves(child))
