"""Jobs for integers alone: no bit differs from the interpreter, answers stay, the rest is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from rarefy.core.errors import BudgetError, RecipeError, TargetError
from rarefy.core.nouns import Recipe, Step
from rarefy.measure.resources import bytes_on_disk
from rarefy.models.network import Network
from rarefy.run.job import Job, Result, compress, evaluate
from rarefy.run.progress import Silent
from rarefy.runtimes.integer import Fake, IntegerNetwork
from tiny_networks import Digits


def text_job(folder: Path, out: Path, **more: object) -> Job:
    return Job(str(folder), out, **{"to": "100%", "target": "integer", "effort": "quick",
                                    "data": (str(folder / "train.tsv"),),
                                    "eval_data": (str(folder / "dev.tsv"),), **more})


def image_job(digits: Digits, out: Path, module: nn.Module | None = None, **more: object) -> Job:
    x, y = digits.train
    unseen = tuple(values[:200] for values in digits.test)
    return Job(Network.from_module(module or digits.module), out, **{
        "to": "100%", "target": "integer", "effort": "quick", "data": ((x[:400], y[:400]),),
        "eval_data": (unseen,), **more})


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return compress(text_job(tiny_encoder, tmp_path_factory.mktemp("job") / "out"), Silent())


@pytest.fixture(scope="module")
def cnn(tiny_cnn: Digits, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return compress(image_job(tiny_cnn, tmp_path_factory.mktemp("job") / "out"), Silent())


@pytest.mark.parametrize("kind", ["encoder", "cnn"])
def test_answers_stay_and_no_bit_differs(kind: str, request: pytest.FixtureRequest) -> None:
    done: Result = request.getfixturevalue(kind)
    runtime = done.receipt["measured"]["runtime"]
    assert runtime["bits_differing"] == 0
    assert runtime["activations"].startswith("integers of 8 bits")
    assert abs(runtime["task"]["accuracy"] - runtime["task"]["accuracy_original"]) < 0.02
    told = runtime["logit_error_vs_float"]
    assert 0 < told["relative_error"] <= told["relative_error_allowed"]
    assert done.receipt["bytes"] == bytes_on_disk(done.exported)
    assert set(done.receipt["lowered"].values()) == {"8-bit integers"}


@pytest.mark.parametrize("kind", ["encoder", "cnn"])
def test_the_file_multiplies_integers_alone(kind: str, request: pytest.FixtureRequest) -> None:
    import onnx

    done: Result = request.getfixturevalue(kind)
    kinds = {node.op_type for node in onnx.load(done.exported / "model.onnx").graph.node}
    assert kinds & {"MatMulInteger", "ConvInteger"}
    assert not kinds & {"MatMul", "Gemm", "Conv", "Softmax", "Erf", "BatchNormalization"}


def test_another_process_evaluates_it_in_the_runtime(encoder: Result, tiny_encoder: Path) -> None:
    found = evaluate(encoder.out, str(tiny_encoder), Silent(), effort="quick",
                     eval_data=(str(tiny_encoder / "dev.tsv"),))
    assert found["measured"]["runtime"]["kl_mean"] == pytest.approx(
        encoder.receipt["measured"]["runtime"]["kl_mean"], rel=0.5, abs=1e-3)


def test_an_answer_that_differs_by_a_bit_is_refused(tiny_cnn: Digits, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    honest = IntegerNetwork.run

    def off_by_one(self: IntegerNetwork, codes: dict[str, Tensor]) -> Tensor:
        answer = honest(self, codes)
        answer.view(-1)[0] ^= 1
        return answer

    monkeypatch.setattr(IntegerNetwork, "run", off_by_one)
    with pytest.raises(TargetError, match="answers otherwise than the integers say, in 1 of"):
        compress(image_job(tiny_cnn, tmp_path / "out"), Silent())
    assert not (tmp_path / "out").exists()


def test_integers_far_from_fake_quantization_are_refused(tiny_cnn: Digits, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Though file and interpreter agree: both may hold the same wrong integers."""
    honest = Fake.answers
    monkeypatch.setattr(Fake, "answers", lambda self, inputs: honest(self, inputs).flip(1))
    with pytest.raises(TargetError, match=r"integers answer .* from fake quantization"):
        compress(image_job(tiny_cnn, tmp_path / "out"), Silent())


class Smooth(nn.Module):
    """An activation function that has no integer form here."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Conv2d(1, 4, 3), nn.Linear(144, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.nn.functional.silu(self.layer(x)).flatten(1))


def test_what_has_no_integers_is_refused_before_any_work(tiny_cnn: Digits, tiny_llama: Path, tmp_path: Path
                                                         ) -> None:
    with pytest.raises(TargetError, match=r"silu.* has no integer form here"):
        compress(image_job(tiny_cnn, tmp_path / "a", Smooth()), Silent())
    with pytest.raises(TargetError, match="causal attention has no form in integers alone"):
        compress(Job(str(tiny_llama), tmp_path / "b", to="50%", target="integer"), Silent())
    with pytest.raises(BudgetError, match="not possible"):
        compress(image_job(tiny_cnn, tmp_path / "c", to="10%"), Silent())
    assert not any(tmp_path.glob("*/receipt.json"))


def test_a_recipe_rounds_every_weight_by_rows(tiny_cnn: Digits, tmp_path: Path) -> None:
    def run(*steps: Step) -> Result:
        return compress(image_job(tiny_cnn, tmp_path / "out", to=None, overwrite=True,
                                  recipe=Recipe("cnn", steps, "integer", "quick")), Silent())

    first = tiny_cnn.module.state_dict()
    path = next(name for name, values in first.items() if values.ndim > 1)
    with pytest.raises(RecipeError, match="has not one scale a row"):
        run(Step("rtn", format="int4-g8"))
    with pytest.raises(RecipeError, match="no step rounds it"):
        run(Step("rtn", (path,), format="int8"))
    done = run(Step("magnitude", settings={"sparsity": 0.3}), Step("rtn", format="int6"))
    assert done.receipt["measured"]["runtime"]["task"]["accuracy"] > 0.85
