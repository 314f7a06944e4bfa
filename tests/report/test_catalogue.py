"""Techniques are found by their files alone, and their pages say what the files say."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rarefy.core.errors import RecipeError
from rarefy.report.catalogue import Setting, catalogue, find, read_technique
from rarefy.report.docs import index, page

ROOT = Path(__file__).resolve().parents[2]

HALVE = '''"""Halve every weight.

    w <- w / 2

Paper: Nobody 1999, "Less",
section 1.
"""

from dataclasses import dataclass
from typing import ClassVar

@dataclass(frozen=True)
class Other:
    x: int = 0

@dataclass(frozen=True)
class Halve:
    """Smaller by half. ``factor``: how much is kept. axis: which one, or
    None for all.
    """

    factor: float
    axis: int | None = None

    edits: ClassVar[tuple[type[object], ...]] = (int, float)
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    beats: ClassVar[str] = "nothing"
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "prune").mkdir()
    (tmp_path / "prune" / "halve.py").write_text(HALVE)
    (tmp_path / "prune" / "__init__.py").write_text("")
    return tmp_path


def test_a_file_is_an_entry(folder: Path) -> None:
    (entry,) = catalogue(folder)
    assert (entry.name, entry.family, entry.idea) == ("halve", "prune", "Halve every weight.")
    assert entry.body == "    w <- w / 2"
    assert entry.paper == 'Nobody 1999, "Less", section 1.'
    assert entry.about == "Smaller by half."
    assert entry.settings == (Setting("factor", "float", None, "how much is kept."),
                              Setting("axis", "int | None", "None", "which one, or None for all."))
    assert (entry.edits, entry.needs, entry.beats) == (("int", "float"), ("gram",), "nothing")


def test_page_and_index(folder: Path) -> None:
    (entry,) = catalogue(folder)
    text = page(entry, "| model | KL |\n|---|---|\n| tiny | 0.1 |")
    assert "| `axis` | `int \\| None` | `None` | which one, or None for all. |" in text
    assert "| `factor` | `float` | required | how much is kept. |" in text
    assert text.endswith("| tiny | 0.1 |\n")
    assert "[halve](halve.md) | prune | Halve every weight." in index((entry,))


@pytest.mark.parametrize(("old", "new", "told"), [
    ('Paper: Nobody 1999, "Less",\nsection 1.\n', "", "names no source"),
    ("    edits: ClassVar[tuple[type[object], ...]] = (int, float)\n", "", "one frozen dataclass"),
    ('"""Halve every weight.', 'x = """Halve every weight.', "opens with a docstring")])
def test_an_incomplete_file_is_an_error(folder: Path, old: str, new: str, told: str) -> None:
    path = folder / "prune" / "halve.py"
    assert old in HALVE
    path.write_text(HALVE.replace(old, new, 1))
    with pytest.raises(RecipeError, match=told):
        read_technique(path, folder)


def test_find_suggests() -> None:
    assert find("gptq").needs == ("gram",)
    with pytest.raises(RecipeError, match=r"did you mean 'gptq'\?"):
        find("gtpq")


def test_pages_in_the_repository_are_up_to_date() -> None:
    command = [sys.executable, "-m", "rarefy.report.docs", str(ROOT / "docs" / "techniques"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_documented_example_is_a_technique(tmp_path: Path) -> None:
    """The file shown in docs/adding-a-technique.md is found, runs through ``edit``, and keeps its mask."""
    import torch

    from rarefy.core.edit import edit
    from rarefy.core.nodes import Dense

    text = (ROOT / "docs" / "adding-a-technique.md").read_text(encoding="utf-8")
    path = tmp_path / "prune" / "largest.py"
    path.parent.mkdir()
    path.write_text(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0], encoding="utf-8")
    (entry,) = catalogue(tmp_path)
    assert entry.settings == (Setting("keep", "float", "0.5", "share of each row's weights that stays."),)
    spec = importlib.util.spec_from_file_location("largest", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["largest"] = module
    spec.loader.exec_module(module)
    weight = torch.tensor([[1.0, -3.0, 0.5, 2.0]])
    tree, _ = edit("site", Dense(weight), weight, module.Largest(), "largest", None, torch.Generator())
    assert tree.dense().tolist() == [[0.0, -3.0, 0.0, 2.0]]
