"""Fine-tuning and distillation as jobs: what comes out is an ordinary folder that opens again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rarefy.calibration.examples import read_examples
from rarefy.core.errors import DataError, RarefyError, RecipeError
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.models.opening import open_any
from rarefy.run import lessons
from rarefy.run.lessons import Lesson, Term, material
from rarefy.run.training import Training, train, with_recipe
from rarefy.training.loop import Settings

SETTINGS = Settings(epochs=2, batch=32, rate=3e-3, precision="float32")
# PEFT asks transformers for an attribute under its old name
PEFT_WARNS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def bare(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder without its head."""
    from transformers import AutoModel, AutoTokenizer

    folder = tmp_path_factory.mktemp("bare")
    AutoModel.from_pretrained(tiny_encoder).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(folder)
    return folder


def another_task(source: Path, table: Path) -> Path:
    """Not what the encoder was trained on: whether the sentence negates anything."""
    rows = [line.split("\t")[0] for line in source.read_text().splitlines()[1:]]
    table.write_text("sentence\tlabel\n" + "".join(f"{row}\t{int('not' in row.split())}\n" for row in rows))
    return table


def test_a_tenth_is_held_back_and_no_more_than_judges_need(tiny_encoder: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    network, table = open_any(tiny_encoder), (str(tiny_encoder / "train.tsv"),)
    found = material(Lesson(data=table, settings=SETTINGS), network, distils=False)
    count = len(found.train) + len(found.held)
    assert len(found.held) == round(0.1 * count) > 5
    monkeypatch.setattr(lessons, "ASIDE", 5)
    found = material(Lesson(data=table, settings=SETTINGS), network, distils=False)
    assert len(found.held) == 5 and len(found.train) == count - 5


@PEFT_WARNS
@pytest.mark.parametrize(("adapter", "scales"), [("none", False), ("lora", False), ("loftq", True)])
def test_an_encoder_learns_a_task(adapter: str, scales: bool, bare: Path, tiny_encoder: Path, tmp_path: Path
                                  ) -> None:
    tables = [another_task(tiny_encoder / name, tmp_path / name) for name in ("train.tsv", "dev.tsv")]
    done = train(Training(str(bare), tmp_path / "out", (str(tables[0]),), (str(tables[1]),), adapter=adapter,
                          scales=scales, settings=SETTINGS))
    assert done.receipt["after"]["accuracy"] > max(0.8, done.receipt["before"]["accuracy"])
    assert json.loads((done.out / "receipt.json").read_text())["adapter"] == adapter
    network = open_any(done.out)
    assert isinstance(network, Network) and network.form.gives == "classes"
    held = read_examples(network, str(tables[1]))
    answers = network.run(held.inputs)
    assert float((answers.argmax(1) == held.labels).float().mean()) == done.receipt["after"]["accuracy"]
    if adapter != "none":
        from peft import PeftModel
        from transformers import AutoModelForSequenceClassification

        start = done.out / "base" if adapter == "loftq" else bare
        base = AutoModelForSequenceClassification.from_pretrained(start, num_labels=2)
        with torch.no_grad():
            again = PeftModel.from_pretrained(base, done.out / "adapter").eval()(**held.inputs).logits
        torch.testing.assert_close(again, answers, rtol=1e-3, atol=1e-3)


def test_scales_without_an_adapter_are_refused(bare: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="beside the adapters lora and loftq, not dora"):
        train(Training(str(bare), tmp_path / "out", ("x.tsv",), adapter="dora", scales=True))
    assert not (tmp_path / "out").exists()


def test_half_the_blocks_keep_the_task(tiny_encoder: Path, tmp_path: Path) -> None:
    job = Training(str(tiny_encoder), tmp_path / "out", (str(tiny_encoder / "train.tsv"),),
                   (str(tiny_encoder / "dev.tsv"),), "half", settings=SETTINGS)
    done = train(job)
    student = open_any(done.out)
    assert isinstance(student, Network) and student.map.blocks == 1
    assert done.receipt["after"]["accuracy"] > 0.9
    kept = Training(str(tiny_encoder), tmp_path / "kept", (str(tiny_encoder / "train.tsv"),), (), "0",
                    (Term("forward_kl"), Term("hard_labels", 0.5)), settings=SETTINGS)
    assert train(kept).receipt["after"]["accuracy"] > 0.9


def test_a_language_model_without_data(tiny_llama: Path, tmp_path: Path) -> None:
    settings = Settings(steps=6, batch=8, rate=1e-3, precision="float32")
    done = train(Training(str(tiny_llama), tmp_path / "out", (), (), "0,2", settings=settings))
    student = open_any(done.out)
    assert isinstance(student, Model) and student.map.blocks == 2
    points = done.receipt["curve"]["points"]
    assert points[-1]["loss"] < points[0]["loss"]


def test_a_language_model_with_an_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"The number {k} follows the number {k - 1} as it did." for k in range(900)))
    settings = Settings(steps=6, batch=4, rate=3e-3, precision="float32")
    done = train(Training(str(tiny_llama), tmp_path / "out", (str(text),), adapter="lora", rank=4,
                          settings=settings))
    assert done.receipt["curve"]["best"] < done.receipt["curve"]["points"][0]["loss"]
    assert (done.out / "adapter" / "adapter_model.safetensors").is_file()
    assert isinstance(open_any(done.out), Model)


@pytest.mark.parametrize("text", ["blocks=1", "blocks=1,units=50%", "units=25%"])
def test_students_of_what_matters_most(text: str, tiny_encoder: Path, tmp_path: Path) -> None:
    teacher = open_any(tiny_encoder)
    done = train(Training(str(tiny_encoder), tmp_path / "out", (str(tiny_encoder / "train.tsv"),),
                          student=text, settings=SETTINGS))
    student = open_any(done.out)
    assert student.map.blocks == (1 if "blocks" in text else teacher.map.blocks)
    share = student.config.intermediate_size / teacher.config.intermediate_size
    assert share == (0.5 if "50%" in text else 0.25 if "25%" in text else 1.0)
    assert done.receipt["after"]["accuracy"] > 0.6


def test_a_language_models_student(tiny_llama: Path, tmp_path: Path) -> None:
    settings = Settings(steps=2, batch=8, rate=1e-3, precision="float32")
    done = train(Training(str(tiny_llama), tmp_path / "out", student="blocks=2,units=50%", settings=settings))
    student = open_any(done.out)
    assert student.map.blocks == 2 and student.config.intermediate_size == 128


@pytest.mark.parametrize(("text", "match"), [
    ("blocks=9", "choose a number of blocks from 1 to"), ("units=50", "choose a share of the neurons"),
    ("block=1", "did you mean 'blocks'")])
def test_students_that_cannot_be(text: str, match: str, tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=match):
        train(Training(str(tiny_encoder), tmp_path / "out", (str(tiny_encoder / "train.tsv"),), student=text,
                       settings=SETTINGS))


def other_vocabulary(folder: Path, out: Path) -> Path:
    """The same network under a tokenizer that has two words the other way round."""
    shutil.copytree(folder, out)
    said = json.loads((out / "tokenizer.json").read_text())
    words: dict[str, int] = said["model"]["vocab"]
    one, other = sorted(words, key=words.__getitem__)[-2:]
    words[one], words[other] = words[other], words[one]
    (out / "tokenizer.json").write_text(json.dumps(said))
    return out


def test_bad_input_is_named(tiny_encoder: Path, tiny_llama: Path, tmp_path: Path) -> None:
    def refused(match: str, kind: type[RarefyError], data: str, **more: object) -> None:
        table = tmp_path / "table.tsv"
        table.write_text(data)
        with pytest.raises(kind, match=match):
            train(Training(str(tiny_encoder), tmp_path / "out", (str(table),), settings=SETTINGS,
                           **more))  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()

    rows = [f"the film is {k}" for k in range(20)]
    one = "sentence\tlabel\n" + "".join(f"{row}\t1\n" for row in rows)
    refused("at least two|of two classes", DataError, one)
    far = "sentence\tlabel\n" + "".join(f"{row}\t{k}\n" for k, row in enumerate(rows))
    refused("outside the model's 2 classes", DataError, far)
    plain = "sentence\n" + "".join(f"{row}\n" for row in rows)
    refused("no labels", DataError, plain)
    refused("adapter 'lorra'.*did you mean 'lora'", RecipeError, one, adapter="lorra")
    good = "sentence\tlabel\n" + "".join(f"{row}\t{k % 2}\n" for k, row in enumerate(rows))
    refused("does not exist; did you mean 'soft_labels'", RecipeError, good, student="half",
            objectives=(Term("soft_label"),))
    refused("different kinds", RecipeError, good, student=str(tiny_llama))
    refused("different vocabularies; choose a student with the teacher's tokenizer", RecipeError, good,
            student=str(other_vocabulary(tiny_encoder, tmp_path / "other")))


def test_the_recipe_of_distilbert(tmp_path: Path) -> None:
    job = Training("teacher", tmp_path / "out")
    found = with_recipe(job, Path(__file__).resolve().parents[2] / "recipes" / "distilbert.yaml")
    assert found.student == "half" and found.settings.schedule == "linear"
    assert found.objectives == (Term("triple", 1.0, {"soft": 5.0, "hard": 2.0, "angle": 1.0,
                                                     "temperature": 2.0}),)
    for text, match in (("studnet: half", "studnet"), ("training: {rat: 1}", "did you mean 'rate'"),
                        ("- a", "recipe"), ("training: {rate: -1}", "must be positive")):
        (tmp_path / "wrong.yaml").write_text(text)
        with pytest.raises(RecipeError, match=match):
            with_recipe(job, tmp_path / "wrong.yaml")


def test_the_command_line(tiny_encoder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from rarefy.cli.main import app

    done = CliRunner().invoke(app, [
        "distill", str(tiny_encoder), "--data", str(tiny_encoder / "dev.tsv"), "--steps", "3",
        "--objective", "soft_labels=0.5", "--objective", "hard_labels", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "held-out loss" in done.stdout and "accuracy" in done.stdout
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert [weight for weight, _ in receipt["objectives"]] == [0.5, 1.0]


def test_a_student_with_bottlenecks(tiny_encoder: Path, tmp_path: Path) -> None:
    tables = tuple(str(tiny_encoder / name) for name in ("train.tsv", "dev.tsv"))
    settings = Settings(steps=10, rate=3e-3, precision="float32")
    done = train(Training(str(tiny_encoder), tmp_path / "out", tables[:1], tables[1:],
                          student="bottleneck:32", settings=settings))
    student = open_any(done.out)
    assert isinstance(student, Network) and student.config.intra_bottleneck_size == 32
    assert done.receipt["student"].endswith("bottleneck32")
