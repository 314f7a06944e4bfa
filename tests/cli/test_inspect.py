"""``rarefy inspect`` on tiny real models: every byte is accounted for, and the formats are the target's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def test_every_byte_is_somewhere(cli: Any, tiny_gemma3: Path) -> None:
    done = cli("inspect", str(tiny_gemma3), "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tied"] is True
    assert sum(role["bytes"] for role in found["roles"]) == found["bytes"]
    assert sum(role["weights"] for role in found["roles"]) == found["parameters"]
    inside = sum(role["bytes"] for role in found["roles"] if role["role"] not in (None, "embed"))
    assert sum(block["bytes"] for block in found["blocks"]) == inside
    assert found["bytes"] < found["file_bytes"]
    assert found["gguf"]["fixed"] < found["gguf"]["smallest"] < found["gguf"]["f16"]


def test_formats_follow_the_row_length(cli: Any, tiny_llama: Path) -> None:
    found = json.loads(cli("inspect", str(tiny_llama), "--json").stdout)
    rows = {row["columns"]: row for row in found["formats"]}
    assert set(rows) == {128, 256}
    assert "Q4_K" in rows[128]["does_not_fit"]
    assert "IQ4_NL" in rows[128]["fits"]
    assert "Q4_K" in rows[256]["fits"]
    assert rows[256]["roles"] == ["down"]


def test_in_words(cli: Any, tiny_llama: Path) -> None:
    text = cli("inspect", str(tiny_llama)).stdout
    assert "3 blocks" in text
    assert "embedding and head are two matrices" in text
    assert "0 to 2" in text  # equal blocks are one line
    assert "query" in text


@pytest.mark.parametrize(("name", "told"), [
    ("gema-3-270m", "did you mean 'gemma-3-270m'?"), ("nothing", "no such")])
def test_no_model(cli: Any, name: str, told: str) -> None:
    done = cli("inspect", name)
    assert done.exit_code == 3
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
