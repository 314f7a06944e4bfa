"""Stop where the answer is already sure: exits behind some blocks, a threshold with a guarantee.

Behind chosen blocks stand small heads that learnt to say what the last block says. With p the distribution
that an exit gives over C classes, its certainty is

    confidence   max p
    entropy      1 - H(p) / ln C
    patience     (exits in a row that agree with it, itself included) / (exits in all)

and a sample leaves at the first exit whose certainty reaches the threshold. The loss of a threshold is 1 for
a sample whose answer becomes another than the whole network's (or, where labels are known, a wrong one
instead of a right one). Thresholds are tested from the most careful on: as long as "the risk is above
``max_loss``" is rejected at level ``delta`` the next is tried, the last that passed is taken. Testing in a
fixed order needs no correction, so with probability 1 - delta over the calibration samples

    P(a new sample loses) <= max_loss.

Paper: Schuster et al. 2022, "CALM", section 3.2, with Angelopoulos et al. 2021, "Learn then Test", (the
guarantee); Teerapittayanon et al. 2016, "BranchyNet" (entropy); Zhou et al. 2020, "PABEE" (patience).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rarefy.core.errors import EditError, RecipeError, did_you_mean
from rarefy.core.structure import ExitAnswers, ExitRule
from rarefy.numerics.tails import binomial_tail, hoeffding_tail

RULES = ("confidence", "entropy", "patience")
STEPS = 100


@dataclass(frozen=True)
class EarlyExit:
    """Leave early, losing at most a share of the answers.

    Shapes: certainty [samples] of logits [exits so far, samples, classes]. rule: confidence, entropy or
    patience. max_loss: the share of answers that may be lost. delta: the probability with which the guarantee
    may fail. bound: binomial (exact) or hoeffding. harm: count only right answers that become wrong ones
    (needs labels).
    """

    rule: str = "confidence"
    max_loss: float = 0.01
    delta: float = 0.05
    bound: str = "binomial"
    harm: bool = False

    scope: ClassVar[str] = "exits"
    edits: ClassVar[tuple[type[ExitAnswers], ...]] = (ExitAnswers,)
    needs: ClassVar[frozenset[str]] = frozenset()
    beats: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, value, known in (("rule", self.rule, RULES),
                                   ("bound", self.bound, ("binomial", "hoeffding"))):
            if value not in known:
                raise RecipeError(f"{name} {value!r}: choose one of {', '.join(known)}"
                                  f"{did_you_mean(value, list(known))}")
        if not 0 < self.max_loss < 1 or not 0 < self.delta < 1:
            raise RecipeError(f"max_loss {self.max_loss}, delta {self.delta}: must be above 0 and below 1")

    def certainty(self, logits: Float[Tensor, "so_far samples classes"], exits: int
                  ) -> Float[Tensor, " samples"]:
        """How sure the last of these exits is; ``exits``: how many there are in all, the end included."""
        last = logits[-1].float()
        match self.rule:
            case "confidence":
                return last.softmax(-1).amax(-1)
            case "entropy":
                log = last.log_softmax(-1)
                return 1 + (log.exp() * log).sum(-1) / math.log(last.shape[-1])
        chosen = logits.argmax(-1)
        row = [(chosen[place:] == chosen[-1]).all(0) for place in range(len(chosen))]
        return torch.stack(row).sum(0) / exits

    def leaves(self, answers: ExitAnswers, threshold: float) -> Int64[Tensor, " samples"]:
        """The exit at which each sample leaves."""
        exits, count = answers.logits.shape[:2]
        found = torch.full((count,), exits - 1)
        for place in reversed(range(exits - 1)):
            sure = self.certainty(answers.logits[:place + 1], exits) >= threshold
            found[sure] = place
        return found

    def lost(self, answers: ExitAnswers, threshold: float) -> Bool[Tensor, " samples"]:
        """Which samples lose their answer."""
        chosen = answers.logits.argmax(-1)
        given = chosen.gather(0, self.leaves(answers, threshold)[None])[0]
        if not self.harm:
            return given != chosen[-1]
        if answers.labels is None:
            raise EditError("early_exit: harm counts right answers that become wrong, and there are no "
                            "labels; pass some, or harm=False")
        return (chosen[-1] == answers.labels) & (given != answers.labels)

    def calibrated(self, answers: ExitAnswers) -> ExitRule:
        """The least careful threshold that the samples vouch for."""
        exits, count = answers.logits.shape[:2]
        if exits < 2 or not count:
            raise EditError(f"early_exit: {exits - 1} exits and {count} samples; give at least one of each")
        if not bool(torch.isfinite(answers.logits).all()):
            raise EditError("early_exit: an exit's logits are not finite; train it with a lower rate")
        rule = ExitRule(math.inf, 0.0, self.max_loss)
        for threshold in self._candidates(exits, answers.logits.shape[2]):
            wrong = int(self.lost(answers, threshold).sum())
            p = (binomial_tail(wrong, count, self.max_loss) if self.bound == "binomial"
                 else hoeffding_tail(wrong / count, count, self.max_loss))
            if p > self.delta:
                break
            rule = ExitRule(threshold, wrong / count, self.max_loss)
        if math.isinf(rule.threshold):
            needed = math.ceil(math.log(self.delta) / math.log1p(-self.max_loss))
            return ExitRule(math.inf, 0.0, self.max_loss, f"{count} samples vouch for no threshold at "
                            f"max_loss={self.max_loss:g}, so every sample goes to the end; even without a "
                            f"loss, at least {needed} are needed")
        return rule

    def _candidates(self, exits: int, classes: int) -> list[float]:
        """Thresholds, the most careful first."""
        if self.rule == "patience":
            return [k / exits for k in range(exits - 1, 0, -1)]
        least = 1 / classes if self.rule == "confidence" else 0.0
        # finer where networks are: most are either very sure or not
        return [1 - (1 - least) * (k / STEPS) ** 3 for k in range(STEPS + 1)]
