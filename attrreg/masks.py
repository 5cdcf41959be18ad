"""The mask contract: 1 (True) = relevant, 0 = irrelevant, values between are soft.

A mask is `(N, H, W)`, `(N, 1, H, W)` or `(H, W)` (one mask for the whole batch), boolean or floating point, of any
size: it is resized to the map that it judges. An image without annotation is said with `annotated=`, and is not the
same as an image whose mask is empty: the first is left out of every mean, the second says that nothing is relevant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attrreg.ops.precision import compute_dtype
from attrreg.settings import is_integer


def at_least_float32(value: Tensor) -> Tensor:
    """A tensor in the dtype that penalties are computed in."""
    return value.to(compute_dtype(value))


@dataclass(frozen=True)
class AllRanks:
    """The images of all ranks: how many are annotated, how many there are, on how many ranks."""

    count: Tensor
    batch: Tensor
    ranks: int


@dataclass(frozen=True)
class Annotation:
    """A checked mask.

    Attributes:
        relevant: `(N, 1, H, W)` in [0, 1], on the device of `x`; ones for the images without annotation.
        annotated: boolean `(N,)`.
        count: number of annotated images; where this is a `part`, still that of the whole batch.
        batch: number of images, likewise.
        all: these numbers over all ranks of a distributed run; None: this process is alone.
    """

    relevant: Tensor
    annotated: Tensor
    count: int
    batch: int
    all: AllRanks | None = None

    def mean(self, per_image: Tensor, reduction: str) -> Tensor:
        """Reduce a penalty `(N,)` over the annotated images; exactly 0, still connected, when there are none.

        On several ranks the sum is divided by the count of all, and multiplied by their number, by which DDP and FSDP2 divide gradients.
        """
        mean = torch.where(self.annotated, per_image, 0).sum() / self.annotated.sum().clamp(min=1)
        if self.all is None:
            return mean if reduction == "mean" else mean * (self.count if reduction == "sum" else self.count / self.batch)
        total = mean * (self.count * self.all.ranks)
        if reduction == "sum":
            return total
        return total / (self.all.count if reduction == "mean" else self.all.batch).clamp(min=1).to(total.dtype)

    def part(self, indices: Tensor) -> Annotation:
        """The annotation of some of the images, which stand for the whole batch: its counts are kept."""
        return replace(self, relevant=self.relevant[indices], annotated=self.annotated[indices])


def check(mask: Tensor, x: Tensor, annotated: Tensor | None, needs_region: str | None = None) -> Annotation:
    """Check a mask against the images and bring it to its canonical form.

    Args:
        mask: the user's mask.
        x: images `(N, C, H, W)`.
        annotated: boolean `(N,)`, or None: every image is annotated.
        needs_region: who is undefined for a mask without any relevant pixel, for the message; None: nobody.

    Raises:
        TypeError, ValueError: naming `mask` or `annotated`, with the remedy.
    """
    relevant = _canonical(mask, x)
    flags = checked_flags(annotated, x)
    pixels = relevant.flatten(1)
    low, high = pixels.amin(1), pixels.amax(1)  # NaN where there is one
    # A blurred or resized mask is 1 + 1e-7 somewhere, and 1 - 1e-7: relevant, where `baselines.Shuffle` would mix it with what is not.
    slack = min(32 * torch.finfo(mask.dtype).eps, 0.01) if mask.is_floating_point() else 0.0
    # One transfer to the host for all checks of values: each would otherwise wait for the device by itself.
    bad, empty = flags & ~((low >= -slack) & (high <= 1 + slack)), flags & (high <= slack)
    has_bad, has_empty, count = torch.stack([bad.any(), empty.any(), flags.sum()]).tolist()
    if has_bad:
        raise ValueError(
            "mask has values that are NaN or outside [0, 1]. Scale it (for example `mask / 255`), write `mask == label` for a map of "
            "labels, or say which images have no annotation with `annotated=`."
        )
    if has_empty and needs_region is not None:
        first = int(empty.nonzero()[0])
        raise ValueError(
            f"mask of image {first} has no relevant pixel, and {needs_region} is undefined without one. Leave the image out "
            "with `annotated=`, or give a term that has an objective one that accepts empty masks, as objectives.LogOutside()."
        )
    relevant = torch.where(relevant >= 1 - slack, 1, relevant.clamp(min=0)) if slack else relevant
    return Annotation(torch.where(flags.view(-1, 1, 1, 1), relevant, 1), flags, count, x.shape[0])


def _canonical(mask: Tensor, x: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        remedy = "Convert it, for example with torch.as_tensor(numpy.array(mask))."
        if mask is None or (isinstance(mask, (list, tuple)) and all(part is None or isinstance(part, Tensor) for part in mask)):
            remedy = "Stack the images' masks: torch.stack(masks). Where an image has none, put any mask, and say so with `annotated=`."
        if mask is None:
            remedy += " For a penalty on whole images, with nothing relevant, pass torch.zeros(H, W, dtype=torch.bool)."
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}. {remedy}")
    if mask.dim() < 2:
        raise ValueError(
            f"mask must be (N, H, W), (N, 1, H, W) or (H, W), got {tuple(mask.shape)}. Pass a map of pixels; labels go by name: target=."
        )
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"mask must be boolean or floating point, got {mask.dtype}. Write `mask > 0`, or `mask == label` for a map of labels."
        )
    shape, n = tuple(mask.shape), x.shape[0]
    if mask.dim() == 2:
        mask = mask.expand(n, *shape)
    if mask.dim() == 3:
        mask = mask.unsqueeze(1)
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise ValueError(f"mask must be (N, H, W), (N, 1, H, W) or (H, W), got {shape}. Drop or reduce the other axes.")
    if mask.shape[0] != n:
        raise ValueError(
            f"mask is for {mask.shape[0]} images, but the batch has {n} (mask {shape}). Pass one mask an image, or one (H, W) for all."
        )
    if 0 in mask.shape[2:]:
        raise ValueError(f"mask is empty: its shape is {shape}. Pass a mask with at least one pixel.")
    return mask.detach().to(device=x.device, dtype=compute_dtype(x))


def checked_flags(annotated: Tensor | None, x: Tensor) -> Tensor:
    """Which images are annotated, `(N,)`; `annotated`: boolean `(N,)`, or None: all.

    Raises:
        TypeError, ValueError: naming `annotated`.
    """
    n = x.shape[0]
    if annotated is None:
        return torch.ones(n, dtype=torch.bool, device=x.device)
    if not isinstance(annotated, Tensor) or annotated.dtype is not torch.bool:
        kind = annotated.dtype if isinstance(annotated, Tensor) else type(annotated).__name__
        raise TypeError(f"annotated must be a boolean tensor, got {kind}. Write torch.tensor([...], dtype=torch.bool).")
    if annotated.shape != (n,):
        raise ValueError(f"annotated must be ({n},), one flag an image, got {tuple(annotated.shape)}. Reshape it.")
    return annotated.to(x.device, copy=True)  # a graph keeps it: not what was made under inference_mode, or will be written to


def resize(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a canonical mask `(N, 1, H, W)` to a map's size, by area.

    Downwards every cell is the mean of the pixels it covers, so a thin region becomes soft and never vanishes;
    upwards pixels are repeated (averaged with a neighbour where the sizes do not divide).
    """
    height, width = size
    if mask.shape[-2:] == (height, width):
        return mask
    mask = mask if mask.is_floating_point() else mask.float()
    if mask.device.type == "mps":  # which pools only where the sizes divide
        return F.adaptive_avg_pool2d(mask.cpu(), (height, width)).to(mask.device)
    return F.adaptive_avg_pool2d(mask, (height, width))


def from_boxes(boxes: Sequence[Tensor | Sequence[Tensor | Sequence[float]] | None], size: Sequence[int]) -> Tensor:
    """Masks from bounding boxes: a pixel is relevant where any box of its image touches it.

    Args:
        boxes: one entry an image: `(K, 4)` boxes as (x1, y1, x2, y2) in pixels, x2 and y2 exclusive (the format of
            torchvision's `BoundingBoxFormat.XYXY`). An image with no box (`[]`) gets an empty mask: nothing is relevant.
            None stands for an image without annotation: its mask is all True, and it must also be left out with
            `annotated=torch.tensor([b is not None for b in boxes])`.
        size: `(H, W)` of the masks.

    Returns:
        Boolean `(N, H, W)`.

    Raises:
        TypeError: naming the entry of `boxes`: a mapping, a text, or nothing that has boxes.
        ValueError: naming `size` or the entry of `boxes`: not `(K, 4)`, in another format, or a box is empty, not finite or outside.
    """
    if not (isinstance(size, Sequence) and len(size) == 2 and all(map(is_integer, size))):
        raise ValueError(f"size must be (H, W), got {size!r}. Give the height and width of the images in pixels.")
    height, width = size
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for index, entry in enumerate(boxes):
        if entry is None:
            masks[index] = True
            continue
        for x1, y1, x2, y2 in _checked_boxes(f"boxes[{index}]", entry, height, width):
            masks[index, max(0, math.floor(y1)) : math.ceil(y2), max(0, math.floor(x1)) : math.ceil(x2)] = True
    return masks


def _checked_boxes(name: str, entry: Tensor | Sequence[Tensor | Sequence[float]], height: int, width: int) -> list[list[float]]:
    """The boxes of an image of that size."""
    if isinstance(entry, (str, Mapping)) or not hasattr(entry, "__iter__"):
        raise TypeError(f"{name} is a {type(entry).__name__}, but the boxes of one image are (K, 4). Take them out, as target['boxes'].")
    parts = [entry] if isinstance(entry, Tensor) else list(entry)  # once: it may be an iterator
    for part in parts:  # torchvision's `BoundingBoxes` say more
        form = str(getattr(getattr(part, "format", "XYXY"), "value", "XYXY"))
        if form != "XYXY":
            raise ValueError(f"{name} are {form}, not (x1, y1, x2, y2). Convert them: v2.ConvertBoundingBoxFormat('XYXY').")
        rows, columns = getattr(part, "canvas_size", (0, 0))
        if rows > height or columns > width:  # smaller ones may have been padded
            raise ValueError(f"{name} are of an image of {(rows, columns)}, but size={(height, width)}. Scale them with their image.")
    try:
        corners = [torch.as_tensor(box, dtype=torch.float64, device="cpu").tolist() for box in parts]
        listed = torch.as_tensor(corners[0] if isinstance(entry, Tensor) else corners, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} are no boxes: {error}. Give (x1, y1, x2, y2) a box.") from error
    if listed.numel() % 4 or (listed.numel() and listed.shape[-1] != 4):
        raise ValueError(f"{name} has the shape {tuple(listed.shape)}, but boxes are (K, 4). Give (x1, y1, x2, y2) a box.")
    boxes: list[list[float]] = listed.reshape(-1, 4).tolist()
    for x1, y1, x2, y2 in boxes:
        if not (-math.inf < x1 < x2 < math.inf and -math.inf < y1 < y2 < math.inf and x2 > 0 and y2 > 0 and x1 < width and y1 < height):
            raise ValueError(
                f"{name} has the box {[x1, y1, x2, y2]}, which is not finite, empty or outside an image of {height} x {width}. Give "
                "(x1, y1, x2, y2) in pixels with x1 < x2 and y1 < y2."
            )
    return boxes
