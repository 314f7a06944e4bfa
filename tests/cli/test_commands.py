"""What each command asks of the floors below, and what it prints of their answers."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rarefy.cli import chat
from rarefy.core.errors import BudgetError, TargetError
from rarefy.core.nouns import Option
from rarefy.run import job as jobs
from rarefy.run.job import Job, Planned, Result

SAMPLE: Any = runpy.run_path(str(Path(__file__).parents[1] / "report" / "conftest.py"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Jobs that ``compress`` was asked to do; each one succeeds at once."""
    seen: list[Job] = []

    def compress(job: Job, progress: Any) -> Result:
        seen.append(job)
        with progress.stage("survey") as stage:
            stage.advance(1, 1)
        return Result(job.out, job.out / "model.gguf", SAMPLE["sample"]())

    monkeypatch.setattr(jobs, "compress", compress)
    return seen


def test_compress_makes_the_job_that_was_typed(cli: Any, asked: list[Job], tmp_path: Path) -> None:
    done = cli("compress", "some/model", "--to", "60%", "--max-kl", "0.1", "--effort", "quick",
               "--data", "a.txt", "--data", "b", "--eval-data", "c.txt", "--seed", "7", "--overwrite",
               "--dequantize", "-o", str(tmp_path / "out"))
    assert done.exit_code == 0, done.stderr
    (job,) = asked
    assert job.command.startswith("rarefy")
    assert job == Job("some/model", tmp_path / "out", "60%", 0.1, "auto", "quick", ("a.txt", "b"),
                      ("c.txt",), 7, True, True, job.command)


def test_every_field_of_a_job_has_a_flag(cli: Any) -> None:
    """Flags are written by hand; this holds them to the job. A recipe is another command's argument."""
    text = cli("compress", "--help").stdout.lower()
    for field in fields(Job):
        if field.name == "recipe":
            continue
        flag = {"model": "model", "target": "--for", "command": "compress"}.get(
            field.name, "--" + field.name.replace("_", "-"))
        assert flag in text, field.name


def test_compress_says_what_came_out(cli: Any, asked: list[Job]) -> None:
    done = cli("compress", "m", "--to", "160MB", "-o", "out")
    assert done.stderr.splitlines() == ["survey ...", "survey: 0.0 s"]
    lines = done.stdout.splitlines()
    assert lines[1] == "gemma-3-270m fits in 160 MB and stays very close to the original."
    assert "  size                       159.7 MB, 3.4× smaller than 543 MB" in lines
    assert "  KL in llama.cpp            0.0948 ± 0.0041 nats per token, same next token 84.9%" in lines
    assert "  report                     out/report.html" in lines


def test_compress_as_json_is_the_receipt(cli: Any, asked: list[Job]) -> None:
    done = cli("compress", "m", "--to", "160MB", "-o", "out", "--json")
    assert json.loads(done.stdout) == SAMPLE["sample"]()


def test_interrupted_says_what_remains(cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(job: Job, progress: Any) -> Result:
        (tmp_path / "out.partial").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "compress", interrupt)
    done = cli("compress", "m", "--to", "160MB", "-o", str(tmp_path / "out"))
    assert done.exit_code == 130
    assert done.stderr == (f"what is finished is kept in {tmp_path / 'out.partial'}; "
                           "the same command resumes there\nerror: interrupted\n")


@pytest.mark.parametrize("arguments", [
    ["compress", "m", "--to", "160MB"], ["compress", "m", "-o", "out", "--effort", "slow"], ["plan"],
    ["compress", "m", "-o", "out", "--seed", "-1"], ["evaluate", "out"], ["run", "-o", "x"]])
def test_wrong_usage(cli: Any, arguments: list[str]) -> None:
    assert cli(*arguments).exit_code == 2


def planned() -> Planned:
    rows = SAMPLE["plan_rows"]()
    model: Any = SimpleNamespace(name="gemma-3-270m", map=SimpleNamespace(tied=True))
    option = Option("model.embed_tokens.weight", "IQ4_NL", 1, 0.1)
    survey: Any = SimpleNamespace()
    return Planned(model, {option.site: option}, survey, 159_700_000, 0.0874, 543_000_000, rows, [])


def test_plan_shows_roles_tensors_or_json(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "plan", lambda job, progress: planned())
    text = cli("plan", "m", "--to", "160MB").stdout
    assert re.search(r"down +18 +23\.6M +13\.2 MB +4\.47 +0\.0078 +13 IQ4_NL, 3 Q3_K", text)
    assert text.endswith("gemma-3-270m would take 159.7 MB, 3.4× smaller than 543 MB uncompressed; "
                         "predicted mean KL 0.0874 nats per token (very close).\n")
    every = cli("plan", "m", "--to", "160MB", "--tensors").stdout
    assert every.count("model.layers.") == 7 * 18
    found = json.loads(cli("plan", "m", "--to", "160MB", "--json").stdout)
    assert (found["bytes"], found["kl"], len(found["plan"])) == (159_700_000, 0.0874, 1 + 7 * 18)


def test_an_impossible_budget_is_one_line(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(job: Job, progress: Any) -> Planned:
        raise BudgetError("--to 1MB: not possible; pass --to 79.6MB or more")

    monkeypatch.setattr(jobs, "plan", refuse)
    done = cli("plan", "m", "--to", "1MB")
    assert (done.exit_code, done.stderr) == (6, "error: --to 1MB: not possible; pass --to 79.6MB or more\n")


def test_run_hands_the_recipe_over(cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []

    def run_recipe(path: Path, out: Path, progress: Any, *, overwrite: bool, command: str) -> Result:
        seen.append((path, out, overwrite))
        return Result(out, out / "model.gguf", SAMPLE["sample"]())

    monkeypatch.setattr(jobs, "run_recipe", run_recipe)
    done = cli("run", "recipe.yaml", "-o", str(tmp_path / "out"), "--overwrite")
    assert done.exit_code == 0, done.stderr
    assert seen == [(Path("recipe.yaml"), tmp_path / "out", True)]


def test_evaluate_shows_what_was_measured(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def evaluate(out: Path, against: str, progress: Any, *, eval_data: tuple[str, ...]) -> dict[str, Any]:
        seen.append((out, against, eval_data))
        kept = ("rarefy", "versions", "model", "outputs", "target", "measured", "speed", "seconds")
        return {key: value for key, value in SAMPLE["sample"]().items() if key in kept}

    monkeypatch.setattr(jobs, "evaluate", evaluate)
    done = cli("evaluate", "out", "--against", "m", "--eval-data", "a.txt")
    assert seen == [(Path("out"), "m", ("a.txt",))]
    assert "gemma-3-270m now takes 159.7 MB and stays very close to the original." in done.stdout
    found = json.loads(cli("evaluate", "out", "--against", "m", "--json").stdout)
    assert found["measured"]["float"]["tokens"] == 4096


# ---- chat


class Echo:
    """A session that answers in pieces, and remembers what it was asked."""

    asked: list[tuple[str, str, bool]]

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Echo:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stream(self, prompt: str, most: int, *, special: bool = False) -> Any:
        Echo.asked.append((self.path.stem, prompt, special))
        yield from ("you said \x1b[2J", prompt[-3:])


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    Echo.asked = []
    monkeypatch.setattr("rarefy.runtimes.llamacpp.Session", Echo)
    monkeypatch.setattr(chat, "_template", lambda path: None)
    ours, theirs = tmp_path / "out" / "model.gguf", tmp_path / "original.gguf"
    ours.parent.mkdir()
    ours.touch()
    theirs.touch()
    return ours, theirs


def test_chat_answers_lines_side_by_side(cli: Any, files: tuple[Path, Path]) -> None:
    done = cli("chat", str(files[0].parent), "--against", str(files[1]), stdin="one\n\ntwo\n")
    assert done.stdout == ("[compressed] you said \ufffd[2Jone\n[original] you said \ufffd[2Jone\n"
                           "[compressed] you said \ufffd[2Jtwo\n[original] you said \ufffd[2Jtwo\n")


def test_chat_once_as_json(cli: Any, files: tuple[Path, Path]) -> None:
    done = cli("chat", str(files[0]), "-p", "hello", "--json")
    assert json.loads(done.stdout) == {"prompt": "hello", "compressed": "you said \x1b[2Jllo"}


def test_chat_keeps_the_conversation_in_its_template(cli: Any, files: tuple[Path, Path],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_template", lambda path: lambda said: "|".join(m["content"] for m in said))
    cli("chat", str(files[0]), stdin="one\ntwo\n")
    assert Echo.asked == [("model", "one", True), ("model", "one|you said \x1b[2Jone|two", True)]
    Echo.asked.clear()
    cli("chat", str(files[0]), "-p", "one", "-p", "two")
    assert Echo.asked == [("model", "one", True), ("model", "two", True)]


def test_chat_needs_one_file(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no such file or folder"):
        chat.gguf_in(tmp_path / "nothing")
    with pytest.raises(TargetError, match=r"holds no \.gguf files"):
        chat.gguf_in(tmp_path)
    (tmp_path / "a.gguf").touch()
    assert chat.gguf_in(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(TargetError, match=r"holds 2 \.gguf files"):
        chat.gguf_in(tmp_path)
