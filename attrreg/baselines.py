"""Images made from an image: where a path starts, and what an image's irrelevant part is filled with.

Each is `(x, mask, generator) -> image`, of the shape of `x`. `mask` is canonical (`(N, 1, H, W)`, 1 = relevant, any
size) or None; `generator` lies on the device of `x`, and only those with `draws = True` use it.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attrreg import masks
from attrreg.settings import brief, is_number, is_real
from attrreg.spec import Key, public_path


class Baseline(Key, ABC):
    """An image made from an image.

    Subclasses implement `__call__`; set `draws` if they draw from the generator, and `needs_mask` if they read the mask.
    """

    draws: ClassVar[bool] = False
    needs_mask: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        """Make the image `(N, C, H, W)` from `x` `(N, C, H, W)`."""


@dataclass(frozen=True, repr=False)
class Zero(Baseline):
    """Zeros: the mean colour, for images that were normalised."""

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        """Zeros like `x`."""
        return torch.zeros_like(x)


@dataclass(frozen=True, eq=False, repr=False)
class Fixed(Baseline):
    """A given image, or one for each image of the batch: any tensor that broadcasts to the shape of `x`.

    Args:
        image: the tensor. Two of these are equal when their tensors are.

    Raises:
        ValueError: the tensor is empty or not finite; in a call, it does not broadcast to `x`.
    """

    image: Tensor

    def __post_init__(self) -> None:
        try:
            given = self.image if isinstance(self.image, Tensor) else torch.as_tensor(self.image, device="cpu")
            image = given.detach().clone()
        except (TypeError, ValueError, RuntimeError) as error:
            found = type(self.image).__name__
            raise TypeError(f"image must be a tensor, or what torch.as_tensor takes, got {found}. Make a tensor of it.") from error
        if not (image.numel() and image.isfinite().all()):
            raise ValueError(f"baseline of shape {tuple(image.shape)} is empty or has values that are not finite. Give finite values.")
        object.__setattr__(self, "image", image)

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        """The image, broadcast to the shape of `x`."""
        return _broadcast(self.image.to(x, copy=True), x)  # which a baseline of the user's may write into

    def __eq__(self, other: object) -> bool:
        # By values, wherever they lie.
        if type(other) is not type(self) or self.image.dtype != other.image.dtype:
            return False
        return torch.equal(self.image.cpu(), other.image.cpu())

    def __hash__(self) -> int:
        return hash((type(self), tuple(self.image.shape), self.image.dtype))

    def __repr__(self) -> str:
        if self.image.numel() > 1000:  # from where on PyTorch prints no tensor in full
            content = zlib.crc32(self.image.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            return f"{public_path(type(self))}(<{tuple(self.image.shape)}, {self.image.dtype}, {content:08x}>)"
        return f"{public_path(type(self))}(torch.tensor({self.image.tolist()}, dtype={self.image.dtype}))"


@dataclass(frozen=True, repr=False)
class OneOf(Baseline):
    """One of some given images, drawn for each image, with replacement.

    Args:
        images: `(K, C, H, W)`.

    Raises:
        TypeError, ValueError: `images` is not a finite tensor of that shape.
    """

    images: Fixed | Tensor
    draws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.images, (list, tuple)):
            raise TypeError(f"OneOf: images must be a tensor (K, C, H, W), got a {type(self.images).__name__}. Write torch.stack(images).")
        images = self.images if isinstance(self.images, Fixed) else Fixed(self.images)
        if images.image.dim() != 4:
            raise ValueError(f"OneOf: images must be (K, C, H, W), got {tuple(images.image.shape)}. Stack the images to draw from.")
        object.__setattr__(self, "images", images)

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        """An image for each one of `x`."""
        assert isinstance(self.images, Fixed)
        images = self.images.image  # all of which may be many, and elsewhere
        chosen = images[torch.randint(images.shape[0], (x.shape[0],), generator=generator, device=x.device).to(images.device)]
        return _broadcast(chosen, x)


@dataclass(frozen=True, repr=False)
class Mean(Baseline):
    """Each channel's mean over the image, everywhere."""

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        """The mean colour of each image of `x`."""
        return x.mean(dim=(2, 3), keepdim=True).expand_as(x)


@dataclass(frozen=True, repr=False)
class Blur(Baseline):
    """The image under a Gaussian blur.

    Args:
        sigma: standard deviation in pixels.

    Raises:
        ValueError: `sigma` is not positive.
    """

    sigma: float = 5.0

    def __post_init__(self) -> None:
        if not is_number(self.sigma) or self.sigma <= 0:
            raise ValueError(f"Blur(sigma={self.sigma!r}) is not a blur. Give a positive standard deviation in pixels.")

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        """Blurred `x`; the border is reflected."""
        from torchvision.transforms.v2.functional import gaussian_blur  # timm brings torchvision; slow to import

        # Along the width, then the height; reflection cannot reach further than the image.
        kernel = [2 * min(math.ceil(3 * self.sigma), size - 1) + 1 for size in (x.shape[-1], x.shape[-2])]
        blurred: Tensor = gaussian_blur(x, kernel_size=kernel, sigma=[self.sigma] * 2)
        return blurred


@dataclass(frozen=True, repr=False)
class Noise(Baseline):
    """Gaussian noise, independent of the image, drawn anew each call.

    Args:
        std: standard deviation, in units of `x`.
        mean: mean, in units of `x`.

    Raises:
        ValueError: `std` is negative, or a setting is not finite.
    """

    std: float = 1.0
    mean: float = 0.0
    draws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value in (("std", self.std), ("mean", self.mean)):
            if not is_real(value):
                raise TypeError(f"Noise: {name} must be a number, got {brief(value)}. Give one number for all channels.")
        if not (is_number(self.std) and self.std >= 0 and is_number(self.mean)):
            raise ValueError(f"{self!r} is not a normal distribution. Give a finite mean and a standard deviation of at least 0.")

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        """Noise of the shape of `x`."""
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return noise * self.std + self.mean


@dataclass(frozen=True, repr=False)
class OtherImage(Baseline):
    """Another image of the batch for each image, by a random permutation: for expected gradients, in place of the training set.

    Raises:
        ValueError: in a call, the batch has one image alone.
    """

    draws: ClassVar[bool] = True

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        """For each image of `x` one of the others."""
        count = x.shape[0]
        if count == 1:
            raise ValueError(
                "OtherImage: a batch of one has no other image, so every attribution would be zero. Use drop_last=True in the "
                "DataLoader if it is the rest of an epoch, or another baseline."
            )
        order = torch.randperm(count, generator=generator, device=x.device)
        # To each image the one before it in a random round: a permutation that leaves none in its place.
        return x[torch.empty_like(order).scatter_(0, order, order.roll(1))]


@dataclass(frozen=True, repr=False)
class Shuffle(Baseline):
    """The irrelevant pixels of each image, randomly permuted among themselves; relevant pixels stay.

    The channels of a pixel move together. Under a soft mask every pixel with any irrelevance takes part.

    Source: `x~` of the founding paper, arXiv 1910.00199.
    """

    draws: ClassVar[bool] = True
    needs_mask: ClassVar[bool] = True

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        """`x` with the pixels outside `mask` permuted."""
        n, channels, height, width = x.shape
        outside = masks.resize(_mask(self, mask), (height, width)).reshape(n, -1) < 1
        # The k-th outside pixel by place gets the value of the k-th in a random order.
        order = _orders(n, height * width, generator, x.device)
        chosen = outside.gather(1, order)
        last = height * width  # where inside pixels go, and nobody looks
        origin = order.new_empty(n, last + 1).scatter_(1, torch.where(chosen, chosen.cumsum(1) - 1, last), order)
        places = torch.arange(last, device=x.device)
        index = torch.where(outside, origin.gather(1, (outside.cumsum(1) - 1).clamp_min_(0)), places)
        return x.flatten(2).gather(2, index.unsqueeze(1).expand(n, channels, -1)).reshape(x.shape)


@dataclass(frozen=True, repr=False)
class Masked(Baseline):
    """The image with its irrelevant part replaced: m x + (1 - m) fill(x).

    Args:
        fill: what takes the place of the irrelevant pixels: a number, a tensor that broadcasts to `x`, or one of `attrreg.baselines`.

    Raises:
        TypeError, ValueError: `fill` is none of these.
    """

    fill: Baseline | Tensor | float = Shuffle()
    needs_mask: ClassVar[bool] = True

    def __post_init__(self) -> None:
        keep_baseline(self, "fill")

    @property
    def draws(self) -> bool:  # type: ignore[override]
        """Whether the fill draws."""
        return as_baseline(self.fill).draws

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        """`x` inside the mask, the fill outside."""
        relevant = masks.resize(_mask(self, mask), (x.shape[-2], x.shape[-1])).to(x.dtype)
        return torch.lerp(as_baseline(self.fill)(x, mask, generator).to(x.dtype), x, relevant)  # in one pass over the images


def as_baseline(value: Baseline | Tensor | float, name: str = "baseline") -> Baseline:
    """A baseline as the user may write it: a `Baseline`, a tensor, or a number; `name`: that of the setting, for the message.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(value, Baseline):
        return value
    if isinstance(value, Tensor):
        return Fixed(value)
    if is_real(value):
        return Fixed(torch.tensor(float(value), dtype=torch.float64, device="cpu"))
    raise TypeError(
        f"{name} must be a tensor, a number or a baselines.Baseline, got {_named(value)}. Use baselines.Zero(), for example, or "
        "baselines.Fixed(image) for an array."
    )


def _named(value: object) -> str:
    """What a value is, for a message: often the class of a baseline, which was not called."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def keep_baseline(spec: Any, name: str = "baseline") -> Baseline:
    """Check a baseline of a frozen dataclass, and keep it as a `Baseline`, however it was written.

    Raises:
        TypeError, ValueError: it is none.
    """
    baseline = as_baseline(getattr(spec, name), name)
    object.__setattr__(spec, name, baseline)
    return baseline


def made_of(part: object) -> Iterator[Baseline]:
    """The baselines that a point or a baseline is made of, those inside others included."""
    if isinstance(part, (tuple, list)):
        for each in part:
            yield from made_of(each)
    if isinstance(part, Baseline):
        yield part
    if is_dataclass(part) and not isinstance(part, OneOf):  # what it draws from is not one for each image of the batch
        for field in fields(part):
            yield from made_of(getattr(part, field.name))


def _orders(count: int, length: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Random orders `(count, length)`."""
    if device.type == "cpu":  # where sorting takes ten times as long
        orders = torch.empty((count, length), dtype=torch.int64, device=device)
        for row in orders:
            torch.randperm(length, generator=generator, out=row, device=device)
        return orders
    dtype = torch.float32 if device.type == "mps" else torch.float64  # in which two are hardly ever equal; Apple's has none
    return torch.rand((count, length), generator=generator, device=device, dtype=dtype).argsort(dim=1)


def _mask(baseline: Baseline, mask: Tensor | None) -> Tensor:
    if mask is None:
        raise ValueError(f"{baseline!r} needs a mask. Pass `mask=`.")
    return mask


def _broadcast(image: Tensor, x: Tensor) -> Tensor:
    """An image on the device, of the type and of the shape of `x`."""
    image = image.to(device=x.device, dtype=x.dtype)
    try:
        return image.expand_as(x)
    except RuntimeError as error:
        raise ValueError(
            f"baseline of shape {tuple(image.shape)} does not broadcast to x of shape {tuple(x.shape)}. Pass a scalar "
            "tensor, a value for each channel (C, 1, 1), one image (C, H, W), or one for each image of x."
        ) from error
