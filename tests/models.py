"""Small models and batches for the tests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from attrreg.regularizer import AttributionRegularizer

DEVICE = torch.get_default_device().type  # of what tests make; see conftest


class Raising(torch.autograd.Function):
    """The same values; its backward raises an error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, error: Exception) -> Tensor:
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ctx.error


class SmoothNet(nn.Module):
    """A convolutional net without kinks, so that numerical derivatives are exact."""

    def __init__(self, norm: bool = False, dropout: float = 0.0, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.act = nn.Tanh()
        self.body = nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(self.act(self.norm(self.stem(x))))
        h = F.silu(h)
        logits: Tensor = self.head(self.drop(h.mean(dim=(2, 3))))
        return logits


class InplaceNet(nn.Module):
    """A ReLU works in place right behind the tapped layer, and a normalisation in place on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.sub_(0.1) if x.requires_grad and not x.is_leaf else x - 0.1
        h = self.relu(self.last(self.relu(self.conv(x))))
        logits: Tensor = self.head(h.mean(dim=(2, 3)))
        return logits


@dataclass(frozen=True)
class Family:
    """A model family: how to build a small one, the image size, and a layer with an (N, C, h, w) map."""

    create: Callable[[], nn.Module]
    size: int
    layer: str

    def build(self) -> nn.Module:
        """A new one, of the same draws on every device."""
        with torch.device("cpu"):
            model = self.create()
        return model.to(DEVICE)


def _timm(name: str, **settings: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, num_classes=5, **settings)


FAMILIES = {
    "resnet": Family(_timm("test_resnet"), 64, "layer4"),
    "resnet_torchvision": Family(lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5), 48, "layer3"),
    "convnext": Family(_timm("test_convnext"), 64, "stages.3"),
    "vit": Family(_timm("test_vit", img_size=64), 64, "patch_embed.proj"),
    "swin": Family(
        _timm("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), num_heads=(2, 4), embed_dim=16), 56, "patch_embed.proj"
    ),
    "efficientnet": Family(_timm("test_efficientnet"), 64, "conv_head"),
    "nfnet": Family(_timm("test_nfnet"), 64, "final_conv"),
    "mobilenetv3": Family(_timm("mobilenetv3_small_050"), 64, "blocks.4"),
    "squeezenet": Family(lambda: torchvision.models.squeezenet1_1(num_classes=5), 64, "features.12"),
    "inplace": Family(InplaceNet, 24, "last"),
}


Batch = tuple[Tensor, Tensor, Tensor]


def batch(n: int = 3, channels: int = 3, size: int = 24, classes: int = 5, dtype: torch.dtype = torch.float32) -> Batch:
    """Images, masks with a relevant rectangle, another one for each image, and targets."""
    x = torch.randn(n, channels, size, size, dtype=dtype, device="cpu").to(DEVICE)
    mask = torch.zeros(n, size, size, dtype=torch.bool)
    mask[:, size // 4 : size // 2, size // 4 : -size // 4] = True
    for i in range(n):  # so that a penalty that judged an image by the mask of another would show
        mask[i] = mask[i].roll(i * (size // 8), 0)
    return x, mask, torch.randint(0, classes, (n,), device="cpu").to(DEVICE)


def smooth_batch(n: int = 3) -> Batch:
    """A float64 batch for `SmoothNet`."""
    return batch(n, channels=2, size=8, classes=3, dtype=torch.float64)


def nearly_all(x: Tensor) -> Tensor:
    """A mask with which x~ is almost x: of images that are equal, `ActivationDifference` is zero whatever the passes computed."""
    return torch.full_like(x[:, 0], 1 - 1e-9, dtype=torch.float64)


def flat(found: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten().double() for tensor in found])


def gradients(model: nn.Module, value: Tensor) -> list[Tensor]:
    """Parameter gradients of a scalar, zeros where it does not depend on one."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    return [gradient.detach() for gradient in found]  # older versions of PyTorch leave a graph


def accumulated(model: nn.Module) -> list[Tensor]:
    """The parameter gradients that backwards have left."""
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


WAYS = ("unattached", "attached", "evaluate")


def logits_and_penalty(way: str, regularizer: AttributionRegularizer, model: nn.Module, data: Batch) -> tuple[Tensor, Tensor]:
    """What a loop makes its loss of, in one of the ways to call a regularizer."""
    x, mask, target = data
    if way == "evaluate":
        penalty = regularizer.evaluate(model, x, mask, target)
        return penalty.output, penalty.total
    with regularizer.attach(model) if way == "attached" else nullcontext():
        return model(x), regularizer(model, x, mask, target)


def loss_by(way: str, regularizer: AttributionRegularizer, model: nn.Module, data: Batch) -> Tensor:
    """The loss of a training step, with its penalty called in one of the three ways."""
    logits, penalty = logits_and_penalty(way, regularizer, model, data)
    return F.cross_entropy(logits, data[-1]) + penalty


def stir(model: nn.Module, by: float) -> None:
    """Move all weights a little: some heads start at zero, where every map would be zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn_like(parameter))


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    """Compare tensors, each relative to its own largest value; what lies below a millionth of the largest of all may be rounding."""
    got, want = [tensor.detach() for tensor in got], [tensor.detach() for tensor in want]
    scale = max(float(tensor.abs().max()) for tensor in want)
    assert scale > 0, "nothing to compare: all values are zero"
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        bound = max(tolerance * float(other.abs().max()), min(tolerance, 1e-6) * scale)
        assert float((one - other).abs().max()) <= bound
