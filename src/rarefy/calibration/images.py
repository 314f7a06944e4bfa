"""Images and their labels, from arrays in files or folders of pictures.

    .npz          arrays ``images`` and ``labels`` (or ``x`` and ``y``)
    .npy          images alone
    idx           as MNIST has them: ``*-images-*`` with ``*-labels-*`` beside it, gzipped or not
    a folder      one folder of pictures per class (needs Pillow); pictures outside such folders have no label

Bytes become 0..1. Nothing here is unpickled.
"""

from __future__ import annotations

import gzip
import struct
import zipfile
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rarefy.core.errors import DataError, did_you_mean

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
FORMS = "pass .npz, .npy, idx files or a folder of pictures"
MOST = 1 << 31  # bytes that a file may unpack to


@dataclass(frozen=True, eq=False)
class Images:
    """Floats [samples, channels, height, width]; a label each, if there are any, and the classes' names."""

    values: Tensor
    labels: Tensor | None = None
    names: tuple[str, ...] = ()


def read_images(path: Path, *, size: tuple[int, int] | None = None, count: int | None = None,
                seed: int = 0) -> Images:
    """The images that ``path`` stands for.

    size: (height, width) that pictures are scaled to. count: of a folder, read that many, drawn by ``seed``.
    """
    if path.is_dir():
        return _folder(path, size, count, seed)
    if not path.is_file():
        known = [str(each) for each in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file or folder{did_you_mean(str(path), known)}; {FORMS}")
    try:
        match path.suffix.lower():
            case ".npz":
                values, labels = _npz(path)
            case ".npy":
                values, labels = torch.from_numpy(np.load(path, allow_pickle=False)), None
            case _:
                values, labels = _idx(path)
    except (OSError, ValueError, TypeError, EOFError, struct.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not readable as images ({str(error) or type(error).__name__}); "
                        f"{FORMS}") from None
    return Images(channels_first(values, str(path)), labels)


def channels_first(values: Tensor, name: str) -> Tensor:
    """Floats with an axis of channels behind that of samples; bytes become 0..1."""
    if values.ndim not in (3, 4):
        raise DataError(f"{name}: images of shape {list(values.shape)}; expected [samples, channels, height, "
                        "width], or without channels")
    scaled = values.float() / 255 if values.dtype == torch.uint8 else values.float()
    if scaled.ndim == 3:
        return scaled[:, None].contiguous()
    last = scaled.shape[-1] in (1, 3) and scaled.shape[1] not in (1, 3)
    return (scaled.permute(0, 3, 1, 2) if last else scaled).contiguous()


def resized(values: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Images scaled to (height, width), averaged where that makes them smaller."""
    if size is None or tuple(values.shape[2:]) == size:
        return values
    return torch.nn.functional.interpolate(values, size, mode="bilinear", antialias=True)


def _npz(path: Path) -> tuple[Tensor, Tensor | None]:
    with np.load(path, allow_pickle=False) as held:
        named = {name.lower(): name for name in held.files}
        images = next((named[name] for name in ("images", "x", "x_test", "data") if name in named), None)
        labels = next((named[name] for name in ("labels", "y", "y_test", "target") if name in named), None)
        if images is None:
            raise DataError(f"{path}: holds {', '.join(held.files)}; name the arrays 'images' and 'labels'")
        return torch.from_numpy(held[images]), None if labels is None else torch.from_numpy(held[labels])


def _idx(path: Path) -> tuple[Tensor, Tensor | None]:
    beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    return _array(path), _array(beside) if beside != path and beside.is_file() else None


def _array(path: Path) -> Tensor:
    """LeCun's idx: two zero bytes, type 8 (bytes), how many axes, their lengths, the numbers."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        head = file.read(4)
        if len(head) < 4 or head[:3] != b"\x00\x00\x08" or not 0 < head[3] < 5:
            raise DataError(f"{path}: not an idx file of bytes; {FORMS}")
        shape = struct.unpack(f">{head[3]}I", file.read(4 * head[3]))
        if prod(shape) > MOST:
            raise DataError(f"{path}: says that it holds {prod(shape):,} bytes; it is damaged")
        data = file.read(prod(shape) + 1)
    if len(data) != prod(shape):
        raise DataError(f"{path}: does not hold the {prod(shape):,} bytes that it says; download it again")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(*shape)


def _folder(path: Path, size: tuple[int, int] | None, count: int | None, seed: int) -> Images:
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES)
    files = [p for p in found if not p.name.startswith(".")]
    if not files:
        raise DataError(f"{path}: no pictures in this folder; known are {', '.join(sorted(PICTURES))}")
    classes = tuple(sorted({p.relative_to(path).parts[0] for p in files if p.parent != path}))
    labelled = all(p.parent != path for p in files)
    if count is not None and len(files) > count:
        generator = torch.Generator().manual_seed(seed)
        files = [files[k] for k in torch.randperm(len(files), generator=generator)[:count].sort().values]
    pictures = [_picture(file, size) for file in files]
    shapes = {tuple(picture.shape) for picture in pictures}
    if len(shapes) > 1:
        raise DataError(f"{path}: pictures of {len(shapes)} sizes, and the model does not say which it "
                        "wants; scale them to one size")
    values = channels_first(torch.stack(pictures), str(path))
    if not labelled:
        return Images(values)
    labels = torch.tensor([classes.index(p.relative_to(path).parts[0]) for p in files])
    return Images(values, labels, classes)


def _picture(file: Path, size: tuple[int, int] | None) -> Tensor:
    try:
        from PIL import Image
    except ImportError:
        raise DataError(f"{file}: reading pictures needs Pillow; run: pip install pillow") from None
    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
            scaled = picture if size is None else picture.resize(size[::-1], Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(scaled)).permute(2, 0, 1)
    except (OSError, ValueError, Image.DecompressionBombError) as error:  # OSError: none, or half of one
        raise DataError(f"{file}: not a picture that can be read ({error}); remove it") from None
