"""Adapters beside trees: they begin as the network, train alone, and PEFT reads what is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rarefy.core.errors import DataError, ModelError, RecipeError, TargetError
from rarefy.core.nouns import Recipe, Step
from rarefy.export.networks import opened
from rarefy.models.network import Network
from rarefy.models.opening import open_any
from rarefy.run.job import Job, compress
from rarefy.run.training import Training, train
from rarefy.training.adapters import BESIDE, KINDS, MERGED, Bottleneck, adapted, with_bottlenecks
from rarefy.training.loop import Settings

SETTINGS = Settings(steps=6, batch=8, rate=1e-2, precision="float32")
PEFT_WARNS = pytest.mark.filterwarnings("ignore")
WORDS = {"input_ids": torch.arange(3, 21).view(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}


def logits(module: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = module.eval()(**WORDS).logits
    return found


@pytest.fixture
def network(tiny_encoder: Path) -> Network:
    found = open_any(tiny_encoder)
    assert isinstance(found, Network)
    return found


@PEFT_WARNS
@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_as_the_network_and_trains_little(kind: str, network: Network) -> None:
    found = adapted(network, kind, rank=4, whole=("classifier",))
    if kind != "prefix":  # which is read from the first step on
        torch.testing.assert_close(logits(found.module), logits(network.module))
    moving = {name for name, value in found.module.named_parameters() if value.requires_grad}
    share = sum(value.numel() for value in found.module.parameters() if value.requires_grad)
    assert moving and share < 0.5 * network.parameters
    assert any("classifier" in name for name in moving)
    assert not any(name.endswith("embeddings.weight") for name in moving)
    again = adapted(network, kind, rank=4, whole=("classifier",))
    assert all(torch.equal(a, b) for a, b in zip(found.module.parameters(), again.module.parameters(),
                                                 strict=True))


@PEFT_WARNS
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_back(kind: str, tiny_encoder: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    done = train(Training(str(tiny_encoder), tmp_path / "out", (str(tiny_encoder / "train.tsv"),),
                          adapter=kind, rank=4, settings=SETTINGS))
    points = done.receipt["curve"]["points"]
    assert len(points) == 6 and done.receipt["after"]["accuracy"] > 0.5
    base = tiny_encoder if kind in MERGED else done.out / "base"
    plain = AutoModelForSequenceClassification.from_pretrained(base)
    before = logits(plain)
    if kind in ("bottleneck", "pfeiffer"):
        behind = with_bottlenecks(plain, done.out / "adapter")
        count = sum(isinstance(part, Bottleneck) for part in behind.modules())
        assert count == (2 if kind == "bottleneck" else 1) * plain.config.num_hidden_layers
        after = logits(behind)
    else:
        after = logits(PeftModel.from_pretrained(plain, done.out / "adapter"))
    assert float((after - before).abs().max()) > 1e-3
    if kind in MERGED:
        merged = AutoModelForSequenceClassification.from_pretrained(done.out)
        torch.testing.assert_close(logits(merged), after, rtol=1e-4, atol=1e-4)
    else:
        assert not (done.out / "config.json").exists()


@PEFT_WARNS
def test_on_a_pruned_and_rounded_base(tiny_encoder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    where = ("role:up", "role:down")
    recipe = Recipe(str(tiny_encoder), (Step("magnitude", where, {"sparsity": 0.5}),
                                        Step("rtn", where, format="int4-g32")), "torch", "quick")
    data = (str(tiny_encoder / "train.tsv"),)
    small = compress(Job(str(tiny_encoder), tmp_path / "small", target="torch", effort="quick", data=data,
                         recipe=recipe)).exported
    done = train(Training(str(small), tmp_path / "out", data, adapter="ia3", settings=SETTINGS))
    base = opened(small)
    assert isinstance(base, Network)
    found = PeftModel.from_pretrained(base.module, done.out / "adapter")
    merged = open_any(done.out)
    assert isinstance(merged, Network)
    torch.testing.assert_close(logits(found), logits(merged.module), rtol=1e-4, atol=1e-4)
    lora = train(Training(str(small), tmp_path / "lora", data, adapter="lora", rank=2, settings=SETTINGS))
    assert (lora.out / "base" / "config.json").is_file() and (lora.out / "adapter").is_dir()


@PEFT_WARNS
@pytest.mark.parametrize("kind", ["dora", "prefix", "bottleneck"])
def test_a_language_model(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"The number {k} follows the number {k - 1} as it did." for k in range(900)))
    settings = Settings(steps=4, batch=4, rate=3e-3, precision="float32")
    done = train(Training(str(tiny_llama), tmp_path / "out", (str(text),), adapter=kind, rank=2,
                          settings=settings))
    assert len(done.receipt["curve"]["points"]) == 4
    assert any((done.out / "adapter").iterdir())


@PEFT_WARNS
def test_bad_input_is_named(network: Network, tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="choose one of dora"):
        adapted(network, "dorra")
    with pytest.raises(TargetError, match="prefix: is no change of weights"):
        adapted(network, "prefix").merged()
    with pytest.raises(ModelError, match="holds no bottlenecks"):
        with_bottlenecks(network.module, tmp_path)
    bare = Network.from_module(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(RecipeError, match="has no blocks with o and down"):
        adapted(bare, "bottleneck")
    made = adapted(network, "bottleneck", rank=2)
    made.save(tmp_path / "adapter", "base")
    with pytest.raises(ModelError, match="is no layer of this network"):
        with_bottlenecks(bare.module, tmp_path / "adapter")
    with pytest.raises(RecipeError, match="a student is trained whole"):
        train(Training(str(tiny_encoder), tmp_path / "out", (str(tiny_encoder / "train.tsv"),),
                       student="half", adapter=BESIDE[0], settings=SETTINGS))
    with pytest.raises(DataError, match="one table"):
        train(Training(str(tiny_encoder), tmp_path / "out", (), adapter="ia3", settings=SETTINGS))
