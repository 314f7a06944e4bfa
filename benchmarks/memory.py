"""What does a language model lose when it remembers less: keys and values rounded, forgotten, or of low rank?

    OMP_NUM_THREADS=1 python benchmarks/memory.py --model HF_FOLDER --data DATA --work WORK

HF_FOLDER is the permuted Gemma that ``permuted_gemma.py`` writes. A passage of WikiText-2's test text is read
64 tokens at a time; what is forgotten between two pieces is not there for the next. The page has, for each
way to remember, the bytes that are held at the end, how far the answers of the second half moved, and how
long reading took. Latents are fitted to the validation text.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harness import Ledger, fingerprint, sha256, source_sha256, table, write_page

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "memory.md"
SOURCES = ("runtimes/memory.py", "runtimes/decoding.py", "models/latent.py", "techniques/attention/latent.py",
           "run/reshape.py")
LENGTH = 1024             # tokens of the passage
STEPS = 8                 # tokens more that are timed
WINDOWS, WINDOW = 16, 256  # that latents are fitted to


@dataclass(frozen=True)
class Way:
    """bits: of what is remembered. keep: of blocks that look back to the beginning: first tokens, newest,
    heavy ones. latent: settings of the technique (None: keys and values themselves)."""

    bits: int = 32
    keep: tuple[int, int, int] | None = None
    latent: tuple[tuple[str, Any], ...] | None = None


HALF = (("ratio", 0.5),)
WAYS: dict[str, Way] = {
    "everything": Way(), "8 bits": Way(8), "4 bits": Way(4),
    "windows where blocks have them": Way(keep=(0, LENGTH, 0)),
    "newest 64": Way(keep=(0, 64, 0)), "first 4, newest 60": Way(keep=(4, 60, 0)),
    "first 4, newest 28, heavy 32": Way(keep=(4, 28, 32)),
    "latent of three quarters": Way(latent=(("ratio", 0.75),)), "latent of half": Way(latent=HALF),
    "latent of half, 8 bits": Way(8, latent=HALF)}


def main() -> None:
    """Every way that is not in the ledger yet; the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    ledger, reader, found = Ledger(arguments.work / "memory.json"), Reader(arguments), dict[str, Any]()
    model, source = sha256(arguments.model / "model.safetensors"), source_sha256(*SOURCES)
    for name, way in WAYS.items():
        key = fingerprint(model, source, LENGTH, WINDOWS, WINDOW, way)
        if ledger.get(key) is None:
            ledger.put(key, reader.measured(way))
        found[name] = ledger.get(key)
        print(table(HEADS, rows(found)), flush=True)
    write_page(PAGE, "Keys and values that are remembered",
               "python benchmarks/memory.py --model GEMMA --data DATA --work WORK", page(found))


class Reader:
    """The passage, and the models that read it, each made when it is first needed."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.latents = arguments, dict[Any, Any]()

    @cached_property
    def model(self) -> Any:
        """Gemma."""
        from rarefy.models.model import open_model

        return open_model(self.arguments.model)

    @cached_property
    def text(self) -> Any:
        """The passage, [1, length]."""
        return self._windows("test.raw.txt", LENGTH, 1)

    @cached_property
    def whole(self) -> list[Any]:
        """What the model says of the second half when it remembers everything: log-probabilities by chunk."""
        layered = self.layered(None)
        return [logits.log_softmax(-1)
                for _, logits in layered.read(self.text, layered.memory(), skip=LENGTH // 2)]

    def layered(self, latent: tuple[tuple[str, Any], ...] | None) -> Any:
        """The model, its keys and values made of a latent."""
        from rarefy.core.nouns import Recipe, Step
        from rarefy.run.reshape import reshaped
        from rarefy.runtimes.decoding import Layered

        if latent not in self.latents:
            model = self.model
            if latent is not None:
                steps = (Step("latent", settings=dict(latent)),)
                model = reshaped(model, Recipe("", steps), self._windows("valid.txt", WINDOW, WINDOWS)).model
            self.latents = {latent: Layered(model, (0,))}  # one at a time
        return self.latents[latent]

    def measured(self, way: Way) -> dict[str, float]:
        """Nats a token in the second half, divergence from remembering everything, bytes held, seconds."""
        from rarefy.runtimes.memory import Keep

        whole, layered = self.whole, self.layered(way.latent)
        memory = layered.memory(way.bits, None if way.keep is None else Keep(*way.keep))
        loss = kl = 0.0
        started, count = time.process_time(), 0
        chunks = layered.read(self.text, memory, skip=LENGTH // 2)
        for (start, logits), wanted in zip(chunks, whole, strict=True):
            said, after = logits.log_softmax(-1), self.text[0, start + 1:start + 1 + len(logits)]
            loss -= float(said[:len(after)].gather(1, after[:, None]).sum())
            kl += float((wanted.exp() * (wanted - said)).sum())
            count += len(logits)
        return {"loss": loss / (count - 1), "kl": kl / count, "bytes": memory.bytes,
                "seconds": time.process_time() - started, "step": self._step(layered, memory)}

    def _step(self, layered: Any, memory: Any) -> float:
        """Seconds of one token more, behind all of the passage."""
        import torch

        started = time.process_time()
        with torch.no_grad():
            for place in range(LENGTH, LENGTH + STEPS):
                hidden = layered.stem(self.text[:, -1:], place)
                for index in range(len(layered.cuts) - 1):
                    hidden = layered.part(index, hidden, place, memory)
                layered.logits(hidden)
        return (time.process_time() - started) / STEPS

    def _windows(self, file: str, length: int, count: int) -> Any:
        from rarefy.calibration.text import windows

        text = str(self.arguments.data / "wikitext2" / file)
        return windows(text, self.model.tokenizer, length=length, count=count, seed=0)


HEADS = ("remembered", f"MB after {LENGTH:,} tokens", "share", "perplexity", "beside everything",
         "KL, nats", "seconds to read", "ms a token behind it")


def rows(found: dict[str, Any]) -> list[list[str]]:
    """Every way beside remembering everything."""
    whole = found["everything"]
    return [[name, f"{each['bytes'] / 1e6:.2f}", f"{each['bytes'] / whole['bytes']:.0%}",
             f"{math.exp(each['loss']):.2f}", f"{each['loss'] - whole['loss']:+.4f} nats",
             f"{each['kl']:.4f}", f"{each['seconds']:.1f}", f"{1e3 * each['step']:.0f}"]
            for name, each in found.items()]


def page(found: dict[str, Any]) -> list[str]:
    """What the table means."""
    return [
        f"Gemma-3-270M, float32; {LENGTH:,} tokens of WikiText-2's test text, perplexity and divergence of "
        "the second half. Three of its 18 blocks look back to the beginning; where some tokens are kept, "
        "those keep as many as the table says. The other 15 have a window of 512 and keep that, which "
        "changes nothing. Time is the processor's, one thread: for reading all of it 64 tokens at a time, "
        "and for each token that is written then.",
        table(HEADS, rows(found)),
        "*Heavy* tokens are those that got the most attention so far (H2O). A *latent* takes the place of "
        f"keys and values in all blocks, without any training; it was fitted to {WINDOWS} x {WINDOW} tokens "
        "of validation text. Gemma has one head of keys and values in a block, 512 numbers a token already "
        "where its states have 640: there is less to share than among many heads. What is rounded is "
        "decoded and what has a latent is multiplied out at every step: less memory, not less time. "
        + verdict(found)]


def verdict(found: dict[str, Any]) -> str:
    """Rounding beside a latent, as they came out."""
    rounded, latent, both = (found[name] for name in ("4 bits", "latent of half", "latent of half, 8 bits"))
    share = found["everything"]["bytes"]
    better = "rounding" if rounded["kl"] < latent["kl"] and rounded["bytes"] < latent["bytes"] else "neither"
    return (f"Of the two, {better} is better in both: 4 bits hold {rounded['bytes'] / share:.0%} at "
            f"{rounded['kl']:.3f} nats, a latent of half {latent['bytes'] / share:.0%} at "
            f"{latent['kl']:.3f}, and in 8 bits {both['bytes'] / share:.0%} at {both['kl']:.3f}.")


if __name__ == "__main__":
    main()
