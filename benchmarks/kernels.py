"""When is a compressed weight faster than the matrix it stands for? The kernels of ``rarefy.runtimes.torch``.

    OMP_NUM_THREADS=1 python benchmarks/kernels.py       # half a minute; writes docs/benchmarks/kernels.md

Every kernel is timed in turns with the dense product in float32, at some shapes and numbers of tokens; what
counts is the ratio, so whatever else the machine does slows down both. A kernel whose time grows with what it
keeps breaks even where its line crosses 1; the slope of that line is the constant in ``runtimes/torch.py``.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from harness import table, write_page
from rarefy.core.nodes import Dense, Product, Quantized
from rarefy.core.tensors import CP, Tucker
from rarefy.numerics.grids import integer_grid
from rarefy.numerics.rounding import encode, fit
from rarefy.runtimes import torch as runtime
from rarefy.runtimes.modules import Factors, Matrix, Narrow, Sparse, Whole

SHAPES = ((640, 2048), (1024, 1024), (1536, 384))
TOKENS = (1, 16, 128)
KEPT = (0.05, 0.1, 0.2, 0.4)
SHARES = (0.25, 0.5, 0.75)
CONVS = ((64, 64, 28), (128, 128, 14))  # channels in and out, height and width; windows of 3 x 3
ROUNDS, SLICE = 5, 0.008  # turns, and seconds of each
PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "kernels.md"

Run = Callable[[], object]


def seconds(run: Run) -> float:
    """Seconds of the shortest call of as many as fit into a slice of time: the one that nothing disturbed."""
    best, end = float("inf"), time.perf_counter() + SLICE
    while (start := time.perf_counter()) < end:
        run()
        best = min(best, time.perf_counter() - start)
    return best


def ratio(kernel: Run, dense: Run) -> float:
    """Time of a kernel over that of the dense one, in turns."""
    for run in (kernel, dense):
        run()
    turns = [(seconds(kernel), seconds(dense)) for _ in range(ROUNDS)]
    return min(one for one, _ in turns) / min(other for _, other in turns)


def mean(values: list[float]) -> float:
    return statistics.geometric_mean(values)


# ---- matrices

def matrices(out: int, columns: int) -> Iterator[tuple[str, float, Matrix]]:
    """Kind, how much of the matrix is left (0: it does not matter), and the module."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, columns, generator=generator) / columns**0.5
    for bits, group, kind in ((8, 0, "int8"), (4, 32, "int4")):
        found = fit(weight, torch.ones(columns), integer_grid(bits, group))
        node = Quantized.of(encode(weight, found), found)
        yield kind, 0.0, runtime._integers(node, None, runtime.ONE)[0].build()
    for share in SHARES:
        rank = max(1, round(share * out * columns / (out + columns)))
        yield "low rank", share, Factors(Whole(torch.randn(out, rank)), Whole(torch.randn(rank, columns)))
        rows, inputs = torch.arange(round(share * out)), torch.arange(round(share * columns))
        inner = Whole(weight[: len(rows), : len(inputs)].contiguous())
        yield "rows and columns", share**2, Narrow(inner, rows, inputs, out)
    for kept in KEPT:
        keep = torch.rand(out, columns, generator=generator) < kept
        yield "sparse", kept, Sparse(weight * keep, None)
        for side in (4, 16):
            tiles = torch.rand(out // side, columns // side, generator=generator) < kept
            keep = tiles.repeat_interleave(side, 0).repeat_interleave(side, 1)
            yield f"blocks of {side}", kept, Sparse(weight * keep, (side, side))


def measure_matrices() -> dict[tuple[str, float], dict[int, float]]:
    """Ratios by kind, share and tokens; the geometric mean over the shapes."""
    found: dict[tuple[str, float], dict[int, list[float]]] = {}
    for out, columns in SHAPES:
        dense = Whole(torch.randn(out, columns))
        for kind, share, module in matrices(out, columns):
            for tokens in TOKENS:
                x = torch.randn(tokens, columns)
                times = found.setdefault((kind, share), {}).setdefault(tokens, [])
                times.append(ratio(lambda: module(x), lambda: dense(x)))  # noqa: B023
    return {key: {tokens: mean(times) for tokens, times in by.items()} for key, by in found.items()}


# ---- convolutions

def convolutions(channels: int, filters: int) -> Iterator[tuple[str, float, nn.Module, nn.Module]]:
    """Kind, share of the multiplications, the chain and the convolution it stands for."""
    whole = channels * filters * 9
    conv = nn.Conv2d(channels, filters, 3, padding=1, bias=False)

    def matrix(rows: int, columns: int) -> Dense:
        return Dense(torch.randn(rows, columns) / columns**0.5)

    for wanted in SHARES:
        rank = round(wanted * whole / (channels * 9 + filters))
        node = Product(matrix(filters, rank), matrix(rank, channels * 9))
        share = rank * (channels * 9 + filters) / whole
        yield "low rank", share, runtime._two(node.left, node.right, conv), conv
        rank = next(rank for rank in range(channels, 0, -1)
                    if rank * (channels + filters + 9 * rank) <= wanted * whole)
        tucker = Tucker(matrix(filters, rank), matrix(rank, rank * 9), matrix(channels, rank), (3, 3))
        share = (rank * (channels + filters) + 9 * rank * rank) / whole
        yield "Tucker", share, runtime._three(tucker, conv), conv
        rank = round(wanted * whole / (channels + filters + 6))
        cp = CP((matrix(filters, rank), matrix(channels, rank), matrix(3, rank), matrix(3, rank)))
        yield "CP", rank * (channels + filters + 6) / whole, runtime._four(cp, conv), conv


def measure_convolutions() -> dict[str, list[tuple[float, float]]]:
    """(share, ratio) by kind, one picture at a time and eight."""
    found: dict[str, list[tuple[float, float]]] = {}
    for channels, filters, size in CONVS:
        for kind, share, chain, conv in convolutions(channels, filters):
            times = []
            for pictures in (1, 8):
                x = torch.randn(pictures, channels, size, size)
                times.append(ratio(lambda: chain(x), lambda: conv(x)))  # noqa: B023
            found.setdefault(kind, []).append((share, mean(times)))
    return found


# ---- the page

Times = dict[tuple[str, float], dict[int, float]]
Points = dict[str, list[tuple[float, float]]]


def constants(times: Times) -> Iterator[tuple[str, str, str]]:
    """Kind, constant and break-even point for one token and for many."""
    for kind in ("int8", "int4", "low rank", "sparse", "blocks of 4", "blocks of 16", "rows and columns"):
        cells = []
        for tokens in (TOKENS[0], TOKENS[-1]):
            found = [(share, by[tokens]) for (name, share), by in times.items() if name == kind]
            if kind in ("int8", "int4"):
                cells.append(f"{found[0][1]:.2f}, {'faster' if found[0][1] < 1 else 'slower'}")
            elif kind == "rows and columns":
                beside = statistics.mean(time - share for share, time in found)
                cells.append(f"{beside:.2f} beside what is kept, {1 - beside:.0%}")
            else:
                slope = mean([time / share for share, time in found])
                cells.append(f"{slope:.2f}, {min(1, 1 / slope):.0%}")
        yield kind, *cells


def chains(points: Points) -> Iterator[tuple[str, ...]]:
    """Kind, share and time at every shape, the constant and the break-even point."""
    for kind, found in points.items():
        slope = mean([time / share for share, time in found])
        yield (kind, *(f"{share:.2f}: {time:.2f}" for share, time in found), f"{slope:.2f}",
               f"{min(1, 1 / slope):.0%}")


def parts(times: Times, points: Points) -> list[str]:
    """The page: the measured tables and the constants that follow."""
    shapes = ", ".join(f"{out} x {columns}" for out, columns in SHAPES)
    head = ["kernel", "kept", *(f"{tokens} token{'s' * (tokens > 1)}" for tokens in TOKENS), "mean"]
    rows = [[kind, f"{share:.0%}" if share else "all", *(f"{by[tokens]:.2f}" for tokens in TOKENS),
             f"{mean(list(by.values())):.2f}"] for (kind, share), by in sorted(times.items())]
    columns = [f"{channels} channels, {size} x {size}" for channels, _, size in CONVS for _ in SHARES]
    return [
        "Time of a product with a compressed weight as a share of the time of the dense product in float32: "
        f"below 1 is faster. Geometric means over weights of {shapes}; threads: {torch.get_num_threads()}. "
        "*Kept*: of the weights; of low rank, the share of the multiplications. int8 rounds activations to 8 "
        "bits as well, int4 computes in bfloat16, in groups of 32.", table(head, rows),
        "## What follows\n\nTime is about a constant times what is kept. `rarefy.runtimes.torch` takes the "
        "kernel where that is below 1, and else expands the weight once and says so. The constant, and what "
        "is kept where it breaks even:",
        table(["kernel", *(f"{tokens} token{'s' * (tokens > 1)}" for tokens in (TOKENS[0], TOKENS[-1]))],
              constants(times)),
        "## Convolutions\n\nWindows of 3 x 3, one picture and eight: share of the multiplications and of the "
        "time, the constant, and the share of the multiplications where it breaks even.",
        table(["chain", *columns, "constant", "breaks even at"], chains(points))]


def main() -> None:
    """Measure and write the page."""
    warnings.filterwarnings("ignore", "Sparse .* is in beta state")
    started = time.perf_counter()
    with torch.no_grad():
        measured = parts(measure_matrices(), measure_convolutions())
    write_page(PAGE, "Kernels", "python benchmarks/kernels.py", measured)
    print(*measured, f"{time.perf_counter() - started:.0f} seconds", sep="\n\n")


if __name__ == "__main__":
    main()
