"""How much sooner does a language model write the same text when its first blocks guess and the others check?

    OMP_NUM_THREADS=1 python benchmarks/self_speculation.py --model HF_FOLDER --data DATA --work WORK

HF_FOLDER is the permuted Gemma that ``permuted_gemma.py`` writes. Exits behind some blocks learn the last
block's distribution on WikiText-2's validation text; then passages of its test text are gone on with,
greedily: by the whole network, with drafts of several lengths, and per token, where a token leaves as soon as
its exit is sure. Drafts choose among the words that occur in the validation text: the head is most of this
model. The page says for each whether the text is the same, and its speed beside the whole network's, in turns
in one process.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from harness import Ledger, fingerprint, sha256, source_sha256, table, write_page

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "self_speculation.md"
FLOORS = ("runtimes", "models", "training", "techniques")
AFTER, DRAFTS, WORDS = (5,), (2, 4), 16_000
BOUNDS = (0.05, 0.1)
PROMPT, COUNT, PROMPTS = 64, 32, 2


def main() -> None:
    """Every exit in turn; the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--windows", type=int, default=48, help="windows of 64 tokens that exits learn from")
    arguments = parser.parse_args()
    ledger, found = Ledger(arguments.work / "self_speculation.json"), []
    model = sha256(arguments.model / "model.safetensors")
    for block in AFTER:
        key = fingerprint(block, arguments.steps, arguments.windows, model, source_sha256(*FLOORS), COUNT)
        if ledger.get(key) is None:
            ledger.put(key, measure(arguments, block))
        found.append(ledger.get(key))
        print(table(HEADS, rows(found)), flush=True)
    write_page(PAGE, "Self-speculative decoding and early exit per token",
               "python benchmarks/self_speculation.py --model GEMMA --data DATA --work WORK",
               page(found, arguments))


def measure(arguments: argparse.Namespace, block: int) -> dict[str, Any]:
    """One exit: it learns, drafts are checked, tokens leave."""
    from rarefy.calibration.text import windows
    from rarefy.models.model import open_model
    from rarefy.runtimes.decoding import Layered, frequent
    from rarefy.techniques.depth.early_exit import EarlyExit
    from rarefy.training.loop import Settings

    model, text = open_model(arguments.model), arguments.data / "wikitext2"
    layered = Layered(model, (block,))
    many = windows(str(text / "valid.txt"), model.tokenizer, length=512, count=400, seed=0, minimum=100)
    words = layered.words(frequent(many, WORDS))
    count = arguments.windows + 16
    learnt = windows(str(text / "valid.txt"), model.tokenizer, length=64, count=count, seed=1)
    started = time.perf_counter()
    settings = Settings(steps=arguments.steps, batch=256, rate=1e-3, precision="float32")
    layered.learn(learnt[16:], settings, words)
    seconds = time.perf_counter() - started
    prompts = windows(str(text / "test.raw.txt"), model.tokenizer, length=PROMPT, count=PROMPTS, seed=2)
    ways: dict[str, Any] = {"whole": lambda prompt: layered.greedy(prompt, COUNT)}
    for draft in DRAFTS:
        ways[f"drafts of {draft}"] = lambda prompt, draft=draft: layered.speculative(
            prompt, COUNT, draft=draft, words=words)
    answers = layered.answers(learnt[:16], count=400)
    for bound in BOUNDS:
        technique = EarlyExit(max_loss=bound)
        rule = technique.calibrated(answers)
        ways[f"leaves, {bound:.0%} may be lost"] = lambda prompt, how=technique, rule=rule: layered.early(
            prompt, COUNT, how, rule.threshold)
    return {"after": block, "blocks": len(layered.blocks), "learnt": seconds, "words": len(words.index),
            "ways": run(ways, [each[None] for each in prompts])}


def run(ways: dict[str, Any], prompts: list[Any]) -> dict[str, dict[str, float]]:
    """Seconds a token behind the prompt, the share of tokens as the whole network writes them, passes."""
    found = {name: {"seconds": 0.0, "same": 0.0, "identical": 0.0, "blocks": 0.0, "checked": 0.0}
             for name in ways}
    for prompt in prompts:
        wanted = None
        for name, way in ways.items():
            started = time.perf_counter()
            text = way(prompt)
            each = found[name]
            each["seconds"] += (time.perf_counter() - started) / (COUNT * len(prompts))
            wanted = text.tokens if wanted is None else wanted
            same = (text.tokens == wanted).long()
            each["same"] += float(same.cumprod(0).sum()) / (COUNT * len(prompts))
            each["identical"] += float(same.all()) / len(prompts)
            each["blocks"] += float(text.blocks.float().mean()) / len(prompts)
            each["checked"] += text.checked / len(prompts)
    return found


HEADS = ("exit behind block", "way", "tokens/s", "beside the whole", "texts identical", "same until",
         "passes of the later blocks", "blocks a token")


def rows(found: list[dict[str, Any]]) -> list[list[str]]:
    """Every way of every exit."""
    lines = []
    for each in found:
        whole = each["ways"]["whole"]["seconds"]
        for name, way in each["ways"].items():
            passes = f"{way['checked']:.0f} of {COUNT - 1}" if way["checked"] else ""
            lines.append([f"{each['after'] + 1} of {each['blocks']}", name, f"{1 / way['seconds']:.1f}",
                          f"{whole / way['seconds']:.2f}x", f"{way['identical']:.0%}", f"{way['same']:.0%}",
                          passes, f"{way['blocks']:.1f}"])
    return lines


def page(found: list[dict[str, Any]], arguments: argparse.Namespace) -> list[str]:
    """What the table means."""
    learnt = found[0]
    return [
        f"Gemma-3-270M, float32, one thread of a machine that did other things as well. {PROMPTS} passages "
        f"of {PROMPT} tokens of WikiText-2's test text, {COUNT} tokens each behind them; prefill is in the "
        f"time. Exits learnt for {arguments.steps} steps of 256 tokens of the validation text "
        f"({learnt['learnt']:.0f} s), and draft among the {learnt['words']:,} words that occur most often in "
        "it. " + verdict(found),
        table(HEADS, rows(found)),
        "*Drafts* are checked, so the text is the whole network's (a tie of two logits may fall otherwise: a "
        "pass of several tokens adds up in another order). *Leaves* is early exit per token with a threshold "
        "that calibration tokens vouch for: the text may part, and *same until* is the share of tokens "
        "before it does. The later blocks get the states of tokens that left when the next one goes deeper. "
        "All of the head is read for every token that is checked or leaves: it is 63% of this model's "
        "weights, and what bounds the gain."]


def verdict(found: list[dict[str, Any]]) -> str:
    """The fastest draft, as fast as it is."""
    speed, name, after = max((each["ways"]["whole"]["seconds"] / way["seconds"], name, each["after"] + 1)
                             for each in found for name, way in each["ways"].items() if "drafts" in name)
    said = "faster than" if speed > 1 else "no gain over"
    return f"The best, {name} behind block {after}, are {said} the whole network: {speed:.2f}x."


if __name__ == "__main__":
    main()
