"""``rarefy exits``: a classifier that stops where it is sure, within a bound on what that may cost."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rarefy.cli.compress import finished, resumable, typed
from rarefy.cli.options import (
    BUDGET,
    WORK,
    Data,
    Effort,
    Efforts,
    EvalData,
    Json,
    Model,
    Out,
    Overwrite,
    Seed,
)
from rarefy.cli.progress import progress
from rarefy.cli.terminal import guarded

After = Annotated[str | None, typer.Option(
    "--after", metavar="BLOCKS", rich_help_panel=WORK, show_default=False,
    help="Behind which blocks exits stand, counted from 0: 1,3. Evenly over the work if not given; of a CNN, "
         "blocks end where one tensor carries everything.")]
MaxLoss = Annotated[str, typer.Option(
    "--max-loss", metavar="SHARE", rich_help_panel=BUDGET,
    help="Answers that may become others than the network's own, at a confidence of 95%.")]
Rule = Annotated[str, typer.Option("--rule", metavar="RULE", rich_help_panel=WORK,
                                   help="What being sure means: confidence, entropy or patience.")]
Calibration = Annotated[list[str] | None, typer.Option(
    "--calibration", metavar="DATA", rich_help_panel=WORK, show_default=False,
    help="Chooses the threshold: data that the network was not trained on. A fifth of --data if not given.")]
Together = Annotated[bool, typer.Option(
    "--together", rich_help_panel=WORK, help="Let the network learn with its exits: they stand earlier.")]
Samples = Annotated[int, typer.Option("--samples", min=2, rich_help_panel=WORK,
                                      help="Samples to learn from at most.")]
Epochs = Annotated[float | None, typer.Option("--epochs", rich_help_panel=WORK, show_default=False,
                                              help="Times seen: 30 for heads, 1 together, 4 for CNNs.")]


@guarded
def exits(
    model: Model, *, after: After = None, max_loss: MaxLoss = "1%", rule: Rule = "confidence",
    data: Data = None, calibration: Calibration = None, eval_data: EvalData = None,
    together: Together = False, samples: Samples = 8000, epochs: Epochs = None,
    effort: Effort = Efforts.balanced, seed: Seed = 0,
    out: Out, overwrite: Overwrite = False, as_json: Json = False,
) -> None:
    """Give a classifier exits, measure where samples leave and what it gains, and write it to DIR.

    rarefy.load(DIR) runs it. The same stands in a recipe under exits, behind any steps.
    """
    from rarefy.core.errors import RecipeError
    from rarefy.core.nouns import Exiting, Recipe, share_of
    from rarefy.run.job import do_recipe

    try:
        places = tuple(int(part) for part in (after or "").split(",") if after)
    except ValueError:
        raise RecipeError(f"--after {after}: expected numbers of blocks like 1,3") from None
    training: dict[str, Any] = {} if epochs is None else {"epochs": epochs}
    asked = Exiting(places, share_of(max_loss), {"rule": rule}, together,
                    calibration=tuple(calibration or ()), samples=samples, training=training)
    recipe = Recipe(model, (), target="torch", effort=effort.value, data=tuple(data or ()),
                    eval_data=tuple(eval_data or ()), seed=seed, exits=asked)
    finished(resumable(lambda: do_recipe(recipe, out, progress(), overwrite=overwrite, command=typed()), out),
             as_json=as_json)
