"""``rarefy bench``: an exported file in its runtime, timed in turns with what it is compared to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rarefy.cli.options import WORK, Json
from rarefy.cli.progress import progress
from rarefy.cli.terminal import dump, guarded, show, table
from rarefy.core.errors import TargetError
from rarefy.report import words

if TYPE_CHECKING:
    from rarefy.runtimes.bench import Timed

SUFFIXES = (".gguf", ".onnx", ".xml", ".pt2")


@guarded
def bench(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="An exported file, or a folder with one.")],
    against: Annotated[list[Path], typer.Option(
        "--against", metavar="FILE", show_default=False,
        help="The original: a .gguf, .onnx, .xml or .pt2 file (PyTorch). Repeat for several; ratios are "
             "to the first.")],
    *, threads: Annotated[int | None, typer.Option(
        "--threads", min=1, rich_help_panel=WORK, show_default=False,
        help="Threads of each runtime; default: all.")] = None,
    length: Annotated[int, typer.Option("--length", min=1, rich_help_panel=WORK,
                                        help="Tokens of a text.")] = 64,
    visits: Annotated[int, typer.Option("--visits", min=1, rich_help_panel=WORK,
                                        help="How often each file is visited.")] = 5,
    as_json: Json = False,
) -> None:
    """Time a file against its original: latency at batch 1 and 8, or tokens per second, and memory."""
    path = exported(out)
    if ".gguf" in {each.suffix for each in (path, *against)}:
        _gguf(path, against, threads, visits, as_json=as_json)
        return
    from rarefy.runtimes.bench import compare

    with progress().stage("bench"):
        rows = compare([*against, path], length=length, visits=visits, threads=threads)
    if as_json:
        dump(rows)
        return
    _show(rows)


def exported(out: Path) -> Path:
    """The exported file that ``out`` is or holds."""
    if out.is_file():
        return out
    found = sorted(each for place in (out, out / "model") if place.is_dir() for each in place.glob("*")
                   if each.suffix in SUFFIXES)
    if len(found) != 1:
        raise TargetError(f"{out}: holds {len(found)} exported files ({', '.join(SUFFIXES)}); pass the file "
                          "itself")
    return found[0]


def _show(rows: list[Timed]) -> None:
    lines = []
    for row in rows:
        times = [cell for batch in row.latency for cell in (
            f"{row.latency[batch].median:.2f}", f"{row.latency[batch].p95:.2f}",
            f"{row.ratio[batch]:.2f} ±{row.spread[batch] / 2:.0%}")]
        lines.append((str(row.path), row.runtime, words.size(row.bytes), words.size(row.peak),
                      f"{row.load:.1f}", *times))
    heads = [head for batch in rows[0].latency
             for head in (f"batch {batch} ms", f"p95 {batch}", f"faster {batch}")]
    table("", ("file", "runtime", "size", "peak memory", "load s", *heads), lines,
          right=tuple(range(2, 5 + len(heads))))


def _gguf(path: Path, against: list[Path], threads: int | None, visits: int, *, as_json: bool) -> None:
    from rarefy.runtimes.llamacpp import compare_speed

    if len(against) != 1 or {path.suffix, against[0].suffix} != {".gguf"}:
        raise TargetError(f"{path}: a .gguf file is compared with one other .gguf file")
    with progress().stage("bench"):
        found = compare_speed(against[0], path, threads=threads, repeats=visits)
    if as_json:
        dump(found)
        return
    rows: list[tuple[Any, ...]] = [(against[0], found.a, found.memory_a), (path, found.b, found.memory_b)]
    table("", ("file", "prefill tokens/s", "decode tokens/s", "peak memory", "size"),
          [(str(file), f"{speed.prefill:.1f}", f"{speed.decode:.1f}", words.size(memory.peak),
            words.size(file.stat().st_size)) for file, speed, memory in rows], right=(1, 2, 3, 4))
    show(f"\nprefill {found.ratio_prefill:.2f} times, decode {found.ratio_decode:.2f} times as fast; "
         f"drift {found.drift:.0%}")
