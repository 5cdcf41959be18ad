"""Your own data, as a folder of arrays in the layout of the founding paper's code."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy
import torch
from torch import Generator, Tensor

from attrreg.evidence.data import Split, Task, dilate
from attrreg.transforms import ReplaceOutside


def folder(
    root: Path | str,
    splits: tuple[str, str, str] = ("train", "valid", "test"),
    similar: str | None = None,
    dilation: int = 0,
    seed: int = 0,
) -> Task:
    """Read a task from arrays.

    The layout: `<split>_labels.csv` with the columns `file` and `class`, one row an image; beside it each image as `.npy`, `(H, W)` or
    `(H, W, C)`, and its mask under the same name with `seg` for `img`, not zero where relevant. Of the paths in `file` the last part
    counts. The clean test is the test with zeros outside the masks.

    Args:
        root: the folder.
        splits: what the training, validation and test splits are called. The shortcut should mislead in the last two.
        similar: a split of images like those of training, to choose settings on. None: a fifth of the training images, taken from them.
        dilation: pixels by which masks are grown.
        seed: of which images that fifth is.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not as above.
    """
    root = Path(root)
    train, valid, test = (_split(root, name, dilation) for name in splits)
    if similar is None:
        order = torch.randperm(len(train), generator=Generator().manual_seed(seed))
        held = len(train) // 5
        if not held:
            raise ValueError(f"{root}: {len(train)} training images are too few to hold a fifth back. Name a split with `similar=`.")
        like_training, train = train.take(order[:held]), train.take(order[held:])
    else:
        like_training = _split(root, similar, dilation)
    classes = 1 + max(int(split.labels.max()) for split in (train, like_training, valid, test))
    clean = replace(test, images=ReplaceOutside()(test.images, test.masks))
    return Task(root.name, classes, train, like_training, valid, test, clean)


def _split(root: Path, name: str, dilation: int) -> Split:
    table = root / f"{name}_labels.csv"
    if not table.is_file():
        raise FileNotFoundError(f"{table} does not exist. Name the splits that there are, or write one row `file,class` an image into it.")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"file", "class"} <= rows[0].keys():
        raise ValueError(f"{table} must have the columns file and class, and a row an image. Add them.")
    names = [row["file"].replace("\\", "/").rsplit("/", 1)[-1] for row in rows]
    images = torch.stack([_image(root / name) for name in names])
    masks = torch.stack([_array(root / name.replace("img", "seg")) for name in names]) != 0
    if masks.dim() == 4:
        masks = masks.any(dim=-1)
    if masks.shape[1:] != images.shape[2:]:
        raise ValueError(
            f"{table}: masks are {tuple(masks.shape[1:])}, but images {tuple(images.shape[2:])}. Give masks of the images' size."
        )
    labels = torch.tensor([int(float(row["class"])) for row in rows])
    return Split(images, labels, dilate(masks, dilation) if dilation else masks)


def _image(path: Path) -> Tensor:
    image = _array(path).float()
    image = image.unsqueeze(0) if image.dim() == 2 else image.movedim(-1, 0)
    return image / 255 if float(image.max()) > 1 else image


def _array(path: Path) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, though a table of labels names it. Put it there, or take its row out.")
    array = numpy.load(path)
    if array.ndim not in (2, 3):
        raise ValueError(f"{path} is {array.shape}, but an array must be (H, W) or (H, W, C). Save it so.")
    return torch.from_numpy(array)
