"""Which text a job calibrates on, and which other text it is judged on.

Without data the model writes its own calibration text, and is judged on ``python-docs``. With data,
windows of it that share no passage with the rest are set aside for the judgement, unless the user names
evaluation text; ``python-docs`` is then the second, unseen domain. Text that stands on both sides is
refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rarefy.calibration.samples import SELF, sample_windows
from rarefy.calibration.text import PYTHON_DOCS, refuse_overlap, split_windows, windows
from rarefy.models.model import Model
from rarefy.run.effort import Effort
from rarefy.run.progress import Progress


@dataclass(frozen=True, eq=False)
class Data:
    """Windows of tokens, [windows, length] each, and where they are from."""

    calibration: Tensor
    evaluation: Tensor
    second: Tensor | None
    sources: dict[str, str]


def window_length(model: Model, effort: Effort) -> int:
    """Tokens of a window: as many as the model has positions for, and no more than is useful."""
    return min(effort.length, getattr(model.config, "max_position_embeddings", effort.length))


def evaluation_windows(model: Model, eval_data: tuple[str, ...], effort: Effort, seed: int) -> Tensor:
    """Windows to judge on when nothing is calibrated."""
    return windows(eval_data or PYTHON_DOCS, model.tokenizer, length=window_length(model, effort),
                   count=effort.evaluation, seed=seed + 1, minimum=2)


def gather(model: Model, data: tuple[str, ...], eval_data: tuple[str, ...], effort: Effort, seed: int,
           progress: Progress, kept: Path | None = None) -> Data:
    """Choose, cut and check the text. DataError when it is unusable or overlaps.

    kept: where an interrupted run of the same job left its windows, and where these are left.
    """
    if kept is not None and kept.is_file():
        with safe_open(kept, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return Data(found["calibration"], found["evaluation"], found.get("second"), file.metadata())
    chosen = _choose(model, data, eval_data, effort, seed, progress)
    if kept is not None:
        tensors = {"calibration": chosen.calibration, "evaluation": chosen.evaluation}
        if chosen.second is not None:
            tensors["second"] = chosen.second
        part = kept.with_name(kept.name + ".part")
        save_file({name: value.contiguous() for name, value in tensors.items()}, part, chosen.sources)
        part.rename(kept)
    return chosen


def _choose(model: Model, data: tuple[str, ...], eval_data: tuple[str, ...], effort: Effort, seed: int,
            progress: Progress) -> Data:
    length = window_length(model, effort)
    own = not data or data == (SELF,)
    aside = 0 if own or eval_data else effort.evaluation
    with progress.stage("own samples" if own else "calibration text") as stage:
        if own:
            calibration = sample_windows(model, count=effort.calibration, length=length, seed=seed,
                                         progress=stage.advance)
        else:
            calibration = windows(data, model.tokenizer, length=length, count=effort.calibration + aside,
                                  seed=seed, minimum=aside + 2)
    if aside:
        calibration, evaluation = split_windows(calibration, aside, seed=seed)
    else:
        evaluation = windows(eval_data or PYTHON_DOCS, model.tokenizer, length=length,
                             count=effort.evaluation, seed=seed + 1, minimum=2,
                             avoid=None if eval_data else calibration)
    refuse_overlap(evaluation, calibration, model.tokenizer)
    second = None
    if PYTHON_DOCS not in (*data, *eval_data) and not own:
        second = windows(PYTHON_DOCS, model.tokenizer, length=length, count=effort.second, seed=seed + 2,
                         minimum=1, avoid=calibration)
    names = {"calibration": "the model's own samples" if own else ", ".join(data),
             "evaluation": ", ".join(eval_data or ((PYTHON_DOCS,) if own else data)),
             "second": "" if second is None else PYTHON_DOCS}
    if aside:
        names["evaluation"] += f" ({aside} windows held out)"
    return Data(calibration, evaluation, second, names)
