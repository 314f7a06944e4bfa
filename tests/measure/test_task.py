"""Answers compared, and tasks scored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from rarefy.calibration.examples import Examples, read_examples
from rarefy.core.errors import DataError, ModelError
from rarefy.measure.task import Judge, divergences, macro_f1, probe, task
from rarefy.models.form import Form
from rarefy.models.network import TENSOR, Network
from rarefy.models.opening import open_any
from tiny_networks import Digits


@pytest.fixture(scope="module")
def cnn(tiny_cnn: Digits) -> Network:
    return Network.from_module(tiny_cnn.module)


def test_a_network_is_at_no_distance_from_itself(cnn: Network, tiny_cnn: Digits) -> None:
    x, y = tiny_cnn.test
    found = Judge(cnn, Examples({TENSOR: x}, y)).compare(cnn)
    assert (found.kind, found.mean, found.same, found.samples) == ("kl", 0.0, 1.0, len(x))
    assert found.task is not None and found.task.accuracy == found.task.accuracy_original > 0.95
    assert found.task.accuracy_stderr == 0


def test_noise_moves_answers_and_costs_accuracy(cnn: Network, tiny_cnn: Digits) -> None:
    x, y = tiny_cnn.test
    generator = torch.Generator().manual_seed(0)
    judge = Judge(cnn, Examples({TENSOR: x}, y))

    def noisy(size: float) -> object:
        weight = cnn.weight("fc.weight")
        return {"fc.weight": weight + size * torch.randn(weight.shape, generator=generator)}.get

    little, much = judge.compare(cnn, noisy(0.01)), judge.compare(cnn, noisy(0.5))
    assert 0 < little.mean < 0.1 * much.mean
    assert little.same is not None and much.same is not None and much.same < little.same
    assert much.task is not None and much.task.accuracy < much.task.accuracy_original
    assert 0 < much.task.accuracy_stderr < 0.1
    assert set(much.as_dict()) == {"kl_mean", "kl_stderr", "kl_median", "kl_p999", "samples", "top1", "task"}


def test_kl_and_cosine_are_what_they_say() -> None:
    p, q = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.5, 0.0, 2.0]])
    kl = float(divergences(p, q, Form(gives="classes")))
    assert kl == pytest.approx(float(torch.nn.functional.kl_div(
        q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="sum")), rel=1e-5)
    apart = divergences(p, q, Form(gives="embedding"))
    assert float(apart) == pytest.approx(1 - 4 / (5**0.5 * 4.25**0.5), rel=1e-6)


def test_f1_is_that_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, labels = (torch.randint(0, 5, (300,), generator=generator) for _ in range(2))
    assert macro_f1(chosen, labels) == pytest.approx(f1_score(labels, chosen, average="macro"), rel=1e-5)


def test_errors_of_differences_are_paired() -> None:
    labels = torch.zeros(100, dtype=torch.int64)
    wrong = labels.clone()
    wrong[:30] = 1
    assert task(wrong, wrong, labels, "labels").accuracy_stderr == 0
    worse = wrong.clone()
    worse[30] = 1
    found = task(wrong, worse, labels, "labels")
    assert found.accuracy == pytest.approx(0.69) and found.accuracy_stderr == pytest.approx(0.01, rel=0.01)


def test_vectors_are_judged_by_a_probe(tiny_encoder: Path) -> None:
    classifier = open_any(tiny_encoder)
    assert isinstance(classifier, Network)
    bare = Network.from_module(classifier.module.bert, form=Form("text", "embedding", "cls", 64),
                               tokenizer=classifier.tokenizer)
    train, dev = (read_examples(bare, str(tiny_encoder / name)) for name in ("train.tsv", "dev.tsv"))
    judge = Judge(bare, dev, train)
    found = judge.compare(bare, {"encoder.layer.0.output.dense.weight": torch.zeros(64, 128)}.get)
    assert found.kind == "distance" and found.same is None and found.mean > 0.01
    assert found.as_dict()["cosine"] == 1 - found.mean
    assert found.task is not None and found.task.by == "probe"
    assert found.task.accuracy < found.task.accuracy_original and found.task.accuracy_original > 0.9
    unlabelled = Judge(bare, Examples(dev.inputs)).compare(bare)
    assert unlabelled.task is None


def test_probe_is_a_logistic_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(400, 8, generator=generator), dim=1)
    y = (x[:, 0] + 0.3 * torch.randn(400, generator=generator) > 0).long()
    ours = probe(x, y, 2)
    theirs = LogisticRegression(C=1e3, max_iter=2000).fit(x.numpy(), y.numpy())
    agree = (torch.cat([x, torch.ones(400, 1)], 1) @ ours).argmax(1).numpy() == theirs.predict(x.numpy())
    assert agree.mean() > 0.98


def test_labels_beyond_the_classes(cnn: Network, tiny_cnn: Digits) -> None:
    x, y = tiny_cnn.test
    with pytest.raises(DataError, match="the network has 10 classes, 0 to 9"):
        Judge(cnn, Examples({TENSOR: x}, y + 1))


def test_a_network_that_computes_nan(cnn: Network, tiny_cnn: Digits) -> None:
    judge = Judge(cnn, Examples({TENSOR: tiny_cnn.test[0]}))
    with pytest.raises(ModelError, match="computes NaN or infinity for sample 0"):
        judge.compare(cnn, {"fc.weight": torch.full((10, 512), torch.nan)}.get)
