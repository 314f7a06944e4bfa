"""How fast GPTQ and SparseGPT are themselves: one layer of 2048 x 2048, ours against llm-compressor's.

    pip install llmcompressor
    python benchmarks/algorithms.py [--size 2048] [--threads 2] [--repeats 5]

Both get the same weight and the same second moments, on the CPU, in one process, in turns; what is timed is
the call from weight and Gram to codes and scales (GPTQ: 4 bits, groups of 128, activation order) or to the
pruned weight (SparseGPT: 50% and 2:4), at a damping of 0.01. Ours searches its scales inside the sweep,
theirs come from a min-max observer, whose time is not counted. The error is that of the output, relative,
for both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import table, write_page

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "algorithms.md"
COMMAND = "python benchmarks/algorithms.py"
GROUP = 128
DAMPING = 0.01  # llm-compressor's default


def problem(size: int) -> tuple[Any, Any, int]:
    """A weight with heavy tails [size, size], and the Gram of correlated inputs of uneven scale."""
    import torch

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator) * 0.02
    weight *= torch.where(torch.rand(size, size, generator=generator) < 0.01, 4.0, 1.0)
    tokens = 2 * size
    mix = torch.randn(size, size, generator=generator) / size**0.5
    x = (torch.randn(tokens, size, generator=generator) @ mix) * torch.logspace(-1, 0.5, size)
    return weight, x.T @ x, tokens


def ours(technique: Any, weight: Any, gram: Any, tokens: int) -> Callable[[], Any]:
    import torch

    from rarefy.core.edit import Leaf
    from rarefy.core.nodes import Dense
    from rarefy.core.nouns import Evidence

    leaf = Leaf("layer", Dense(weight), weight, None, Evidence(gram, tokens))
    return lambda: technique.rewrite(leaf, torch.Generator()).node


def their_gptq(weight: Any, gram: Any, tokens: int) -> Callable[[], Any]:
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    args = QuantizationArgs(num_bits=4, group_size=GROUP, symmetric=True, strategy="group", actorder="weight")
    peak = weight.unflatten(1, (-1, GROUP)).abs().amax(-1)
    scale = (peak / 7.5)[None]

    def call() -> Any:
        return quantize_weight(weight[None].clone(), (gram / tokens)[None].clone(), scale,
                               torch.zeros_like(scale, dtype=torch.int8), None, args,
                               percdamp=DAMPING)[0][0]

    return call


def their_sparsegpt(weight: Any, gram: Any, tokens: int, n: int, m: int) -> Callable[[], Any]:
    import torch
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight

    def call() -> Any:
        with torch.no_grad():
            return sparsify_weight(layer, {layer: gram / tokens}, 0.5, n, m, 128, DAMPING, False)

    return call


def dense(found: Any) -> Any:
    from rarefy.core.nodes import Node

    return found.dense() if isinstance(found, Node) else found[1] if isinstance(found, tuple) else found


def compare(first: Callable[[], Any], second: Callable[[], Any],
            repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of both, in turns, after one call each to warm up."""
    first(), second()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for call, seconds in zip((first, second), times, strict=True):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return times


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    try:
        import llmcompressor
    except ImportError as error:
        sys.exit(f"{error}: pip install llmcompressor")
    import torch

    from rarefy.numerics.grids import integer_grid
    from rarefy.techniques.prune.sparsegpt import SparseGPT
    from rarefy.techniques.quantize.gptq import GPTQ

    torch.set_num_threads(options.threads)
    weight, gram, tokens = problem(options.size)
    grid = integer_grid(4, GROUP)
    cases = {
        "GPTQ, 4 bits in groups of 128": (ours(GPTQ(grid, damping=DAMPING), weight, gram, tokens),
                                          their_gptq(weight, gram, tokens)),
        "SparseGPT, 50%": (ours(SparseGPT(0.5, damping=DAMPING), weight, gram, tokens),
                           their_sparsegpt(weight, gram, tokens, 0, 0)),
        "SparseGPT, 2:4": (ours(SparseGPT(pattern="2:4", damping=DAMPING), weight, gram, tokens),
                           their_sparsegpt(weight, gram, tokens, 2, 4)),
    }
    energy = float(((weight @ gram) * weight).sum())
    rows = []
    for name, (mine, theirs) in cases.items():
        own, other = compare(mine, theirs, options.repeats)
        deltas = [dense(call()) - weight for call in (mine, theirs)]
        errors = [float(((delta @ gram) * delta).sum()) / energy for delta in deltas]
        a, b = statistics.median(own), statistics.median(other)
        spread = sorted(x / y for x, y in zip(own, other, strict=True))
        rows.append([name, f"{a:.2f} s", f"{b:.2f} s", f"{a / b:.2f} ({spread[0]:.2f} to {spread[-1]:.2f})",
                     f"{errors[0]:.2e}", f"{errors[1]:.2e}"])
        print(rows[-1], flush=True)
    head = ["", "rarefy", f"llm-compressor {llmcompressor.__version__}", "ratio", "our error", "their error"]
    about = __doc__.split("\n\n", 2)[2]
    write_page(PAGE, "Speed of the algorithms", COMMAND, [about, table(head, rows)])


if __name__ == "__main__":
    main()
