"""What the engines of traced graphs can hold, at which bytes."""

from __future__ import annotations

import pytest

from rarefy.core.nouns import Option, Step
from rarefy.export.pieces import Use
from rarefy.models.map import Site
from rarefy.run.engines import ENGINES, Engine

EMBED = Site("embed.weight", "embed", (4000, 64), None)


def option(technique: str, rank: int) -> Option:
    return Option(EMBED.path, "tree", 0, 0.1, (Step(technique, (EMBED.path,), {"rank": rank}),
                                               Step("cast", (EMBED.path,), {"dtype": "float16"})))


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.target.name)
def test_a_planned_embedding_is_priced_as_its_two_factors(engine: Engine) -> None:
    """Both widen factors of 16 bits."""
    priced = engine.held(EMBED, (Use("Gather"),), option("fwsvd", 16))
    assert priced is not None
    assert priced.bytes == pytest.approx(16 * (4000 + 64) * 2, abs=5000)  # operators
    assert engine.held(EMBED, (Use("Gather"),), option("kmeans", 16)) is None


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.target.name)
def test_a_planned_table_of_vectors_is_priced_as_its_indices(engine: Engine) -> None:
    planned = Option(EMBED.path, "tree", 0, 0.1, (Step("product", (EMBED.path,), {"length": 4}),))
    priced = engine.held(EMBED, (Use("Gather"),), planned)
    assert priced is not None
    assert 0 < priced.bytes - 4000 * 16 - 4 * 256 * 4 < 5000  # operators
