"""Objectives of distillation against their papers' equations, written out."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rarefy.core.errors import DataError, RecipeError
from rarefy.core.signals import Signals, Top, matched_layers
from rarefy.numerics.divergences import jensen_shannon, kl, top, with_rest
from rarefy.techniques import distill
from rarefy.techniques.distill.attention import Attention
from rarefy.techniques.distill.cosine import Cosine
from rarefy.techniques.distill.forward_kl import ForwardKL
from rarefy.techniques.distill.hard_labels import HardLabels
from rarefy.techniques.distill.hidden_states import HiddenStates
from rarefy.techniques.distill.jensen_shannon import JensenShannon
from rarefy.techniques.distill.relations import Relations
from rarefy.techniques.distill.reverse_kl import ReverseKL
from rarefy.techniques.distill.sequence import Sequence
from rarefy.techniques.distill.soft_labels import SoftLabels
from rarefy.techniques.distill.triple import Triple

BATCH, LENGTH, CLASSES = 3, 5, 7
NAMES = sorted(path.stem for path in Path(distill.__path__[0]).glob("[a-z]*.py"))


def side(seed: int, blocks: int, width: int = 8, heads: int = 2) -> Signals:
    generator = torch.Generator().manual_seed(seed)

    def states(count: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(BATCH, LENGTH, width, generator=generator) for _ in range(count))

    real = torch.arange(LENGTH) < torch.tensor([[5], [3], [4]])
    return Signals(torch.randn(BATCH, CLASSES, generator=generator) * 2, labels=torch.tensor([0, 6, 3]),
                   hidden=states(blocks + 1), queries=states(blocks), keys=states(blocks),
                   values=states(blocks), heads=heads, real=real)


STUDENT, TEACHER = side(0, 2), side(1, 4)
assert STUDENT.rows is not None and TEACHER.rows is not None
Q, P = STUDENT.rows, TEACHER.rows


def per_row(values: list[list[float]]) -> Tensor:
    return torch.tensor([sum(row) / len(row) for row in values])


def test_soft_labels() -> None:
    T, expected = 3.0, []
    for p, q in zip(P.tolist(), Q.tolist(), strict=True):
        pt = [math.exp(z / T) / sum(math.exp(y / T) for y in p) for z in p]
        qt = [math.exp(z / T) / sum(math.exp(y / T) for y in q) for z in q]
        expected.append(T * T * sum(a * math.log(a / b) for a, b in zip(pt, qt, strict=True)))
    torch.testing.assert_close(SoftLabels(T).loss(STUDENT, TEACHER, None), torch.tensor(expected))


def test_divergences() -> None:
    p, q = P.softmax(1), Q.softmax(1)
    forward, backward = (p * (p / q).log()).sum(1), (q * (q / p).log()).sum(1)
    torch.testing.assert_close(ForwardKL().loss(STUDENT, TEACHER, None), forward)
    torch.testing.assert_close(ReverseKL().loss(STUDENT, TEACHER, None), backward)
    m = 0.3 * p + 0.7 * q
    expected = 0.3 * (p * (p / m).log()).sum(1) + 0.7 * (q * (q / m).log()).sum(1)
    torch.testing.assert_close(JensenShannon(0.3).loss(STUDENT, TEACHER, None), expected)
    torch.testing.assert_close(JensenShannon(1e-4).loss(STUDENT, TEACHER, None) / 1e-4, forward,
                               rtol=2e-2, atol=1e-3)
    for objective in (HardLabels(), Sequence()):
        expected = -torch.stack([q[k, label].log() for k, label in enumerate([0, 6, 3])])
        torch.testing.assert_close(objective.loss(STUDENT, TEACHER, None), expected)


def test_hidden_states() -> None:
    wide = side(2, 4, width=12)
    learned = HiddenStates().learned((2, 8), (4, 12))
    assert isinstance(learned, nn.ModuleList)
    losses = []
    for row, end in enumerate([5, 3, 4]):
        tokens = []
        for t in range(end):
            pairs = [(0, 0), (1, 2), (2, 4)]
            tokens.append(sum(float((learned[m].weight @ STUDENT.hidden[m][row, t] - wide.hidden[g][row, t])
                                    .detach().square().mean()) for m, g in pairs) / 3)
        losses.append(tokens)
    torch.testing.assert_close(HiddenStates().loss(STUDENT, wide, learned).detach(), per_row(losses))
    same = HiddenStates().learned((2, 8), (4, 8))
    own = Signals(P, hidden=TEACHER.hidden[::2], real=TEACHER.real)
    assert float(HiddenStates().loss(own, TEACHER, same).detach().abs().max()) == 0


def attention_table(signals: Signals, block: int, row: int, head: int, end: int) -> Tensor:
    channels = slice(4 * head, 4 * head + 4)
    return (signals.queries[block][row, :end, channels] @ signals.keys[block][row, :end, channels].T) / 2


def test_attention() -> None:
    losses = []
    for row, end in enumerate([5, 3, 4]):
        total = torch.zeros(end)
        for block, goal in ((0, 1), (1, 3)):
            for head in range(2):
                a = attention_table(STUDENT, block, row, head, end)
                b = attention_table(TEACHER, goal, row, head, end)
                total += (a - b).square().mean(1) / 4
        losses.append(total.tolist())
    torch.testing.assert_close(Attention().loss(STUDENT, TEACHER, None), per_row(losses))
    with pytest.raises(RecipeError, match="2 heads, the teacher 4; use relations"):
        Attention().loss(STUDENT, side(1, 4, heads=4), None)


def test_relations() -> None:
    wide, losses = side(3, 4, width=12, heads=4), []
    for row, end in enumerate([5, 3, 4]):
        total = torch.zeros(end)
        for kind in ("queries", "keys", "values"):
            own, goal = getattr(STUDENT, kind)[-1][row, :end], getattr(wide, kind)[-1][row, :end]
            for head in range(4):
                a, b = own[:, 2 * head:2 * head + 2], goal[:, 3 * head:3 * head + 3]
                p, q = (b @ b.T / 3**0.5).softmax(1), (a @ a.T / 2**0.5).softmax(1)
                total += (p * (p / q).log()).sum(1) / 4
        losses.append(total.tolist())
    torch.testing.assert_close(Relations().loss(STUDENT, wide, None), per_row(losses), rtol=1e-4, atol=1e-5)
    with pytest.raises(RecipeError, match="do not divide into 5 heads"):
        Relations(heads=5).loss(STUDENT, wide, None)
    with pytest.raises(RecipeError, match="kinds"):
        Relations(kinds="x")


def test_cosine_and_triple() -> None:
    angles = per_row([[1 - float(torch.cosine_similarity(STUDENT.hidden[-1][row, t],
                                                         TEACHER.hidden[-1][row, t], dim=0))
                       for t in range(end)] for row, end in enumerate([5, 3, 4])])
    torch.testing.assert_close(Cosine().loss(STUDENT, TEACHER, None), angles)
    soft, hard = (each.loss(STUDENT, TEACHER, None) for each in (SoftLabels(2.0), HardLabels()))
    expected = 5 * soft + 2 * hard + angles
    torch.testing.assert_close(Triple().loss(STUDENT, TEACHER, None), expected)
    rows = Cosine("rows").loss(STUDENT, TEACHER, None)
    torch.testing.assert_close(rows, 1 - torch.cosine_similarity(Q, P, dim=1))
    with pytest.raises(RecipeError, match="8 numbers, the teacher's 12"):
        Cosine().loss(STUDENT, side(2, 4, width=12), None)


def test_top_probabilities_and_the_rest() -> None:
    """With all classes but one kept, the rest is that class and nothing is lost; with fewer, KL is a lower
    bound (what is merged cannot tell apart)."""
    full = ForwardKL().loss(STUDENT, TEACHER, None)
    bounds = []
    for k in (2, 4, CLASSES - 1):
        said = Signals(None, Top(*top(P, k)))
        bounds.append(ForwardKL().loss(STUDENT, said, None))
    torch.testing.assert_close(bounds[-1], full, rtol=1e-4, atol=1e-5)
    assert bool((bounds[0] <= bounds[1] + 1e-6).all()) and bool((bounds[1] <= full + 1e-6).all())
    with pytest.raises(RecipeError, match="temperature 2"):
        SoftLabels(2.0).loss(STUDENT, Signals(None, Top(*top(P, 2))), None)


@given(st.integers(2, 9), st.integers(0, 10_000), st.floats(0.1, 30))
@settings(max_examples=30, deadline=None)
def test_divergences_are_positive_and_finite(classes: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(4, classes, generator=generator) * scale for _ in range(2)]
    p, q = (each.log_softmax(1) for each in logits)
    for loss in (kl(p, q), jensen_shannon(p, q, 0.5)):
        assert bool((loss >= -1e-5).all()) and bool(torch.isfinite(loss).all())
    assert float(jensen_shannon(p, q, 0.5).max()) <= math.log(2) + 1e-5
    values, index = top(logits[0], max(1, classes // 2))
    student = logits[1].clone().requires_grad_()
    loss = kl(with_rest(values), with_rest(student.log_softmax(1).gather(1, index))).sum()
    loss.backward()
    assert bool(torch.isfinite(loss)) and student.grad is not None
    assert bool(torch.isfinite(student.grad).all())
    assert float(kl(with_rest(values), with_rest(values)).abs().max()) == 0


def test_layers_are_matched_evenly() -> None:
    assert matched_layers(3, 6) == (2, 4, 6) and matched_layers(4, 6) == (1, 3, 4, 6)
    with pytest.raises(RecipeError, match="the student has 7 blocks, the teacher 6"):
        matched_layers(7, 6)


def test_mismatches_are_named() -> None:
    other = Signals(torch.zeros(BATCH, CLASSES + 1))
    with pytest.raises(RecipeError, match="8 classes, the student with 7"):
        ForwardKL().loss(STUDENT, other, None)
    with pytest.raises(DataError, match="no labels"):
        HardLabels().loss(Signals(Q), TEACHER, None)
    for wrong in (lambda: SoftLabels(0.0), lambda: JensenShannon(1.0), lambda: Triple(soft=-1.0),
                  lambda: Cosine("logits")):
        with pytest.raises(RecipeError):
            wrong()


@pytest.mark.parametrize("name", NAMES)
def test_declares_what_a_user_meets(name: str) -> None:
    module = importlib.import_module(f"rarefy.techniques.distill.{name}")
    kind = next(value for value in vars(module).values()
                if getattr(value, "__module__", "") == module.__name__ and hasattr(value, "edits"))
    assert "Paper:" in (module.__doc__ or "") and "Shapes:" in (kind.__doc__ or "")
    assert kind.scope == "objective" and kind.__dataclass_params__.frozen
    assert kind.needs <= {"logits", "labels", "hidden", "attention", "relations", "samples"}
