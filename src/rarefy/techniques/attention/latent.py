"""Make keys and values of one latent a token: a cache holds ``rank`` numbers in the place of two per channel.

Keys and values are both linear in what enters a block, so one narrow matrix R can serve both,

    c = R x,    k = U_k c,    v = U_v c,

and c is all that has to be remembered. With H the second moment of x, f what an error of each row of
[W_k; W_v] costs (the Fisher of the outputs) and C C^T = H, the factors that move the answers least are those
of the singular value decomposition

    diag(f)^1/2 [W_k; W_v] C = Q S V^T,    predicted KL = 1/2 sum_(i > rank) s_i^2.

These are nats, so blocks can be compared: under ``spread: global`` the components that are worth least go,
wherever they stand. Keys are turned by their positions (and normed, where a family does) after U_k, so that
positions need no channels of their own, as DeepSeek's have; the price is that keys are made anew of all that
is remembered at every step: less memory, not less time.

Paper: DeepSeek-AI 2024, "DeepSeek-V2", section 2.1.2 (the latent); Meng et al. 2025, "TransMLA", section 4
(a trained model's keys and values balanced, then factored together); Chang et al. 2024, "Palu: Compressing
KV-Cache with Low-Rank Projection", section 3 (whitening, ranks by the Fisher, keys made anew before turning).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rarefy.core.errors import EditError, RecipeError
from rarefy.core.structure import KeyValues
from rarefy.numerics.decompose import Spectrum, refit, spectrum, whitening

FLOOR = 1e-4  # of the mean Fisher: a row that the sample did not need is not free


@dataclass(frozen=True)
class Latent:
    """Low-rank keys and values that share a latent.

    Shapes: factors [rows, rank] and [rank, in]. ratio: the share of the cache that stays, as numbers a token.
    spread: uniform (the same rank in every block) or global. weigh: fisher (rows by what their errors cost)
    or energy (keys and values alike, by the size of what they give). multiple: ranks are multiples of this,
    an even number. damping: share of the Gram's mean diagonal added to it.
    """

    ratio: float = 0.5
    spread: str = "global"
    weigh: str = "fisher"
    multiple: int = 8
    damping: float = 0.01

    scope: ClassVar[str] = "structure"
    edits: ClassVar[tuple[type[KeyValues], ...]] = (KeyValues,)
    beats: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, value, known in (("spread", self.spread, ("uniform", "global")),
                                   ("weigh", self.weigh, ("fisher", "energy"))):
            if value not in known:
                raise RecipeError(f"{name} {value!r}: choose {' or '.join(known)}")
        if not 0 < self.ratio <= 1:
            raise RecipeError(f"ratio {self.ratio}: must be a share above 0, at most 1")
        if self.multiple < 2 or self.multiple % 2:
            raise RecipeError(f"multiple {self.multiple}: must be an even number, 2 or more")

    @property
    def needs(self) -> frozenset[str]:
        """The Gram, and the Fisher where rows are weighed by it."""
        return frozenset({"gram", "fisher"} if self.weigh == "fisher" else {"gram"})

    def energies(self, block: KeyValues) -> Float[Tensor, " components"]:
        """Squared singular values: nats, twice, where rows are weighed by the Fisher."""
        return self._spectrum(block)[0].energies

    def ranks(self, site: str, rows: int, energies: tuple[Float[Tensor, " components"], ...]
              ) -> tuple[int, ...]:
        """What the share of a cache of ``rows`` numbers a token holds, the most valuable first."""
        step, most = self.multiple, len(energies[0]) // self.multiple
        runs = min(int(self.ratio * rows) // step, most)
        if not runs:
            raise EditError(f"{site}: a ratio of {self.ratio:g} of {rows} numbers a token holds no {step}; "
                            f"raise ratio or lower multiple={step}")
        if self.spread == "uniform":
            return (step * runs,) * len(energies)
        counts = [1] * len(energies)
        queue = sorted(((float(part.sum()), block) for block, each in enumerate(energies)
                        for part in each[:most * step].split(step)[1:]), reverse=True)
        for _, block in queue[:(runs - 1) * len(energies)]:
            counts[block] += 1
        return tuple(step * count for count in counts)

    def factors(self, block: KeyValues, rank: int
                ) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, "rank in_"]]:
        """U, the best there is for R, and R."""
        found, C = self._spectrum(block)
        right = found.cut(rank)[1].float()
        return refit(block.weight, right, C).float(), right

    def _spectrum(self, block: KeyValues) -> tuple[Spectrum, Float[Tensor, "in_ in_"]]:
        assert block.evidence is not None
        H = block.evidence.gram / max(block.evidence.tokens, 1)
        C, _ = whitening(H, self.damping)
        if C is None or not bool(torch.isfinite(block.weight).all()):
            raise EditError(f"{block.site}: what arrives at it, or its weights, are not finite; check the "
                            "model")
        return spectrum(block.weight, rows=self._costs(block, C).sqrt(), factor=C), C

    def _costs(self, block: KeyValues, C: Tensor) -> Float[Tensor, " rows"]:
        """What an error of each row costs."""
        assert block.evidence is not None
        f = block.evidence.fisher
        if self.weigh == "energy":
            sides = (block.weight.double() @ C).square().sum(1).view(2, -1)
            f = (1 / sides.sum(1, keepdim=True).clamp_min(1e-30)).expand_as(sides).flatten()
        assert f is not None
        mean = float(f.mean())
        return f.double().clamp_min(FLOOR * mean) if mean > 0 else torch.ones_like(f, dtype=torch.float64)
