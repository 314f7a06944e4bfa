"""Examples: what a network that is no language model is shown, with labels where there are some.

They come from files (``sentences`` and ``images`` say which), or in Python from tensors or arrays: inputs,
(inputs, labels), a mapping of inputs by name, or batches of these. Labels are whole numbers, or the names
that the model's configuration has for its classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from rarefy.calibration.images import channels_first, read_images, resized
from rarefy.calibration.sentences import Labels, Sentence, read_sentences
from rarefy.core.errors import DataError, did_you_mean
from rarefy.models.form import MASK, Form
from rarefy.models.network import TENSOR, Network
from rarefy.models.sources import read_json

PIXELS = "pixel_values"
PREPARED = "preprocessor_config.json"


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs by name, first axis samples, and a label each (None: there are none)."""

    inputs: dict[str, Tensor]
    labels: Int64[Tensor, " samples"] | None = None

    def __post_init__(self) -> None:
        counts = {name: len(values) for name, values in self.inputs.items()}
        if self.labels is not None:
            counts["labels"] = len(self.labels)
        if len(set(counts.values())) != 1:
            raise DataError(f"inputs and labels of different lengths: {counts}; give one row per sample in "
                            "each")

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def select(self, index: Tensor) -> Examples:
        """Some samples."""
        return Examples({name: values[index] for name, values in self.inputs.items()},
                        None if self.labels is None else self.labels[index])

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Inputs of ``size`` samples at a time; padding that a whole batch shares is cut off."""
        for start in range(0, len(self), size):
            batch = {name: values[start:start + size] for name, values in self.inputs.items()}
            if MASK not in batch:
                yield batch
                continue
            width, end = batch[MASK].shape[1], int(batch[MASK].sum(1).max())
            yield {name: values[:, :end] if values.ndim > 1 and values.shape[1] == width else values
                   for name, values in batch.items()}

    def by_length(self) -> Examples:
        """The same with samples of like length together: little padding in every batch."""
        if MASK not in self.inputs:
            return self
        return self.select(self.inputs[MASK].sum(1).argsort(stable=True))

    def digests(self) -> list[bytes]:
        """A hash of every sample's inputs; how far it was padded makes no difference."""
        mask = self.inputs.get(MASK)
        ends = [None] * len(self) if mask is None else mask.sum(1).tolist()
        rows = [values.flatten(1).numpy() if values.ndim > 1 else values[:, None].numpy()
                for _, values in sorted(self.inputs.items())]
        return [hashlib.sha256(b"".join(part[k][:end].tobytes() for part in rows)).digest()
                for k, end in enumerate(ends)]

    def apart_from(self, other: Examples) -> Examples:
        """Those that do not occur in ``other``, each once."""
        seen, kept = set(other.digests()), []
        for k, digest in enumerate(self.digests()):
            if digest not in seen:
                seen.add(digest)
                kept.append(k)
        return self.select(torch.tensor(kept, dtype=torch.int64))


def read_examples(network: Network, ref: Any, *, count: int | None = None, seed: int = 0) -> Examples:
    """The examples that ``ref`` stands for, as ``network`` takes them; ``count`` of them drawn by ``seed``.

    ref: a path, ``python-docs`` (for encoders of text), or what Python has in memory.
    """
    form = network.form
    match ref:
        case str() | Path() if form.takes == "text":
            sentences, words = _drawn(*read_sentences(ref), count, seed)
            found = _encoded(network, sentences, _numbers(words, form, str(ref)))
        case str() | Path():
            images = read_images(Path(ref), size=_size(network), count=count, seed=seed)
            labels = images.labels
            if labels is not None and images.names:  # of folders: their order will do where no name is known
                named = _known([images.names[k] for k in labels.tolist()], form)
                labels = labels if named is None else named
            found = _images(network, images.values, labels)
        case _:
            found = _in_memory(network, ref)
    if not len(found):
        raise DataError("the data is empty; pass at least a few samples")
    return found if count is None or len(found) <= count else found.select(_draw(len(found), count, seed))


def _draw(total: int, count: int, seed: int) -> Tensor:
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].sort().values


# ---- text ----------------------------------------------------------------------------------------------


def _drawn(rows: list[Sentence], labels: Labels, count: int | None, seed: int
           ) -> tuple[list[Sentence], Labels]:
    """Each sentence once, and of those as many as are wanted."""
    first = list({row: k for k, row in reversed(list(enumerate(rows)))}.values())
    first.sort()
    if count is not None and len(first) > count:
        first = [first[k] for k in _draw(len(first), count, seed).tolist()]
    return [rows[k] for k in first], None if labels is None else [labels[k] for k in first]


def _encoded(network: Network, rows: list[Sentence], labels: Tensor | None) -> Examples:
    tokenizer = network.tokenizer
    if tokenizer.pad_token_id is None:
        raise DataError(f"{network.name}: its tokenizer has no padding token; name one in "
                        "tokenizer_config.json")
    texts = [list(column) for column in zip(*rows, strict=True)]
    with _unmoved(tokenizer):
        batch = tokenizer(*texts, padding=True, truncation=True, max_length=network.form.length or None,
                          return_tensors="pt", verbose=False)
    return Examples(dict(batch.items()), labels)


@contextmanager
def _unmoved(tokenizer: Any) -> Iterator[None]:
    """A tokenizer remembers how it last padded and cut, and would save that: it gets back what it knew."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    padding, truncation = (None, None) if backend is None else (backend.padding, backend.truncation)
    try:
        yield
    finally:
        if backend is not None:
            backend.no_padding() if padding is None else backend.enable_padding(**padding)
            backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)


def _numbers(words: Labels, form: Form, name: str) -> Tensor | None:
    """Labels as numbers; the model's own names for its classes come before what looks like a number."""
    if words is None:
        return None
    if (known := _known(words, form)) is not None:
        return known
    if all(word.isdigit() for word in words):
        return torch.tensor([int(word) for word in words])
    if form.gives == "embedding":  # no classes of its own: any names will do
        order = {word: k for k, word in enumerate(sorted(set(words)))}
        return torch.tensor([order[word] for word in words])
    wrong = next(word for word in words if not word.isdigit())
    raise DataError(f"{name}: label {wrong!r} is no class of the model"
                    f"{did_you_mean(wrong, list(form.labels))}; its classes are "
                    f"{', '.join(form.labels[:12])}")


def _known(words: list[str], form: Form) -> Tensor | None:
    """Labels by the model's own names for its classes; None when there are others among them."""
    known = {label.lower(): k for k, label in enumerate(form.labels)}
    if not all(word.lower() in known for word in words):
        return None
    return torch.tensor([known[word.lower()] for word in words])


# ---- images --------------------------------------------------------------------------------------------


def _preparation(network: Network) -> dict[str, Any]:
    return next((read_json(path) for path in network.files if path.name == PREPARED), {})


def _size(network: Network) -> tuple[int, int] | None:
    match _preparation(network).get("size"):
        case {"height": int(high), "width": int(wide)}:
            return high, wide
        case {"shortest_edge": int(edge)}:
            return edge, edge
        case int(edge):
            return edge, edge
        case _:
            return None


def _images(network: Network, values: Tensor, labels: Tensor | None) -> Examples:
    """Images scaled and normalised as the model's folder says; as they are where it says nothing."""
    said, labels = _preparation(network), None if labels is None else labels.long()
    if network.form.takes != "images":
        return Examples({TENSOR: values}, labels)
    if values.shape[1] == 1 and getattr(network.config, "num_channels", 1) == 3:
        values = values.expand(-1, 3, -1, -1)
    values = resized(values, _size(network))
    mean, spread = said.get("image_mean"), said.get("image_std")
    if said.get("do_normalize", True) and mean and spread:
        values = (values - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(spread).view(1, -1, 1, 1)
    return Examples({PIXELS: values.contiguous()}, labels)


# ---- in memory -----------------------------------------------------------------------------------------


def _in_memory(network: Network, ref: Any) -> Examples:
    match ref:
        case Examples():
            return ref
        case Tensor() | np.ndarray():
            return _plain(network, torch.as_tensor(ref), None)
        case [Tensor() | np.ndarray() as inputs, Tensor() | np.ndarray() | list() as labels] if (
                isinstance(ref, tuple) or _are_labels(labels, len(inputs))):  # loaders give pairs as lists
            return _plain(network, torch.as_tensor(inputs), torch.as_tensor(labels).long())
        case Mapping():
            named = {str(name): torch.as_tensor(values) for name, values in ref.items()}
            found = next((named.pop(name) for name in ("labels", "label") if name in named), None)
            return Examples(named, None if found is None else found.long())
        case Iterable():
            return _joined([_in_memory(network, batch) for batch in ref])
        case _:
            raise DataError(f"data of type {type(ref).__name__}: pass a path, tensors, (inputs, labels) or "
                            "batches of these")


def _are_labels(values: Any, count: int) -> bool:
    labels = torch.as_tensor(values)
    return labels.shape == (count,) and not labels.is_floating_point()


def _plain(network: Network, inputs: Tensor, labels: Tensor | None) -> Examples:
    match network.form.takes:
        case "images":
            return _images(network, channels_first(inputs, "data"), labels)
        case "text":
            mask = torch.ones_like(inputs, dtype=torch.int64)
            return Examples({"input_ids": inputs.long(), MASK: mask}, labels)
        case _:
            return Examples({TENSOR: inputs}, labels)


def _joined(parts: list[Examples]) -> Examples:
    if not parts:
        raise DataError("the data is empty; pass at least a few samples")
    first = parts[0]
    for part in parts:
        if list(part.inputs) != list(first.inputs) or (part.labels is None) != (first.labels is None):
            raise DataError("the batches do not all hold the same inputs; give each batch the same form")
        if any(part.inputs[name].shape[1:] != first.inputs[name].shape[1:] for name in first.inputs):
            raise DataError("the batches hold samples of different shapes; bring them to one shape")
    labels = [part.labels for part in parts if part.labels is not None]
    return Examples({name: torch.cat([part.inputs[name] for part in parts]) for name in first.inputs},
                    torch.cat(labels) if labels else None)
