"""The command line as a user meets it: arguments in, exit code and both streams out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from typer.testing import CliRunner, Result

from rarefy.cli import terminal
from rarefy.cli.main import app

Cli = Callable[..., Result]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """Run ``rarefy`` with these arguments. Its switches of the process are set back afterwards."""
    monkeypatch.setattr("rarefy.cli.main.quiet_others", lambda: None)
    monkeypatch.setenv("COLUMNS", "200")
    runner = CliRunner()

    def call(*arguments: str, stdin: str | None = None) -> Result:
        return runner.invoke(app, list(arguments), input=stdin)

    yield call
    terminal.set_debug(False)
