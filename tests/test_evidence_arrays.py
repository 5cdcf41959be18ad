"""Folders of arrays: what is read of them; of what is not as it should be the file is named, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from attrreg.evidence import arrays

pytestmark = pytest.mark.cpu


def write_arrays(root: Path, name: str, count: int, channels: int = 0) -> None:
    """As the founding paper's code reads them, with the absolute paths of somebody else's machine."""
    lines = ["file,class"]
    for index in range(count):
        image = numpy.zeros((8, 8, channels) if channels else (8, 8))
        image[index % 8, 3] = 1.0
        numpy.save(root / f"{name}_img_{index}.npy", image)
        numpy.save(root / f"{name}_seg_{index}.npy", (image.max(-1) if channels else image) * 7)
        lines.append(f"/network/data1/GM/{name}_img_{index}.npy,{index % 2}")
    (root / f"{name}_labels.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("channels", [0, 3])
def test_folder_of_arrays(tmp_path: Path, channels: int) -> None:
    for name, count in (("train", 10), ("valid", 4), ("test", 6)):
        write_arrays(tmp_path, name, count, channels)
    task = arrays.folder(tmp_path)
    assert [len(part) for part in (task.train, task.similar, task.valid, task.test)] == [8, 2, 4, 6]
    assert task.classes == 2 and task.test.images.shape == (6, channels or 1, 8, 8)
    assert torch.equal(task.test.masks, task.test.images[:, 0] > 0)
    assert task.test.labels.tolist() == [0, 1] * 3
    whole = torch.cat([task.train.images, task.similar.images]).flatten(1).argmax(dim=1)
    assert sorted(whole.tolist()) == sorted(8 * (index % 8) + 3 for index in range(10))
    named = arrays.folder(tmp_path, similar="valid", dilation=1)
    assert len(named.train) == 10 and torch.equal(named.similar.images, task.valid.images)
    assert named.train.masks.sum() > 5 * task.train.masks.sum()


def test_folder_as_the_founding_paper_reads_it(tmp_path: Path) -> None:
    """Balanced draws, and the last two splits mirrored."""
    for name, count in (("distractor1", 20), ("distractor2", 16), ("distractor3", 16)):
        write_arrays(tmp_path, name, count)
    names = ("distractor1", "distractor2", "distractor3")
    task = arrays.folder(tmp_path, names, flip=True, sizes=(12, 8, 8), seed=1)
    assert [part.labels.bincount().tolist() for part in (task.train, task.similar, task.valid, task.test)] == [[6, 6], *[[4, 4]] * 3]
    for part, column in ((task.train, 3), (task.similar, 3), (task.valid, 4), (task.test, 4)):
        assert (part.images.sum(dim=(1, 2))[:, column] == 1).all()
        assert torch.equal(part.masks, part.images[:, 0] > 0)
    assert torch.equal(task.similar.images.flip(-1), task.valid.images)
    assert not torch.equal(arrays.folder(tmp_path, names, flip=True, sizes=(12, 8, 8), seed=2).train.images, task.train.images)
    with pytest.raises(ValueError, match=r"distractor3 has not 18 images.*\. "):
        arrays.folder(tmp_path, names, sizes=(12, 8, 18))


def test_images_of_a_split_are_scaled_alike(tmp_path: Path) -> None:
    bytes_ = numpy.ones((8, 8), dtype=numpy.uint8), numpy.full((8, 8), 255, dtype=numpy.uint8)
    shares = numpy.full((8, 8), 0.25), numpy.ones((8, 8))
    standardised = numpy.full((8, 8), -1.5), numpy.full((8, 8), 2.5)
    for images, expected in ((bytes_, [1 / 255, 1.0]), (shares, [0.25, 1.0]), (standardised, [-1.5, 2.5])):
        for name in ("train", "valid", "test"):
            write_arrays(tmp_path, name, 2)
            for number, image in enumerate(images):
                numpy.save(tmp_path / f"{name}_img_{number}.npy", image)
        task = arrays.folder(tmp_path, similar="valid")
        assert task.train.images.flatten(1)[:, 0].tolist() == pytest.approx(expected)


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
    "four axes": (lambda root: numpy.save(root / "test_seg_3.npy", numpy.zeros((2, 2, 2, 2))), r"must be \(H, W\) or \(H, W, C\)\. "),
    "no img in a name": (lambda root: relabel(root, "img_3", "3", "valid"), r"valid_3\.npy has no `img` in its name.*\. "),
    "other columns": (lambda root: relabel(root, "file,class", "name"), r"must have the columns file and class.*\. "),
    "channels of a split": (
        lambda root: write_arrays(root, "test", 10, 3),
        r"images of test are \(3, 8, 8\), but those of train \(1, 8, 8\)",
    ),
    "class in part": (lambda root: relabel(root, "_3.npy,1", "_3.npy,0.9"), r"train_img_3\.npy has the class '0\.9'\. Write a number"),
    "class in words": (lambda root: relabel(root, "_3.npy,1", "_3.npy,cat"), r"train_img_3\.npy has the class 'cat'"),
    "no class": (lambda root: relabel(root, "_3.npy,1", "_3.npy"), r"train_img_3\.npy has the class None"),
    "negative class": (lambda root: relabel(root, "_3.npy,1", "_3.npy,-1"), r"train_img_3\.npy has the class '-1'"),
    "classes from 1": (lambda root: relabel(root, ".npy,0", ".npy,2"), r"train has the classes \[1, 2\], .* Number them from 0"),
    "one class": (lambda root: relabel(root, ",1", ",0"), r"train has the class 0 alone, which leaves nothing to learn\. Add images"),
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


def test_files_that_are_missing_are_named(root: Path) -> None:
    (root / "test_seg_1.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"test_seg_1\.npy does not exist, though.*\. "):
        arrays.folder(root)
    (root / "train_labels.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"train_labels\.csv does not exist\. "):
        arrays.folder(root)


def test_of_each_class_a_fifth_is_held_back(root: Path) -> None:
    write_arrays(root, "train", 22)
    relabel(root, ",1", ",0")
    for number in (4, 9, 14):
        relabel(root, f"_{number}.npy,0", f"_{number}.npy,1")
    task = arrays.folder(root)
    assert task.similar.labels.bincount().tolist() == [3, 1] and task.train.labels.bincount().tolist() == [16, 2]


def test_an_image_of_each_class_is_too_few_to_hold_a_fifth_back(root: Path) -> None:
    write_arrays(root, "train", 2)
    with pytest.raises(ValueError, match=r"too few to hold a fifth back\. "):
        arrays.folder(root)


@pytest.mark.parametrize(
    ("splits", "similar"),
    [
        (("train", "test", "test"), None),
        (("train", "train", "test"), None),
        (("train", "valid", "test"), "train"),
        (("train", "valid", "test"), "test"),
    ],
)
def test_one_split_cannot_stand_for_two(splits: tuple[str, str, str], similar: str | None, root: Path) -> None:
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


@pytest.mark.parametrize(("kind", "shape"), [("img", (1, 8, 20)), ("seg", (1, 8, 20)), ("img", (1, 8, 8))])
def test_channels_first(kind: str, shape: tuple[int, ...], root: Path) -> None:
    for path in root.glob(f"*_{kind}_*.npy"):
        numpy.save(path, numpy.ones(shape))
    message = r"looks like \(C, H, W\)\. Save them as \(H, W, C\)" if shape[2] > 16 else "masks of train are"
    with pytest.raises(ValueError, match=message):
        arrays.folder(root)


def test_signals_of_many_leads_are_one_row(root: Path) -> None:
    for path in root.glob("*.npy"):
        numpy.save(path, numpy.random.rand(1, 8, 20) if "img" in path.name else numpy.eye(1, 8))
    assert arrays.folder(root).train.images.shape[1:] == (20, 1, 8)


def test_values_of_more_than_8_bits_are_refused(root: Path) -> None:
    poke(root, "train_img_3.npy", 4095)
    with pytest.raises(ValueError, match=r"values up to 4095, more than 8 bits hold\. Scale them"):
        arrays.folder(root)
    poke(root, "train_img_4.npy", -1000.0)  # as Hounsfield's units are
    assert float(arrays.folder(root, similar="valid").train.images.max()) == 4095


def test_masks_that_are_relevant_everywhere(root: Path) -> None:
    for path in root.glob("train_seg_*.npy"):
        numpy.save(path, numpy.ones((8, 8)))
    with pytest.raises(ValueError, match="all masks of train are relevant everywhere, which leaves nothing to penalise"):
        arrays.folder(root)


TABLES = [("file;class\na_img.npy;0\n", "separated by commas"), ("file,class\n\xe9_img.npy,0\n", "in UTF-8")]


@pytest.mark.parametrize(
    ("text", "message"), [*TABLES, ("file,class\n" + "a" * 200_000 + ",0\n", "in UTF-8")], ids=["commas", "UTF-8", "long"]
)
def test_tables_of_other_forms(text: str, message: str, root: Path) -> None:
    (root / "train_labels.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        arrays.folder(root)
