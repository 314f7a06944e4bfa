"""Proof: what the exported file is worth, measured on the file itself.

The file is opened again as a model, through our own reader, and compared with the original in float32
PyTorch on text that calibration did not see. Then llama.cpp loads it in a fresh process: its
distributions are compared with the original's (that is the KL a user gets) and with ours of the same
file (that is the check of the export: they may differ by llama.cpp's rounding of activations only).
"""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.calibration.evidence import SLAB
from rarefy.core.errors import TargetError
from rarefy.measure.divergence import Reference, final_states
from rarefy.models.model import Model, open_model
from rarefy.models.runner import Runner
from rarefy.run.progress import Stage
from rarefy.runtimes.llamacpp import Session, compare_speed, runtime

AGREEMENT = 0.05  # mean KL: far above llama.cpp's rounding of activations, far below a wrong permutation
PROMPTS = ("The history of the steam engine begins in", "A good way to learn a new language is to",
           "def fibonacci(n):\n", "The capital of France is")
WORDS = 40


def in_float(model: Model, exported: Path, evaluation: Tensor, second: Tensor | None,
             stage: Stage) -> dict[str, Any]:
    """KL, agreement and perplexity of the file, read back, against the original."""
    candidate = Runner(reopened(exported))
    found: dict[str, Any] = {"float": None, "second_domain": None}
    for key, tokens in (("float", evaluation), ("second_domain", second)):
        if tokens is not None:
            stage.line(f"{key.replace('_', ' ')}: {tokens.shape[0]} windows of {tokens.shape[1]} tokens")
            found[key] = asdict(Reference(model, tokens).compare(candidate))
    return found


def reopened(exported: Path) -> Model:
    """The exported file as a model; that its weights are quantized is no news here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*already quantized.*")
        return open_model(exported, dequantize=True)


@torch.no_grad()
def in_runtime(model: Model, exported: Path, evaluation: Tensor, windows: int, positions: int,
               stage: Stage) -> dict[str, Any]:
    """The same in llama.cpp, at ``positions`` spread evenly over each window.

    TargetError when llama.cpp computes something else from the file than we do.
    """
    tokens = evaluation[:windows]
    places = torch.linspace(0, tokens.shape[1] - 1, min(positions, tokens.shape[1])).long().tolist()
    ours, before = Runner(reopened(exported)), Runner(model)
    original, exported_final = (final_states(runner, tokens)[:, places] for runner in (before, ours))
    kl_original, kl_ours, kl_float, top, largest = [], [], [], [], 0.0
    with Session(exported) as session:
        theirs = session.distributions(tokens.numpy(), places)
        for k, window in enumerate(theirs):
            stage.advance(k + 1, len(tokens))
            for part in torch.arange(len(places)).split(SLAB):
                q = torch.from_numpy(np.array(window[part.numpy()]))
                p = before.logits(original[k, part]).log_softmax(-1)
                mine = ours.logits(exported_final[k, part]).log_softmax(-1)
                kl_original.append(_kl(p, q))
                kl_ours.append(_kl(mine, q))
                kl_float.append(_kl(p, mine))
                top.append((p.argmax(-1) == q.argmax(-1)).float())
                likely = mine > np.log(1e-4)
                largest = max(largest, float((mine - q)[likely].abs().max()))
        memory = asdict(session.memory())
    kl, agreement = torch.cat(kl_original), torch.cat(kl_ours)
    # a network that rounding broke amplifies llama.cpp's own rounding too: that is no fault of the export
    if float(agreement.mean()) > max(AGREEMENT, 0.5 * float(torch.cat(kl_float).mean())):
        raise TargetError(f"{exported.name}: llama.cpp computes something else than we do from the same file "
                          f"(KL {float(agreement.mean()):.3g}); this is a bug of the export: report it")
    return {"name": runtime().name, "version": runtime().version, "positions": kl.numel(),
            "kl_mean": float(kl.mean()), "kl_stderr": float(kl.std() / kl.numel() ** 0.5),
            "top1": float(torch.cat(top).mean()), "memory": memory,
            "logit_error_vs_float": {"kl_mean": float(agreement.mean()), "kl_max": float(agreement.max()),
                                     "log_prob_max": largest}}


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) per position from log-probabilities; q's are floored where the runtime underflows."""
    return (p.exp() * (p - q.clamp_min(-100))).sum(-1)


def speeds(original: Path, exported: Path, repeats: int) -> dict[str, Any]:
    """Tokens per second of both files in llama.cpp, interleaved, and the ratio; resident memory."""
    found = compare_speed(original, exported, repeats=repeats)
    return {"original": asdict(found.a), "compressed": asdict(found.b), "drift": found.drift,
            "ratio_decode": found.ratio_decode, "ratio_prefill": found.ratio_prefill,
            "memory_original": asdict(found.memory_a), "memory_compressed": asdict(found.memory_b)}


def completions(original: Path, exported: Path) -> list[dict[str, str]]:
    """Greedy continuations by both files, side by side."""
    with Session(original) as a, Session(exported) as b:
        return [{"prompt": prompt, "original": a.complete(prompt, WORDS),
                 "compressed": b.complete(prompt, WORDS)} for prompt in PROMPTS]


def tokens_agree(model: Model, exported: Path) -> None:
    """llama.cpp must cut text into the same tokens as the model's own tokenizer."""
    texts = [*PROMPTS, "Zwölf Boxkämpfer jagen Viktor über den Deich. 12345,678  \n\n\tπ≈3.14159 🙂"]
    with Session(exported) as session:
        session.check_tokens(texts, [model.tokenizer(text)["input_ids"] for text in texts])


