"""The main job for networks that are no language models, and for language models that run in PyTorch."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rarefy
from rarefy.calibration.examples import Examples
from rarefy.core.errors import BudgetError, DataError, EditError, ModelError, RecipeError, TargetError
from rarefy.core.nodes import Dense, Masked, Product, Quantized
from rarefy.core.nouns import Recipe, Step
from rarefy.measure.resources import bytes_on_disk
from rarefy.models.network import TENSOR, Network
from rarefy.report.summary import summary
from rarefy.run.job import Job, compress, evaluate, plan, run_recipe
from rarefy.run.progress import Silent
from rarefy.run.samples import _stages, joined
from rarefy.run.trees import outline
from rarefy.runtimes.torch import LOOKED_UP
from tiny_networks import Digits, TinyCNN


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def encoder_job(folder: Path, out: Path, **changes: Any) -> Job:
    settings: dict[str, Any] = {"to": "30%", "effort": "quick", "data": (str(folder / "train.tsv"),),
                                "eval_data": (str(folder / "dev.tsv"),)}
    return Job(str(folder), out, **{**settings, **changes})


@pytest.fixture(scope="module")
def finished(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One finished job on the encoder that several tests look at."""
    result = compress(encoder_job(tiny_encoder, tmp_path_factory.mktemp("job") / "out"), Silent())
    return result.out, result.receipt


# ---- encoders ------------------------------------------------------------------------------------------


def test_keeps_the_budget_and_the_task(finished: tuple[Path, dict[str, Any]]) -> None:
    out, receipt = finished
    limit = receipt["budget"]["limit_bytes"]
    assert bytes_on_disk(out / "model") == receipt["bytes"] <= limit
    assert receipt["bytes"] > 0.8 * limit
    assert receipt["target"] == "torch" and receipt["model"]["answers"] == "classes"
    measured = receipt["measured"]["float"]
    assert measured["task"]["accuracy"] >= measured["task"]["accuracy_original"] - 0.02
    assert measured["top1"] > 0.98 and measured["samples"] == 200
    assert {p.name for p in out.iterdir()} == {"model", "receipt.json", "report.html", "recipe.yaml"}
    assert {each["path"] for each in receipt["outputs"]} >= {"model/tree.json", "model/rarefy.safetensors"}
    assert set(receipt["lowered"]) == {row["site"] for row in receipt["plan"]}
    assert receipt["speed"]["compressed"]["batch"] > 0


def test_says_what_came_out(finished: tuple[Path, dict[str, Any]]) -> None:
    out, receipt = finished
    headline, rows = summary(receipt)
    assert headline.startswith("tiny_encoder fits in")
    labels = dict(rows)
    assert "nats per sample, same class" in labels["KL in PyTorch"] and "the original's" in labels["accuracy"]
    page = (out / "report.html").read_text()
    assert "Same class" in page and "How the weights run" in page and "next token" not in page


def test_what_was_exported_runs(finished: tuple[Path, dict[str, Any]], tiny_encoder: Path) -> None:
    out, receipt = finished
    found = evaluate(out, str(tiny_encoder), Silent(), eval_data=(str(tiny_encoder / "dev.tsv"),))
    assert found["measured"]["float"]["kl_mean"] == receipt["measured"]["float"]["kl_mean"]
    loaded = rarefy.load(out)
    assert type(loaded).__name__ == "BertForSequenceClassification"


def test_recipe_that_it_writes_gives_the_same_folder(finished: tuple[Path, dict[str, Any]],
                                                     tmp_path: Path) -> None:
    out, _ = finished
    again = run_recipe(out / "recipe.yaml", tmp_path / "again", Silent())
    assert hashes(again.exported) == hashes(out / "model")


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_bits(finished: tuple[Path, dict[str, Any]], tiny_encoder: Path,
                                                tmp_path: Path) -> None:
    out, threads = tmp_path / "out", str(torch.get_num_threads())
    code = ("from pathlib import Path; from rarefy.run.job import Job, compress\n"
            f"compress(Job({str(tiny_encoder)!r}, Path({str(out)!r}), to='30%', effort='quick', "
            f"data=({str(tiny_encoder / 'train.tsv')!r},), eval_data=({str(tiny_encoder / 'dev.tsv')!r},)))")
    work = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": threads})
    sites, patience = tmp_path / "out.partial" / "work" / "sites0", time.monotonic() + 180
    while not (sites.is_dir() and len(list(sites.iterdir())) >= 4) and work.poll() is None:
        assert time.monotonic() < patience, "the job never got to its weights"
        time.sleep(0.005)
    os.kill(work.pid, signal.SIGKILL)
    work.wait()
    result = compress(encoder_job(tiny_encoder, out), Silent())
    assert hashes(result.exported) == hashes(finished[0] / "model")


def test_bare_encoder_is_judged_by_cosine_and_probe(tiny_encoder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    module = AutoModelForSequenceClassification.from_pretrained(tiny_encoder).bert
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    result = rarefy.compress(module, "40%", out=tmp_path / "out", tokenizer=tokenizer, effort="quick",
                             data=str(tiny_encoder / "train.tsv"), eval_data=str(tiny_encoder / "dev.tsv"))
    measured = result.receipt["measured"]["float"]
    assert measured["cosine"] > 0.99 and "kl_mean" not in measured
    assert measured["task"]["by"] == "probe" and measured["task"]["accuracy"] > 0.8
    assert "cosine" in dict(summary(result.receipt)[1])["distance in PyTorch"]
    pooler = next(row for row in result.receipt["plan"] if "pooler" in row["site"])
    assert pooler["format"] == "float32"  # no sample reaches the answer through it


# ---- networks of one's own -----------------------------------------------------------------------------


def test_module_and_tensors_in_memory(tiny_cnn: Digits, tmp_path: Path) -> None:
    result = rarefy.compress(tiny_cnn.module, "40%", out=tmp_path / "out", data=tiny_cnn.train,
                             eval_data=tiny_cnn.test, effort="quick")
    task = result.receipt["measured"]["float"]["task"]
    assert task["accuracy"] >= task["accuracy_original"] - 0.02
    loaded = rarefy.load(tmp_path / "out", into=TinyCNN())
    x, y = tiny_cnn.test
    with torch.no_grad():
        assert float((loaded(x).argmax(1) == y).float().mean()) == pytest.approx(task["accuracy"])


def test_balanced_effort_measures_swaps_and_goes_stage_by_stage(tiny_cnn: Digits, tmp_path: Path) -> None:
    result = rarefy.compress(tiny_cnn.module, "40%", out=tmp_path / "out", data=tiny_cnn.train,
                             eval_data=tiny_cnn.test)
    assert {swap["role"] for swap in result.receipt["swaps"]} == {"conv", "depthwise", "pointwise", "head"}
    assert result.receipt["measured"]["float"]["top1"] > 0.97


def test_smallest_export_for_a_bound(tiny_cnn: Digits, tmp_path: Path) -> None:
    result = rarefy.compress(tiny_cnn.module, max_kl=0.01, out=tmp_path / "out", data=tiny_cnn.train,
                             eval_data=tiny_cnn.test, effort="quick")
    assert result.receipt["measured"]["float"]["kl_mean"] <= 0.01
    assert result.receipt["bytes"] < 0.5 * result.receipt["model"]["original_bytes"]


def test_vectors_of_a_network_that_does_not_classify(tiny_cnn: Digits, tmp_path: Path) -> None:
    module = nn.Sequential(tiny_cnn.module.stem, nn.Conv2d(16, 8, 3, stride=2), nn.Flatten())
    result = rarefy.compress(module, "90%", out=tmp_path / "out", data=tiny_cnn.train[0][:200],
                             gives="embedding", effort="quick")
    assert result.receipt["measured"]["float"]["cosine"] > 0.99


# ---- recipes -------------------------------------------------------------------------------------------


def cnn_recipe(digits: Digits, out: Path, *steps: Step) -> Any:
    job = Job(Network.from_module(digits.module), out, effort="quick", data=(digits.train,),
              eval_data=(digits.test,), recipe=Recipe("", steps))
    return compress(job, Silent())


@pytest.mark.parametrize("steps", [
    (Step("magnitude", ("role:head",), {"sparsity": 0.5}), Step("gptq", ("*",), {}, "int8")),
    (Step("rtn", ("*",), {}, "int4"), Step("magnitude", ("role:head",), {"sparsity": 0.5})),
    (Step("svd", ("role:head",), {"rank": 5}), Step("rtn", ("role:head",), {}, "int8")),
])
def test_any_techniques_in_any_order(steps: tuple[Step, ...], tiny_cnn: Digits, tmp_path: Path) -> None:
    result = cnn_recipe(tiny_cnn, tmp_path / "out", *steps)
    done = [receipt["technique"] for receipt in result.receipt["sites"] if receipt["site"] == "fc.weight"]
    assert done == [step.technique for step in steps]
    assert result.receipt["measured"]["float"]["top1"] > 0.7
    head = next(row for row in result.receipt["plan"] if row["site"] == "fc.weight")
    assert head["bytes"] < 10 * 512 * 1.1 and "int" in head["format"]


def test_weights_that_no_step_names_stay_as_they_are(tiny_cnn: Digits, tmp_path: Path) -> None:
    result = cnn_recipe(tiny_cnn, tmp_path / "out", Step("rtn", ("role:head",), {}, "int8"))
    formats = {row["site"]: row["format"] for row in result.receipt["plan"]}
    assert formats.pop("fc.weight") == "int8" and set(formats.values()) == {"float32"}


@pytest.mark.parametrize("how", ["global", "owl", "fisher"])
def test_sparsity_is_shared_out(how: str, tiny_cnn: Digits, tmp_path: Path) -> None:
    step = Step("magnitude", ("*",), {"sparsity": 0.5, "allocate": how})
    result = cnn_recipe(tiny_cnn, tmp_path / "out", step)
    loaded = rarefy.load(tmp_path / "out", into=TinyCNN())
    weights = [loaded.get_parameter(row["site"]) for row in result.receipt["plan"]]
    shares = [float((weight == 0).float().mean()) for weight in weights]
    total = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert total == pytest.approx(0.5, abs=0.02)
    assert max(shares) - min(shares) > 0.01


@pytest.mark.parametrize("technique", ["svd", "fwsvd"])
def test_an_embedding_becomes_a_narrow_table(technique: str, tiny_encoder: Path, tmp_path: Path) -> None:
    """The file holds two factors, and what it is loaded as looks rows up without the table."""
    steps = (Step(technique, ("role:embed",), {"rank": 24}),)
    job = encoder_job(tiny_encoder, tmp_path / "out", to=None, recipe=Recipe(str(tiny_encoder), steps,
                                                                             effort="quick"))
    receipt = compress(job, Silent()).receipt
    row = next(row for row in receipt["plan"] if row["role"] == "embed")
    rows, columns = row["shape"]
    assert row["format"] == "low rank" and row["bytes"] == 4 * 24 * (rows + columns) < 2 * rows * columns
    assert receipt["lowered"][row["site"]] == LOOKED_UP
    moved = receipt["measured"]["float"]["kl_mean"]
    assert moved > 0 and receipt["measured"]["runtime"]["kl_mean"] == pytest.approx(moved, rel=1e-3)


@pytest.mark.parametrize(("step", "error", "match"), [
    (Step("rtn", ("*",), {}, "int9"), RecipeError, "format 'int9' is unknown; did you mean 'int"),
    (Step("rtn", ("*",), {}, "int4-g32"), EditError, "9 columns not divisible by int4g32's block 32"),
    (Step("magnitude", ("*",), {"sparsty": 0.5}), RecipeError, "did you mean 'sparsity'"),
    (Step("magnitude", ("role:q",), {}), RecipeError, "'role:q' matches no weight"),
    (Step("rtn", ("*",), {"allocate": "owl"}), RecipeError, "no setting 'allocate'"),
    (Step("awq"), EditError, "awq can change none of its channels: neither a norm nor attention feeds"),
])
def test_recipes_that_do_not_do(step: Step, error: type, match: str, tiny_cnn: Digits,
                                tmp_path: Path) -> None:
    with pytest.raises(error, match=match):
        cnn_recipe(tiny_cnn, tmp_path / "out", step)
    assert not (tmp_path / "out").exists()


# ---- language models in PyTorch ------------------------------------------------------------------------


@pytest.mark.slow
def test_language_model_for_torch(tiny_llama: Path, tmp_path: Path) -> None:
    result = compress(Job(str(tiny_llama), tmp_path / "out", to="35%", target="torch", effort="quick",
                          data=("python-docs",)), Silent())
    receipt = result.receipt
    assert receipt["bytes"] <= receipt["budget"]["limit_bytes"]
    assert 0 < receipt["measured"]["float"]["kl_mean"] < 0.3
    assert receipt["measured"]["runtime"]["logit_error_vs_float"]["kl_mean"] < 0.05
    assert receipt["speed"]["ratio_decode"] > 0 and len(receipt["completions"]) == 4
    network = rarefy.load(tmp_path / "out")
    assert type(network).__name__ == "LlamaForCausalLM"
    found = evaluate(tmp_path / "out", str(tiny_llama), Silent(), effort="quick")
    assert found["target"] == "torch" and found["measured"]["float"]["kl_mean"] > 0


@pytest.mark.slow
def test_plan_for_torch_is_dry(tiny_encoder: Path, tmp_path: Path) -> None:
    few, many = (plan(encoder_job(tiny_encoder, tmp_path / "out", to=to)) for to in ("30%", "40%"))
    assert not (tmp_path / "out").exists()
    assert few.predicted_kl > many.predicted_kl and few.predicted_bytes < many.predicted_bytes


# ---- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "error", "match"), [
    ({"target": "llama.cpp"}, TargetError, "llama.cpp runs causal language models, and this is none"),
    ({"target": "troch"}, TargetError, "did you mean 'torch'"),
    ({"to": "1KB"}, BudgetError, "not possible; the smallest file that torch can load"),
    ({"to": "10%"}, BudgetError, "not possible|are not possible"),
    ({"data": ("nowhere.tsv",)}, DataError, "nowhere.tsv: no such file"),
])
def test_refuses_before_any_work(change: dict[str, Any], error: type, match: str, tiny_encoder: Path,
                                 tmp_path: Path) -> None:
    with pytest.raises(error, match=match):
        compress(encoder_job(tiny_encoder, tmp_path / "out", **change), Silent())
    assert not (tmp_path / "out").exists()


def test_data_on_both_sides_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    job = encoder_job(tiny_encoder, tmp_path / "out", eval_data=(str(tiny_encoder / "train.tsv"),),
                      effort="max")
    with pytest.raises(DataError, match="evaluation data was calibrated on"):
        compress(job, Silent())


def test_a_network_without_data_says_what_it_takes(tiny_cnn: Digits, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="TinyCNN: pass data"):
        rarefy.compress(tiny_cnn.module, "50%", out=tmp_path / "out")
    with pytest.raises(ModelError, match="gives 'clases': choose classes or embedding"):
        rarefy.compress(tiny_cnn.module, "50%", out=tmp_path / "out", data=tiny_cnn.train, gives="clases")


def test_text_is_not_tensors(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a language model takes text"):
        compress(Job(str(tiny_llama), tmp_path / "out", to="50%", data=(torch.zeros(3, 4),)), Silent())


def test_a_missed_bound_leaves_the_candidate_beside(tiny_cnn: Digits, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="is above --max-kl 1e-09"):
        rarefy.compress(tiny_cnn.module, "40%", max_kl=1e-9, out=tmp_path / "out", data=tiny_cnn.train,
                        eval_data=tiny_cnn.test, effort="quick")
    assert json.loads((tmp_path / "out.rejected" / "receipt.json").read_text())["missed"]


# ---- parts ---------------------------------------------------------------------------------------------


def test_stages_follow_blocks_and_are_few(tiny_cnn: Digits) -> None:
    module = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4)) for _ in range(30)])
    sites = list(Network.from_module(module).map.sites)
    stages = _stages(sites, sequential=True)
    assert len(stages) == 12 and [site for stage in stages for site in stage] == sites
    assert _stages(sites, sequential=False) == [sites] and _stages([], sequential=True) == []


def test_sources_are_joined() -> None:
    short, long = Examples({"ids": torch.ones(2, 3).long()}), Examples({"ids": torch.ones(1, 5).long()})
    assert joined([short, long]).inputs["ids"].tolist()[0] == [1, 1, 1, 0, 0]
    with pytest.raises(DataError, match="the same inputs"):
        joined([short, Examples({TENSOR: torch.ones(2, 3)})])
    with pytest.raises(DataError, match="different shapes"):
        joined([Examples({TENSOR: torch.ones(2, 3)}), Examples({TENSOR: torch.ones(2, 4)})])


def test_trees_in_words() -> None:
    from rarefy.core.edit import edit
    from rarefy.numerics.grids import integer_grid
    from rarefy.techniques.quantize.rtn import RTN

    weight = torch.randn(4, 32)
    codes, _ = edit("w", Dense(weight), weight, RTN(integer_grid(4, 32)), "rtn", None, torch.Generator())
    assert isinstance(codes, Quantized)
    assert outline(codes) == "int4-g32"
    assert outline(Masked(weight > 0, codes)) == "sparse int4-g32"
    assert outline(Product(Dense(weight), Dense(weight.half()))) == "low rank (float16)"
