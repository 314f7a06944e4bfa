"""Errors are one line with an exit code; results are plain where there is no terminal."""

from __future__ import annotations

import inspect
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rarefy.cli import terminal
from rarefy.cli.progress import Bars, Lines, progress
from rarefy.core import errors

ESCAPE = "\x1b"
KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)
         if issubclass(kind, errors.RarefyError)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_one_line_and_its_exit_code(cli: Any, monkeypatch: pytest.MonkeyPatch,
                                                   kind: type[errors.RarefyError]) -> None:
    def explode(name: str) -> None:
        raise kind("here: [bold]that[/] is wrong; do this")

    monkeypatch.setattr("rarefy.report.catalogue.find", explode)
    done = cli("techniques", "x")
    assert done.exit_code == kind.exit_code
    assert done.stderr == "error: here: [bold]that[/] is wrong; do this\n"
    assert done.stdout == ""


def test_exit_codes_are_documented() -> None:
    guide = (Path(__file__).resolve().parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
    known = dict(terminal.EXIT_CODES)
    for kind in KINDS:
        assert kind.exit_code in known
    for code in known:
        assert f"| {code} |" in guide


def test_the_unexpected_is_one_line_too(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode() -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr("rarefy.report.catalogue.catalogue", explode)
    done = cli("techniques")
    assert done.exit_code == 1
    assert done.stderr == "error: ZeroDivisionError: first line; this is not expected, --debug shows where\n"
    assert isinstance(cli("--debug", "techniques").exception, ZeroDivisionError)


def test_misspelt_commands_are_suggested(cli: Any) -> None:
    done = cli("compres")
    assert done.exit_code == 2
    assert "Did you mean 'compress'?" in done.stderr


def test_help_and_version(cli: Any) -> None:
    assert "Exit codes" in cli("-h").stdout
    assert re.fullmatch(r"rarefy \d+\.\d+\.\d+\n", cli("--version").stdout)


def test_debug_may_stand_anywhere() -> None:
    command = [sys.executable, "-m", "rarefy.cli.main", "techniques", "nothing", "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_output_without_a_terminal_is_plain(cli: Any) -> None:
    done = cli("techniques")
    assert ESCAPE not in done.stdout
    assert not re.search("[┏━─│]", done.stdout)
    assert not re.search(" $", done.stdout, flags=re.MULTILINE)


@pytest.mark.parametrize("colour", [True, False])
def test_no_color_is_honoured_on_a_terminal(colour: bool) -> None:
    """Under a pseudo-terminal there are colours, and with NO_COLOR there are none."""
    main, child = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", **({} if colour else {"NO_COLOR": "1"})}
    process = subprocess.Popen([sys.executable, "-m", "rarefy.cli.main", "techniques", "nothing"],
                               stdout=child, stderr=child, env=environment)
    os.close(child)
    process.wait(60)
    text = os.read(main, 100_000).decode()
    os.close(main)
    assert (re.search(r"\x1b\[[0-9;]*3[0-9]m", text) is not None) == colour


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.dump(terminal.finite({"a": float("nan"), "b": [1.5, float("inf")], "c": Path("x")}))
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None], "c": "x"}


@pytest.mark.parametrize(("share", "full"), [(0.0, 0), (0.5, 12), (1.0, 24)])
def test_bar(share: float, full: int) -> None:
    assert len(terminal.bar(share)) == full


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_say_when_and_how_far(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    shown = progress()
    assert isinstance(shown, Lines)
    with shown.stage("calibrate") as stage:
        for done in range(1, 11):
            now[0] += 4
            stage.advance(done, 10)
        stage.line("a detail")
    assert stream.getvalue().splitlines() == [
        "calibrate ...", "calibrate: 40% (4/10), about 24 s left", "calibrate: 80% (8/10), about 8.0 s left",
        "  a detail", "calibrate: 40 s"]


def test_bars_leave_one_line_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    shown = progress()
    assert isinstance(shown, Bars)
    with shown.stage("outer") as outer:
        outer.advance(1, 3)
        with shown.stage("inner [bold]") as inner:
            inner.advance(2, 2)
            inner.line("a detail")
    with pytest.raises(ZeroDivisionError), shown.stage("broken"):
        raise ZeroDivisionError
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    for line in (r"  inner \[bold\]  \d\.\d s", "    a detail", r"outer  \d\.\d s"):
        assert re.search(line, text)
    assert not shown.live.live.is_started
    assert "\x1b[?25h" in stream.getvalue()  # the cursor is shown again


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_command(number: int, code: int) -> None:
    """Ctrl-C is 130 with one line; SIGTERM unwinds the program, so that what was staged is removed."""
    program = ("import signal, time, rarefy.report.catalogue as c\n"
               "signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored\n"
               "def wait():\n"
               "    try: print('ready', flush=True); time.sleep(60)\n"
               "    finally: print('cleaned', flush=True)\n"
               "c.catalogue = wait\n"
               "from rarefy.cli.main import main; main()")
    process = subprocess.Popen([sys.executable, "-c", program, "techniques"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert out == "cleaned\n"
    assert err == ("error: interrupted\n" if number == signal.SIGINT else "")
