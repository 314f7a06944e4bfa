"""SparseGPT: drop the weights that the others can stand in for, and let them.

For a weight row w, inputs with Gram H = X X^T and U upper triangular with ``U^T U = H^-1``, dropping
w_j costs, and is best repaired in the columns k > j that are still free, by

    cost_j = w_j^2 / U_jj^2,        w_k <- w_k - w_j / U_jj * U_jk

(Optimal Brain Surgeon, the columns taken in order so that all rows share U). The mask of a block of columns
is chosen when the sweep arrives there, on the weights as they then are: what earlier columns handed over
counts. Inside n:m every group of m chooses for itself. H is damped, so that the repair does not fit the
sample too closely; the damping is taken out of the cost again. Updates are applied lazily, panel by panel
inside a block and block by block behind it, so that most of the arithmetic is matrix products.

Plain values end where the repair leaves them. A leaf whose codes lie on a grid is pruned and rounded
in one sweep: what stays goes to the nearest level of the scales it has, and that error is repaired too
(section 3.5 of the paper).

Paper: Frantar & Alistarh 2023, "SparseGPT", algorithm 1, sections 3.3 to 3.5; Hassibi & Stork 1992,
"Optimal Brain Surgeon", eq. 5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor

from rarefy.core.edit import Edited, Leaf
from rarefy.core.errors import EditError
from rarefy.core.nodes import Dense, Masked, Node, Quantized
from rarefy.core.nouns import Choice, Evidence, Option, Step
from rarefy.core.pruning import Rule, noted, outcome, refuse_unfit
from rarefy.numerics.grids import Grid
from rarefy.numerics.linear import damped, inverse_factor
from rarefy.numerics.patterns import NM, Tiles, Unstructured
from rarefy.numerics.rounding import encode, fit, inverse, level_of, nearest

BLOCK = 128      # columns whose mask is chosen at once
PANEL = 32       # columns between two lazy updates inside a block
ROWS = 4096      # rows swept at once, so that a panel stays in cache
# what the planner may choose from
PLANNED: tuple[dict[str, Any], ...] = (*({"sparsity": s / 10} for s in range(3, 10)), {"pattern": "2:4"})


@dataclass(frozen=True)
class SparseGPT:
    """Pruning with error feedback.

    Shapes: leaf target [out, in] float32 -> Masked [out, in].

    sparsity: share of the weights that is dropped, what masks above dropped included; 0.5, or what n:m says.
    pattern: ``unstructured`` (per layer, in blocks of 128 columns, or ``unstructured per row``), ``2:4`` or
    any n:m (n of m neighbours in a row stay), ``block 16x16``, ``row``, ``column``, ``row 8`` (eight at a
    time). damping: share of the Gram's mean diagonal added to it; climbs 10x and 100x when the factorization
    fails, and then only the Gram's diagonal is used, which the receipt lists.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    damping: float = 0.1

    edits: ClassVar[tuple[type[Node], ...]] = (Dense, Quantized)
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    beats: ClassVar[str] = "wanda"

    def __post_init__(self) -> None:
        self._rule()

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        assert leaf.evidence is not None
        rule, fallback = self._rule().fitted(leaf)
        refuse_unfit(leaf.site, leaf.target)
        refuse_unfit(leaf.site, leaf.evidence.gram)
        U, stakes, note = _factor(leaf.evidence, self.damping)
        sweep = _Sweep(leaf, U, stakes, rule)
        sweep.run()
        keep = sweep.K.T.contiguous()
        notes = noted(fallback, note, outcome(leaf, keep, rule))
        if isinstance(leaf.node, Quantized):
            return Edited(Masked(keep, replace(leaf.node, codes=sweep.codes.T.contiguous())), notes)
        return Edited(Masked(keep, _plain(leaf, sweep.W.mul_(sweep.K).T.contiguous())), notes)

    @classmethod
    def options(cls, leaf: Leaf, choices: Mapping[str, Choice]) -> Iterator[Option]:
        """Every sparsity, in half precision and on every grid that the target has.

        The damage is foreseen without running the sweep: of column j's error the share ``1 / U_jj^2`` reaches
        the output, whether it comes from dropping or from rounding.
        """
        tree = next((name for name, choice in choices.items() if choice.stored is None), None)
        if tree is None:
            return
        assert leaf.evidence is not None and leaf.evidence.fisher is not None
        _, stakes, _ = _factor(leaf.evidence, cls.damping)
        dropped, roundings = leaf.target.square() * stakes, list(_roundings(leaf, stakes, choices))
        scale = (leaf.sampled_from or leaf.target.shape[0]) / leaf.target.shape[0]
        for settings in PLANNED:
            rule = cls(**settings)._rule()
            if rule.pattern.misfit(*leaf.target.shape):
                continue
            keep = rule.keep(dropped)
            if not bool(keep.any()):
                continue
            for rounding in roundings:
                lost = torch.where(keep, rounding.lost, dropped).sum(1)
                size = Masked(keep, rounding.node).bits() / 8 * scale
                damage = 0.5 * float(leaf.evidence.fisher @ lost)
                prune = Step("sparsegpt", (leaf.site,), dict(settings))
                yield Option(leaf.site, tree, ceil(size), damage, (*rounding.before, prune, *rounding.after))

    def _rule(self) -> Rule:
        return Rule.of(self.pattern, self.sparsity, "layer")


def _plain(leaf: Leaf, values: Tensor) -> Dense:
    """New values in the dtype of the ones they replace."""
    assert isinstance(leaf.node, Dense)
    dtype = leaf.node.values.dtype
    stored = values.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise EditError(f"{leaf.site}: {float(values.abs().max()):g} does not fit {str(dtype)[6:]}; cast to "
                        "bfloat16 before pruning")
    return Dense(stored)


def _factor(evidence: Evidence, damping: float) -> tuple[Tensor, Tensor, str]:
    """U, the stakes of every column (0 where no input was ever active), and a note.

    The stakes are ``1 / U_jj^2`` less the damping in it: the damping holds the repair back, but columns of
    little energy would seem as dear as it is.
    """
    gram = evidence.gram / max(evidence.tokens, 1)
    U, needed = inverse_factor(gram, damping)
    notes = []
    if U is None:
        notes.append(f"Gram not positive definite at damping {needed:g}: only its diagonal was used")
        U = torch.diag(damped(gram, needed).diagonal().rsqrt().float())
    elif needed > damping:
        notes.append(f"damping raised to {needed:g}")
    if evidence.tokens < gram.shape[0]:
        notes.append(f"{evidence.tokens} calibration tokens for a Gram of rank {gram.shape[0]}")
    energy = gram.diagonal()
    alive = energy > 0
    if not bool(alive.any()):
        notes.append("nothing that calibration saw depends on this weight: chosen by magnitude")
        return U, torch.ones_like(energy), "; ".join(notes)
    stakes = U.diagonal().square().reciprocal() - needed * energy[alive].mean()
    return U, stakes.clamp_min(0) * alive, "; ".join(notes)


class _Sweep:
    """The state of one sweep. Columns are stored as rows, so that each is contiguous.

    W [in, out]: the weights, repaired. K [in, out]: what stays; until a column's turn, what masks above let
    through. codes [in, out]: for a leaf on a grid, the levels that W goes to.
    """

    def __init__(self, leaf: Leaf, U: Tensor, stakes: Tensor, rule: Rule) -> None:
        self.U, self.stakes, self.rule = U, stakes, rule
        self.per_diagonal = U.diagonal().reciprocal().tolist()
        self.W = leaf.target.T.clone(memory_format=torch.contiguous_format)
        self.K = (torch.ones_like(self.W, dtype=torch.bool) if leaf.keep is None
                  else leaf.keep.T.clone(memory_format=torch.contiguous_format))
        before = self.W.numel() if leaf.keep is None else int(leaf.keep.sum())
        # of the weights that masks above let through, the share that has to go
        self.share = max(0.0, 1 - (1 - rule.sparsity) * self.W.numel() / max(before, 1))
        self.behind = 0.0
        if isinstance(leaf.node, Quantized):
            scale, zero = leaf.node.fit().values()
            self.grid: Grid | None = leaf.node.grid
            self.scale, self.zero = scale.T.contiguous(), None if zero is None else zero.T.contiguous()
            self.codes = torch.empty_like(self.W, dtype=torch.uint8)
        else:
            self.grid = None

    def run(self) -> None:
        columns, rows = self.W.shape
        block, panel = self._widths()
        for first in range(0, columns, block):
            stop = min(first + block, columns)
            if not isinstance(self.rule.pattern, NM):
                self._choose(first, stop)
            for start in range(0, rows, ROWS):
                self._block(first, stop, panel, slice(start, start + ROWS))

    def _widths(self) -> tuple[int, int]:
        """Columns of a block and of a panel: whole groups of what the pattern chooses together."""
        match self.rule.pattern:
            case NM(m=m):
                panel = m * max(1, PANEL // m)
                return panel * max(1, BLOCK // panel), panel
            case Tiles(columns=0):
                return self.W.shape[0], PANEL
            case Tiles(columns=width):
                return width * max(1, BLOCK // width), PANEL
            case Unstructured():
                return BLOCK, PANEL

    def _choose(self, first: int, stop: int) -> None:
        """The mask of columns first..stop; what rounding to whole weights leaves over, the next one owes."""
        allowed = self.K[first:stop].T
        there = int(allowed.sum())
        self.behind += self.share * there
        sparsity = 1 - (there - self.behind) / allowed.numel()
        cost = (self.W[first:stop].square() * self.stakes[first:stop, None]).T.contiguous()
        keep = replace(self.rule, sparsity=min(max(sparsity, 0.0), 1.0)).keep(cost, allowed)
        self.behind -= there - int(keep.sum())
        self.K[first:stop] = keep.T

    def _block(self, first: int, stop: int, panel: int, part: slice) -> None:
        """Go through columns first..stop of some rows; the columns behind them move once, at the end."""
        W, U = self.W[:, part], self.U
        errors = torch.empty_like(W[first:stop])
        for start in range(first, stop, panel):
            end = min(start + panel, stop)
            now = errors[start - first:end - first]
            self._panel(start, end, part, now)
            if end < stop:
                W[end:stop].addmm_(U[start:end, end:stop].T, now, alpha=-1)
        if stop < W.shape[0]:
            W[stop:].addmm_(U[first:stop, stop:].T, errors, alpha=-1)

    def _panel(self, start: int, end: int, part: slice, errors: Tensor) -> None:
        """Columns start..end one by one: what each loses, ``errors``, moves the later ones of the panel."""
        W, K, U = self.W[:, part], self.K[:, part], self.U
        for k, j in enumerate(range(start, end)):
            if isinstance(self.rule.pattern, NM) and j % self.rule.pattern.m == 0:
                group = slice(j, j + self.rule.pattern.m)
                cost = W[group].square() * self.stakes[group, None]
                K[group] = self.rule.keep(cost.T.contiguous(), K[group].T).T
            if self.grid is None:
                torch.mul(W[j], ~K[j], out=errors[k])
            else:
                torch.sub(W[j], torch.where(K[j], self._rounded(j, part), 0.0), out=errors[k])
            errors[k] *= self.per_diagonal[j]
            if j + 1 < end:
                W[j + 1:end].addr_(U[j, j + 1:end], errors[k], alpha=-1)

    def _rounded(self, j: int, part: slice) -> Tensor:
        """Column j at the nearest levels of its scales; the codes are noted."""
        assert self.grid is not None
        group = j // (self.grid.group or self.W.shape[0])
        scale, w = self.scale[group, part], self.W[j, part]
        zero = None if self.zero is None else self.zero[group, part]
        code = nearest((w if zero is None else w - zero) * inverse(scale), self.grid)
        self.codes[j, part] = code.to(torch.uint8)
        value = level_of(code, self.grid) * scale
        return value if zero is None else value + zero


@dataclass(frozen=True, eq=False)
class _Rounding:
    """How what stays may be stored: the node of a dense leaf, its loss [out, in] in the metric of the stakes,
    and the steps before and after the sweep that lead there."""

    node: Node
    lost: Tensor
    before: tuple[Step, ...] = ()
    after: tuple[Step, ...] = ()


def _roundings(leaf: Leaf, stakes: Tensor, choices: Mapping[str, Choice]) -> Iterator[_Rounding]:
    """Half precision, which the sweep keeps, and every grid of the target, by GPTQ under the mask."""
    def lost(node: Node) -> Tensor:
        return (node.dense() - leaf.target).square() * stakes

    fits = bool(torch.isfinite(leaf.target.half()).all())
    half = Dense(leaf.target.to(torch.float16 if fits else torch.bfloat16))
    cast = Step("cast", (leaf.site,), {"dtype": "float16" if fits else "bfloat16"})
    yield _Rounding(half, lost(half), before=(cast,))
    for name, choice in choices.items():
        if isinstance(choice.stored, Grid):
            fitted = fit(leaf.target, stakes, choice.stored)
            codes = Quantized.of(encode(leaf.target, fitted), fitted)
            yield _Rounding(codes, lost(codes), after=(Step("gptq", (leaf.site,), format=name),))
