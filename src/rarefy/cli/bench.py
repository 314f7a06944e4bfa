"""``rarefy bench``: an exported file in its runtime, timed in turns with what it is compared to."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rarefy.cli.options import WORK, EvalData, Json
from rarefy.cli.progress import progress
from rarefy.cli.terminal import dump, guarded, show, table, tell
from rarefy.core.errors import TargetError
from rarefy.report import words

if TYPE_CHECKING:
    from rarefy.run.benching import Originals
    from rarefy.runtimes.bench import Timed

SUFFIXES = (".gguf", ".onnx", ".xml", ".pt2")


@guarded
def bench(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="An exported file, or a folder with one.")],
    against: Annotated[list[str] | None, typer.Option(
        "--against", metavar="ORIGINAL", show_default=False,
        help="A model, which is then written for the same runtime and for PyTorch (default: the one that "
             "OUT was made of), or .gguf, .onnx, .xml and .pt2 (PyTorch) files. Repeat for several; ratios "
             "are to the first.")] = None,
    *, eval_data: EvalData = None, threads: Annotated[int | None, typer.Option(
        "--threads", min=1, rich_help_panel=WORK, show_default=False,
        help="Threads of each runtime; default: all.")] = None,
    length: Annotated[int, typer.Option("--length", min=1, rich_help_panel=WORK,
                                        help="Tokens of a text, or of a prompt.")] = 64,
    visits: Annotated[int, typer.Option("--visits", min=1, rich_help_panel=WORK,
                                        help="How often each file is visited.")] = 5,
    as_json: Json = False,
) -> None:
    """Time a file against its original: latency at batch 1 and 8, or tokens per second, and memory."""
    path = exported(out)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(each) for each in against or () if Path(each).suffix in SUFFIXES]
        writes = path.suffix == ".gguf"
        if len(files) < len(against or ()) or not against:
            found = _originals(out, against, Path(folder), eval_data)
            files, writes = [*found.files, *files], found.writes
        if ".gguf" in {each.suffix for each in (path, *files)}:
            _gguf(path, files, threads, visits, as_json=as_json)
        elif writes or _is_writer(path):
            _writers([*files, path], length, visits, threads, as_json=as_json)
        else:
            _samples([*files, path], length, visits, threads, as_json=as_json)


def _originals(out: Path, against: list[str] | None, folder: Path, eval_data: list[str] | None) -> Originals:
    """The model's files; what writing and compressing took is said apart from speed."""
    from rarefy.run.benching import model_of, originals

    names = [each for each in against or () if Path(each).suffix not in SUFFIXES] or [model_of(out)]
    if len(names) > 1:
        raise TargetError(f"--against {names[1]}: one model at a time; further ones as exported files")
    with progress().stage("original"):
        found = originals(out, names[0], folder / "original", eval_data or ())
    made = f", compressing {sum(found.compression.values()):.0f} s" if found.compression else ""
    tell(f"writing the original took {found.seconds:.0f} s{made}; neither is in the times below")
    return found


def _is_writer(path: Path) -> bool:
    """Whether a graph is a language model's: its tokenizer's folder has the configuration of one."""
    return (path.parent / "config.json").is_file() and path.suffix in (".onnx", ".xml")


def _samples(files: list[Path], length: int, visits: int, threads: int | None, *, as_json: bool) -> None:
    from rarefy.runtimes.bench import compare

    with progress().stage("bench"):
        rows = compare(files, length=length, visits=visits, threads=threads)
    if as_json:
        dump(rows)
    else:
        _show(rows)


def _writers(files: list[Path], prompt: int, visits: int, threads: int | None, *, as_json: bool) -> None:
    from rarefy.measure.machine import bandwidth
    from rarefy.runtimes.bench import compare_writers

    with progress().stage("bench"):
        limit = bandwidth(threads)
        rows = compare_writers(files, prompt=prompt, visits=visits, threads=threads)
    if as_json:
        dump({"memory_bytes_per_second": limit, "files": rows})
        return
    lines = [(str(row.path), row.runtime, words.size(row.bytes), words.size(row.memory.peak),
              f"{row.load:.1f}", f"{row.prefill:.0f}", _times(row.ratio, row.spread, "prefill"),
              f"{row.decode:.1f}", _times(row.ratio, row.spread, "decode"),
              f"{row.bytes * row.decode / limit:.0%}") for row in rows]
    table("", ("file", "runtime", "size", "peak memory", "load s", "prefill tokens/s", "faster",
               "decode tokens/s", "faster", "of memory's speed"), lines, right=tuple(range(2, 10)))
    show(f"\nmemory reads {limit / 1e9:.1f} GB/s; its share counts the whole file for every token written")


def _times(ratio: dict[str, float], spread: dict[str, float], key: str) -> str:
    return f"{ratio[key]:.2f} ±{spread[key] / 2:.0%}"


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
    energy = [f"{row.path.name} " + ", ".join(f"{value:.2f} J at batch {batch}"
                                              for batch, value in row.joules.items())
              for row in rows if row.joules]
    show("\nenergy of a call: " + ("; ".join(energy) or "this machine has no counter that can be read"))


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
