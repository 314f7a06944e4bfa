"""``bench`` and ``doctor``: what they measure, what they find, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

from rarefy.core.errors import TargetError
from rarefy.export.onnx import GRIDS, export_onnx
from rarefy.export.openvino import export_openvino
from rarefy.export.program import trace
from rarefy.measure import machine
from rarefy.runtimes import present
from rarefy.runtimes.bench import compare
from small_networks import bert, rounded_trees, tokens


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, network = tmp_path_factory.mktemp("bench"), bert()
    program = trace(network, tokens(2, 9), (0, 1))
    trees = rounded_trees(network, GRIDS["int8"])
    export_onnx(network, {}, folder / "original.onnx", inputs=tokens(2, 9), program=program)
    (folder / "out").mkdir()
    export_onnx(network, trees, folder / "out" / "model.onnx", inputs=tokens(2, 9), program=program)
    export_openvino(network, trees, folder / "model.xml", inputs=tokens(2, 9), program=program)
    torch.export.save(program.exported, folder / "original.pt2")
    return {"torch": folder / "original.pt2", "original": folder / "original.onnx", "out": folder / "out",
            "openvino": folder / "model.xml"}


def test_all_runtimes_in_turns(files: dict[str, Path]) -> None:
    rows = compare([files["torch"], files["original"], files["openvino"]], length=12, visits=2, calls=3)
    assert [row.runtime.split()[0] for row in rows] == ["torch", "onnxruntime", "openvino"]
    for row in rows:
        assert set(row.latency) == {1, 8} and row.latency[8].median > 0 and row.peak > 20_000_000
    assert rows[0].latency[1].calls == 9 and rows[1].latency[1].calls == 6


def test_the_command(cli: Any, files: dict[str, Path]) -> None:
    done = cli("bench", str(files["out"]), "--against", str(files["original"]), "--visits", "2",
               "--length", "8")
    assert done.exit_code == 0, done.stderr
    assert "faster 8" in done.stdout and "model.onnx" in done.stdout and "onnxruntime 1" in done.stdout
    done = cli("bench", str(files["out"]), "--against", str(files["original"]), "--visits", "1", "--json")
    assert [row["ratio"].keys() for row in json.loads(done.stdout)] == [{"1": 0, "8": 0}.keys()] * 2


@pytest.mark.slow
def test_against_the_model_it_was_made_of(cli: Any, tiny_gemma3: Path, tmp_path: Path) -> None:
    """The original is written for the same runtime, and PyTorch runs what it was opened from."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"model": str(tiny_gemma3), "target": "onnxruntime", "effort": "quick",
                                  "steps": [{"technique": "rtn", "where": ["*"], "format": "int8"}]}))
    done = cli("run", str(recipe), "-o", str(tmp_path / "out"))
    assert done.exit_code == 0, done.stderr
    done = cli("bench", str(tmp_path / "out"), "--visits", "1", "--length", "16", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["memory_bytes_per_second"] > 1e8
    assert [row["runtime"].split()[0] for row in told["files"]] == ["onnxruntime", "torch", "onnxruntime"]
    assert all(row["decode"] > 0 and row["prefill"] > 0 for row in told["files"])
    assert told["files"][2]["bytes"] < told["files"][0]["bytes"] / 3
    assert "neither is in the times" in done.stderr


def test_energy_is_told_where_there_is_a_counter(tmp_path: Path) -> None:
    assert machine.joules(tmp_path) is None and machine.drawn(None, tmp_path) is None
    (tmp_path / "energy_uj").write_text("5000000")
    (tmp_path / "max_energy_range_uj").write_text("9000000")
    assert machine.joules(tmp_path) == 5 and machine.drawn(2.0, tmp_path) == 3
    assert machine.drawn(8.0, tmp_path) == 6  # it wrapped around


def test_what_is_refused(cli: Any, files: dict[str, Path], tmp_path: Path) -> None:
    done = cli("bench", str(tmp_path), "--against", str(files["original"]))
    assert done.exit_code == 7 and "holds 0 exported files" in done.stderr
    done = cli("bench", str(files["out"]), "--against", str(tmp_path / "a.gguf"))
    assert done.exit_code == 7 and "compared with one other .gguf file" in done.stderr
    with pytest.raises(TargetError, match=r"no runtime is known for \.bin"):
        compare([tmp_path / "m.bin"])


def test_doctor(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done = cli("doctor")
    assert done.exit_code == 0, done.stderr
    assert "onnxruntime" in done.stdout and "threads" in done.stdout
    told = json.loads(cli("doctor", "--json").stdout)
    by_name = {each["name"]: each for each in told["runtimes"]}
    assert by_name["onnxruntime"]["install"] == "" and "cpu" in by_name["onnxruntime"]["devices"]
    assert told["machine"]["threads"] >= 1

    real = present.version
    monkeypatch.setattr(present, "version", lambda name: real("none" if name == "openvino" else name))
    missing = {each.name: each for each in present.runtimes()}["openvino"]
    assert not missing.ready and missing.install == "pip install 'rarefy[openvino]'"
    assert missing.packages["openvino"] == "" and missing.devices == ()
