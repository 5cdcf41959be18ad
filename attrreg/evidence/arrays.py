"""Your own data, as a folder of arrays in the layout of the founding paper's code."""

from __future__ import annotations

import csv
import hashlib
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy
import numpy.typing
import torch
from torch import Generator, Tensor

from attrreg.evidence.data import Split, Task, dilate, first_of_each
from attrreg.transforms import ReplaceOutside


def folder(
    root: Path | str,
    splits: tuple[str, str, str] = ("train", "valid", "test"),
    similar: str | None = None,
    *,
    flip: bool = False,
    sizes: tuple[int, int, int] | None = None,
    dilation: int = 0,
    seed: int = 0,
) -> Task:
    """Read a task from arrays.

    The layout: `<split>_labels.csv` with the columns `file` and `class`, one row an image; beside it each image as `.npy`, `(H, W)` or
    `(H, W, C)`, and its mask under the same name with `seg` for `img`, not zero where relevant. Of the paths in `file` the last part
    counts. Where no value of any split is below 0 and one is above 1, all are taken for 0 to 255, and larger ones refused. The clean test
    is the test with zeros outside the masks.

    Args:
        root: the folder.
        splits: what the training, validation and test splits are called. The shortcut should mislead in the last two.
        similar: a split of images like those of training, to choose settings on. None: with `flip`, the validation images as they are;
            else a fifth of the training images of each class, taken from them. It may be the validation split.
        flip: mirror the validation and test images sidewards, masks included. The founding paper's arrays (`distractor1`, `distractor2`,
            `distractor3`) are stored straight, and its code mirrors the last two while loading: that is their shift.
        sizes: how many images of each split to draw, each class alike, so at most as many; there (500, 128, 128). None: all.
        dilation: pixels by which masks are grown.
        seed: of what is drawn.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not as above, there are fewer images than `sizes` says, or a model would be tested on images that it was
            trained or chosen on.
    """
    root, generator = Path(root), Generator().manual_seed(seed)
    names = (*splits, similar) if similar is not None else splits
    if len(set(splits)) < 3 or similar in (splits[0], splits[2]):
        raise ValueError(
            f"{root}: {splits} with similar={similar!r} has one split twice. Name three; `similar` (--similar) may be the second."
        )
    train, valid, test, *others = _splits(root, names, dilation)
    classes = len(train.labels.unique())  # numbered from 0, and those of all splits: `_splits` refuses others
    if sizes is not None:
        parts = zip((train, valid, test), splits, sizes, strict=True)
        train, valid, test = (_some(part, f"{root}: {name}", size, generator) for part, name, size in parts)
    if similar is not None:
        (like_training,) = others
    elif flip:
        like_training = valid
    else:
        order = torch.randperm(len(train), generator=generator)
        # Of a class of two to four images one, of one none.
        held = first_of_each(train.labels[order], lambda count: max(count // 5, min(1, count - 1)))
        if not held.any():
            raise ValueError(
                f"{root}: {len(train)} training images are too few to hold a fifth back. Name a split with `similar=` (--similar)."
            )
        like_training, train = train.take(order[held]), train.take(order[~held])
    if flip:
        valid, test = valid.mirrored(), test.mirrored()
    clean = replace(test, images=ReplaceOutside()(test.images, test.masks))
    return Task(root.name, classes, train, like_training, valid, test, clean)


def digest(root: Path | str) -> str:
    """A hash of the tables and arrays in a folder, by which a record knows whether they have changed since."""
    found = hashlib.sha256()
    for path in sorted(path for path in Path(root).glob("*") if path.suffix.lower() in (".csv", ".npy")):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def _some(split: Split, name: str, size: int, generator: Generator) -> Split:
    """So many images, each class alike, in random order."""
    order = torch.randperm(len(split), generator=generator)
    classes = split.labels.unique().tolist()
    each = max(0, size) // len(classes)
    chosen = [order[split.labels[order] == label][:each] for label in classes]
    if not each or min(map(len, chosen)) < each:
        raise ValueError(f"{name} has not {size} images, each of its {len(classes)} classes alike. Ask for fewer, or for all with None.")
    index = torch.cat(chosen)
    return split.take(index[torch.randperm(len(index), generator=generator)])


def _splits(root: Path, names: Sequence[str], dilation: int) -> list[Split]:
    """The splits, scaled alike, whose images and classes are those of one task."""
    tables = {name: _table(root, name) for name in names}  # one may be named twice
    for name, own in product(names, (names[0], names[2])):
        if name != own and (shared := sorted({*tables[name][0]} & {*tables[own][0]})):
            raise ValueError(f"{root}: {shared[0]} is in {name} and in {own}, which must have images of its own. Take it out of one.")
    found = {name: _split(root, name, *tables[name], dilation) for name in names}
    parts = [found[name] for name in names]
    for name, part in found.items():
        if part.images.shape[1:] != parts[0].images.shape[1:]:
            raise ValueError(
                f"{root}: images of {name} are {tuple(part.images.shape[1:])}, but those of {names[0]} {tuple(parts[0].images.shape[1:])}, "
                "channels first. Save them alike."
            )
    if bool(parts[0].masks.all()):
        raise ValueError(
            f"{root}: all masks of {names[0]} are relevant everywhere, which leaves nothing to penalise. Save them with 0 where "
            "irrelevant, and without an alpha channel" + (f", or lower the dilation of {dilation}." if dilation else ".")
        )
    known = parts[0].labels.unique().tolist()
    seen = sorted({label for part in parts for label in part.labels.tolist()})
    if len(known) < 2:
        raise ValueError(f"{root}: {names[0]} has the class {known[0]} alone, which leaves nothing to learn. Add images of another.")
    if known != list(range(len(known))) or seen != known:
        raise ValueError(f"{root}: {names[0]} has the classes {known}, all splits {seen}. Number them from 0, all of them in {names[0]}.")
    low, high = min(float(part.images.min()) for part in parts), max(float(part.images.max()) for part in parts)
    if high > 255 and low >= 0:
        raise ValueError(f"{root}: images have values up to {high:g}, more than 8 bits hold. Scale them, for example to [0, 1].")
    return [replace(part, images=part.images / 255) if high > 1 and low >= 0 else part for part in parts]


def _table(root: Path, name: str) -> tuple[list[str], list[int]]:
    """The files and the classes of a split."""
    table = root / f"{name}_labels.csv"
    if not table.is_file():
        raise FileNotFoundError(f"{table} does not exist. Name the splits that there are, or write one row `file,class` an image into it.")
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:  # as Excel saves "CSV UTF-8"
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table} cannot be read: {error}. Save it as CSV in UTF-8.") from None
    if not rows or not {"file", "class"} <= rows[0].keys():
        raise ValueError(f"{table} must have the columns file and class, separated by commas, and a row an image. Write it so.")
    labels = []
    for row in rows:
        if not row["file"]:
            raise ValueError(f"{table} has a row without a file. Write one row `file,class` an image into it.")
        try:
            labels.append(_whole(row["class"]))
        except (TypeError, ValueError):
            raise ValueError(f"{table}: {row['file']} has the class {row['class']!r}. Write a number, from 0 on.") from None
    names = [row["file"].replace("\\", "/").rsplit("/", 1)[-1] for row in rows]
    if unnamed := [name for name in names if "img" not in name]:
        raise ValueError(f"{table}: {unnamed[0]} has no `img` in its name, so its mask, named `seg` there, cannot be found. Rename it.")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{table}: {twice[0]} is there twice, so a part that is held back would not be apart. Leave one row of it.")
    return names, labels


def _split(root: Path, name: str, files: Sequence[str], labels: Sequence[int], dilation: int) -> Split:
    images = _stacked([root / file for file in files])
    masks = _stacked([root / file.replace("img", "seg") for file in files]) != 0
    for kind, part in (("images", images), ("masks", masks)):  # columns would be taken for channels; a signal has a mask of its one row
        if part.dim() == 4 and part.shape[1] <= 4 < 16 < part.shape[3] and masks.shape[1:] != images.shape[1:3]:
            raise ValueError(
                f"{root}: {kind} of {name} are {tuple(part.shape[1:])}, which looks like (C, H, W). Save them as (H, W, C), or one channel "
                "as (H, W)."
            )
    images = images.unsqueeze(1) if images.dim() == 3 else images.movedim(-1, 1)
    if masks.dim() == 4:
        masks = masks.any(dim=-1)
    if masks.shape[1:] != images.shape[2:]:
        raise ValueError(
            f"{root}: masks of {name} are {tuple(masks.shape[1:])}, but images {tuple(images.shape[2:])}. Give masks of the images' size."
        )
    return Split(images, torch.tensor(labels), dilate(masks, dilation) if dilation else masks)


def _whole(text: str) -> int:
    """A class, which other programs may have written as 1.0."""
    number = float(text)
    if number < 0 or not number.is_integer():
        raise ValueError(text)
    return int(number)


def _stacked(paths: Sequence[Path]) -> Tensor:
    arrays = [_array(path) for path in paths]
    for path, array in zip(paths, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise ValueError(f"{path} is {array.shape}, but {paths[0].name} {arrays[0].shape}. Save all alike.")
    return torch.from_numpy(numpy.stack(arrays))


def _array(path: Path) -> numpy.typing.NDArray[numpy.float32]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist, though a table of labels names it, or its image. Put it there, or take its row out."
        )
    try:
        array: numpy.typing.NDArray[Any] = numpy.load(path)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:  # empty, cut off, pickled
        raise ValueError(f"{path} cannot be read: {error}. Save it with numpy.save, as numbers.") from None
    if not isinstance(array, numpy.ndarray):
        array.close()
        raise ValueError(f"{path} holds several arrays. Save each by numpy.save.")
    if array.ndim not in (2, 3):
        raise ValueError(f"{path} is {array.shape}, but an array must be (H, W) or (H, W, C). Save it so.")
    if array.dtype.kind not in "biuf" or not numpy.isfinite(array).all():
        raise ValueError(f"{path} has values that are not finite real numbers ({array.dtype}). Mend it, or take its row out.")
    return array.astype(numpy.float32)
