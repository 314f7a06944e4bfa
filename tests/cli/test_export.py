"""``rarefy export`` moves codes between files without touching them, and leaves nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rarefy.cli.export import grown
from rarefy.core.errors import OutputError


@pytest.fixture
def quantized(tiny_llama: Path, tmp_path: Path) -> Path:
    """A tiny Llama with every row in Q4_0, as ``compress`` would leave it."""
    import torch

    from rarefy.core.edit import Leaf
    from rarefy.core.nodes import Dense
    from rarefy.export.gguf import export_gguf
    from rarefy.formats.ggml import CODECS
    from rarefy.models.model import open_model
    from rarefy.techniques.quantize.rtn import RTN

    model, grid = open_model(tiny_llama), CODECS["Q4_0"].grid
    assert grid is not None
    generator = torch.Generator()
    trees = {}
    for site in model.map.sites:
        weight = model.weight(site.path)
        leaf = Leaf(site.path, Dense(weight), weight, None, None)
        trees[site.path] = RTN(grid).rewrite(leaf, generator).node
    (tmp_path / "out").mkdir()
    export_gguf(model, trees, dict.fromkeys(trees, "Q4_0"), tmp_path / "out" / "model.gguf")
    return tmp_path / "out"


def test_there_and_back_is_the_same_file(cli: Any, quantized: Path, tmp_path: Path) -> None:
    there = cli("export", str(quantized), "--for", "native", "-o", str(tmp_path / "native"), "--json")
    assert there.exit_code == 0, there.stderr
    assert json.loads(there.stdout)["target"] == "native"
    back = cli("export", str(tmp_path / "native"), "--for", "llama.cpp", "-o", str(tmp_path / "back.gguf"))
    assert back.exit_code == 0, back.stderr

    import torch

    from rarefy.export.native import trees_of
    from rarefy.models.model import open_model

    with pytest.warns(UserWarning, match="already quantized"):
        ours, theirs = (trees_of(open_model(path, dequantize=True))
                        for path in (quantized / "model.gguf", tmp_path / "back.gguf"))
    for path, tree in ours.items():
        assert torch.equal(tree.codes, theirs[path].codes)
        assert torch.equal(tree.dense(), theirs[path].dense())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back.gguf", "native", "out"]


@pytest.mark.parametrize(("target", "file"), [("onnxruntime", "model.onnx"), ("openvino", "model.xml")])
def test_a_graph_holds_the_same_codes(cli: Any, quantized: Path, tmp_path: Path, target: str, file: str
                                      ) -> None:
    """The runtime reads it back, and writes what we would; a quarter of what floats would take."""
    pytest.importorskip("onnxscript")
    pytest.importorskip(target)
    done = cli("export", str(quantized), "--for", target, "-o", str(tmp_path / "graph"), "--json")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "graph" / file).is_file() and (tmp_path / "graph" / "tokenizer.json").is_file()
    assert "warning" not in done.stderr


def test_a_file_that_grew_is_said_to_have_grown() -> None:
    assert grown(39_700_000, 25_000_000) and not grown(26_000_000, 25_000_000)
    assert not grown(900_000, 100_000), "a graph's own bytes"


def test_refusals(cli: Any, quantized: Path, tmp_path: Path) -> None:
    done = cli("export", str(quantized), "--for", "lama.cpp", "-o", str(tmp_path / "x"))
    assert (done.exit_code, "did you mean 'llama.cpp'" in done.stderr) == (7, True)
    (tmp_path / "there").touch()
    done = cli("export", str(quantized), "-o", str(tmp_path / "there"))
    assert (done.exit_code, "--overwrite" in done.stderr) == (8, True)
    done = cli("export", str(tmp_path / "nothing"), "-o", str(tmp_path / "x"))
    assert (done.exit_code, "no such file" in done.stderr) == (7, True)
    assert not (tmp_path / "x").exists()


def test_nothing_half_written(tmp_path: Path) -> None:
    from rarefy.cli.export import staged

    def interrupted() -> None:
        with staged(tmp_path / "a" / "x", overwrite=False) as partial:
            partial.mkdir()
            (partial / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list((tmp_path / "a").iterdir()) == []
    with staged(tmp_path / "x", overwrite=False) as partial:
        partial.write_text("new")
    assert (tmp_path / "x").read_text() == "new"
    with pytest.raises(OutputError, match="exists already"), staged(tmp_path / "x", overwrite=False):
        pass
    with staged(tmp_path / "x", overwrite=True) as partial:
        partial.write_text("newer")
    assert (tmp_path / "x").read_text() == "newer"


def test_a_checkpoint_for_transformers(cli: Any, quantized: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    done = cli("export", str(quantized), "--for", "transformers", "-o", str(tmp_path / "hf"), "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]
    assert told["config_groups"]["group_0"]["weights"]["group_size"] == 32
    assert (tmp_path / "hf" / "tokenizer.json").exists()


@pytest.mark.parametrize(("target", "file"), [("onnxruntime", "model.onnx"), ("openvino", "model.xml")])
def test_an_encoder_s_codes_go_into_a_graph(cli: Any, tiny_encoder: Path, tmp_path: Path, target: str,
                                            file: str) -> None:
    """From the folder of a job; a quarter of what floats take, and the answers of the same trees."""
    pytest.importorskip("onnxscript")
    pytest.importorskip(target)
    import torch

    from rarefy.export.networks import export_network, opened
    from rarefy.export.onnx import GRIDS
    from rarefy.models.network import Network
    from rarefy.models.opening import open_any
    from rarefy.runtimes.session import Session
    from small_networks import rounded_trees

    network = open_any(tiny_encoder)
    assert isinstance(network, Network)
    export_network(network, rounded_trees(network.module, GRIDS["int8"]), tmp_path / "out" / "model")
    done = cli("export", str(tmp_path / "out"), "--for", target, "-o", str(tmp_path / "graph"), "--json",
               "--data", str(tiny_encoder / "dev.tsv"))
    assert done.exit_code == 0, done.stderr
    codes = sum(site.shape[0] * site.shape[1] for site in network.map.sites)
    assert json.loads(done.stdout)["bytes"] < 2 * codes + 200_000
    assert (tmp_path / "graph" / "tokenizer.json").is_file()
    rounded = opened(tmp_path / "out")
    assert isinstance(rounded, Network)
    tokens = {name: torch.ones(2, 9, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    with Session(tmp_path / "graph" / file, target) as session:
        found = session.answer(tokens)
    wanted = rounded.run(tokens)
    assert float((found - wanted).norm() / wanted.norm()) < 0.1
    done = cli("export", str(tmp_path / "out"), "-o", str(tmp_path / "x"))
    assert done.exit_code == 7 and "onnxruntime or openvino, not llama.cpp" in done.stderr


def test_an_image_network_asks_for_samples(cli: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from transformers import ResNetConfig, ResNetForImageClassification

    from rarefy.export.networks import export_network
    from rarefy.models.network import Network
    from rarefy.models.opening import open_any

    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=2)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "plain")
    network = open_any(tmp_path / "plain")
    assert isinstance(network, Network)
    export_network(network, {}, tmp_path / "out")
    done = cli("export", str(tmp_path / "out"), "--for", "onnxruntime", "-o", str(tmp_path / "graph"))
    assert done.exit_code != 0 and "pass --data" in done.stderr and not (tmp_path / "graph").exists()


def test_a_classifier_leaves_early_in_a_graph(cli: Any, tiny_encoder: Path, tmp_path: Path) -> None:
    """What ``rarefy exits`` writes: int8 blocks, heads, a threshold; in ONNX Runtime alone."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    import torch

    from rarefy.core.structure import ExitRule
    from rarefy.export.networks import export_network
    from rarefy.export.onnx import GRIDS
    from rarefy.models.network import Network
    from rarefy.models.opening import open_any
    from rarefy.runtimes.exits import Exits, Heads, Stepped, save
    from small_networks import rounded_trees

    network = open_any(tiny_encoder)
    assert isinstance(network, Network)
    trees = rounded_trees(network.module, GRIDS["int8"])
    export_network(network, trees, tmp_path / "out")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        heads = Heads([128], [64], 2)
    save(Exits(Stepped(network), (0,), heads, rule=ExitRule(0.52, 0.0, 0.0)), tmp_path / "out")
    done = cli("export", str(tmp_path / "out"), "--for", "openvino", "-o", str(tmp_path / "graph"))
    assert done.exit_code == 7 and "goes into files for onnxruntime alone" in done.stderr
    done = cli("export", str(tmp_path / "out"), "--for", "onnxruntime", "-o", str(tmp_path / "graph"))
    assert done.exit_code == 0, done.stderr
    assert {each.name for each in (tmp_path / "graph").iterdir()} >= {"model.onnx", "tokenizer.json"}
    session = onnxruntime.InferenceSession(tmp_path / "graph" / "model.onnx")
    assert [each.name for each in session.get_outputs()] == ["logits", "blocks"]
