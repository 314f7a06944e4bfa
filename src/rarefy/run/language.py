"""Causal language models as a job sees them: windows of text, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.calibration.evidence import Advance, Seen, survey
from rarefy.core.errors import DataError
from rarefy.core.nodes import Node
from rarefy.core.nouns import Evidence, Receipt, Recipe
from rarefy.export.networks import live, stored_trees
from rarefy.measure.divergence import Reference, compare_tables, log_probs
from rarefy.models.map import Site
from rarefy.models.model import Model
from rarefy.models.runner import Override, Runner
from rarefy.run.attention import attended
from rarefy.run.data import Data, evaluation_windows, gather
from rarefy.run.effort import Effort
from rarefy.run.progress import Progress, Stage
from rarefy.run.proof import PROMPTS, WORDS
from rarefy.run.recipe import split
from rarefy.run.rescale import rescaled
from rarefy.run.reshape import reshaped
from rarefy.run.subject import Pace, Subject
from rarefy.run.sweep import Store, Work, sweep

PREFILL, DECODE = 256, 32  # tokens read at once, and written one by one, when speed is measured


class Language:
    """A causal language model."""

    usual = "llama.cpp"

    def __init__(self, model: Model) -> None:
        self.opened: Model = model

    def about(self) -> dict[str, Any]:
        found = self.opened.map
        return {"name": self.opened.name, "family": found.family.name, "parameters": found.parameters,
                "weights": sum(site.shape[0] * site.shape[1] for site in found.sites),
                "blocks": found.blocks, "tied": found.tied, "answers": "tokens"}

    # ---- examples

    def gather(self, data: tuple[Any, ...], eval_data: tuple[Any, ...], effort: Effort, seed: int,
               progress: Progress, kept: Path | None = None) -> Data:
        if not all(isinstance(ref, str) for ref in (*data, *eval_data)):
            raise DataError(f"{self.opened.name}: a language model takes text: pass files, folders, "
                            "python-docs or self")
        return gather(self.opened, data, eval_data, effort, seed, progress, kept)

    def judged(self, eval_data: tuple[Any, ...], effort: Effort, seed: int) -> Data:
        windows = evaluation_windows(self.opened, eval_data, effort, seed)
        return Data(windows[:0], windows, None, {"evaluation": ", ".join(eval_data) or "python-docs"})

    # ---- compression

    def reshaped(self, recipe: Recipe, effort: Effort, data: Data, advance: Advance
                 ) -> tuple[Subject, tuple[Receipt, ...]]:
        whole = split(recipe.steps)[0]
        if not whole:
            return self, ()
        model, changed = attended(self.opened, whole)
        assert isinstance(model, Model)
        smaller = reshaped(model, recipe, data.calibration, advance)
        done = rescaled(smaller.model, recipe, effort, data.calibration, advance)
        return Language(done.model), changed + smaller.receipts + done.receipts

    def survey(self, data: Data, effort: Effort, generator: torch.Generator, advance: Advance
               ) -> Iterator[Seen]:
        return survey(Runner(self.opened), data.calibration[:effort.survey], generator, advance)

    def outside(self, site: Site) -> bool:
        return site.block is None

    def distance(self, data: Data, effort: Effort) -> Callable[[Override], float]:
        reference = Reference(self.opened, data.calibration[:effort.swaps])
        return lambda override: reference.compare(Runner(self.opened, override)).kl_mean

    def sweep(self, work: Mapping[str, Work], data: Data, seen: Mapping[str, Evidence],
              fishers: Mapping[str, Tensor], store: Store, seed: int, effort: Effort, advance: Advance
              ) -> None:
        sweep(self.opened, work, data.calibration, seen, store, seed, sequential=effort.sequential,
              fishers=fishers, advance=advance)

    # ---- proof

    def measure(self, candidate: Subject, data: Data, stage: Stage) -> dict[str, Any]:
        assert isinstance(candidate, Language)
        runner, found = Runner(candidate.opened), dict[str, Any]()
        for key, tokens in (("float", data.evaluation), ("second_domain", data.second)):
            found[key] = None
            if tokens is not None:
                stage.line(f"{key.replace('_', ' ')}: {tokens.shape[0]} windows of {tokens.shape[1]} tokens")
                found[key] = asdict(Reference(self.opened, tokens).compare(runner))
        return found

    def live(self) -> nn.Module:
        network: nn.Module = live(self.opened)
        return network.eval().requires_grad_(False)

    def trees(self) -> dict[str, Node]:
        return stored_trees(self.opened)

    def glimpse(self, data: Data) -> Data:
        return replace(data, evaluation=data.evaluation[:2], second=None)

    @torch.no_grad()
    def measure_live(self, candidate: nn.Module, data: Data, effort: Effort) -> dict[str, Any]:
        """At some positions spread evenly over the windows: the whole distributions are compared."""
        windows, positions = effort.positions
        tokens = data.evaluation[:windows]
        places = torch.linspace(0, tokens.shape[1] - 1, min(positions, tokens.shape[1])).long()
        runner, answers, originals = Runner(self.opened), [], []
        for window in tokens.split(1):
            out: Any = candidate(input_ids=window, logits_to_keep=places, use_cache=False)
            answers.append(out.logits[0].float().log_softmax(-1))
            originals.append(log_probs(runner, window, places)[0])
        at = torch.arange(len(tokens)).repeat_interleave(len(places))
        found = compare_tables(torch.cat(originals), torch.cat(answers), window=at)
        return {"kl_mean": found.kl_mean, "kl_stderr": found.kl_stderr, "top1": found.top1,
                "positions": found.positions}

    def paces(self, data: Data) -> dict[str, Pace]:
        tokens = data.evaluation[:1, :PREFILL]

        @torch.no_grad()
        def prefill(network: Any) -> int:
            network(input_ids=tokens, use_cache=False)
            return tokens.numel()

        @torch.no_grad()
        def decode(network: Any) -> int:
            cache, last = None, tokens[:, :1]
            for _ in range(DECODE):
                out = network(input_ids=last, past_key_values=cache, use_cache=True)
                cache, last = out.past_key_values, out.logits[:, -1:].argmax(-1)
            return DECODE

        return {"prefill": prefill, "decode": decode}

    def completions(self, original: nn.Module, compressed: nn.Module) -> list[dict[str, str]]:
        return [{"prompt": prompt, "original": self._completed(original, prompt),
                 "compressed": self._completed(compressed, prompt)} for prompt in PROMPTS]

    @torch.no_grad()
    def _completed(self, network: Any, prompt: str) -> str:
        """Greedy, token by token."""
        tokenizer = self.opened.tokenizer
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        cache, last, written = None, ids, []
        for _ in range(WORDS):
            out = network(input_ids=last, past_key_values=cache, use_cache=True)
            cache, last = out.past_key_values, out.logits[:, -1:].argmax(-1)
            if int(last) == tokenizer.eos_token_id:
                break
            written.append(int(last))
        text: str = tokenizer.decode(written)
        return text
