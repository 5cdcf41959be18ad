"""What is measured on: models with a batch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import timm
import torch
import torchvision
from torch import Tensor, nn

CLASSES = 10
TORCHVISION = "torchvision/"  # before the names of its models
MODELS = (
    "resnet18",
    "resnet50",
    "convnext_atto",
    "efficientnet_b0",
    "mobilenetv3_small_100",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "regnety_002",
    "densenet121",
)
SMALL = ("resnet18", "mobilenetv3_small_100", "vit_tiny_patch16_224")


@dataclass(frozen=True)
class Case:
    """A model with a batch of images, labels and masks.

    Attributes:
        name: of the model, or of what is measured with it.
        x: images `(N, C, H, W)`.
        y: labels `(N,)` int64.
        mask: `(N, H, W)` bool; True is relevant.
        autocast: the type to compute in, or None.
    """

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    mask: Tensor
    autocast: torch.dtype | None = None

    def precision(self) -> AbstractContextManager[object]:
        """What forwards and penalties run under."""
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.x.device


def build(name: str, batch: int, size: int, device: torch.device, autocast: torch.dtype | None = None, channels_last: bool = False) -> Case:
    """A model with random weights, in train mode, and random images, of which the upper left quarter is relevant.

    Args:
        name: timm's, or torchvision's after `torchvision/`.
        batch: images.
        size: of an image, in pixels a side.
        device: where to.
        autocast: see `Case`.
        channels_last: how the model and the images are laid out; else contiguous.

    Raises:
        LookupError: there is no such model.
        ValueError: it does not take images of this size, or returns more than logits.
    """
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = create(name, size).to(device).train().to(memory_format=layout)
    # Zero-initialised layers off zero: otherwise there is less to compute.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    x = torch.randn(batch, 3, size, size).to(device, memory_format=layout)
    mask = torch.zeros(batch, size, size, dtype=torch.bool)
    mask[:, : size // 2, : size // 2] = True
    case = Case(name, model, x, torch.arange(batch, device=device) % CLASSES, mask.to(device), autocast)
    try:
        with torch.no_grad():
            returned = model(x)
    except Exception as error:  # a size that does not fit fails in as many ways as there are models
        said = str(error).rstrip(". ")
        raise ValueError(f"{name} does not run on {batch} images of {size} pixels: {said}. Try another --size or --batch.") from error
    if not isinstance(returned, Tensor):
        raise ValueError(f"{name} returns a {type(returned).__name__} and not logits alone, which cannot be measured here. Take another.")
    return case


def create(name: str, size: int = 224) -> nn.Module:
    """The model alone, in one size where it does not take any.

    Raises:
        LookupError: there is no such model.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    own = name.removeprefix(TORCHVISION)
    if name.startswith(TORCHVISION):
        there, make, sized = own in known, torchvision.models.get_model, {"image_size": size}
    else:
        there, make, sized = timm.is_model(name), timm.create_model, {"img_size": size}
    if not there and name in known:
        raise LookupError(f"timm has no model {name!r}, but torchvision has. Write {TORCHVISION}{name}.")
    if not there:
        choices = f"timm.list_models(), or after {TORCHVISION} one of torchvision.models.list_models()"
        raise LookupError(f"There is no model {name!r}. Choose one of {choices}.")
    try:
        model = make(own, num_classes=CLASSES, **sized)
    except (TypeError, AssertionError):  # most models take any size and have no such setting
        model = make(own, num_classes=CLASSES)
    assert isinstance(model, nn.Module)
    return model
