"""Fewer tokens, before anything else: what a job works on and is judged by then knows the others no more.

The original is taken with the same tokens left out: its answers are those of the whole model, conditioned
on the tokens that stay, and text is cut into these. So the numbers of a receipt say what happened to the
weights; what fewer tokens cost by themselves, the receipt of this step says: which share of the text's tokens
stay as they are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy.calibration.sentences import read_sentences
from rarefy.calibration.text import token_streams
from rarefy.core.errors import DataError, EditError, ModelError, RecipeError
from rarefy.core.nouns import Receipt, Recipe, Step
from rarefy.core.structure import Tokens, Trimming
from rarefy.models import narrowed, shrunk
from rarefy.models.map import Site
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.models.tokens import components, fixed_tokens
from rarefy.run.planning import build_structure, structures


@dataclass(frozen=True, eq=False)
class Trimmed:
    """The model with fewer tokens, and one receipt: bits count every weight at 16."""

    opened: Model | Network
    receipts: tuple[Receipt, ...]


def trimmed(opened: Model | Network, steps: Sequence[Step], data: tuple[Any, ...]) -> Trimmed:
    """``opened`` after every step that takes tokens out. data: text for steps that name none."""
    receipts: tuple[Receipt, ...] = ()
    for place, step in enumerate(steps):
        if step.technique in trimmers():
            if place and steps[place - 1].technique not in trimmers():
                raise RecipeError(f"{step.technique}: decides what text is made of, and must be the first "
                                  "step; move it up")
            technique: Any = build_structure(step)
            done = without_rare(opened, technique, technique.text or data, name=step.technique)
            opened, receipts = done.opened, receipts + done.receipts
    return Trimmed(opened, receipts)


def vocabulary_steps(recipe: Recipe | None, text: tuple[str, ...]) -> tuple[Step, ...]:
    """The steps of a recipe, behind one that keeps the tokens of ``text`` where there is any."""
    asked = (Step("vocabulary", settings={"text": text}),) if text else ()
    return asked + (() if recipe is None else recipe.steps)


def trimmers() -> frozenset[str]:
    """The techniques that take tokens out."""
    return frozenset(name for name, kind in structures().items() if kind.edits == (Tokens,))


def without_rare(opened: Model | Network, technique: Trimming, text: tuple[Any, ...], *, name: str = ""
                 ) -> Trimmed:
    """The model without the tokens that the technique lets go."""
    started, table = time.perf_counter(), _table(opened)
    if not text or not all(isinstance(ref, str) for ref in text):
        raise DataError(f"{opened.name}: which tokens are used must be seen; name files of text, or "
                        "python-docs")
    counts, rows = torch.zeros(table.shape[0], dtype=torch.int64), table.shape[0]
    for ids in _streams(opened, text):
        counts += torch.bincount(ids, minlength=rows)
    fixed = torch.zeros(rows, dtype=torch.bool)
    fixed[sorted(index for index in fixed_tokens(opened.tokenizer, opened.config) if index < rows)] = True
    chosen = technique.keep(Tokens(table.path, counts, fixed))
    kept = torch.tensor(sorted(components(opened.tokenizer, chosen.tolist())))
    if kept.numel() >= rows:
        raise EditError(f"{table.path}: the text uses all {rows} tokens; raise least or pass most")
    done = _with_tokens(opened, kept)
    matrices = 1 if opened.map.tied or isinstance(opened, Network) else 2
    before, after = (matrices * 16 * count * table.shape[1] for count in (rows, kept.numel()))
    held = counts[kept].sum() / counts.sum().clamp_min(1)
    note = f"{rows - kept.numel()} of {rows} tokens left out; {float(held):.2%} of the text's stay"
    return Trimmed(done, (Receipt(table.path, name, before, after, float("nan"),
                                  time.perf_counter() - started, note=note),))


def matched(opened: Model | Network, candidate: Model | Network) -> Model | Network:
    """``opened`` with the tokens of ``candidate`` alone, where that was made of it by leaving some out."""
    if isinstance(opened, Network) and opened.form.takes != "text":
        return opened
    held, known = candidate.tokenizer.get_vocab(), opened.tokenizer.get_vocab()
    if len(held) >= len(known) or not held.keys() <= known.keys():
        return opened
    kept = torch.tensor([known[token] for token, _ in sorted(held.items(), key=lambda entry: entry[1])])
    if not bool((kept.diff() > 0).all()):
        raise ModelError(f"{candidate.name}: has some of the tokens of {opened.name} in another order, so it "
                         "was not made of it; name its original")
    return _with_tokens(opened, kept)


def _with_tokens(opened: Model | Network, kept: Tensor) -> Model | Network:
    if isinstance(opened, Model):
        return shrunk.with_tokens(opened, kept)
    return narrowed.with_tokens(opened, kept)


def _table(opened: Model | Network) -> Site:
    if isinstance(opened, Network):
        return narrowed.token_table(opened)
    return next(site for site in opened.map.sites if site.role == "embed")


def _streams(opened: Model | Network, text: tuple[Any, ...]) -> Iterator[Tensor]:
    """The tokens of all of the text, piece by piece."""
    if isinstance(opened, Model):
        yield from token_streams(text, opened.tokenizer)
        return
    for ref in text:
        sentences, _ = read_sentences(ref)
        for ids in opened.tokenizer([part for row in sentences for part in row], padding=False,
                                    truncation=False, add_special_tokens=False, verbose=False)["input_ids"]:
            yield torch.tensor(ids, dtype=torch.int64)
