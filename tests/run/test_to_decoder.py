"""Jobs for ONNX Runtime and OpenVINO with language models: the cache, the budget, the answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from rarefy.core.errors import TargetError
from rarefy.core.nouns import Recipe, Step
from rarefy.measure.resources import bytes_on_disk
from rarefy.run import to_decoder
from rarefy.run.job import Job, Result, compress, evaluate
from rarefy.run.progress import Silent
from rarefy.runtimes.session import Session


@pytest.fixture(scope="module")
def done(tiny_gemma3: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    out = tmp_path_factory.mktemp("job") / "out"
    return compress(Job(str(tiny_gemma3), out, to="40%", target="onnxruntime", effort="quick"), Silent())


def test_keeps_the_budget_and_uses_it(done: Result) -> None:
    size, limit = done.receipt["bytes"], done.receipt["budget"]["limit_bytes"]
    assert size == bytes_on_disk(done.exported) <= limit
    assert size > 0.85 * limit
    assert {each.name for each in done.exported.iterdir()} >= {"model.onnx", "config.json", "tokenizer.json"}


def test_the_runtime_answers_as_we_do(done: Result) -> None:
    runtime, ours = done.receipt["measured"]["runtime"], done.receipt["measured"]["float"]
    assert runtime["version"].startswith("onnxruntime ")
    assert runtime["kl_mean"] == pytest.approx(ours["kl_mean"], rel=0.5, abs=2e-3)
    assert runtime["logit_error_vs_float"]["kl_mean"] < 1e-3
    assert runtime["logit_error_vs_float"]["relative_error"] < to_decoder.ROUNDED


def test_speed_is_told_for_reading_and_writing(done: Result) -> None:
    speed = done.receipt["speed"]
    for name in ("original", "compressed"):
        assert speed[name]["prefill"] > 0 and speed[name]["decode"] > 0
        assert speed[f"memory_{name}"]["peak"] > 0
    assert speed["ratio_decode"] > 0 and speed["ratio_prefill"] > 0
    assert len(done.receipt["completions"]) == len(to_decoder.PROMPTS)


def test_writing_is_the_likeliest_token_each_time(done: Result) -> None:
    """Through the cache, token by token, as if the whole text were read anew for each."""
    with Session(done.exported / "model.onnx", "onnxruntime") as session:
        text = torch.arange(5, 25)
        written = session.write(text, 6).tokens
        for token in written:
            assert int(session.read(text, [len(text) - 1]).argmax()) == token
            text = torch.cat([text, torch.tensor([token])])


@pytest.mark.slow
def test_evaluate_runs_what_another_process_wrote(done: Result, tiny_gemma3: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_decoder.Writing, "reopened", lambda *_: None)
    found = evaluate(done.out, str(tiny_gemma3), Silent(), effort="quick")
    assert found["target"] == "onnxruntime"
    assert found["measured"]["runtime"]["kl_mean"] == pytest.approx(
        done.receipt["measured"]["runtime"]["kl_mean"], rel=0.5, abs=1e-3)


def test_openvino_keeps_states(tiny_gemma3: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    steps = (Step("rtn", ("*.mlp.*",), format="int4-g64"), Step("rtn", ("*embed*",), format="int8"))
    made = compress(Job(str(tiny_gemma3), tmp_path / "out", target="openvino", effort="quick",
                        recipe=Recipe(str(tiny_gemma3), steps, "openvino", "quick")), Silent())
    runtime = made.receipt["measured"]["runtime"]
    assert runtime["version"].startswith("openvino ")
    assert runtime["logit_error_vs_float"]["relative_error"] < to_decoder.FLOAT
    with Session(made.exported / "model.xml", "openvino") as session:
        assert set(session.inputs) == {"input_ids", "attention_mask", "position_ids", "beam_idx"}
        text = torch.arange(5, 45)
        whole, parts = (session.read(text, [0, 20, 39], cut) for cut in ([], [13, 14, 30]))
        assert torch.allclose(whole, parts, rtol=1e-3, atol=1e-4)


def test_a_flipped_scale_is_noticed(done: Result, tiny_gemma3: Path, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    write = to_decoder.Writing.export

    def damaged(self, opened, trees, plan, path) -> None:  # type: ignore[no-untyped-def]
        write(self, opened, trees, plan, path)
        import onnx

        file = onnx.load(path / "model.onnx")
        scale = next(each for each in file.graph.initializer if each.name.endswith("down_proj.weight.scale"))
        values = -onnx.numpy_helper.to_array(scale)
        scale.CopyFrom(onnx.numpy_helper.from_array(values, scale.name))
        onnx.save(file, path / "model.onnx")

    monkeypatch.setattr(to_decoder.Writing, "export", damaged)
    recipe = Recipe(str(tiny_gemma3), (Step("rtn", format="int8"),), "onnxruntime", "quick")
    with pytest.raises(TargetError, match=r"the file is not to be used|computes something else"):
        compress(Job(str(tiny_gemma3), tmp_path / "out", target="onnxruntime", effort="quick",
                     recipe=recipe), Silent())
    assert not (tmp_path / "out").exists()
