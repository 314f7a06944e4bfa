"""Training jobs: fine-tuning on labelled data or text, and distillation into a smaller network.

    open -> data -> (student) -> tune -> folder, adapter, receipt -> final name

What comes out is an ordinary folder of transformers, merged in float32, so that ``rarefy compress`` goes on
from there; an adapter lies beside it in PEFT's format. Staged and resumed like every other job.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

import rarefy
from rarefy.calibration.samples import materialize
from rarefy.core.edit import edit
from rarefy.core.errors import RecipeError, did_you_mean
from rarefy.core.nodes import Dense, Node, Sum
from rarefy.core.tune import Trainer
from rarefy.export.networks import opened, stored_trees
from rarefy.export.peft import adapter_of, export_adapter
from rarefy.models.map import Site
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.run.adapting import adapt
from rarefy.run.journal import Journal, written
from rarefy.run.lessons import Lesson, Material, Term, check_labels, explained, losses, material, score
from rarefy.run.progress import Progress, Silent
from rarefy.run.students import is_measured, measured
from rarefy.techniques.adapt.loftq import LoftQ
from rarefy.techniques.adapt.lora import LoRA
from rarefy.techniques.distill.hard_labels import HardLabels
from rarefy.training.adapters import KINDS
from rarefy.training.architectures import bottleneck
from rarefy.training.heads import with_head
from rarefy.training.loop import Settings
from rarefy.training.students import every_second, shallower
from rarefy.training.tune import Tuned, Tuning, tune

ADAPTERS = ("none", "lora", "loftq", *KINDS)
OUTSIDE = frozenset({"embed", "positions", "token_types", "head", "pooler"})  # roles that get no adapter


@dataclass(frozen=True)
class Training:
    """What to train on what, and where to put it.

    model: the network that is trained, or the teacher. data: a table with labels, or texts; ``self``: what
    the teacher writes. eval_data: what judges (empty: a tenth of the data). student: half, numbers of blocks
    (0,2,4), how much is to stay of the teacher (blocks=3,units=50%), bottleneck (or bottleneck:64, how wide
    it is inside), or a model of the user's own; empty: fine-tuning. objectives: losses with their weights.
    adapter: none trains everything. rank, alpha: of adapters (of bottlenecks the width, of prefixes the
    length). scales: those of rounded weights learn beside ``lora`` and ``loftq``.
    """

    model: str
    out: Path
    data: tuple[str, ...] = ()
    eval_data: tuple[str, ...] = ()
    student: str = ""
    objectives: tuple[Term, ...] = ()
    adapter: str = "none"
    rank: int = 8
    alpha: float = 16.0
    scales: bool = False
    settings: Settings = field(default_factory=Settings)
    overwrite: bool = False


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished job: the folder and its receipt."""

    out: Path
    receipt: dict[str, Any]


def train(job: Training, progress: Progress | None = None) -> Trained:
    """Do the job. Raises a RarefyError; then nothing stands under the final name."""
    progress = progress or Silent()
    if job.adapter not in ADAPTERS:
        raise RecipeError(f"adapter {job.adapter!r}: choose one of {', '.join(ADAPTERS)}"
                          f"{did_you_mean(job.adapter, list(ADAPTERS))}")
    if job.scales and job.adapter not in ("lora", "loftq"):
        raise RecipeError(f"scales learn beside the adapters lora and loftq, not {job.adapter}; leave it out")
    journal = Journal(job.out, overwrite=job.overwrite)
    with written(job.out):
        with progress.stage("open"):
            network = opened(job.model)
        with journal.opened({"training": {**asdict(job), "out": ""}, "rarefy": rarefy.__version__}):
            receipt = _work(job, network, journal, progress)
            (journal.partial / "receipt.json").write_text(json.dumps(_finite(receipt), indent=1))
            return Trained(journal.publish(accepted=True), receipt)


def _work(job: Training, network: Model | Network, journal: Journal, progress: Progress) -> dict[str, Any]:
    """Data, student, training, output; the receipt."""
    fresh: tuple[str, ...] = ()
    lesson, distils = Lesson(job.data, job.eval_data, job.objectives, job.settings), bool(job.student)
    with progress.stage("data"):
        data = material(lesson, network, distils=distils)
        if data.labels and isinstance(network, Network) and network.form.gives == "embedding":
            network, fresh = with_head(network, data.labels, job.settings.seed)
        check_labels(network, data)
    if job.adapter in KINDS:
        return adapt(job, network, data, fresh, journal, progress)
    student = _student(job, network, data) if distils else network
    terms = losses(lesson, student, data) if distils else ((1.0, HardLabels()),)
    tuning, trees = _tuning(job, student, fresh)
    examples, held, objective = explained(student, network if distils else None, terms, data, journal.work,
                                          progress)
    before = score(student, data.held, trees, {})
    with progress.stage("train") as stage:
        tuned = tune(student, trees, tuning, objective, examples, job.settings, held=held,
                     folder=journal.work / "training", advance=stage.advance)
    with progress.stage("write"):
        _write(job, student, tuned, trees, fresh, journal.partial)
    return {"rarefy": rarefy.__version__, "model": job.model, "student": student.name,
            "parameters": student.parameters, "settings": asdict(job.settings), "adapter": job.adapter,
            "objectives": [[weight, repr(term)] for weight, term in terms],
            "examples": len(data.train), "held": len(data.held), "curve": tuned.curve.as_dict(),
            "before": before, "after": score(student, data.held, tuned.trees, tuned.params)}


def with_recipe(job: Training, path: Path) -> Training:
    """``job`` with what a YAML file says: student, objectives, training."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    try:
        found = _RecipeFile.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{path}: {where or 'recipe'}: {first['msg'].lower()}") from None
    terms = tuple(Term(each.technique, each.weight, each.settings) for each in found.objectives)
    known = list(Settings.__dataclass_fields__)
    wrong = [name for name in found.training if name not in known]
    if wrong:
        raise RecipeError(f"{path}: training has no setting {wrong[0]!r}{did_you_mean(wrong[0], known)}")
    return replace(job, student=found.student or job.student, objectives=terms or job.objectives,
                   settings=replace(job.settings, **found.training))


class _TermFile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    technique: str
    weight: float = 1.0
    settings: dict[str, Any] = Field(default_factory=dict)


class _RecipeFile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    student: str = ""
    objectives: tuple[_TermFile, ...] = ()
    training: dict[str, Any] = Field(default_factory=dict)


# ---- what is trained -----------------------------------------------------------------------------------


def _student(job: Training, teacher: Model | Network, data: Material) -> Model | Network:
    """The smaller network that ``job.student`` names."""
    if is_measured(job.student):
        return measured(teacher, job.student, data.train, job.settings.seed)
    if job.student == "half":
        return shallower(teacher, every_second(teacher.map.blocks))
    if all(part.strip().isdigit() for part in job.student.split(",")):
        return shallower(teacher, tuple(int(part) for part in job.student.split(",")))
    kind, _, inner = job.student.partition(":")
    if kind == "bottleneck" and (not inner or inner.isdigit()):
        if isinstance(teacher, Model):
            raise RecipeError(f"{teacher.name}: bottleneck students are encoders; use half, or a smaller "
                              "model")
        return bottleneck(teacher, inner=int(inner or 128), seed=job.settings.seed)
    student = opened(job.student)
    if isinstance(student, Model) != isinstance(teacher, Model):
        raise RecipeError(f"{student.name} and {teacher.name} are of different kinds; one must be able to do "
                          "what the other does")
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise RecipeError(f"{student.name} and {teacher.name} have different vocabularies; choose a student "
                          "with the teacher's tokenizer")
    return student


def _tuning(job: Training, student: Model | Network, fresh: tuple[str, ...]
            ) -> tuple[Tuning, dict[str, Node]]:
    """What moves, and the trees that it starts from."""
    kept = stored_trees(student) if job.adapter != "none" else {}
    trees = {path: tree for path, tree in kept.items() if not isinstance(tree, Dense)}
    dropout = not job.student
    if job.adapter == "none":
        return Tuning(dropout=dropout), trees
    sites = [site for site in student.map.sites if site.role not in OUTSIDE and site.block is not None]
    if not sites:
        raise RecipeError(f"{student.name}: has no blocks to put adapters into; use --adapter none")
    if job.adapter == "loftq":
        trees |= {site.path: _loftq(student, site, job) for site in sites}
    heads = tuple(site.path.rpartition(".")[0] + ".*" for site in student.map.sites
                  if site.role == "head" and isinstance(student, Network))
    technique: Trainer = LoRA(job.rank, job.alpha, scales=job.scales)
    return Tuning(frozenset(), technique, tuple(site.path for site in sites), (*fresh, *heads),
                  dropout=dropout), trees


def _loftq(student: Model | Network, site: Site, job: Training) -> Node:
    weight = student.weight(site.path)
    tree, _ = edit(site.path, Dense(weight), weight, LoftQ(job.rank), "loftq", None,
                   torch.Generator().manual_seed(job.settings.seed), site.kernel)
    return tree


# ---- what comes out ------------------------------------------------------------------------------------


def _write(job: Training, student: Model | Network, tuned: Tuned, start: Mapping[str, Node],
           fresh: tuple[str, ...], folder: Path) -> None:
    """The merged network, and the adapter for itself."""
    module: Any = materialize(student, torch.float32) if isinstance(student, Model) else student.module
    state = {name: value.clone() for name, value in module.state_dict().items()}
    for path, tree in tuned.trees.items():
        state[path] = student.map.by_path[path].stored(tree.dense()).contiguous()
    state |= {path: value.contiguous() for path, value in tuned.params.items()}
    if not hasattr(module, "save_pretrained"):
        raise RecipeError(f"{student.name}: only transformers' networks are written as a folder; use "
                          "rarefy.training.tune in Python")
    module.save_pretrained(folder, state_dict=_once(module, state))
    if isinstance(student, Model) or student.form.takes == "text":
        student.tokenizer.save_pretrained(folder)
    if job.adapter != "none":
        whole = {path: state[path] for path in state if _new(path, fresh, student)}
        task = "CAUSAL_LM" if isinstance(student, Model) else "SEQ_CLS"
        adapters = {path: tree for path, tree in tuned.trees.items() if adapter_of(tree) is not None}
        export_adapter(adapters, student.map, folder / "adapter", base=job.model, task=task, saved=whole)
    if start:  # what the adapter belongs to is not the original
        for path, tree in tuned.trees.items():
            if isinstance(tree, Sum) and adapter_of(tree) is not None:
                base = Sum(tree.terms[:-1]).dense()
                state[path] = student.map.by_path[path].stored(base).contiguous()
        module.save_pretrained(folder / "base", state_dict=_once(module, state))
        student.tokenizer.save_pretrained(folder / "base")


def _new(path: str, fresh: tuple[str, ...], student: Model | Network) -> bool:
    heads = {site.path.rpartition(".")[0] for site in student.map.sites if site.role == "head"}
    return isinstance(student, Network) and (path in fresh or path.rpartition(".")[0] in heads)


def _once(module: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with shared weights as their first name has them; a copy, which transformers empties."""
    state, first = dict(state), dict[int, str]()
    for name, values in module.state_dict(keep_vars=True).items():
        owner = first.setdefault(id(values), name)
        if owner != name:
            state[name] = state[owner]
    return state


def _finite(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {key: _finite(each) for key, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
        case _:
            return value
