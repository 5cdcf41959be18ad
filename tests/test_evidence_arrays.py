"""Folders of arrays that are not as they should be: the file is named, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from attrreg.evidence import arrays
from tests.test_evidence_data import write_arrays


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder as it should be."""
    for name in ("train", "valid", "test"):
        write_arrays(tmp_path, name, 10)
    return tmp_path


def poke(root: Path, name: str, value: Any) -> None:
    """One value of one image or mask."""
    array = numpy.load(root / name).astype(type(value))
    array[0, 0] = value
    numpy.save(root / name, array)


def relabel(root: Path, old: str, new: str, split: str = "train") -> None:
    """In a table."""
    path = root / f"{split}_labels.csv"
    path.write_text(path.read_text().replace(old, new))


def cut(root: Path) -> None:
    """An interrupted copy."""
    (root / "valid_img_2.npy").write_bytes(b"")


def pickled(root: Path) -> None:
    """Objects."""
    numpy.save(root / "valid_img_2.npy", numpy.array([[None, 1], [2, 3]], dtype=object), allow_pickle=True)


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "nan": (lambda root: poke(root, "train_img_3.npy", float("nan")), r"train_img_3\.npy has values that are not finite real"),
    "complex": (lambda root: poke(root, "train_img_3.npy", 1j), r"train_img_3\.npy has values .*complex128"),
    "cut off": (cut, r"valid_img_2\.npy cannot be read: .* Save it with numpy\.save"),
    "pickled": (pickled, r"valid_img_2\.npy cannot be read: .* Save it with numpy\.save"),
    "size of an image": (
        lambda root: numpy.save(root / "train_img_3.npy", numpy.zeros((4, 8))),
        r"train_img_3\.npy is \(4, 8\), but train",
    ),
    "size of a mask": (
        lambda root: numpy.save(root / "test_seg_3.npy", numpy.zeros((8, 8, 1))),
        r"test_seg_3\.npy is \(8, 8, 1\), but test",
    ),
    "channels of a split": (
        lambda root: write_arrays(root, "test", 10, 3),
        r"images of test are \(3, 8, 8\), but those of train \(1, 8, 8\)",
    ),
    "class in part": (lambda root: relabel(root, "_3.npy,1", "_3.npy,0.9"), r"train_img_3\.npy has the class '0\.9'\. Write a number"),
    "class in words": (lambda root: relabel(root, "_3.npy,1", "_3.npy,cat"), r"train_img_3\.npy has the class 'cat'"),
    "no class": (lambda root: relabel(root, "_3.npy,1", "_3.npy"), r"train_img_3\.npy has the class None"),
    "negative class": (lambda root: relabel(root, "_3.npy,1", "_3.npy,-1"), r"train_img_3\.npy has the class '-1'"),
    "classes from 1": (lambda root: relabel(root, ".npy,0", ".npy,2"), r"train has the classes \[1, 2\], .* Number them from 0"),
    "class of the test alone": (lambda root: relabel(root, "_3.npy,1", "_3.npy,2", "test"), r"all splits \[0, 1, 2\]\. Number them from 0"),
    "image twice": (lambda root: relabel(root, "train_img_3", "train_img_2"), r"train_img_2\.npy is there twice.* Leave one row"),
    "image of two splits": (
        lambda root: relabel(root, "test_img_3", "train_img_3", "test"),
        r"train_img_3\.npy is in train and in test, which must have images of its own\. Take it out",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_the_file_is_named(name: str, root: Path) -> None:
    change, message = BAD[name]
    change(root)
    with pytest.raises(ValueError, match=message):
        arrays.folder(root, similar="valid")


@pytest.mark.parametrize(
    ("splits", "similar"),
    [
        (("train", "test", "test"), None),
        (("train", "train", "test"), None),
        (("train", "valid", "test"), "train"),
        (("train", "valid", "test"), "test"),
    ],
)
def test_a_split_that_stands_for_two(splits: tuple[str, str, str], similar: str | None, root: Path) -> None:
    with pytest.raises(ValueError, match=r"has one split twice\. Name three"):
        arrays.folder(root, splits, similar)


def test_one_scale_for_all_splits(root: Path) -> None:
    poke(root, "train_img_3.npy", 1.001)  # one value beyond the others
    task = arrays.folder(root, similar="valid")
    assert task.train.images.max() == pytest.approx(1.001 / 255) and task.valid.images.max() == pytest.approx(1 / 255)


def test_what_other_programs_write(root: Path) -> None:
    want = arrays.folder(root, similar="valid")
    path = root / "train_labels.csv"
    path.write_text(path.read_text().replace(",1\n", ",1.0\n"), encoding="utf-8-sig")
    for name in ("train_img_3.npy", "train_seg_3.npy"):
        numpy.save(root / name, numpy.load(root / name).astype(">f4"))
    found = arrays.folder(root, similar="valid")
    assert found.train.labels.equal(want.train.labels) and found.train.images.equal(want.train.images)


def test_sizes_below_one(root: Path) -> None:
    with pytest.raises(ValueError, match=r"train has not -4 images"):
        arrays.folder(root, sizes=(-4, 4, 4))
