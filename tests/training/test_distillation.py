"""Distillation end to end: readers, kept answers, students of fewer blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import convolutional, encoder, texts

from rarefy.core.errors import RecipeError
from rarefy.core.signals import Objective
from rarefy.models.model import Model, open_model
from rarefy.models.network import Network
from rarefy.techniques.distill.attention import Attention
from rarefy.techniques.distill.cosine import Cosine
from rarefy.techniques.distill.forward_kl import ForwardKL
from rarefy.techniques.distill.hard_labels import HardLabels
from rarefy.techniques.distill.hidden_states import HiddenStates
from rarefy.techniques.distill.relations import Relations
from rarefy.techniques.distill.soft_labels import SoftLabels
from rarefy.techniques.distill.triple import Triple
from rarefy.training.examples import Rows
from rarefy.training.loop import Settings
from rarefy.training.signals import Distillation
from rarefy.training.students import every_second, shallower
from rarefy.training.teacher import answered
from rarefy.training.tune import Tuning, student_of, tune

SETTINGS = Settings(steps=24, batch=16, rate=4e-3, precision="float32", gate_every=5)


def distil(student: Network | Model, teacher: Network | Model | None, *terms: Objective,
           data: Rows | None = None) -> list[float]:
    objective = Distillation(student, teacher, tuple((1.0, term) for term in terms))
    found = tune(student, {}, Tuning(), objective, texts() if data is None else data, SETTINGS)
    return [point.loss for point in found.curve.points]


@pytest.mark.parametrize("terms", [(HiddenStates(), Attention()), (Relations(),), (Triple(),),
                                   (SoftLabels(), HardLabels(), Cosine())], ids=str)
def test_half_the_blocks_learn(terms: tuple[Objective, ...]) -> None:
    teacher = encoder()
    student = shallower(teacher, every_second(4))
    losses = distil(student, teacher, *terms)
    assert sum(losses[-3:]) < 0.98 * sum(losses[:3])


def test_a_narrow_student_learns_through_projections() -> None:
    student = encoder(1, hidden_size=16, num_hidden_layers=2, intermediate_size=24)
    losses = distil(student, encoder(), HiddenStates(), SoftLabels())
    assert losses[-1] < losses[0]
    with pytest.raises(RecipeError, match="16 numbers, the teacher's 32"):
        distil(student, encoder(), Cosine())


def test_shallower_keeps_weights_and_numbers_them_anew() -> None:
    teacher = encoder()
    student = shallower(teacher, (0, 3))
    assert isinstance(student, Network) and student.map.blocks == 2
    name = "bert.encoder.layer.{}.attention.self.query.weight"
    assert torch.equal(student.weight(name.format(1)), teacher.weight(name.format(3)))
    assert student.config.num_hidden_layers == 2 and teacher.config.num_hidden_layers == 4
    for wrong in ((), (0, 4), (2, 1), (1, 1)):
        with pytest.raises(RecipeError, match="rising numbers from 0 to 3"):
            shallower(teacher, wrong)
    with pytest.raises(RecipeError, match="its blocks are no list"):
        shallower(convolutional(), (0,))


def test_a_shallower_language_model_keeps_its_lists(tiny_gemma3: Path) -> None:
    teacher = open_model(tiny_gemma3)
    student = shallower(teacher, (0, 1))
    assert isinstance(student, Model) and student.map.blocks == 2 and student.map.tied
    assert student.config.layer_types == ["sliding_attention", "full_attention"]
    tokens = torch.randint(3, 500, (16, 12), generator=torch.Generator().manual_seed(0))
    losses = distil(student, teacher, ForwardKL(), data=Rows({"input_ids": tokens}))
    assert losses[-1] < losses[0]


def test_kept_answers_are_the_teachers(tmp_path: Path) -> None:
    """With all probabilities kept, a step on stored answers is a step beside the teacher."""
    teacher, data = encoder(), texts(32)
    stored = answered(teacher, data, tmp_path)
    again = answered(teacher, data, tmp_path)  # read, not asked
    assert len(list(tmp_path.iterdir())) == 1
    index = torch.tensor([3, 30, 7])
    assert torch.equal(stored.batch(index)["teacher.rows"], again.batch(index)["teacher.rows"])
    student = student_of(encoder(1), {}, Tuning(), SETTINGS).eval()
    beside = Distillation(encoder(1), teacher, ((1.0, SoftLabels()),))(student, data.batch(index))
    kept = Distillation(encoder(1), None, ((1.0, SoftLabels()),))(student, stored.batch(index))
    torch.testing.assert_close(kept, beside, rtol=1e-4, atol=1e-5)


def test_kept_answers_of_a_language_model(tiny_llama: Path, tmp_path: Path) -> None:
    model = open_model(tiny_llama)
    tokens = torch.randint(3, 500, (6, 10), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(10) < torch.tensor([[10], [7], [10], [4], [9], [10]])).long()
    data = Rows({"input_ids": tokens * mask, "attention_mask": mask})
    stored = answered(model, data, tmp_path, k=511)
    student = student_of(model, {}, Tuning(frozenset({"norms"})), SETTINGS).eval()
    with torch.no_grad():
        for value in student.params.values():
            value.mul_(1.1)
        index = torch.tensor([1, 3])
        beside = Distillation(model, model, ((1.0, ForwardKL()),))(student, data.batch(index))
        kept = Distillation(model, None, ((1.0, ForwardKL()),))(student, stored.batch(index))
    assert len(kept) == 11
    torch.testing.assert_close(kept, beside, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_matched_is_named(tiny_llama: Path) -> None:
    model = open_model(tiny_llama)
    with pytest.raises(RecipeError, match="rotary"):
        Distillation(model, model, ((1.0, Attention()),))
    with pytest.raises(RecipeError, match="no separate queries"):
        Distillation(convolutional(), None, ((1.0, Relations()),))
    with pytest.raises(RecipeError, match="at least one objective"):
        Distillation(model, model, ())
    with pytest.raises(RecipeError, match="need the teacher at hand"):
        Distillation(encoder(), None, ((1.0, HiddenStates()),))
