"""Asking a teacher once: its answers on disk, for as many epochs and students as it takes.

A classifier's logits (or an encoder's embeddings) are a few numbers per row. A language model's are the
whole vocabulary per token; of these the ``k`` largest are kept as log-probabilities, and what is missing to
one is their tail, which objectives see as one outcome more. The teacher is run block by block, so it need
not fit into memory in float32; its weights are read from its files as they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rarefy.models.form import MASK
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.models.runner import Runner
from rarefy.numerics.divergences import top
from rarefy.training.examples import Answered
from rarefy.training.loop import Examples
from rarefy.training.signals import INDEX, ROWS, VALUES, inputs_of

BATCH = 32
WINDOWS = 4  # windows of a language model that go through a block at once
Advance = Callable[[int, int], None]


@torch.no_grad()
def answered(teacher: Model | Network, examples: Examples, folder: Path, *, k: int = 64,
             classes: int | None = None, advance: Advance | None = None) -> Answered:
    """``examples`` with what ``teacher`` says of them, from ``folder`` if it was asked before.

    folder: of this teacher alone. k: how many tokens of a language model's answer are kept. classes: columns
    of the head that are words (those behind are padding).
    """
    path = folder / f"teacher-{examples.digest()}-{k if isinstance(teacher, Model) else 'rows'}.pt"
    if not path.is_file():
        said = (_language(teacher, examples, k, classes, advance) if isinstance(teacher, Model)
                else _rows(teacher, examples, advance))
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        torch.save(said, part)
        part.replace(path)
    return Answered(examples, path)


def _rows(teacher: Network, examples: Examples, advance: Advance | None) -> dict[str, Tensor]:
    """Logits or embeddings of every example, in its order; those of like length are run together."""
    count, lengths = len(examples), examples.lengths()
    numbers = torch.arange(count) if lengths is None else lengths.argsort(stable=True)
    found: Tensor | None = None
    for place, index in enumerate(numbers.split(BATCH)):
        rows = teacher.run(inputs_of(examples.batch(index)))
        found = rows.new_empty(count, rows.shape[1]) if found is None else found
        found[index] = rows
        if advance is not None:
            advance(min(count, (place + 1) * BATCH), count)
    assert found is not None
    return {ROWS: found}


def _language(teacher: Model, examples: Examples, k: int, classes: int | None,
              advance: Advance | None) -> dict[str, Tensor]:
    """The k likeliest tokens behind every token. All windows pass a block before the next is read."""
    runner, whole = Runner(teacher), examples.batch(torch.arange(len(examples)))
    tokens, mask = whole["input_ids"], whole.get(MASK)
    masks = [None] * len(tokens) if mask is None else list(mask.split(WINDOWS))
    stems = [runner.stem(part, None if m is None else m.bool())
             for part, m in zip(tokens.split(WINDOWS), masks, strict=False)]
    hidden = [state for state, _ in stems]
    for block in range(runner.blocks):
        tensors = runner.load(block)
        hidden = [runner.block(block, state, context, tensors=tensors)
                  for state, (_, context) in zip(hidden, stems, strict=True)]
        if advance is not None:
            advance(block + 1, runner.blocks)
    values, index = [], []
    for state in (row for part in hidden for row in part):
        best = top(runner.logits(runner.norm(state))[:, :classes], k)
        values.append(best[0])
        index.append(best[1].int())
    return {VALUES: torch.stack(values), INDEX: torch.stack(index)}
