"""What the terminal shows: results on stdout, everything else (progress, warnings, errors) on stderr.

A result is a table or lines for people, and with ``--json`` one JSON document for programs. Colours and
boxes appear only on a terminal, and never under ``NO_COLOR``. An error is one line, ``error: where, what,
remedy``, and its exit code says of which kind it is.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

import typer

from rarefy.core.errors import RarefyError

P = ParamSpec("P")
R = TypeVar("R")

EXIT_CODES = (
    (0, "done"), (1, "unexpected error (--debug shows the traceback)"), (2, "wrong usage"),
    (3, "the model cannot be loaded"), (4, "the data is unusable"), (5, "the recipe or an option is wrong"),
    (6, "the budget is impossible or was missed"), (7, "the target runtime cannot do it"),
    (8, "the output cannot be written"), (9, "a technique cannot edit a weight"),
    (10, "training went wrong"), (130, "interrupted"),
)
WIDE = 10_000  # columns where there is no terminal: nothing is wrapped or cut
_debug = False


def set_debug(on: bool) -> None:
    """Show tracebacks and the warnings of other libraries."""
    global _debug
    _debug = on


def console(*, error: bool = False) -> Any:
    """A rich console on stdout or stderr, plain and wide where that is no terminal."""
    from rich.console import Console

    stream = sys.stderr if error else sys.stdout
    return Console(file=stream, highlight=False, soft_wrap=not stream.isatty(),
                   width=None if stream.isatty() else WIDE)


def show(text: str = "") -> None:
    """A line of the result."""
    console().print(text, markup=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]],
          right: Sequence[int] = ()) -> None:
    """A table of the result. right: indices of the columns of numbers. Cells are plain text."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    target = console()
    drawn = Table(title=title or None, title_justify="left", title_style="bold", header_style="dim",
                  pad_edge=False, show_edge=False, box=box.SIMPLE_HEAD if target.is_terminal else None)
    for index, name in enumerate(columns):
        drawn.add_column(name, justify="right" if index in right else "left", no_wrap=index in right)
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    if target.is_terminal:
        target.print(drawn)
        return
    with target.capture() as text:
        target.print(drawn)
    for line in text.get().splitlines():
        show(line.rstrip())


def dump(value: Any) -> None:
    """The result as one JSON document."""
    sys.stdout.write(json.dumps(value, indent=2, default=plain, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """What ``json`` does not know by itself: dataclasses, paths, sets."""
    if is_dataclass(value) and not isinstance(value, type):
        return finite(asdict(value))
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} does not go into JSON")


def finite(value: Any) -> Any:
    """The same data with NaN and infinity as null: JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def bar(share: float, width: int = 24) -> str:
    """A bar of ``share`` (0 to 1) in characters, in eighths where the terminal can."""
    filled = round(share * width * 8)
    whole, part = divmod(filled, 8)
    if "utf" not in (sys.stdout.encoding or "").lower():
        return "#" * round(share * width)
    return "█" * whole + (" ▏▎▍▌▋▊▉"[part] if part else "")


def tell(text: str) -> None:
    """A line beside the result, on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def fail(text: str, code: int) -> NoReturn:
    """One line of error, then out."""
    console(error=True).print(f"error: {text}", markup=False, soft_wrap=True,
                              style="red" if sys.stderr.isatty() else None)
    raise typer.Exit(code)


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """The command with its errors turned into one line and an exit code."""
    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except RarefyError as error:
            if _debug:
                raise
            fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            fail("interrupted", 130)
        except BrokenPipeError:  # `rarefy techniques | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:  # the last resort: a line for people, a traceback on request
            if _debug:
                raise
            first = (str(error).splitlines() or [""])[0]
            fail(f"{type(error).__name__}: {first}; this is not expected, --debug shows where", 1)

    return run


def quiet_others() -> None:
    """Our own warnings become one line; other libraries' warnings and logs stay silent without --debug."""
    def line(message: Warning | str, *_: object, **__: object) -> None:
        tell(f"warning: {message}")

    if _debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.showwarning = line
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("always", module=r"rarefy(\.|$)")
