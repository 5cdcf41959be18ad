"""Images with masks: a data set over folders, and masks that follow mixed images. Needs torchvision, which timm brings."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from attrreg.masks import checked_flags, from_boxes, penalty_dtype

if TYPE_CHECKING:
    from torchvision.tv_tensors import Image, Mask

Transforms = Callable[["Image", "Mask"], tuple[Tensor, Tensor]]
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
UNMASKED = ", or, for images of which none has a mask, take torchvision's ImageFolder"


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
        suffix: what follows the image's name without its extension, for example "_mask.png".
        relevant: from the file's values `(H, W)` (of a palette image its indices) to the mask, boolean or in [0, 1]. By default
            every value but 0 is relevant; `lambda values: values == 2` picks one region of a label map.

    Raises:
        ValueError: there is no such folder.
    """

    root: str | Path
    suffix: str = ".png"
    relevant: Callable[[Tensor], Tensor] = field(default=nonzero, repr=False)

    def __post_init__(self) -> None:
        _check_folder("MaskFolder", self.root, UNMASKED)

    def path(self, name: PurePosixPath) -> Path:
        """Where the mask of an image would be."""
        return Path(self.root) / name.parent / (name.stem + self.suffix)

    def __contains__(self, name: object) -> bool:
        """Whether the file exists."""
        return isinstance(name, PurePosixPath) and self.path(name).is_file()

    def __call__(self, name: PurePosixPath, size: tuple[int, int]) -> Tensor:
        """Read the file.

        Raises:
            ValueError: naming the file: it has several channels, or not the size of its image.
        """
        from PIL import Image

        path = self.path(name)
        with Image.open(path) as file:
            found = numpy.array(file)
        if found.dtype.kind == "u" and found.dtype.itemsize > 1:  # 16 bits: PyTorch compares few such types, and takes no other byte order
            found = found.astype(numpy.int64)
        values = torch.as_tensor(found)
        if values.dim() != 2:
            raise ValueError(f"{path} has {values.shape[-1]} channels, but a mask has one. Save it as a greyscale or palette image.")
        if tuple(values.shape) != size:
            raise ValueError(f"{path} is {tuple(values.shape)}, but its image is {size}. Bring them to one size.")
        return self.relevant(values)


@dataclass(frozen=True)
class BoxFile(MaskSource):
    """Bounding boxes in a COCO-style JSON file: a pixel is relevant where any box of its image touches it.

    It reads `images` (`id`, `file_name`: the path below the image root) and `annotations` (`image_id`, `bbox`: x, y, width,
    height in pixels). All boxes of an image count, whatever their category. An image that `images` lists without any
    box was looked at, and nothing in it is relevant. An image that it does not list is not annotated.

    Args:
        path: the file.

    Raises:
        ValueError: naming the file and the entry: it is not of that form, two images have one `id`, or a box is empty.
    """

    path: str | Path
    boxes: dict[PurePosixPath, list[tuple[float, ...]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "boxes", _read_boxes(Path(self.path)))

    def __contains__(self, name: object) -> bool:
        """Whether the file lists the image."""
        return name in self.boxes

    def __call__(self, name: PurePosixPath, size: tuple[int, int]) -> Tensor:
        """Draw the boxes.

        Raises:
            ValueError: a box lies outside its image.
        """
        try:
            return from_boxes([self.boxes[name]], size)[0]
        except ValueError as error:
            raise ValueError(f"{self.path}, {name}: {error}") from None


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
        loader: reads an image file into anything that `v2.functional.to_image` takes. By default Pillow, as RGB.

    Attributes:
        classes: the names of the classes, sorted.
        names: the image files, relative to `root`.
        targets: the class of each image.
        annotated: whether each image has a mask, `(len,)` bool.

    Raises:
        TypeError, ValueError: naming the argument: there are no images, none has a mask (then take torchvision's `ImageFolder`), masks lie
            among the images, or the transforms are of a kind that moves no masks.
    """

    def __init__(
        self, root: str | Path, masks: MaskSource, transforms: Transforms | None = None, loader: Callable[[Path], Any] | None = None
    ) -> None:
        from torchvision.datasets.folder import pil_loader

        if not isinstance(masks, MaskSource):
            raise TypeError(f"masks must be a data.MaskSource, got {masks!r}. Write MaskFolder('masks') or BoxFile('boxes.json').")
        _check_folder("MaskedImageFolder", root)
        _check_transforms(transforms)
        self.root, self.masks, self.transforms, self.loader = Path(root), masks, transforms, loader or pil_loader
        if isinstance(masks, MaskFolder) and Path(masks.root).resolve().is_relative_to(self.root.resolve()):
            raise ValueError(f"The masks in {masks.root} lie within the images of {root}, and would be taken for images. Move them out.")
        self.classes, self.names, self.targets = _images(self.root)
        self.annotated = torch.tensor([name in masks for name in self.names])
        if not self.annotated.any():
            found = _example(masks, self.names[0])
            raise ValueError(f"None of the {len(self)} images of {root} has a mask in {masks} {found}{UNMASKED}.")

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _dtype(self) -> torch.dtype:
        """The type of all masks, also of those that stand for missing ones: a batch has one type. Reads the first annotated image."""
        name = self.names[int(self.annotated.int().argmax())]
        height, width = self._image(name).shape[-2:]
        return self.masks(name, (height, width)).dtype

    def _image(self, name: PurePosixPath) -> Image:
        from torchvision.transforms.v2 import functional
        from torchvision.tv_tensors import Image

        return Image(functional.to_image(self.loader(self.root / name)))

    def __getitem__(self, index: int) -> Sample:
        """Read an image and its mask, and transform both.

        Raises:
            TypeError, ValueError: naming the file: the mask does not fit its image, or a transform lost it.
        """
        from torchvision.tv_tensors import Mask

        name, known = self.names[index], bool(self.annotated[index])
        image = self._image(name)
        size = (image.shape[-2], image.shape[-1])
        mask = Mask(self.masks(name, size) if known else torch.ones(size, dtype=self._dtype))
        if mask.shape != size:
            raise ValueError(f"{type(self.masks).__name__} gave {name}, {size}, a mask {tuple(mask.shape)}. Let it be of the image's size.")
        moved = (image, mask) if self.transforms is None else self.transforms(image, mask)
        if not isinstance(moved, (tuple, list)) or len(moved) != 2:
            raise TypeError(f"transforms returned a {type(moved).__name__} for {name} and its mask. Return both: image, mask.")
        moved_image, moved_mask = moved
        if moved_mask.shape[-2:] != moved_image.shape[-2:]:
            raise ValueError(
                f"transforms made {name} {tuple(moved_image.shape)} and its mask {tuple(moved_mask.shape)}. Use transforms of "
                "torchvision.transforms.v2, which move both alike."
            )
        return Sample(moved_image, moved_mask, self.targets[index], known)


class WithMasks:
    """Let masks follow a mix of images: torchvision's `CutMix` and `MixUp`, timm's `Mixup`.

    Those change `x` and leave the mask as it was, which is then wrong without an error. Here each image's mask and whether it is
    annotated go through the mix as further channels of the image:

    - where a box was pasted, so were the mask's pixels;
    - where images were blended, a pixel is relevant if it is in any of them: only what is irrelevant in all is penalised;
    - the result is annotated if every image that it was made of is.

    Labels become soft, `(N, classes)`. Cross-entropy takes them, and so does `target=`: the default score is then the logits of both
    classes, weighted by their shares (`MultiLabelLogit`).

        mix = WithMasks(v2.CutMix(num_classes=10))
        loader = DataLoader(data, batch_size=32, collate_fn=mix.collate)

    Args:
        mix: called with images and labels, returns both; must treat all channels alike.
    """

    def __init__(self, mix: Mix) -> None:
        self.mix = mix

    def __call__(self, batch: Sample) -> Sample:
        """Mix a batch.

        Raises:
            TypeError, ValueError: images are integers, masks are soft or not of the images' size, or the mix changes their shape or type.
        """
        x, mask, label, annotated = batch
        if not x.is_floating_point():
            raise TypeError(f"image must be floating point to be mixed, got {x.dtype}. Add v2.ToDtype(torch.float32, scale=True).")
        if mask.dtype is not torch.bool:
            raise TypeError(f"mask must be boolean to be mixed, got {mask.dtype}. Threshold it, for example mask > 0.5.")
        if mask.shape != (x.shape[0], *x.shape[2:]):
            raise ValueError(f"mask must be {(x.shape[0], *x.shape[2:])}, as the images, to be mixed; got {tuple(mask.shape)}. Resize it.")
        known = checked_flags(annotated, x).view(-1, 1, 1).expand_as(mask)
        # In float32 at least: in half precision a blend with little of another image would be rounded to none.
        wide = x.to(penalty_dtype(x.dtype))
        stacked = torch.cat([wide, torch.stack([mask & known, known], dim=1).to(wide)], dim=1)
        mixed, labels = self.mix(stacked, label)
        if mixed.shape != stacked.shape or mixed.dtype != wide.dtype:  # timm's FastCollateMixup rounds to integers
            raise TypeError(
                f"{type(self.mix).__name__} made {mixed.dtype} {tuple(mixed.shape)} of {wide.dtype} {tuple(stacked.shape)}, in which masks "
                "are lost. Use CutMix or MixUp of torchvision.transforms.v2, or timm.data.Mixup."
            )
        images, relevant, share = mixed[:, :-2], mixed[:, -2] > 0, mixed[:, -1]
        whole = share.flatten(1).amin(dim=1) > 1 - 4 * torch.finfo(torch.float32).eps  # shares of a blend add up to 1 but for rounding
        return Sample(images.to(x.dtype).contiguous(), relevant | ~whole.view(-1, 1, 1), labels, whole)

    def collate(self, samples: list[Sample]) -> Sample:
        """Mix the batch that `default_collate` makes of samples: a loader's `collate_fn` that any worker process can be given."""
        return self(default_collate(samples))

    def __repr__(self) -> str:
        return f"attrreg.data.WithMasks({self.mix!r})"


def _check_folder(who: str, root: str | Path, remedy: str = "") -> None:
    if not Path(root).is_dir():
        raise ValueError(f"{who}: there is no folder {root}. Give the path of one{remedy}.")


def _check_transforms(transforms: Transforms | None) -> None:
    if type(transforms).__module__ == "torchvision.transforms.transforms":  # also what timm.data.create_transform makes
        raise TypeError(
            f"transforms is a {type(transforms).__name__} of torchvision.transforms, which moves an image without its mask. Use that of "
            "torchvision.transforms.v2."
        )


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


def _read_boxes(path: Path) -> dict[PurePosixPath, list[tuple[float, ...]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        images = {(image["id"], PurePosixPath(image["file_name"])) for image in content["images"]}
        if len(names := dict(images)) < len(images):
            raise ValueError("two images have one id")
        found = [(names[entry["image_id"]], tuple(map(float, entry["bbox"]))) for entry in content["annotations"]]
    except OSError as error:
        raise ValueError(f"BoxFile: {path} cannot be read ({error.strerror}). Give the path of a JSON file.") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a COCO-style file: {type(error).__name__} {error}. Give `images` with `id` and `file_name`, and `annotations` "
            "with `image_id` and `bbox`."
        ) from None
    boxes: dict[PurePosixPath, list[tuple[float, ...]]] = {name: [] for name in names.values()}
    for name, box in found:
        if len(box) != 4 or not all(map(math.isfinite, box)) or min(box[2:]) <= 0:
            raise ValueError(f"{path}: {name} has the box {list(box)}. Give x, y, width and height in pixels, the last two above 0.")
        boxes[name].append((box[0], box[1], box[0] + box[2], box[1] + box[3]))
    return boxes
