"""Masks that grow while a network trains: how much is dropped at which step, and when masks are made anew.

The share falls off like a cube (Zhu & Gupta 2017, eq. 1): from s_0, what is dropped already, to s_f,

    s(t) = s_f + (s_0 - s_f) (1 - (t - t_0) / (t_1 - t_0))^3,      t_0 <= t <= t_1:

most goes early, while much is redundant, and the last weights go slowly, with time to recover between.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxtyping import Bool, Float
from torch import Tensor

from rarefy.core.edit import Leaf
from rarefy.core.errors import RecipeError
from rarefy.core.pruning import Rule, Scope, outcome
from rarefy.numerics.patterns import NM


@dataclass(frozen=True)
class Growth:
    """A rule that is reached step by step.

    begin, end: shares of the training between which masks grow. every: steps from one mask to the next. note:
    what the rule had to be changed to.
    """

    rule: Rule
    begin: float
    end: float
    every: int
    note: str = ""

    @classmethod
    def of(cls, pattern: object, sparsity: object, scope: Scope, begin: float, end: float,
           every: int) -> Growth:
        """The growth that settings ask for; RecipeError for what means nothing."""
        if not 0 <= begin < end <= 1:
            raise RecipeError(f"begin {begin}, end {end}: must be shares of the training, "
                              "0 <= begin < end <= 1")
        if every < 1:
            raise RecipeError(f"every {every}: must be at least one step")
        return cls(Rule.of(pattern, sparsity, scope), begin, end, every)

    def fitted(self, leaf: Leaf) -> Growth:
        """As the leaf's shape allows it; EditError if it cannot be, or if nothing would be left."""
        rule, note = self.rule.fitted(leaf)
        outcome(leaf, rule.keep(leaf.node.dense().square(), leaf.keep), rule)
        return replace(self, rule=rule, note=note)

    def due(self, step: int, total: int) -> bool:
        """Whether a mask is made after this step."""
        first, last = self._span(total)
        return first < step <= last and ((step - first) % self.every == 0 or step == last)

    def over(self, step: int, total: int) -> bool:
        """Whether masks have grown to what was asked."""
        return step >= self._span(total)[1]

    def share(self, step: int, total: int, before: float) -> float:
        """The share that is dropped after this step; ``before``: when training began."""
        first, last = self._span(total)
        left = 1 - min(1.0, max(0.0, (step - first) / (last - first)))
        final = self.rule.sparsity
        return final + (min(before, final) - final) * left**3

    def keep(self, cost: Float[Tensor, "out in_"], share: float,
             allowed: Bool[Tensor, "out in_"] | None) -> Bool[Tensor, "out in_"]:
        """True where the dearest weights are, ``share`` of them dropped in the pattern of the rule."""
        pattern = self.rule.pattern
        if isinstance(pattern, NM):  # of m neighbours one goes, then two, and so on
            pattern = NM(pattern.m - int(pattern.m * share + 1e-6), pattern.m)
        return pattern.keep(cost, share, allowed)

    def _span(self, total: int) -> tuple[int, int]:
        """The steps after which growing begins and ends."""
        last = max(1, round(self.end * total))
        return min(round(self.begin * total), last - 1), last
