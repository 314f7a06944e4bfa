"""``rarefy finetune`` and ``rarefy distill``: training, for people without a training script."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rarefy.cli.compress import resumable
from rarefy.cli.options import WORK, Json, Model, Out, Overwrite, Seed
from rarefy.cli.progress import progress
from rarefy.cli.terminal import dump, finite, guarded, show

if TYPE_CHECKING:
    from rarefy.run.lessons import Term

Table = Annotated[list[str] | None, typer.Option(
    "--data", metavar="DATA", rich_help_panel=WORK, show_default=False,
    help="A table (.tsv, .csv) with the columns sentence and label; for language models text.")]
Judge = Annotated[list[str] | None, typer.Option(
    "--eval-data", metavar="DATA", rich_help_panel=WORK, show_default=False,
    help="What judges when to stop; a tenth of the data if not given.")]
Epochs = Annotated[float, typer.Option("--epochs", rich_help_panel=WORK, help="Times that the data is seen.")]
Steps = Annotated[int, typer.Option("--steps", rich_help_panel=WORK, help="Steps; 0: as --epochs says.")]
Batch = Annotated[int, typer.Option("--batch", rich_help_panel=WORK, help="Examples of a step.")]
Micro = Annotated[int, typer.Option("--micro", rich_help_panel=WORK,
                                    help="Examples that are in memory at once; 0: the batch.")]
Rate = Annotated[float | None, typer.Option("--rate", rich_help_panel=WORK, show_default=False,
                                            help="Learning rate; 3e-4 for adapters, 5e-5 otherwise.")]
Patience = Annotated[int, typer.Option(
    "--patience", rich_help_panel=WORK, help="Judgements without a gain after which to stop; 0: never.")]
Adapter = Annotated[str, typer.Option(
    "--adapter", metavar="KIND", rich_help_panel=WORK,
    help="none trains everything; lora a correction beside the weights; loftq the same on a 4-bit base; "
         "dora, ia3, prefix, bottleneck and pfeiffer other things beside them.")]
Rank = Annotated[int, typer.Option(
    "--rank", rich_help_panel=WORK, help="Rank of the adapters; width of bottlenecks, length of prefixes.")]
Scales = Annotated[bool, typer.Option(
    "--scales", rich_help_panel=WORK,
    help="With lora or loftq: the scales of rounded weights learn too; the adapter belongs to OUT/base.")]
Student = Annotated[str, typer.Option(
    "--student", metavar="STUDENT", rich_help_panel=WORK,
    help="half (every second block), numbers of blocks (0,2,4), blocks=3,units=50% (what the teacher can "
         "least do without), bottleneck or bottleneck:64 (an encoder that "
         "is narrow inside), or a smaller model with the same tokenizer.")]
Recipe = Annotated[Path | None, typer.Option(
    "--recipe", metavar="FILE", rich_help_panel=WORK, show_default=False,
    help="YAML with student, objectives and training, before the flags (recipes/distilbert.yaml).")]
Objectives = Annotated[list[str] | None, typer.Option(
    "--objective", metavar="NAME[=WEIGHT]", rich_help_panel=WORK, show_default=False,
    help="A loss (rarefy techniques lists them). Repeat to add several.")]


@guarded
def finetune(
    model: Model, *, data: Table = None, eval_data: Judge = None, adapter: Adapter = "none", rank: Rank = 8,
    scales: Scales = False, epochs: Epochs = 3.0, steps: Steps = 0, batch: Batch = 32, micro: Micro = 0,
    rate: Rate = None, patience: Patience = 3, seed: Seed = 0, out: Out, overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model on labelled sentences or on text, and write it to DIR as an ordinary folder."""
    from rarefy.run.training import Training, train
    from rarefy.training.loop import Settings

    speed = rate if rate is not None else 5e-5 if adapter == "none" else 3e-4
    settings = Settings(steps=steps, epochs=epochs, batch=batch, micro=micro, rate=speed, patience=patience,
                        seed=seed)
    job = Training(model, out, tuple(data or ()), tuple(eval_data or ()), adapter=adapter, rank=rank,
                   scales=scales, settings=settings, overwrite=overwrite)
    done = resumable(lambda: train(job, progress()), out)
    _finished(done.receipt, str(done.out), as_json=as_json)


@guarded
def distill(
    teacher: Model, *, student: Student = "half", data: Table = None, eval_data: Judge = None,
    objective: Objectives = None, recipe: Recipe = None, epochs: Epochs = 3.0, steps: Steps = 0,
    batch: Batch = 32, micro: Micro = 0, rate: Rate = None, patience: Patience = 3, seed: Seed = 0, out: Out,
    overwrite: Overwrite = False, as_json: Json = False,
) -> None:
    """Teach a smaller model what a larger one knows, and write it to DIR as an ordinary folder.

    Without --data a language model writes the text that its student learns from.
    """
    from rarefy.run.training import Training, train, with_recipe
    from rarefy.training.loop import Settings

    settings = Settings(steps=steps, epochs=epochs, batch=batch, micro=micro,
                        rate=1e-4 if rate is None else rate, patience=patience, seed=seed)
    job = Training(teacher, out, tuple(data or ()), tuple(eval_data or ()), student,
                   tuple(map(_weighted, objective or ())), settings=settings, overwrite=overwrite)
    if recipe is not None:
        job = with_recipe(job, recipe)
    done = resumable(lambda: train(job, progress()), out)
    _finished(done.receipt, str(done.out), as_json=as_json)


def _weighted(text: str) -> Term:
    """``soft_labels=0.5``: a loss and its weight."""
    from rarefy.core.errors import RecipeError
    from rarefy.run.lessons import Term

    name, _, weight = text.partition("=")
    try:
        return Term(name, float(weight) if weight else 1.0)
    except ValueError:
        raise RecipeError(f"--objective {text}: {weight!r} is no weight; write {name}=0.5") from None


def _finished(receipt: dict[str, object], out: str, *, as_json: bool) -> None:
    if as_json:
        dump(finite(receipt))
        return
    curve, after, before = receipt["curve"], receipt["after"], receipt["before"]
    assert isinstance(curve, dict) and isinstance(after, dict) and isinstance(before, dict)
    rows = [("parameters", f"{receipt['parameters']:,}"), ("steps", f"{len(curve['points'])} "
                                                                     f"({curve['stopped']})"),
            ("held-out loss", f"{curve['best']:.4f} at step {curve['best_step']}")]
    if after:
        rows.append(("accuracy", f"{before['accuracy']:.1%} -> {after['accuracy']:.1%}"))
    for label, text in (*rows, ("folder", out)):
        show(f"  {label:<14}  {text}")
