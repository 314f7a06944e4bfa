"""Jobs for ONNX Runtime and OpenVINO: the budget holds, the runtime answers as we do, recipes repeat."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from rarefy.cli.bench import exported as timed
from rarefy.core.errors import RecipeError, TargetError
from rarefy.core.nouns import Recipe, Step
from rarefy.measure.resources import bytes_on_disk
from rarefy.models.network import Network
from rarefy.run import to_onnx
from rarefy.run.job import Job, Result, compress, evaluate, run_recipe
from rarefy.run.progress import Silent
from rarefy.run.resolve import TARGETS, exported
from tiny_networks import Digits


def job(folder: Path, out: Path, **more: object) -> Job:
    return Job(str(folder), out, **{"to": "40%", "target": "onnxruntime", "effort": "quick",
                                    "data": (str(folder / "train.tsv"),),
                                    "eval_data": (str(folder / "dev.tsv"),), **more})


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return compress(job(tiny_encoder, tmp_path_factory.mktemp("job") / "out"), Silent())


def test_keeps_the_budget_and_uses_it(encoder: Result) -> None:
    size, limit = encoder.receipt["bytes"], encoder.receipt["budget"]["limit_bytes"]
    assert size == bytes_on_disk(encoder.out / "model") <= limit
    assert size > 0.9 * limit
    assert (encoder.out / "model" / "model.onnx").is_file()
    assert (encoder.out / "model" / "tokenizer.json").is_file()


def test_bytes_of_weights_are_those_of_the_file(encoder: Result) -> None:
    """What is foreseen for all weights differs from the file by less than a hundredth of it."""
    rows = encoder.receipt["plan"]
    assert {row["format"] for row in rows} != {"float32"}
    network, fixed = sum(row["bytes"] for row in rows), encoder.receipt["bytes"]
    assert 0 < fixed - network < fixed


def test_the_runtime_answers_as_we_do(encoder: Result) -> None:
    runtime, ours = encoder.receipt["measured"]["runtime"], encoder.receipt["measured"]["float"]
    assert runtime["version"].startswith("onnxruntime ")
    assert runtime["kl_mean"] == pytest.approx(ours["kl_mean"], rel=0.1, abs=1e-4)
    assert runtime["task"]["accuracy"] > 0.9
    assert runtime["logit_error_vs_float"]["kl_mean"] < 1e-3
    assert runtime["activations"] in ("floats", "8 bits, a scale for every token")


def test_speed_is_against_the_original_in_the_same_runtime(encoder: Result) -> None:
    speed = encoder.receipt["speed"]
    for name in ("original", "compressed"):
        latency = speed[name]["latency_ms"]
        assert set(latency) == {"1", "8"}
        assert all(0 < each["median"] <= each["p95"] for each in latency.values())
        assert speed[f"memory_{name}"]["peak"] > 0
    assert speed["ratio_single"] > 0 and speed["ratio_batch"] > 0
    assert set(encoder.receipt["lowered"]) == {row["site"] for row in encoder.receipt["plan"]}


def test_recipe_that_it_writes_gives_the_same_file(encoder: Result, tmp_path: Path) -> None:
    again = run_recipe(encoder.out / "recipe.yaml", tmp_path / "again", Silent())
    assert again.receipt["target"] == "onnxruntime"
    found = [hashlib.sha256((each / "model" / "model.onnx").read_bytes()).hexdigest()
             for each in (encoder.out, again.out)]
    assert found[0] == found[1]


def test_evaluate_runs_what_another_process_wrote(encoder: Result, tiny_encoder: Path) -> None:
    found = evaluate(encoder.out, str(tiny_encoder), Silent(), effort="quick",
                     eval_data=(str(tiny_encoder / "dev.tsv"),))
    assert found["target"] == "onnxruntime" and found["measured"].get("float") is None
    assert found["measured"]["runtime"]["kl_mean"] == pytest.approx(
        encoder.receipt["measured"]["runtime"]["kl_mean"], rel=0.5, abs=1e-3)


def test_found_by_folder_and_file(encoder: Result) -> None:
    inside = encoder.out / "model"
    for named in (encoder.out, inside, inside / "model.onnx"):
        assert exported(named) == (TARGETS["onnxruntime"], inside)
    assert timed(encoder.out) == inside / "model.onnx"


@pytest.mark.parametrize(("target", "to"), [("onnxruntime", "45%"), ("openvino", "95%")])  # XML is long
def test_cnn(tiny_cnn: Digits, tmp_path: Path, target: str, to: str) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    x, y = tiny_cnn.train
    unseen = tuple(values[:200] for values in tiny_cnn.test)
    done = compress(Job(Network.from_module(tiny_cnn.module), tmp_path / "out", to=to, target=target,
                        effort="quick", data=((x[:400], y[:400]),), eval_data=(unseen,)), Silent())
    runtime = done.receipt["measured"]["runtime"]
    assert bytes_on_disk(done.exported) <= done.receipt["budget"]["limit_bytes"]
    assert runtime["task"]["accuracy"] > 0.93
    assert runtime["activations"].startswith("8 bits, calibrated ranges")
    assert "8-bit integers" in done.receipt["lowered"].values()


def test_encoder_in_openvino(tiny_encoder: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    steps = (Step("svd", ("*.intermediate.dense.weight",), {"ratio": 0.5}),
             Step("rtn", ("*.attention.*",), format="int8"))
    done = compress(job(tiny_encoder, tmp_path / "out", to=None, target="openvino",
                        recipe=Recipe(str(tiny_encoder), steps, "openvino", "quick")), Silent())
    assert {each.name for each in done.exported.iterdir()} >= {"model.xml", "model.bin", "tokenizer.json"}
    assert done.receipt["measured"]["runtime"]["version"].startswith("openvino ")
    assert "two thin products" in done.receipt["lowered"].values()


@pytest.mark.filterwarnings("default")
def test_what_a_target_has_no_form_for_is_said(tiny_encoder: Path, tmp_path: Path) -> None:
    steps = (Step("tensor_train", ("*.intermediate.dense.weight",)),)
    recipe = Recipe(str(tiny_encoder), steps, "onnxruntime", "quick")
    done = compress(job(tiny_encoder, tmp_path / "out", to=None, recipe=recipe), Silent())
    assert "onnxruntime has no form as small for 2 weights" in done.receipt["warnings"][0]


def test_missing_package_is_one_line(tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                     ) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"onnx is not installed; pip install 'rarefy\[onnx\]'"):
        compress(job(tiny_encoder, tmp_path / "out"), Silent())


def test_unknown_format_in_a_recipe(tiny_encoder: Path, tmp_path: Path) -> None:
    recipe = Recipe(str(tiny_encoder), (Step("rtn", format="int4-g33x"),), "onnxruntime", "quick")
    with pytest.raises(RecipeError, match="format 'int4-g33x' is unknown; did you mean"):
        compress(job(tiny_encoder, tmp_path / "out", to=None, recipe=recipe), Silent())


def test_disagreement_is_refused(encoder: Result, tiny_encoder: Path, tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is not what its trees say does not get a name."""
    write = to_onnx.Traced.export

    def damaged(self, opened, trees, plan, path) -> None:  # type: ignore[no-untyped-def]
        write(self, opened, trees, plan, path)
        import onnx

        file = onnx.load(path / "model.onnx")
        scale = next(each for each in file.graph.initializer if each.name.endswith(".scale"))
        values = 3 * onnx.numpy_helper.to_array(scale)
        scale.CopyFrom(onnx.numpy_helper.from_array(values, scale.name))
        onnx.save(file, path / "model.onnx")

    monkeypatch.setattr(to_onnx.Traced, "export", damaged)
    with pytest.raises(TargetError, match=r"the file is not to be used|computes something else"):
        compress(job(tiny_encoder, tmp_path / "out"), Silent())
    assert not (tmp_path / "out").exists()
