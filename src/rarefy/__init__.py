"""Compress a trained network under a budget, with proof.

    result = rarefy.compress("gemma-3-270m", to="160MB", out="OUT")
    result.exported, result.receipt          the file, and what was measured on it
    network = rarefy.load("OUT/model.gguf")  a transformers network with the weights that OUT stands for
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from rarefy.run.job import Result

__version__ = "0.1.0"


def compress(model: Any, to: str | None = None, *, max_kl: float | None = None, out: Path | str = "out",
             tokenizer: Any = None, **settings: Any) -> Result:
    """Compress ``model`` under a budget into the folder ``out``, and measure what came out.

    model: a Hugging Face id, a folder, a ``.gguf`` file, a built-in name, or a transformers causal language
    model in memory (then with its ``tokenizer``). to: bytes (``160MB``), a share (``60%``) or bits per
    weight (``4.5bpw``) of the whole file. max_kl: nats per token; alone, the file is as small as it allows.
    settings: other fields of ``rarefy.run.job.Job``, like ``effort``, ``data``, ``overwrite``. Raises a
    ``rarefy.core.errors.RarefyError`` and leaves nothing under ``out`` when it cannot.
    """
    import os
    from pathlib import Path

    from rarefy.models.model import Model
    from rarefy.run.job import Job
    from rarefy.run.job import compress as work

    if not isinstance(model, str | os.PathLike | Model):
        model = Model.from_module(model, tokenizer)
    ref = model if isinstance(model, Model) else str(model)
    return work(Job(ref, Path(out), to=to, max_kl=max_kl, **settings))


def load(ref: Path | str, *, fast: bool = False, **settings: Any) -> Any:
    """A network, ready to run, from a native folder, a job's folder, a ``.gguf`` file or any other model.

    fast: compressed weights run by the fastest kernels that there are for them, and ``network.lowered`` says
    how each one does; such a network does not train. Otherwise all are decoded. ``dtype``: torch's type of
    the weights, float32 if not given. ``into``: a module of the same class, when the network is not one of
    transformers but your own.
    """
    if fast:
        from rarefy.runtimes.torch import load as load_fast

        return load_fast(ref, **settings)
    from rarefy.export.networks import load as load_network  # importing rarefy must not import torch

    return load_network(ref, **settings)
