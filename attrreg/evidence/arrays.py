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
    *,
    flip: bool = False,
    sizes: tuple[int, int, int] | None = None,
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
        similar: a split of images like those of training, to choose settings on. None: with `flip`, the validation images as they are;
            else a fifth of the training images, taken from them.
        flip: mirror the validation and test images sidewards, masks included. The founding paper's arrays (`distractor1`, `distractor2`,
            `distractor3`) are stored straight, and its code mirrors the last two while loading: that is their shift.
        sizes: how many images of each split to draw, each class alike; there (500, 128, 128). None: all.
        dilation: pixels by which masks are grown.
        seed: of what is drawn.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not as above, or there are fewer images than `sizes` says.
    """
    root, generator = Path(root), Generator().manual_seed(seed)
    train, valid, test = (_split(root, name, dilation) for name in splits)
    if sizes is not None:
        parts = zip((train, valid, test), splits, sizes, strict=True)
        train, valid, test = (_some(part, f"{root}: {name}", size, generator) for part, name, size in parts)
    if similar is not None:
        like_training = _split(root, similar, dilation)
    elif flip:
        like_training = valid
    else:
        order = torch.randperm(len(train), generator=generator)
        held = len(train) // 5
        if not held:
            raise ValueError(
                f"{root}: {len(train)} training images are too few to hold a fifth back. Name a split with `similar=` (--similar)."
            )
        like_training, train = train.take(order[:held]), train.take(order[held:])
    if flip:
        valid, test = (replace(part, images=part.images.flip(-1), masks=part.masks.flip(-1)) for part in (valid, test))
    classes = 1 + max(int(part.labels.max()) for part in (train, like_training, valid, test))
    clean = replace(test, images=ReplaceOutside()(test.images, test.masks))
    return Task(root.name, classes, train, like_training, valid, test, clean)


def _some(split: Split, name: str, size: int, generator: Generator) -> Split:
    """So many images, each class alike, in random order."""
    order = torch.randperm(len(split), generator=generator)
    classes = split.labels.unique().tolist()
    each = size // len(classes)
    chosen = [order[split.labels[order] == label][:each] for label in classes]
    if not each or min(map(len, chosen)) < each:
        raise ValueError(f"{name} has not {size} images, each of its {len(classes)} classes alike. Ask for fewer, or for all with None.")
    index = torch.cat(chosen)
    return split.take(index[torch.randperm(len(index), generator=generator)])


def _split(root: Path, name: str, dilation: int) -> Split:
    table = root / f"{name}_labels.csv"
    if not table.is_file():
        raise FileNotFoundError(f"{table} does not exist. Name the splits that there are, or write one row `file,class` an image into it.")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"file", "class"} <= rows[0].keys():
        raise ValueError(f"{table} must have the columns file and class, and a row an image. Add them.")
    names = [row["file"].replace("\\", "/").rsplit("/", 1)[-1] for row in rows]
    if unnamed := [name for name in names if "img" not in name]:
        raise ValueError(f"{table}: {unnamed[0]} has no `img` in its name, so its mask, named `seg` there, cannot be found. Rename it.")
    images = _scaled(torch.stack([_image(root / name) for name in names]))
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
    return image.unsqueeze(0) if image.dim() == 2 else image.movedim(-1, 0)


def _scaled(images: Tensor) -> Tensor:
    """All images of a split alike: values above 1, with none below 0, are taken for 0 to 255."""
    return images / 255 if float(images.max()) > 1 and float(images.min()) >= 0 else images


def _array(path: Path) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, though a table of labels names it. Put it there, or take its row out.")
    array = numpy.load(path)
    if array.ndim not in (2, 3):
        raise ValueError(f"{path} is {array.shape}, but an array must be (H, W) or (H, W, C). Save it so.")
    return torch.from_numpy(array)
