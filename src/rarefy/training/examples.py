"""What is trained on: rows of tensors in memory, and rows that a teacher has answered, on disk.

Texts of one batch are cut to the longest of them, and the loop puts texts of like length together: on short
sentences most of the work would be padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rarefy.core.errors import DataError
from rarefy.models.form import MASK
from rarefy.training.loop import Batch, Examples

LABELS = "labels"
IGNORED = -100  # a position without a label


class Rows:
    """Tensors with one row for each example, by the names under which the network takes them.

    ``labels`` and what else the network does not take are for the objective. With an ``attention_mask``, rows
    end where the longest of a batch ends.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        counts = {name: len(values) for name, values in tensors.items()}
        if len(set(counts.values())) != 1:
            raise DataError(f"columns of different lengths: {counts}; give one row per example in each")
        self.tensors = dict(tensors)
        mask = self.tensors.get(MASK)
        self._lengths = None if mask is None else mask.sum(1)
        self._width = 0 if mask is None else mask.shape[1]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def lengths(self) -> Tensor | None:
        """Tokens of each row, where they differ."""
        same = self._lengths is None or bool((self._lengths == self._lengths[0]).all())
        return None if same else self._lengths

    def batch(self, index: Tensor) -> Batch:
        """Some rows."""
        rows = {name: values[index] for name, values in self.tensors.items()}
        if self._lengths is None:
            return rows
        end = int(self._lengths[index].max())
        wide = self._width
        return {name: values[:, :end] if values.ndim > 1 and values.shape[1] == wide else values
                for name, values in rows.items()}

    def digest(self) -> str:
        """Of every number in it."""
        sha = hashlib.sha256()
        for name, values in sorted(self.tensors.items()):
            sha.update(f"{name}{tuple(values.shape)}{values.dtype}".encode())
            sha.update(values.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()[:16]

    def split(self, share: float, seed: int) -> tuple[Rows, Rows]:
        """What remains, and a share set aside at random."""
        aside = min(max(1, round(share * len(self))), len(self) - 1)
        if aside < 1:
            raise DataError(f"{len(self)} examples: too few to set any aside")
        shuffled = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        parts = [{name: values[index] for name, values in self.tensors.items()}
                 for index in (shuffled[aside:], shuffled[:aside])]
        return Rows(parts[0]), Rows(parts[1])


class Answered:
    """Examples together with what a teacher said of them, read row by row from a file.

    The file is the store of ``training.teacher``; its tensors join every batch under their names, cut as the
    examples are.
    """

    def __init__(self, examples: Examples, answers: Path) -> None:
        self.examples, self.path = examples, answers
        self.tensors: dict[str, Tensor] = torch.load(answers, mmap=True, weights_only=True)
        found = {name: len(values) for name, values in self.tensors.items()}
        if set(found.values()) != {len(examples)}:
            raise DataError(f"{answers}: answers to {found} examples, there are {len(examples)}; "
                            "remove the file to ask the teacher again")

    def __len__(self) -> int:
        return len(self.examples)

    def lengths(self) -> Tensor | None:
        """Those of the examples."""
        return self.examples.lengths()

    def batch(self, index: Tensor) -> Batch:
        """The examples, and the teacher's answers to them."""
        rows = self.examples.batch(index)
        width = next((values.shape[1] for name, values in rows.items() if name == MASK), None)
        answers = {name: values[index] for name, values in self.tensors.items()}
        if width is not None:
            answers = {name: values[:, :width] if values.ndim > 2 else values
                       for name, values in answers.items()}
        return {**rows, **answers}

    def digest(self) -> str:
        """Of the examples: the answers follow from them."""
        return self.examples.digest()
