"""A part of the batch: the images that a penalty's own pass has to see."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields, is_dataclass, replace

import torch
from torch import nn

from attrreg.attach import attached
from attrreg.baselines import Fixed, OneOf, OtherImage
from attrreg.call import Call
from attrreg.needs import Need
from attrreg.walk import modules


def check_fraction(fraction: float, call: Call) -> None:
    """Check the share of images to compute a penalty on.

    Raises:
        TypeError, ValueError: naming `fraction`.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
        raise TypeError(f"fraction must be a number, got {type(fraction).__name__}. Write for example fraction=0.25.")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}. Write for example fraction=0.25.")
    if fraction < 1 and call.inputs is not None:
        raise ValueError("fraction cannot be used with inputs=: which of them go by image is not known. Leave one of the two out.")


def part_of(call: Call, needs: Iterable[Need], fraction: float) -> Call:
    """The call on the images that need a pass: a random share of the annotated ones, or all of those.

    Images without annotation are left out only where that changes nothing but dropout's draws: where the pass is the penalty's
    own, no BatchNorm in train mode couples the images, and no image is made by draws over the batch or given for each sample.

    Raises:
        ValueError: naming `fraction`.
    """
    annotation = call.annotation
    assert annotation is not None
    if annotation.count == 0 or call.inputs is not None:
        return call
    by_row = any(_by_row(need.at) for need in needs)
    if fraction < 1 and any(_of_batch(need.at) for need in needs):
        raise ValueError(
            "fraction cannot be used with baselines.OtherImage, which would draw from the images that fraction left alone. Give it images: "
            "baselines.OneOf(images), or leave fraction out."
        )
    if fraction < 1 and by_row:
        raise ValueError(
            "fraction cannot be used with a baseline that holds one image a sample. Give one image for all, or leave fraction out."
        )
    if fraction == 1:
        whole = annotation.count == annotation.batch or attached(call.model) is not None
        if whole or by_row or any(map(couples, modules(call.model))) or any(need.at.draws for need in needs):
            return call
    indices = annotation.annotated.nonzero().squeeze(1)
    if fraction < 1:
        device = torch.device("cpu") if call.generator is None else call.generator.device
        order = torch.randperm(annotation.count, generator=call.generator, device=device)
        indices = indices[order[: math.ceil(fraction * annotation.count)].to(indices.device).sort().values]
    target = None if call.target is None else call.target[indices]
    return replace(call, x=call.x[indices], annotation=annotation.part(indices), target=target)


def _by_row(part: object) -> bool:
    """Whether a point, or what it is made of, holds an image for each of the batch's."""
    if isinstance(part, Fixed):
        return part.image.dim() == 4 and part.image.shape[0] > 1
    if isinstance(part, OneOf) or not is_dataclass(part):
        return False
    return any(_by_row(getattr(part, field.name)) for field in fields(part))


def _of_batch(part: object) -> bool:
    """Whether a point, or what it is made of, takes other images of the batch."""
    if isinstance(part, OtherImage):
        return True
    return is_dataclass(part) and not isinstance(part, Fixed) and any(_of_batch(getattr(part, field.name)) for field in fields(part))


def couples(module: nn.Module) -> bool:
    """Whether what a layer itself gives for an image depends on the others of the batch: it normalises by their statistics."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.training or module.running_mean is None
    return module.training and any(name.startswith("running_") for name in module._buffers.keys())  # noqa: SIM118  (TorchScript's); such as timm's EvoNorm
