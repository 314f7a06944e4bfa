"""Fine-tuning with adapters that are no sum of matrices: DoRA, IA3, prefixes, bottlenecks.

    OUT/adapter    the adapters alone, as PEFT writes and reads them (bottlenecks: as we do)
    OUT            the network with adapters merged in, where they can be
    OUT/base       else the network that they belong to
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rarefy
from rarefy.core.errors import RecipeError
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.run.journal import Journal
from rarefy.run.lessons import Material, score
from rarefy.run.progress import Progress
from rarefy.techniques.distill.hard_labels import HardLabels
from rarefy.training.adapters import MERGED, Adapted, adapted
from rarefy.training.signals import Distillation
from rarefy.training.student import module_of

if TYPE_CHECKING:
    from rarefy.run.training import Training


def adapt(job: Training, network: Model | Network, data: Material, fresh: tuple[str, ...], journal: Journal,
          progress: Progress) -> dict[str, Any]:
    """Train the adapters that ``job`` names, write them, and give the receipt. fresh: tensors of a new
    head."""
    if job.student:
        raise RecipeError(f"adapter {job.adapter}: a student is trained whole; leave the adapter out")
    made = adapted(network, job.adapter, rank=job.rank, alpha=job.alpha, whole=_whole(network, fresh),
                   seed=job.settings.seed)
    before = _scored(network, made, data)
    with progress.stage("train") as stage:
        curve = made.train(Distillation(network, None, ((1.0, HardLabels()),)), data.train, job.settings,
                           held=data.held, folder=journal.work / "training", advance=stage.advance)
    after = _scored(network, made, data)
    with progress.stage("write"):
        _write(job, network, made, journal.partial)
    return {"rarefy": rarefy.__version__, "model": job.model, "student": network.name,
            "parameters": network.parameters, "settings": asdict(job.settings), "adapter": job.adapter,
            "objectives": [[1.0, repr(HardLabels())]], "examples": len(data.train), "held": len(data.held),
            "curve": curve.as_dict(), "before": before, "after": after}


def _whole(network: Model | Network, fresh: tuple[str, ...]) -> tuple[str, ...]:
    """Modules of a classifier that train as they are: its head, and what is new in it."""
    if isinstance(network, Model):
        return ()
    heads = [site.path for site in network.map.sites if site.role == "head"]
    return tuple(sorted({path.rpartition(".")[0] for path in (*fresh, *heads)}))


def _scored(network: Model | Network, made: Adapted, data: Material) -> dict[str, float]:
    return {} if isinstance(network, Model) else score(network.running(made.module), data.held, {}, {})


def _write(job: Training, network: Model | Network, made: Adapted, folder: Path) -> None:
    base = folder if job.adapter in MERGED else folder / "base"
    module: Any = made.merged() if job.adapter in MERGED else module_of(network)
    save: Callable[..., Any] | None = getattr(module, "save_pretrained", None)
    if save is None:
        raise RecipeError(f"{network.name}: only transformers' networks are written as a folder; use "
                          "rarefy.training.adapters in Python")
    save(base)
    if isinstance(network, Model) or network.form.takes == "text":
        network.tokenizer.save_pretrained(base)
    made.save(folder / "adapter", job.model if job.adapter in MERGED else "../base")
