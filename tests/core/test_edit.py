"""``edit`` walks every tree, hands out the right targets, and never edits in silence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from rarefy.core.edit import Edited, Leaf, edit, relative_error
from rarefy.core.errors import EditError
from rarefy.core.nodes import Dense, Masked, Node, Product, Quantized, Shared, Sum
from rarefy.core.nouns import Evidence
from rarefy.numerics.grids import integer_grid
from rarefy.techniques.quantize.rtn import RTN


@dataclass(frozen=True)
class Spy:
    """Replaces each leaf by its target and keeps what it was shown."""

    seen: list[Leaf] = field(default_factory=list)
    edits: ClassVar[tuple[type[Node], ...]] = (Dense,)
    needs: ClassVar[frozenset[str]] = frozenset()

    def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
        self.seen.append(leaf)
        return Edited(Dense(leaf.target), "seen")


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(12, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def evidence() -> Evidence:
    x = torch.randn(300, 32, generator=torch.Generator().manual_seed(1))
    return Evidence(x.T @ x, 300, torch.ones(12))


def run(tree: Node, original: Tensor, technique: object, evidence: Evidence | None):
    return edit("site", tree, original, technique, "spy", evidence, torch.Generator())


def test_sum_gives_each_term_what_the_others_leave(weight: Tensor, evidence: Evidence) -> None:
    rounded, _ = run(Dense(weight), weight, RTN(integer_grid(2, 32)), evidence)
    assert isinstance(rounded, Quantized)
    spy = Spy()
    tree, receipt = run(Sum((rounded, Dense(torch.zeros_like(weight)))), weight, spy, evidence)
    torch.testing.assert_close(spy.seen[0].target, weight - rounded.dense())
    torch.testing.assert_close(tree.dense(), weight)
    assert receipt.error < 1e-6 and receipt.note == "seen"


def test_mask_keeps_the_whole_target_and_says_what_counts(weight: Tensor, evidence: Evidence) -> None:
    keep = weight > 0
    spy = Spy()
    tree, _ = run(Masked(keep, Masked(weight < 1, Dense(weight))), weight, spy, evidence)
    assert spy.seen[0].keep is not None
    assert torch.equal(spy.seen[0].keep, keep & (weight < 1))
    torch.testing.assert_close(spy.seen[0].target, weight)
    assert not bool(tree.dense()[~keep].any())


def test_factors_get_their_least_squares_fit_and_evidence(weight: Tensor, evidence: Evidence) -> None:
    left, right = weight[:, :4].contiguous(), weight[:4].contiguous()
    spy = Spy()
    before = evidence.error(weight - left @ right)
    tree, _ = run(Product(Dense(left), Dense(right)), weight, spy, evidence)
    assert evidence.error(weight - tree.dense()) < before
    second, first = spy.seen  # the right factor is visited first
    assert second.target.shape == (4, 32) and first.target.shape == (12, 4)
    assert first.evidence is not None and first.evidence.gram.shape == (4, 4)
    # no other left factor does better under the gram
    R = tree.right.dense()
    best = (weight @ evidence.gram @ R.T).double() @ torch.linalg.pinv((R @ evidence.gram @ R.T).double())
    torch.testing.assert_close(tree.left.dense(), best.float(), rtol=1e-3, atol=1e-3)


def test_nothing_to_edit_is_an_error(weight: Tensor, evidence: Evidence) -> None:
    shared = Shared("elsewhere", Dense(weight))
    with pytest.raises(EditError, match=r"site: spy edits Dense and found none in Shared"):
        run(shared, weight, Spy(), evidence)


def test_missing_evidence_is_an_error(weight: Tensor) -> None:
    from rarefy.techniques.quantize.gptq import GPTQ

    with pytest.raises(EditError, match="needs calibration evidence"):
        run(Dense(weight), weight, GPTQ(), None)


def test_changed_shape_is_an_error(weight: Tensor) -> None:
    @dataclass(frozen=True)
    class Cut(Spy):
        def rewrite(self, leaf: Leaf, generator: torch.Generator) -> Edited:
            return Edited(Dense(leaf.target[:3]))

    with pytest.raises(EditError, match="changed the shape"):
        run(Dense(weight), weight, Cut(), None)


def test_evidence_of_shards_adds_up() -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    g = torch.rand(50, 3, generator=torch.Generator().manual_seed(3))

    def of(a: Tensor, b: Tensor) -> Evidence:
        return Evidence(a.T @ a, len(a), b.square().mean(0))

    both, whole = of(x[:20], g[:20]) + of(x[20:], g[20:]), of(x, g)
    torch.testing.assert_close(both.gram, whole.gram)
    torch.testing.assert_close(both.fisher, whole.fisher)
    assert both.tokens == 50


def test_evidence_through_a_matrix_is_evidence_of_its_outputs() -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(4))
    m = torch.randn(5, 8, generator=torch.Generator().manual_seed(5))
    behind = Evidence(x.T @ x, 50).through(m)
    torch.testing.assert_close(behind.gram, (x @ m.T).T @ (x @ m.T), rtol=1e-4, atol=1e-4)


def test_error_of_a_large_matrix_is_told_from_some_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(400, 16, generator=generator)
    tree = Dense(weight + 0.1 * torch.randn(400, 16, generator=generator))
    evidence = Evidence(torch.eye(16) * 10, 10)
    whole = relative_error(weight, tree, evidence)
    monkeypatch.setattr("rarefy.core.edit.LOOKED_AT", 2000)
    assert relative_error(weight, tree, evidence) == pytest.approx(whole, rel=0.1)
    assert relative_error(weight, tree, evidence) != whole
