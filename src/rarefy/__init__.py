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
             data: Any = (), eval_data: Any = (), tokenizer: Any = None, gives: str = "",
             **settings: Any) -> Result:
    """Compress ``model`` under a budget into the folder ``out``, and measure what came out.

    model: a Hugging Face id, a folder, a ``.gguf`` file, a built-in name, or a torch module in memory: a
    transformers causal language model or encoder (then with its ``tokenizer``), or any network of your own.
    to: bytes (``160MB``), a share (``60%``) or bits per weight (``4.5bpw``) of the whole export. max_kl: nats
    per token, or per sample; alone, the file is as small as it allows. data, eval_data: names of files, or
    for networks that take tensors: inputs, (inputs, labels), or batches of these. gives: "classes" or
    "embedding", where a network of your own leaves it open what its outputs are. settings: other fields of
    ``rarefy.run.job.Job``, like ``effort``, ``target``, ``overwrite``. Raises a
    ``rarefy.core.errors.RarefyError`` and leaves nothing under ``out`` when it cannot.
    """
    import os
    from pathlib import Path

    from rarefy.run.job import Job
    from rarefy.run.job import compress as work
    from rarefy.run.resolve import in_memory

    ref = str(model) if isinstance(model, str | os.PathLike) else in_memory(model, tokenizer, gives)
    return work(Job(ref, Path(out), to=to, max_kl=max_kl, data=_sources(data), eval_data=_sources(eval_data),
                    **settings))


def _sources(data: Any) -> tuple[Any, ...]:
    """Several names are several sources; anything else in memory is one."""
    import os

    if isinstance(data, str | os.PathLike):
        return (str(data),)
    if isinstance(data, tuple | list) and all(isinstance(each, str | os.PathLike) for each in data):
        return tuple(str(each) for each in data)
    return (data,)


def load(ref: Path | str, *, fast: bool = False, exits: bool = True, **settings: Any) -> Any:
    """A network, ready to run, from a native folder, a job's folder, a ``.gguf`` file or any other model.

    A network with exits comes as a module that leaves early and says through how many blocks each sample went
    (``.logits``, ``.blocks``); ``exits=False`` gives the network alone. fast: compressed weights run by the
    fastest kernels that there are for them, and ``network.lowered`` says how each one does; such a network
    does not train. Otherwise all are decoded. ``dtype``: torch's type of the weights, float32 if not given.
    ``into``: a module of the same class, when the network is not one of transformers but your own.
    """
    from rarefy.export.networks import has_exits  # importing rarefy must not import torch

    if exits and has_exits(ref):
        from rarefy.runtimes.exits import load as load_exits

        return load_exits(ref, fast=fast, **settings)
    if fast:
        from rarefy.runtimes.torch import load as load_fast

        return load_fast(ref, **settings)
    from rarefy.export.networks import load as load_network

    return load_network(ref, **settings)
