"""The small networks that are trained here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rarefy.models.network import Network

sys.path.insert(0, str(Path(__file__).parent))  # for `networks`


@pytest.fixture
def convolutional() -> Network:
    from networks import convolutional

    return convolutional()
