"""A small image folder: discs and plus signs on noise, with a coloured corner that tells the class, or is random."""

from __future__ import annotations

from pathlib import Path

import numpy
from numpy.typing import NDArray
from PIL import Image

SIZE = 32
CLASSES = ("disc", "plus")


def draw(
    kind: int, numbers: numpy.random.Generator, size: int = SIZE, corner_tells: bool = True
) -> tuple[NDArray[numpy.uint8], NDArray[numpy.uint8]]:
    """An image `(size, size, 3)` and its mask, 255 on the shape."""
    shown = kind if corner_tells else numbers.integers(2)
    rows, columns = numpy.mgrid[:size, :size]
    row, column = numbers.integers(size // 3, 2 * size // 3 + 1, 2)
    across, down = abs(columns - column), abs(rows - row)
    shape = (
        across**2 + down**2 <= (size // 5) ** 2
        if kind == 0
        else (numpy.minimum(across, down) <= size // 16) & (numpy.maximum(across, down) <= size // 4)
    )
    image = numbers.integers(60, 120, (size, size, 3))
    image[shape] += 80
    image[: size // 6, : size // 6] = (230, 60, 60) if shown == 0 else (60, 60, 230)
    return image.astype(numpy.uint8), (255 * shape).astype(numpy.uint8)


def write(root: Path, each: int, seed: int = 0, without_mask: int = 1, size: int = SIZE, corner_tells: bool = True) -> None:
    """Write `root/images/CLASS/NUMBER.jpg` and `root/masks/CLASS/NUMBER.png`, the last few of each class without a mask."""
    numbers = numpy.random.default_rng(seed)
    for kind, name in enumerate(CLASSES):
        for tree in ("images", "masks"):
            (root / tree / name).mkdir(parents=True)
        for number in range(each):
            image, mask = draw(kind, numbers, size, corner_tells)
            Image.fromarray(image).save(root / "images" / name / f"{number:03}.jpg", quality=95)
            if number < each - without_mask:
                Image.fromarray(mask).save(root / "masks" / name / f"{number:03}.png")
