"""Named errors. Each message says where, what value, and the remedy; the CLI prints it in one line.

The exit code of the command line is a property of the error, so that scripts can tell them apart.
"""

from __future__ import annotations


class RarefyError(Exception):
    """Anything the user can do something about."""

    exit_code = 1


class ModelError(RarefyError):
    """The model cannot be loaded, or should not be: missing or bad weights, unsafe files."""

    exit_code = 3


class DataError(RarefyError):
    """Calibration or evaluation data is unusable: empty, too short, overlapping."""

    exit_code = 4


class RecipeError(RarefyError):
    """A recipe, pattern or option that means nothing here."""

    exit_code = 5


class BudgetError(RarefyError):
    """The budget is below what is possible, or the result missed a bound that the user set."""

    exit_code = 6


class TargetError(RarefyError):
    """The target runtime cannot load what was asked, is missing, or disagrees with us."""

    exit_code = 7


class OutputError(RarefyError):
    """The output cannot be written: it exists, is read-only, or the disk is full."""

    exit_code = 8


class EditError(RarefyError):
    """A technique cannot edit this weight, or found nothing to edit."""

    exit_code = 9


class TrainingError(RarefyError):
    """Training went wrong: the loss is no number any more, or nothing is left to train."""

    exit_code = 10


def did_you_mean(word: str, known: list[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest known words, or an empty string."""
    from difflib import get_close_matches

    close = get_close_matches(word, known, n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
