"""Examples from files and from memory, and what is wrong with those that are refused."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification

from rarefy.calibration.examples import Examples, read_examples
from rarefy.calibration.images import read_images
from rarefy.calibration.sentences import read_sentences
from rarefy.core.errors import DataError
from rarefy.models.form import MASK, Form
from rarefy.models.network import TENSOR, Network
from rarefy.models.opening import open_any

CNN = Network.from_module(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 36, 10)))


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path) -> Network:
    network = open_any(tiny_encoder)
    assert isinstance(network, Network)
    return network


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# ---- sentences -----------------------------------------------------------------------------------------


def test_tables_and_texts(tmp_path: Path) -> None:
    tabs = write(tmp_path / "a.tsv", 'Sentence\tlabel\nsay "hi"\t1\n\nno\t0\n')
    assert read_sentences(tabs) == ([('say "hi"',), ("no",)], ["1", "0"])
    commas = write(tmp_path / "a.csv", 'label,sentence1,sentence2\nyes,"a, b",c\n')
    assert read_sentences(commas) == ([("a, b", "c")], ["yes"])
    unlabelled = write(tmp_path / "b.tsv", "\ufefftext\tid\none\t7\n")
    assert read_sentences(unlabelled) == ([("one",)], None)
    assert read_sentences(write(tmp_path / "c.txt", "one\n\n two \n")) == ([("one",), ("two",)], None)
    paragraphs, labels = read_sentences("python-docs")
    assert labels is None and len(paragraphs) > 500


@pytest.mark.parametrize(("name", "text", "message"), [
    ("a.tsv", "phrase\tlabel\nx\t1\n", "names no column 'sentence' or 'text'"),
    ("a.tsv", "sentence\tlabel\none\n", "line 2 has 1 columns, the header 2"),
    ("a.tsv", "sentence\tlabel\n", "has a header and no lines"),
    ("a.txt", "\n\n", "the text is empty"),
])
def test_tables_that_do_not_do(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_sentences(write(tmp_path / name, text))


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"sentence\n\xff\xfe")
    with pytest.raises(DataError, match="byte 9 is not UTF-8"):
        read_sentences(tmp_path / "a.tsv")
    with pytest.raises(DataError, match=r"no such file; did you mean .*a\.tsv"):
        read_sentences(tmp_path / "b.tsv")


def test_labels_by_number_and_by_name(encoder: Network, tmp_path: Path) -> None:
    numbers = write(tmp_path / "a.tsv", "sentence\tlabel\none\t1\ntwo\t0\n")
    found = read_examples(encoder, str(numbers))
    assert found.labels is not None and found.labels.tolist() == [1, 0]
    names = write(tmp_path / "b.tsv", "sentence\tlabel\none\tlabel_0\ntwo\tLABEL_1\n")
    found = read_examples(encoder, str(names))
    assert found.labels is not None and found.labels.tolist() == [0, 1]
    wrong = write(tmp_path / "c.tsv", "sentence\tlabel\none\tLABEL_O\ntwo\tLABEL_1\n")
    with pytest.raises(DataError, match=r"label 'LABEL_O' is no class of the model; did .*'LABEL_0'"):
        read_examples(encoder, str(wrong))


def test_each_sentence_once_and_as_many_as_wanted(encoder: Network, tmp_path: Path) -> None:
    lines = "".join(f"w {k % 30}\t{k % 2}\n" for k in range(90))
    path = write(tmp_path / "a.tsv", f"sentence\tlabel\n{lines}")
    assert len(read_examples(encoder, str(path))) == 30
    some, again = (read_examples(encoder, str(path), count=10, seed=1) for _ in range(2))
    assert len(some) == 10 and torch.equal(some.inputs["input_ids"], again.inputs["input_ids"])
    assert not torch.equal(some.inputs["input_ids"],
                           read_examples(encoder, str(path), count=10, seed=2).inputs["input_ids"])


# ---- images --------------------------------------------------------------------------------------------


def idx(path: Path, values: np.ndarray) -> Path:
    head = b"\x00\x00\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    data = head + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_arrays_in_files(tmp_path: Path) -> None:
    images = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8)
    labels = np.array([3, 4])
    np.savez(tmp_path / "a.npz", x=images, y=labels)
    np.save(tmp_path / "a.npy", images[..., None].astype(np.float32))
    idx(tmp_path / "t-labels-idx1-ubyte.gz", labels)
    path = idx(tmp_path / "t-images-idx3-ubyte.gz", images)
    for each in (tmp_path / "a.npz", path):
        found = read_examples(CNN, str(each))
        assert found.labels is not None and found.labels.tolist() == [3, 4]
        assert torch.equal(found.inputs[TENSOR], torch.from_numpy(images)[:, None].float() / 255)
    floats = read_images(tmp_path / "a.npy")
    assert floats.values.shape == (2, 1, 8, 8) and floats.labels is None


@pytest.mark.parametrize(("data", "message"), [
    (b"\x00\x00\x0d\x01" + bytes(8), "not an idx file of bytes"),
    (b"\x00\x00\x08\x01\x00\x00\x00\x05abc", "does not hold the 5 bytes"),
    (b"\x00\x00\x08\x02\xff\xff\xff\xff\xff\xff\xff\xff", "it is damaged"),
    (b"\x00\x00\x08\x03\x00", "not readable as images"),
])
def test_damaged_idx(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x-images-idx3-ubyte").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_images(tmp_path / "x-images-idx3-ubyte")


def test_pickles_in_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="not readable as images"):
        read_images(tmp_path / "a.npy")
    np.savez(tmp_path / "b.npz", pictures=np.zeros(3))
    with pytest.raises(DataError, match="holds pictures; name the arrays"):
        read_images(tmp_path / "b.npz")


def test_folders_of_pictures(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    for k, kind in enumerate(("cat", "dog")):
        (tmp_path / kind).mkdir()
        for n in range(3):
            Image.fromarray(np.full((10, 12, 3), 40 * k + n, np.uint8)).save(tmp_path / kind / f"{n}.png")
    found = read_images(tmp_path)
    assert found.values.shape == (6, 3, 10, 12) and found.names == ("cat", "dog")
    assert found.labels is not None and found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert read_images(tmp_path, size=(4, 5), count=4).values.shape == (4, 3, 4, 5)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "cat" / "odd.png")
    with pytest.raises(DataError, match="pictures of 2 sizes"):
        read_images(tmp_path)
    (tmp_path / "cat" / "odd.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"odd\.png: not a picture"):
        read_images(tmp_path)


def test_images_are_prepared_as_the_folder_says(tmp_path: Path) -> None:
    config = AutoConfig.for_model("resnet", embedding_size=4, hidden_sizes=[4], depths=[1],
                                  layer_type="basic", id2label={0: "cat", 1: "dog"})
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(
        {"size": {"height": 6, "width": 6}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    network = open_any(tmp_path)
    assert isinstance(network, Network)
    found = read_examples(network, (torch.full((2, 12, 12), 255, dtype=torch.uint8), [1, 0]))
    torch.testing.assert_close(found.inputs["pixel_values"], torch.full((2, 3, 6, 6), 2.0))


# ---- in memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ref", [
    (torch.zeros(6, 3), torch.arange(6)), (np.zeros((6, 3)), [0, 1, 2, 3, 4, 5]),
    {TENSOR: torch.zeros(6, 3), "labels": torch.arange(6)},
    [(torch.zeros(4, 3), torch.arange(4)), (torch.zeros(2, 3), torch.arange(4, 6))],
    [[torch.zeros(4, 3), torch.arange(4)], [torch.zeros(2, 3), torch.arange(4, 6)]],
])
def test_tensors(ref: Any) -> None:
    found = read_examples(CNN, ref)
    assert len(found) == 6 and found.inputs[TENSOR].shape == (6, 3)
    assert found.labels is not None and found.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert len(read_examples(CNN, ref, count=2)) == 2


@pytest.mark.parametrize(("ref", "message"), [
    ((torch.zeros(3, 2), torch.zeros(2)), "different lengths"), (torch.zeros(0, 2), "is empty"),
    ([], "is empty"),
    (3, "data of type int"), ([torch.zeros(2, 3), torch.zeros(2, 4)], "different shapes"),
    ([torch.zeros(2, 3), (torch.zeros(2, 3), torch.zeros(2))], "the same inputs"),
])
def test_tensors_that_do_not_do(ref: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_examples(CNN, ref)


# ---- examples ------------------------------------------------------------------------------------------


def padded(rows: list[list[int]], width: int) -> Examples:
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return Examples({"input_ids": ids, MASK: (ids != 0).long()}, torch.arange(len(rows)))


def test_batches_cut_common_padding() -> None:
    found = padded([[1, 2, 3], [4], [5, 6]], 7).by_length()
    assert found.labels is not None and found.labels.tolist() == [1, 2, 0]
    shapes: list[tuple[int, ...]] = [tuple(batch["input_ids"].shape) for batch in found.batches(2)]
    assert shapes == [(2, 2), (1, 3)]


def test_samples_are_the_same_whatever_their_padding() -> None:
    seen, new = padded([[1, 2], [3]], 5), padded([[3], [4, 5], [1, 2], [4, 5]], 3)
    kept = new.apart_from(seen)
    assert kept.labels is not None and kept.labels.tolist() == [1]


def test_digests_of_numbers() -> None:
    x: Tensor = torch.arange(6.0).view(3, 2)
    assert len(set(Examples({TENSOR: x}).digests())) == 3
    assert Examples({TENSOR: x[:, 0]}).digests()[0] != Examples({TENSOR: x[1:, 0]}).digests()[0]


def test_a_tokenizer_must_be_able_to_pad(tiny_tokenizer: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = None
    network = Network.from_module(nn.Linear(2, 2), form=Form("text", "embedding"), tokenizer=tokenizer)
    with pytest.raises(DataError, match="no padding token"):
        read_examples(network, "python-docs", count=2)
