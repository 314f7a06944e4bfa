"""Does llama.cpp compute what we compute from the same file? Format by format.

    python benchmarks/agreement.py --data DATA --work WORK [--model FOLDER]

For every format: the permuted Gemma-3-270M, each matrix whose rows fit rounded to nearest in that
format, the others F16, exported to GGUF. Then the file itself is read back and evaluated

    float       by our runner, weights dequantized to float32, activations in float32,
    rounded     the same weights in transformers' own network, with the input of every matrix rounded as
                llama.cpp rounds it: to 8 bits in blocks of 32 (of 256 beside K-types), beside F16 and BF16
                to those,
    llama.cpp   by the runtime.

What lies between *float* and *llama.cpp* is that rounding when *rounded* lies as far from *float*, in
the mean, as llama.cpp does. The roundings themselves fall differently wherever the order of a sum moved
a value across a border, so the two do not coincide.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import Ledger, fingerprint, sha256, source_sha256, table, write_page
from rarefy.core.edit import edit
from rarefy.core.nodes import Dense, Node
from rarefy.export.gguf import export_gguf
from rarefy.formats.ggml import CODECS
from rarefy.models.model import Model, open_model, skeleton
from rarefy.models.runner import Runner
from rarefy.runtimes.llamacpp import Session, runtime
from rarefy.techniques.quantize.rtn import RTN

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "agreement.md"
FORMATS = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "MXFP4", "Q2_0",
           "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "Q2_K")
WINDOWS, LENGTH, STRIDE = 2, 512, 4
FLOORS = ("numerics", "core", "formats", "techniques", "models", "export", "runtimes")  # what decides it
CHUNK = 32  # positions whose distributions are held in float64 at once
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

HEAD = ("format", "weights in it", "KL, mean", "KL, max", "mean abs Δ log p", "max abs Δ log p",
        "same top token", "KL of rounding", "its mean abs Δ log p", "KL rounded to llama.cpp")
HOW = f"""\
{{count}} positions in {WINDOWS} windows of {LENGTH} tokens of the wikitext-2 raw test set, BOS first;
log-probabilities over the whole vocabulary of 262,144 tokens, the unlikeliest included, which is where the
largest differences are. The first group of columns is *float* against *llama.cpp*, then *float* against
*rounded*, then *rounded* against *llama.cpp*. Rows of this model are 640, 1024 and 2048 weights long:
K-types and IQ4_XS fit the attention outputs and the down projections only. Runtime: {{runtime}}."""


@dataclass(frozen=True)
class Gap:
    """How far one evaluation of a file is from another, over positions and the vocabulary."""

    kl_mean: float
    kl_max: float
    mean: float
    highest: float
    top1: float


def gap(reference: Tensor, other: Tensor) -> Gap:
    """Compare log-probabilities [positions, vocabulary]; the absolute difference is over all tokens."""
    divergences, differences, highest, same = [], [], 0.0, 0
    for start in range(0, len(reference), CHUNK):
        a, b = (table[start:start + CHUNK].double().log_softmax(-1) for table in (reference, other))
        divergences.append((a.exp() * (a - b)).sum(-1))
        moved = (a - b).abs()
        differences.append(moved.mean(-1))
        highest = max(highest, float(moved.max()))
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
    kl = torch.cat(divergences)
    return Gap(float(kl.mean()), float(kl.max()), float(torch.cat(differences).mean()), highest,
               same / len(reference))


def windows(model: Model, text: Path) -> Tensor:
    """Windows of the text's tokens, each with one BOS in front."""
    tokenizer = model.tokenizer
    tokens = tokenizer(text.read_text(encoding="utf-8")[:40_000], add_special_tokens=False)["input_ids"]
    body = torch.tensor(tokens[:WINDOWS * (LENGTH - 1)]).view(WINDOWS, LENGTH - 1)
    return torch.cat([torch.full((WINDOWS, 1), tokenizer.bos_token_id), body], 1)


def rounded_trees(model: Model, name: str) -> tuple[dict[str, Node], dict[str, str]]:
    """Every matrix that fits the format rounded to it, and the format of every matrix."""
    codec, trees, formats = CODECS[name], {}, {}
    for site in model.map.sites:
        formats[site.path] = name if codec.fits(site.shape[1]) else "F16"
        if codec.grid is not None and formats[site.path] == name:
            weight = model.weight(site.path)
            trees[site.path], _ = edit(site.path, Dense(weight), weight, RTN(codec.grid), "rtn", None,
                                       torch.Generator().manual_seed(0))
    return trees, formats


def in_runner(model: Model, tokens: Tensor, positions: Sequence[int]) -> Tensor:
    """Our own evaluation: float32, block by block."""
    runner, found = Runner(model), []
    with torch.no_grad():
        for window in tokens:
            hidden, context = runner.stem(window[None])
            for block in range(runner.blocks):
                hidden = runner.block(block, hidden, context)
            found.append(runner.logits(runner.norm(hidden[0, list(positions)])).log_softmax(-1))
    return torch.cat(found)


def in_runtime(path: Path, tokens: Tensor, positions: Sequence[int], threads: int) -> Tensor:
    """llama.cpp's evaluation."""
    with Session(path, threads=threads) as session:
        tables = session.distributions(tokens.numpy(), positions)
        return torch.cat([torch.from_numpy(values.copy()) for values in tables])


def to_eight_bits(values: Tensor, block: int) -> Tensor:
    """Activations as llama.cpp rounds them: integers up to 127 times the largest magnitude of a block."""
    blocks = values.view(*values.shape[:-1], -1, block)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    nearest = torch.where(scale > 0, blocks / scale, 0).round()
    return (nearest * scale).view(values.shape)


def rounding(name: str) -> Callable[[Tensor], Tensor]:
    """What llama.cpp does to the input of a matrix in this format."""
    if name in FLOATS:
        return lambda values: values.to(FLOATS[name]).float()
    block = 256 if CODECS[name].block == 256 else 32
    return lambda values: to_eight_bits(values, block)


def in_rounded_network(model: Model, formats: dict[str, str], tokens: Tensor,
                       positions: Sequence[int]) -> Tensor:
    """transformers' network with these weights, the input of every matrix rounded first."""
    network = skeleton(model.config)
    state = {site.path: model.weight(site.path) for site in model.map.sites}
    state |= {param.path: model.param(param.path) for param in model.map.params}
    network.load_state_dict(state, strict=False, assign=True)
    network.tie_weights()
    rules = {path.removesuffix(".weight"): rounding(name) for path, name in formats.items()}
    rules["lm_head"] = rules.get("lm_head", rules["model.embed_tokens"])
    for path, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs, rule=rules[path]: (rule(inputs[0]),))
    with torch.no_grad():
        kept = [network.model(window[None], use_cache=False).last_hidden_state[0, list(positions)]
                for window in tokens]
        logits: Tensor = network.lm_head(torch.cat(kept))
        return logits.log_softmax(-1)


def measure(model: Model, name: str, tokens: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Export in one format, evaluate three times, compare."""
    path = options.work / f"{name}.gguf"
    trees, formats = rounded_trees(model, name)
    export_gguf(model, trees, formats, path)
    positions = range(STRIDE - 1, LENGTH, STRIDE)
    with warnings.catch_warnings():  # that it is quantized is the point here
        warnings.simplefilter("ignore")
        exported = open_model(path, dequantize=True)
    exact = in_runner(exported, tokens, positions)
    found = in_runtime(path, tokens, positions, options.threads)
    expected = in_rounded_network(exported, formats, tokens, positions)
    weights = sum(s.shape[0] * s.shape[1] for s in model.map.sites if formats[s.path] == name)
    path.unlink()
    return {"weights": weights, "runtime": asdict(gap(exact, found)), "rounded": asdict(gap(exact, expected)),
            "rest": asdict(gap(expected, found))}


def results(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every format's result, cached by the model, the text, the source and the runtime."""
    folder = options.model or options.work / "model" / "hf"
    if not folder.exists():
        script = Path(__file__).with_name("permuted_gemma.py")
        subprocess.run([sys.executable, script, folder.parent], check=True)
    text = options.data / "wikitext2" / "test.raw.txt"
    model, ledger = open_model(folder), Ledger(options.work / "agreement.json")
    tokens = windows(model, text)
    identity = fingerprint(sha256(folder / "model.safetensors"), sha256(text), source_sha256(*FLOORS),
                           runtime(), WINDOWS, LENGTH, STRIDE)
    for name in FORMATS:
        key = f"{name} {identity}"
        found = ledger.get(key)
        if found is None:
            ledger.put(key, found := measure(model, name, tokens, options))
        print(f"{name}: KL {found['runtime']['kl_mean']:.2e}, with rounded activations "
              f"{found['rounded']['kl_mean']:.2e}", flush=True)
        yield name, found


def row(name: str, found: dict[str, Any]) -> list[str]:
    """One format's row."""
    a, b, c = found["runtime"], found["rounded"], found["rest"]
    return [name, f"{found['weights'] / 1e6:.0f}M", f"{a['kl_mean']:.1e}", f"{a['kl_max']:.1e}",
            f"{a['mean']:.1e}", f"{a['highest']:.2f}", f"{100 * a['top1']:.1f}%", f"{b['kl_mean']:.1e}",
            f"{b['mean']:.1e}", f"{c['kl_mean']:.1e}"]


def main() -> None:
    """Measure what is not cached, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds wikitext2/")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="the hf folder of permuted_gemma.py, else it is built")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    rows = [row(name, found) for name, found in results(options)]
    about = ("\n".join((__doc__ or "").splitlines()[4:])).strip()
    write_page(PAGE, "Agreement with llama.cpp", "python benchmarks/agreement.py --data DATA --work WORK",
               [about, HOW.format(count=WINDOWS * (LENGTH // STRIDE), runtime=runtime()), table(HEAD, rows)])


if __name__ == "__main__":
    main()
