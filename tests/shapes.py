"""A small image folder: discs and plus signs on noise, with a coloured corner that tells the class, or is random."""

from __future__ import annotations

from pathlib import Path

import numpy
from numpy.typing import NDArray
from PIL import Image

SIZE = 32


def _draw(kind: int, numbers: numpy.random.Generator, corner_tells: bool) -> tuple[NDArray[numpy.uint8], NDArray[numpy.uint8]]:
    """An image `(SIZE, SIZE, 3)` and its mask, 255 on the shape."""
    shown = kind if corner_tells else numbers.integers(2)
    rows, columns = numpy.mgrid[:SIZE, :SIZE]
    row, column = numbers.integers(SIZE // 3, 2 * SIZE // 3 + 1, 2)
    across, down = abs(columns - column), abs(rows - row)
    disc = across**2 + down**2 <= 6**2
    plus = (numpy.minimum(across, down) <= 2) & (numpy.maximum(across, down) <= 8)
    shape = plus if kind else disc
    image = numbers.integers(60, 120, (SIZE, SIZE, 3))
    image[shape] += 80
    image[:5, :5] = (60, 60, 230) if shown else (230, 60, 60)
    return image.astype(numpy.uint8), (255 * shape).astype(numpy.uint8)


def write(root: Path, each: int, seed: int = 0, without_mask: int = 1, corner_tells: bool = True) -> None:
    """Write `root/images/CLASS/NUMBER.jpg` and `root/masks/CLASS/NUMBER.png`, the last few of each class without a mask."""
    numbers = numpy.random.default_rng(seed)
    for kind, name in enumerate(("disc", "plus")):
        for tree in ("images", "masks"):
            (root / tree / name).mkdir(parents=True)
        for number in range(each):
            image, mask = _draw(kind, numbers, corner_tells)
            Image.fromarray(image).save(root / "images" / name / f"{number:03}.jpg", quality=95)
            if number < each - without_mask:
                Image.fromarray(mask).save(root / "masks" / name / f"{number:03}.png")
