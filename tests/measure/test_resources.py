"""Memory, bytes, digests and seconds."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rarefy.core.errors import OutputError
from rarefy.measure.resources import Clock, bytes_on_disk, fingerprint, fingerprints, peak_rss, resident


def test_the_peak_is_this_process_own() -> None:
    """A large parent must not show up in its child, as it does in getrusage."""
    ballast = bytearray(300 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    code = "from rarefy.measure.resources import peak_rss; print(peak_rss())"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    child = int(run.stdout)
    assert 5 << 20 < child < 200 << 20
    assert peak_rss() >= max(resident() or 0, len(ballast))


def test_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.bin").write_bytes(b"abc")
    (tmp_path / "b" / "c.bin").write_bytes(b"")
    one = fingerprint(tmp_path / "a.bin", tmp_path)
    assert one.as_dict() == {"path": "a.bin", "sha256": hashlib.sha256(b"abc").hexdigest(), "bytes": 3}
    assert [each.path for each in fingerprints(tmp_path)] == ["a.bin", "b/c.bin"]
    assert fingerprints(tmp_path / "a.bin") == (one,)
    assert bytes_on_disk(tmp_path) == bytes_on_disk(tmp_path / "a.bin") == 3
    with pytest.raises(OutputError, match="cannot be read back"):
        fingerprint(tmp_path / "none")


def test_the_clock_adds_up_and_survives_errors() -> None:
    clock = Clock()
    for _ in range(2):
        with clock.stage("first"):
            time.sleep(0.01)
    with pytest.raises(ValueError), clock.stage("second"):
        raise ValueError
    assert list(clock.seconds) == ["first", "second"]
    assert clock.seconds["first"] >= 0.02 > clock.seconds["second"]
