"""Every target whose packages are missing says so in one line, with the line that installs them, before any
work: the model that the job names does not even exist."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from rarefy.core.errors import TargetError
from rarefy.run.engines import ENGINES
from rarefy.run.job import Job, compress, plan
from rarefy.run.progress import Silent
from rarefy.run.resolve import TARGETS, WRITING
from rarefy.run.to_integer import PACKAGES as FOR_INTEGERS
from rarefy.run.to_transformers import PACKAGES
from rarefy.runtimes.session import PIP

NEEDED = [(engine.target.name, package) for engine in ENGINES for package in engine.packages]
NEEDED += [("transformers", package) for package in PACKAGES]
NEEDED += [("integer", package) for package in FOR_INTEGERS]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    find = importlib.util.find_spec

    def hide(package: str) -> None:
        monkeypatch.setattr("importlib.util.find_spec",
                            lambda name, *rest: None if name == package else find(name, *rest))
    return hide


@pytest.mark.parametrize(("target", "package"), NEEDED)
def test_a_missing_package_is_one_line(target: str, package: str, without: Any, tmp_path: Path) -> None:
    without(package)
    for work in (compress, plan):
        with pytest.raises(TargetError) as told:
            work(Job(str(tmp_path / "nowhere"), tmp_path / "out", to="30%", target=target), Silent())
        assert str(told.value) == f"{package} is not installed; {PIP[package]}"
    assert list(tmp_path.iterdir()) == []


def test_no_target_is_left_out() -> None:
    assert {name for name, _ in NEEDED} | {"llama.cpp", "torch"} == set(TARGETS)
    assert set(WRITING) == {engine.target.name for engine in ENGINES}
