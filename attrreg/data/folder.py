"""Images in a folder for each class, each with its mask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from attrreg.data.sources import UNMASKED, BoxFile, MaskFolder, MaskSource, check_folder, opened, upright

if TYPE_CHECKING:
    from torchvision.tv_tensors import Image, Mask

Transforms = Callable[["Image", "Mask"], tuple[Tensor, Tensor]]


class Sample(NamedTuple):
    """An image with its mask, or, from PyTorch's `default_collate`, a batch of them: what `reg(model, x, mask, ...)` takes.

    Attributes:
        image: `(C, H, W)`; `(N, C, H, W)` in a batch.
        mask: `(H, W)`, 1 = relevant; `(N, H, W)`. True everywhere where nobody annotated, before transforms.
        label: the class; `(N,)`.
        annotated: whether there is a mask; `(N,)`, for `annotated=`. An image that was looked at and has nothing relevant
            is annotated, with an empty mask.
    """

    image: Tensor
    mask: Tensor
    label: Any
    annotated: Any


class MaskedImageFolder(Dataset[Sample]):
    """Images in a folder for each class, as torchvision's `ImageFolder` reads them, each with its mask.

    Image and mask are `tv_tensors`, so that `torchvision.transforms.v2` augments them together. A plain `DataLoader` makes batches:

        for x, mask, y, annotated in DataLoader(MaskedImageFolder("images", MaskFolder("masks"), transforms), batch_size=32):
            loss = F.cross_entropy(model(x), y) + reg(model, x, mask, target=y, annotated=annotated)

    A crop may leave the relevant region behind; the mask is then empty, which `LogOutside` accepts and `OutsideFraction` refuses.
    To leave such images out: `annotated & mask.flatten(1).any(1)`.

    Args:
        root: a folder with a subfolder for each class.
        masks: `MaskFolder(...)`, `BoxFile(...)`, or a source of your own.
        transforms: of image (uint8, `(3, H, W)`) and mask; returns both, the image as floats: `v2.ToDtype(torch.float32, scale=True)`.
        loader: reads an image file into anything that `v2.functional.to_image` takes. By default Pillow, as RGB, and turned upright as its
            EXIF data say, as the tools show it in which masks are drawn.

    Attributes:
        classes: the names of the classes, sorted.
        names: the image files, relative to `root`.
        targets: the class of each image.
        annotated: whether each image has a mask, `(len,)` bool.

    Raises:
        TypeError, ValueError: naming the argument: there are no images, none has a mask (then take torchvision's `ImageFolder`), several
            share one, masks lie among the images, or the transforms are of a kind that moves no masks.
    """

    def __init__(
        self, root: str | Path, masks: MaskSource, transforms: Transforms | None = None, loader: Callable[[Path], Any] | None = None
    ) -> None:
        if not isinstance(masks, MaskSource):
            raise TypeError(f"masks must be a data.MaskSource, got {masks!r}. Write MaskFolder('masks') or BoxFile('boxes.json').")
        check_folder("MaskedImageFolder", root)
        _check_transforms(transforms)
        self.root, self.masks, self.transforms, self.loader = Path(root), masks, transforms, loader or _rgb
        if isinstance(masks, MaskFolder) and Path(masks.root).resolve().is_relative_to(self.root.resolve()):
            raise ValueError(f"The masks in {masks.root} lie within the images of {root}, and would be taken for images. Move them out.")
        self.classes, self.names, self.targets = _images(self.root)
        self.annotated = torch.tensor([name in masks for name in self.names])
        if type(masks) is MaskFolder:  # a subclass may let images share one
            paths = Counter(masks.path(name) for name, known in zip(self.names, self.annotated.tolist(), strict=True) if known)
            if shared := [path for path, count in paths.items() if count > 1]:
                raise ValueError(f"{shared[0]} would be the mask of several images in {root}, alike but for the extension. Rename one.")
        if not self.annotated.any():
            found = _example(masks, self.names[0])
            raise ValueError(f"None of the {len(self)} images of {root} has a mask in {masks} {found}{UNMASKED}.")
        self._first = self.names[int(self.annotated.int().argmax())]

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _dtype(self) -> torch.dtype:
        """The type of all masks, also of those that stand for missing ones: a batch has one type. Reads the first annotated image."""
        height, width = self._image(self._first).shape[-2:]
        return self.masks(self._first, (height, width)).dtype

    def _image(self, name: PurePosixPath) -> Image:
        from torchvision.transforms.v2 import functional
        from torchvision.tv_tensors import Image

        return Image(functional.to_image(self.loader(self.root / name)))

    def __getitem__(self, index: int) -> Sample:
        """Read an image and its mask, and transform both.

        Raises:
            TypeError, ValueError: naming the file: it cannot be read, its mask does not fit it, or a transform lost that.
        """
        from torchvision.tv_tensors import Mask

        name, known = self.names[index], bool(self.annotated[index])
        image = self._image(name)
        size = (image.shape[-2], image.shape[-1])
        mask = Mask(self.masks(name, size) if known else torch.ones(size, dtype=self._dtype))
        if mask.shape != size:
            raise ValueError(f"{type(self.masks).__name__} gave {name}, {size}, a mask {tuple(mask.shape)}. Let it be of the image's size.")
        moved = (image, mask) if self.transforms is None else _moved(self.transforms, image, mask)
        if not isinstance(moved, (tuple, list)) or len(moved) != 2:
            raise TypeError(f"transforms returned a {type(moved).__name__} for {name} and its mask. Return both: image, mask.")
        moved_image, moved_mask = moved
        if not (hasattr(moved_image, "shape") and hasattr(moved_mask, "shape")):
            kinds = f"{type(moved_image).__name__} and {type(moved_mask).__name__}"
            raise TypeError(f"transforms returned {kinds} for {name} and its mask. Return tensors: end with v2.ToImage().")
        if moved_mask.shape[-2:] != moved_image.shape[-2:]:
            raise ValueError(
                f"transforms made {name} {tuple(moved_image.shape)} and its mask {tuple(moved_mask.shape)}. Use transforms of "
                "torchvision.transforms.v2, which move both alike."
            )
        return Sample(moved_image, moved_mask, self.targets[index], known)


def _check_transforms(transforms: Transforms | None) -> None:
    if type(transforms).__module__ == "torchvision.transforms.transforms":  # also what timm.data.create_transform makes
        raise TypeError(
            f"transforms is a {type(transforms).__name__} of torchvision.transforms, which moves an image without its mask. Use that of "
            "torchvision.transforms.v2."
        )


def _moved(transforms: Transforms, image: Image, mask: Mask) -> Any:
    try:
        return transforms(image, mask)
    except TypeError as error:
        if "Inputs of type Mask are not supported" not in str(error):
            raise
        raise TypeError(
            f"transforms move no masks: {error} RandAugment and its kind choose among transforms of which some move the image alone. "
            "Write out those that you want, as v2.RandomAffine and v2.ColorJitter."
        ) from error


def _rgb(path: Path) -> Any:
    with opened(path) as file:
        if file.mode.startswith(("I", "F")):  # Pillow would cut off at 255
            raise ValueError(f"{path} has more than 8 bits a value, which RGB has not. Give a loader= that scales them.")
        return upright(file).convert("RGB")


def _example(masks: MaskSource, name: PurePosixPath) -> str:
    if isinstance(masks, MaskFolder):
        return f"(for {name}: {masks.path(name)}). Check the paths and the suffix"
    if isinstance(masks, BoxFile) and masks.boxes:
        return f"(an image is {name}, and in the file {next(iter(masks.boxes))}). Give each `file_name` as the path below the image root"
    return f"(say {name}). Check the paths"


def _images(root: Path) -> tuple[list[str], list[PurePosixPath], list[int]]:
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    try:
        classes, indices = find_classes(root)
        found: Sequence[tuple[str, int]] = make_dataset(root, indices, IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise ValueError(f"{root}: {error} Give a folder with a subfolder of images for each class.") from None
    return classes, [PurePosixPath(Path(path).relative_to(root).as_posix()) for path, _ in found], [target for _, target in found]
