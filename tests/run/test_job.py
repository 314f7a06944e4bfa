"""The main job on tiny trained models: the promise, the proof, and what happens when things go wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rarefy.core.errors import BudgetError, DataError, OutputError, RecipeError, TargetError
from rarefy.formats.gguf import read_gguf
from rarefy.run import journal
from rarefy.run.job import Job, compress, evaluate, plan, run_recipe
from rarefy.run.progress import Silent


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def finished(tiny_gemma3: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """One finished job that several tests look at."""
    out = tmp_path_factory.mktemp("job") / "out"
    result = compress(Job(str(tiny_gemma3), out, to="40%", effort="quick", data=("python-docs",)), Silent())
    return result.out, result.receipt


def test_keeps_the_budget_to_the_last_byte(finished: tuple[Path, dict]) -> None:
    out, receipt = finished
    size = (out / "model.gguf").stat().st_size
    assert size == receipt["bytes"] <= receipt["budget"]["limit_bytes"]
    assert size > 0.9 * receipt["budget"]["limit_bytes"]  # and uses what it may
    assert receipt["budget"]["limit_bytes"] == int(receipt["model"]["original_bytes"] * 0.4)
    assert {p.name for p in out.iterdir()} == {"model.gguf", "receipt.json", "report.html", "recipe.yaml"}
    assert not out.with_name("out.partial").exists()


def test_proof_is_of_the_exported_file(finished: tuple[Path, dict]) -> None:
    out, receipt = finished
    measured = receipt["measured"]
    assert 0 < measured["float"]["kl_mean"] < 0.5
    assert measured["runtime"]["logit_error_vs_float"]["kl_mean"] < 0.01
    assert receipt["outputs"][0]["sha256"] == sha(out / "model.gguf")
    assert json.loads((out / "receipt.json").read_text())["measured"] == measured
    formats = {row["site"]: row["format"] for row in receipt["plan"]}
    held = {name: tensor.type for name, tensor in read_gguf(out / "model.gguf").tensors.items()}
    assert held["token_embd.weight"] == formats["model.embed_tokens.weight"]
    sites = {each["site"] for each in receipt["sites"]}
    assert sites == set(formats)  # no weight without a receipt


def test_recipe_that_it_writes_gives_the_same_file(finished: tuple[Path, dict], tmp_path: Path) -> None:
    """Law 4: same seed, same codes, bit for bit, however the job is asked for."""
    out, _ = finished
    again = run_recipe(out / "recipe.yaml", tmp_path / "again", Silent())
    assert sha(again.exported) == sha(out / "model.gguf")


def test_evaluate_finds_the_same_file_again(finished: tuple[Path, dict], tiny_gemma3: Path) -> None:
    out, receipt = finished
    found = evaluate(out, str(tiny_gemma3), Silent(), effort="quick")
    assert found["outputs"][0]["sha256"] == receipt["outputs"][0]["sha256"]
    assert 0 < found["measured"]["float"]["kl_mean"] < 0.5


def test_untied_llama_with_permuted_rows_and_own_samples(tiny_llama_wide: Path, tmp_path: Path) -> None:
    result = compress(Job(str(tiny_llama_wide), tmp_path / "out", to="5bpw", effort="quick"), Silent())
    measured = result.receipt["measured"]
    assert measured["runtime"]["logit_error_vs_float"]["kl_mean"] < 0.01
    assert result.receipt["data"]["calibration"] == "the model's own samples"
    assert result.exported.stat().st_size <= result.receipt["budget"]["limit_bytes"]


def test_more_bytes_less_damage(tiny_gemma3: Path) -> None:
    found = [plan(Job(str(tiny_gemma3), to=to, effort="quick", data=("python-docs",)))
             for to in ("35%", "45%", "60%")]
    assert found[0].predicted_kl > found[1].predicted_kl > found[2].predicted_kl
    assert found[0].predicted_bytes < found[1].predicted_bytes < found[2].predicted_bytes


def test_max_kl_minimises_bytes_and_holds(tiny_gemma3: Path, tmp_path: Path) -> None:
    result = compress(Job(str(tiny_gemma3), tmp_path / "out", max_kl=0.02, effort="quick",
                          data=("python-docs",)), Silent())
    assert result.receipt["measured"]["float"]["kl_mean"] <= 0.02
    assert result.receipt["bytes"] < 0.7 * result.receipt["model"]["original_bytes"]


def test_missed_bound_leaves_the_candidate_beside(tiny_gemma3: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = Job(str(tiny_gemma3), out, to="35%", max_kl=1e-5, effort="quick", data=("python-docs",))
    with pytest.raises(BudgetError, match=r"above --max-kl 1e-05 .* (would do|larger --max-kl)"):
        compress(job, Silent())
    assert not out.exists()
    assert (tmp_path / "out.rejected" / "model.gguf").is_file()


@pytest.mark.parametrize(("change", "error", "match"), [
    ({"to": "1KB"}, BudgetError, r"not possible; the smallest file .* pass --to"),
    ({"to": "40%", "target": "lama.cpp"}, TargetError, "did you mean 'llama.cpp'"),
    ({"to": "40%", "effort": "quik"}, RecipeError, "did you mean 'quick'"),
    ({"to": "40%", "data": ("nowhere.txt",)}, DataError, "nowhere.txt"),
    ({}, RecipeError, "no budget"),
])
def test_refuses_before_any_work(change: dict, error: type, match: str, tiny_gemma3: Path,
                                 tmp_path: Path) -> None:
    job = Job(str(tiny_gemma3), tmp_path / "out", **{"effort": "quick", **change})
    with pytest.raises(error, match=match):
        compress(job, Silent())
    assert not (tmp_path / "out").exists()


def test_text_on_both_sides_is_refused(tiny_gemma3: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    import pydoc_data.topics as topics

    text.write_text("\n".join(topics.topics.values())[:20_000])
    job = Job(str(tiny_gemma3), tmp_path / "out", to="40%", effort="quick", data=(str(text),),
              eval_data=(str(text),))
    with pytest.raises(DataError, match="calibrated on"):
        compress(job, Silent())
    assert not (tmp_path / "out").exists()


def test_existing_output_is_not_touched(tiny_gemma3: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="exists"):
            compress(Job(str(tiny_gemma3), out, to="40%", overwrite=overwrite), Silent())
    assert (out / "thesis.tex").read_text() == "years of work"


def test_output_that_cannot_be_written(tiny_gemma3: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        compress(Job(str(tiny_gemma3), tmp_path / "file" / "out", to="40%"), Silent())


def test_full_disk_is_one_line_and_nothing_is_left_under_the_name(
        tiny_gemma3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rarefy.run.to_llamacpp.export_gguf", full)
    with pytest.raises(OutputError, match="disk is full; free some space and run the same command again"):
        compress(Job(str(tiny_gemma3), tmp_path / "out", to="40%", effort="quick", data=("python-docs",)),
                 Silent())
    assert not (tmp_path / "out").exists()


def test_kill_9_and_resume_gives_the_same_bits(finished: tuple[Path, dict], tiny_gemma3: Path,
                                               tmp_path: Path) -> None:
    """Law 4 across a crash: killed while weights are being written, continued, equal to the last bit."""
    import torch

    out, threads = tmp_path / "out", str(torch.get_num_threads())  # sums depend on how many share them
    code = ("from pathlib import Path; from rarefy.run.job import Job, compress\n"
            f"compress(Job({str(tiny_gemma3)!r}, Path({str(out)!r}), to='40%', effort='quick', "
            "data=('python-docs',)))")
    work = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": threads})
    sites = tmp_path / "out.partial" / "work" / "sites0"
    patience = time.monotonic() + 120
    while not (sites.is_dir() and len(list(sites.iterdir())) >= 5) and work.poll() is None:
        assert time.monotonic() < patience, "the job never got to its weights"
        time.sleep(0.01)
    os.kill(work.pid, signal.SIGKILL)
    work.wait()
    assert not out.exists()
    before = {p.name: p.stat().st_mtime_ns for p in sites.iterdir() if not p.name.endswith(".part")}
    result = compress(Job(str(tiny_gemma3), out, to="40%", effort="quick", data=("python-docs",)), Silent())
    assert len(before) >= 4
    assert sha(result.exported) == sha(finished[0] / "model.gguf")


def test_torn_weight_is_done_again(tmp_path: Path, cached: Callable[..., Path]) -> None:
    del cached
    import torch

    from rarefy.core.nodes import Dense

    sites = journal.Sites(tmp_path / "sites", frozenset())
    sites["a"], sites["b"] = (Dense(torch.ones(2, 2)), ()), (Dense(torch.zeros(2, 2)), ())
    weights = next((tmp_path / "sites" / "b").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-3])
    (tmp_path / "sites" / "c.part").mkdir()  # killed while writing
    fresh = journal.Sites(tmp_path / "sites", frozenset())
    assert fresh.verify() == ["b"]
    assert list(fresh) == ["a"]
    fresh["c"] = (Dense(torch.ones(2, 2)), ())
    assert "c" in fresh
