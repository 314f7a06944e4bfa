"""House rules that no linter reads: lean start, floors, short functions, no drawers for odds and ends.

A function may be long when one loop is the algorithm; it then says so on its ``def`` line, ``# long: why``.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "rarefy"
FILES = sorted(SOURCE.rglob("*.py"))
HEAVY = ("torch", "transformers", "scipy", "numpy", "gguf", "tokenizers", "huggingface_hub")
LONGEST = 40


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["rarefy", "rarefy.cli", "rarefy.cli.main", "rarefy.report"])
def test_import_is_lean(module: str) -> None:
    loaded = python(f"import sys, {module}; print(' '.join(m for m in sys.modules if m in {HEAVY!r}))")
    assert loaded.split() == []


def test_help_answers_within_half_a_second() -> None:
    """Processor time, the best of three: the machine may be busy, the program may not."""
    command = [sys.executable, "-c", "from rarefy.cli.main import main; main()", "--help"]
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0, done.stderr
        assert "compress" in done.stdout
    assert min(seconds) < 0.5, seconds


def test_floors_and_strangers() -> None:
    """import-linter: imports go downwards only, and no technique knows another."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 0, done.stdout + done.stderr


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int:
    """Lines that compute: signature, docstring, blank lines and comments are not counted."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body:
        return 0
    span = lines[body[0].lineno - 1:function.end_lineno]
    return sum(1 for line in span if line.strip() and not line.strip().startswith("#"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    long = []
    for function in functions(ast.parse(text)):
        head = "\n".join(lines[function.lineno - 1:function.body[0].lineno - 1])
        if code_lines(function, lines) > LONGEST and not re.search(r"# long: \w+", head):
            long.append(f"{path.name}:{function.lineno} {function.name} "
                        f"has {code_lines(function, lines)} lines of code")
    assert not long, f"{long}; split it, or say `# long: why` where it is defined"


def test_no_drawers_for_odds_and_ends() -> None:
    drawers = {"utils", "util", "common", "helpers", "base", "misc", "mixins", "registry"}
    named = [p.relative_to(ROOT) for p in SOURCE.rglob("*") if p.stem in drawers]
    assert not named, f"{named}: name a file after what it does"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_file_opens_with_its_idea(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{path}: no docstring"


def test_every_floor_of_the_design_exists() -> None:
    """The design page and the package name the same floors."""
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    drawn = set(re.findall(r"^ {6}(\w+)/", page, flags=re.MULTILINE))
    built = {p.name for p in SOURCE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert built <= drawn, f"not in docs/design.md: {sorted(built - drawn)}"


def test_readme_commands_are_the_ones_that_ci_runs() -> None:
    """The README marks two commands; .ci/run reads them from there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    marked = dict(re.findall(r"<!-- ci: (\w+) -->\n+```sh\n(.+?)\n```", readme, flags=re.DOTALL))
    assert set(marked) == {"demo", "test"}
    assert marked["demo"].startswith("pip install -e '.[demo]' && rarefy compress gemma-3-270m ")
    assert "pytest" in marked["test"]


@pytest.mark.parametrize("path", [path for path in FILES if ">>>" in path.read_text()],
                         ids=lambda path: str(path.relative_to(SOURCE)))
def test_worked_examples_come_out(path: Path) -> None:
    name = ".".join(("rarefy", *path.relative_to(SOURCE).with_suffix("").parts))
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted and not found.failed
