"""Exits as the last stage of a job: heads that learn, a threshold that samples vouch for, what it gains.

Three sets of samples that share none: heads (and, ``together``, the network) learn from one, the threshold is
chosen on the second, the third, which the whole job is judged on, is what the receipt reports.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from rarefy.calibration.examples import Examples, read_examples
from rarefy.calibration.text import PYTHON_DOCS
from rarefy.core.errors import DataError, RecipeError, TargetError, did_you_mean
from rarefy.core.nodes import Dense
from rarefy.core.nouns import Exiting, Step
from rarefy.export.networks import export_network, opened, stored_trees, tell_unrounded
from rarefy.export.onnx import OnnxSettings
from rarefy.formats.onnx import coarse
from rarefy.measure.resources import bytes_on_disk
from rarefy.models.model import Model
from rarefy.models.network import Network
from rarefy.run.engines import ENGINES
from rarefy.run.planning import build_exit
from rarefy.run.progress import Stage
from rarefy.run.samples import joined
from rarefy.run.target import Opened
from rarefy.run.to_onnx import write_beside
from rarefy.runtimes.exit_graph import export_exits
from rarefy.runtimes.exit_training import starts, together, trained
from rarefy.runtimes.exits import Exits, Stepped, classifier, load, measured, places, save, staged
from rarefy.runtimes.segments import Segments
from rarefy.techniques.depth.early_exit import EarlyExit
from rarefy.training.loop import Settings

CALIBRATES = 0.2  # the share of the data that chooses the threshold, where no other data does
BATCHES = (1, 32)
SHOWN = 128  # samples by which an exported graph is compared


def check_exits(asked: Exiting, model: Opened, target: str) -> None:
    """Refuse what cannot work before any work is done; where exits of a plain network may stand is known
    when there are samples (``check_places``)."""
    if target != "torch":
        raise TargetError(f"{target}: exits are made in PyTorch only; leave target out, or say torch "
                          "(rarefy export writes what came out for onnxruntime)")
    if isinstance(model, Model):
        raise RecipeError(f"{model.name}: exits in a recipe are for classifiers; a language model's are in "
                          "rarefy.runtimes.decoding")
    classifier(model)
    if model.form.takes == "text":
        places(Stepped(model), asked.after)
    _technique(asked)
    _settings(asked, model, 0)


def check_places(asked: Exiting, network: Opened, judged: Examples) -> None:
    """Refuse places where no exit can stand, still before any work."""
    assert isinstance(network, Network)
    places(staged(network, next(judged.batches(2))), asked.after)


def add_exits(asked: Exiting, original: Network, data: tuple[Any, ...], judged: Examples, path: Path,
              seed: int, work: Path, stage: Stage) -> dict[str, Any]:
    """Give the network in the native folder ``path`` exits, and measure them on ``judged``.

    original: what it was made of. data: the recipe's.
    """
    train, calibration = _samples(asked, original, data, judged, seed)
    network = _read(path, original)
    after = places(staged(network, next(train.batches(2))), asked.after)
    settings = _settings(asked, network, seed)
    if asked.together:
        stage.line(f"network and exits learn from {len(train)} samples")
        heads, tuned = together(network, stored_trees(network), original, train, after, settings,
                                folder=work / "exits", advance=stage.advance)
        if network.ranges:
            warnings.warn(f"exits: the network learns with them, so the ranges of {len(network.ranges)} "
                          "inputs that training found no longer hold", stacklevel=1)
        again = path.with_name(f"{path.name}.learnt")
        shutil.rmtree(again, ignore_errors=True)
        export_network(network, tuned.trees, again, params=tuned.params, ranges=tuned.ranges)
        shutil.rmtree(path)
        again.rename(path)
        network = _read(path, original)
        exits = Exits(staged(network, next(train.batches(2))), after, heads)
    else:
        stage.line(f"exits learn from {len(train)} samples")
        exits = trained(network, train, after, settings)
    exits = exits.calibrated(_technique(asked), calibration)
    save(exits, path)
    found = measured(exits, judged, [size for size in BATCHES if size <= len(judged)])
    return {**found, "after": list(after), "threshold": exits.rule.threshold,
            "together": asked.together, "samples": {"learn": len(train), "calibrate": len(calibration),
                                                    "judge": len(judged)}}


def export_early(source: Path, folder: Path) -> int:
    """Write the classifier with exits of a native folder for ONNX Runtime, with its tokenizer, and compare
    what it answers with our own evaluation; bytes. Weights of few bits are multiplied in 8."""
    ENGINES[0].ready()
    exits = load(source).exits
    network = exits.stepped.network
    tell_unrounded(network, "a graph with exits")
    trees = {path: tree for path, tree in stored_trees(network).items() if not isinstance(tree, Dense)}
    samples = _shown(exits)
    batches = list(samples.batches(BATCHES[-1]))
    settings = OnnxSettings("dynamic" if any(map(coarse, trees.values())) else "float")
    folder.mkdir(parents=True)
    file = export_exits(exits, trees, folder / ENGINES[0].file, inputs=batches[-1], settings=settings,
                        calibration=batches)
    file.verify(batches)
    write_beside(network, folder)
    return bytes_on_disk(folder)


def _shown(exits: Exits) -> Examples:
    """Samples by which a graph is compared: texts, or noise in the shape of what the network was cut on."""
    stepped = exits.stepped
    if not isinstance(stepped, Segments):
        return read_examples(stepped.network, PYTHON_DOCS, count=SHOWN).by_length()
    draw = torch.Generator().manual_seed(0)
    return Examples({name: torch.rand(SHOWN, *shape, generator=draw)
                     for name, shape in stepped.inputs.items()})


def _read(path: Path, original: Network) -> Network:
    """The network in a native folder, of the original's class."""
    network = opened(path, original.module)
    assert isinstance(network, Network)
    return network


def _samples(asked: Exiting, network: Network, data: tuple[Any, ...], judged: Examples, seed: int
             ) -> tuple[Examples, Examples]:
    """What is learnt from and what calibrates, nothing of it judged on."""
    refs = asked.data or data
    if not refs:
        raise DataError("exits: no data to learn from; pass data")

    def read(refs: tuple[Any, ...]) -> Examples:
        share = -(-asked.samples // len(refs))
        return joined([read_examples(network, ref, count=share, seed=seed) for ref in refs])

    train = read(refs).apart_from(judged)
    if asked.calibration:
        calibration = read(asked.calibration).apart_from(judged)
        train = train.apart_from(calibration)
    else:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        aside = round(CALIBRATES * len(train))
        train, calibration = train.select(order[aside:]), train.select(order[:aside])
    if len(train) < 2 or not len(calibration):
        raise DataError(f"exits: {len(train)} samples to learn from and {len(calibration)} to calibrate on, "
                        "those that are judged on left out; pass more data")
    return train, calibration


def _technique(asked: Exiting) -> EarlyExit:
    return build_exit(Step("early_exit", settings={**asked.settings, "max_loss": asked.max_loss}))


def _settings(asked: Exiting, network: Network, seed: int) -> Settings:
    start, known = starts(network, asked.together), list(Settings.__dataclass_fields__)
    wrong = [name for name in asked.training if name not in known]
    if wrong:
        raise RecipeError(f"exits: training has no setting {wrong[0]!r}{did_you_mean(wrong[0], known)}")
    return Settings(**{**vars(start), "seed": seed, **asked.training})
