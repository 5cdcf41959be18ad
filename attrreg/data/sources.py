"""Where the masks of an image tree come from: a tree of mask images, or a file of boxes."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from attrreg.masks import from_boxes

if TYPE_CHECKING:
    import PIL.Image

ORIENTATION = 0x0112  # EXIF's tag
UNMASKED = ", or, for images of which none has a mask, take torchvision's ImageFolder"


class MaskSource(ABC):
    """Where the masks of an image tree come from. Images go by their path below its root, such as `cat/001.jpg`."""

    @abstractmethod
    def __contains__(self, name: object) -> bool:
        """Whether an image is annotated; `name` is a `PurePosixPath`."""

    @abstractmethod
    def __call__(self, name: PurePosixPath, size: tuple[int, int]) -> Tensor:
        """The mask `(H, W)` of an annotated image of that size, boolean or in [0, 1]: 1 = relevant."""


def nonzero(values: Tensor) -> Tensor:
    """Every value but 0 is relevant."""
    return values != 0


@dataclass(frozen=True)
class MaskFolder(MaskSource):
    """Mask images in a tree of the same shape: `cat/001.jpg` has its mask in `cat/001.png`.

    An image without such a file is not annotated. A mask that is 0 everywhere says that nothing in the image is relevant.

    Args:
        root: the folder.
        suffix: what follows the image's name without its extension, for example "_mask.png"; its extension also in capitals.
        relevant: from the file's values `(H, W)` (of a palette image its indices) to the mask, boolean or in [0, 1]. By default
            every value but 0 is relevant; `lambda values: values == 2` picks one region of a label map.

    Raises:
        ValueError: there is no such folder.
    """

    root: str | Path
    suffix: str = ".png"
    relevant: Callable[[Tensor], Tensor] = field(default=nonzero, repr=False)

    def __post_init__(self) -> None:
        check_folder("MaskFolder", self.root, UNMASKED)
        if not callable(self.relevant):
            raise TypeError(f"relevant must be a function of the values, got {self.relevant!r}. Write `lambda values: values == 255`.")

    def path(self, name: PurePosixPath) -> Path:
        """Where the mask of an image would be; its extension may be in capitals."""
        path = Path(self.root) / name.parent / (name.stem + self.suffix)
        capitals = path.with_suffix(path.suffix.upper())
        return capitals if capitals.is_file() and not path.is_file() else path

    def __contains__(self, name: object) -> bool:
        """Whether the file exists."""
        return isinstance(name, PurePosixPath) and self.path(name).is_file()

    def __call__(self, name: PurePosixPath, size: tuple[int, int]) -> Tensor:
        """Read the file.

        Raises:
            ValueError: naming the file: it cannot be read, has several channels, is a JPEG of which every value but 0 would be relevant, or
                has not the size of its image.
        """
        path = self.path(name)
        with opened(path) as file:
            lossy, turned = file.format == "JPEG", upright(file)
            found = numpy.array(turned.convert("L") if turned.mode == "1" else turned)  # of one bit: 0 and 255, as in other files
        if lossy and self.relevant is nonzero:
            raise ValueError(
                f"{path} is a JPEG, whose compression leaves few values at 0. Give relevant=, as `lambda values: values > 127`."
            )
        if found.dtype.kind == "u" and found.dtype.itemsize > 1:  # 16 bits: PyTorch compares few such types, and takes no other byte order
            found = found.astype(numpy.int64)
        values = torch.as_tensor(found)
        if values.dim() != 2:
            raise ValueError(f"{path} has {values.shape[-1]} channels, but a mask has one. Save it as a greyscale or palette image.")
        if tuple(values.shape) != size:
            raise ValueError(
                f"{path} is {tuple(values.shape)}, but its image is {size}, upright as EXIF data say. Bring them to one size, or read the "
                "images by a loader= of your own."
            )
        return self.relevant(values)


@dataclass(frozen=True)
class BoxFile(MaskSource):
    """Bounding boxes in a COCO-style JSON file: a pixel is relevant where any box of its image touches it.

    It reads `images` (`id`, `file_name`: the path below the image root, and `width` and `height` where they are given) and `annotations`
    (`image_id`, `bbox`: x, y, width, height in pixels). All boxes of an image count, whatever their category. An image that `images`
    lists without any box was looked at, and nothing in it is relevant. An image that it does not list is not annotated.

    Args:
        path: the file.

    Raises:
        ValueError: naming the file and the entry: it is not of that form, two images have one `id`, or a box is empty.
    """

    path: str | Path
    boxes: dict[PurePosixPath, list[tuple[float, ...]]] = field(init=False, repr=False, compare=False)
    sizes: dict[PurePosixPath, tuple[int, int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        boxes, sizes = _read_boxes(Path(self.path))
        object.__setattr__(self, "boxes", boxes)
        object.__setattr__(self, "sizes", sizes)

    def __contains__(self, name: object) -> bool:
        """Whether the file lists the image."""
        return name in self.boxes

    def __call__(self, name: PurePosixPath, size: tuple[int, int]) -> Tensor:
        """Draw the boxes.

        Raises:
            ValueError: a box lies outside its image, or the file gives that another size.
        """
        if self.sizes.get(name, size) != size:
            raise ValueError(
                f"{self.path}, {name}: its boxes are of an image of {self.sizes[name]}, but the file is {size}, upright as EXIF data say. "
                "Scale the boxes, or read the images by a loader= of your own."
            )
        try:
            return from_boxes([self.boxes[name]], size)[0]
        except ValueError as error:
            raise ValueError(f"{self.path}, {name}: {error}") from None


@contextmanager
def opened(path: Path) -> Iterator[PIL.Image.Image]:
    """An image file, read.

    Raises:
        ValueError: naming the file: it cannot be read.
    """
    from PIL import Image

    with ExitStack() as entered:
        try:
            file = entered.enter_context(Image.open(path))
            file.load()
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's for broken files, too
            raise ValueError(f"{path} cannot be read: {error}. Replace it, or take it out.") from error
        yield file


def upright(file: PIL.Image.Image) -> PIL.Image.Image:
    """The image as its EXIF data say that it is to be shown. Pillow's own `exif_transpose` fails on other tags that are broken."""
    from PIL.Image import Transpose as To

    ways = To.FLIP_LEFT_RIGHT, To.ROTATE_180, To.FLIP_TOP_BOTTOM, To.TRANSPOSE, To.ROTATE_270, To.TRANSVERSE, To.ROTATE_90
    try:
        orientation: Any = file.getexif().get(ORIENTATION)
        way = dict(enumerate(ways, start=2)).get(orientation)
    except Exception:  # broken data say nothing; of what kind the error is depends on how they are broken
        way = None
    return file if way is None else file.transpose(way)


def check_folder(who: str, root: str | Path, remedy: str = "") -> None:
    """Check that there is a folder; `who` asks for it.

    Raises:
        ValueError: there is none.
    """
    if not Path(root).is_dir():
        raise ValueError(f"{who}: there is no folder {root}. Give the path of one{remedy}.")


def _read_boxes(path: Path) -> tuple[dict[PurePosixPath, list[tuple[float, ...]]], dict[PurePosixPath, tuple[int, int]]]:
    """The boxes of each image, and the sizes of those whose size is given."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        images = {(image["id"], PurePosixPath(image["file_name"])) for image in content["images"]}
        if len(names := dict(images)) < len(images):
            raise ValueError("two images have one id")
        sized = [image for image in content["images"] if image.get("height") and image.get("width")]
        sizes = {PurePosixPath(image["file_name"]): (int(image["height"]), int(image["width"])) for image in sized}
        listed = [(entry["image_id"], tuple(map(float, entry["bbox"]))) for entry in content["annotations"]]
        found = [(names.get(number), number, box) for number, box in listed]
    except OSError as error:
        raise ValueError(f"BoxFile: {path} cannot be read ({error.strerror}). Give the path of a JSON file.") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a COCO-style file: {type(error).__name__} {error}. Give `images` with `id` and `file_name`, and `annotations` "
            "with `image_id` and `bbox`."
        ) from None
    boxes: dict[PurePosixPath, list[tuple[float, ...]]] = {name: [] for name in names.values()}
    for name, number, box in found:
        if name is None:
            raise ValueError(f"{path}: an annotation is of the image {number!r}, which `images` does not list. Add it, or leave that out.")
        if len(box) != 4 or not all(map(math.isfinite, box)) or min(box[2:]) <= 0:
            raise ValueError(f"{path}: {name} has the box {list(box)}. Give x, y, width and height in pixels, the last two above 0.")
        boxes[name].append((box[0], box[1], box[0] + box[2], box[1] + box[3]))
    return boxes, sizes
