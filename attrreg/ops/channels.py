"""How channels lie in memory, and a scale and a shift a channel, fast."""

from __future__ import annotations

import torch
from torch import Tensor

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of axes
_ORDER = {4: (1, 3, 2, 0), 5: (1, 4, 3, 2, 0)}  # of the axes there, the densest first


def memory_format(x: Tensor) -> torch.memory_format:
    """`torch.channels_last`, or `channels_last_3d`, for a tensor that is contiguous in this format only; else `torch.contiguous_format`."""
    format = CHANNELS_LAST.get(x.dim(), torch.contiguous_format)
    return format if x.is_contiguous(memory_format=format) and not x.is_contiguous() else torch.contiguous_format


def dense(x: Tensor) -> bool:
    """Whether a tensor is contiguous in one of these formats."""
    return x.is_contiguous() or memory_format(x) != torch.contiguous_format


def suggested_format(x: Tensor) -> torch.memory_format:
    """The memory format of what PyTorch's layers make of a tensor: channels last where the strides have that order, also with gaps.

    What follows may ask for a `view`, and a dropout draws in the order of memory. It is ATen's `suggest_memory_format`, of which Python has
    only a slower, private copy: strides must not fall from the channels over the axes of the image, the last first, to the batch.
    """
    steps = x.stride()
    axes = len(steps)
    if axes not in CHANNELS_LAST or not steps[1] or steps[-1] < steps[1]:  # the last settles it for most
        return torch.contiguous_format
    shape, least = x.shape, 0
    for axis in _ORDER[axes]:
        size, step = shape[axis], steps[axis]
        if not size or step < least:
            return torch.contiguous_format
        if axis == 0 and least == steps[1]:  # one position, stored as a contiguous one
            return torch.contiguous_format
        least = step * size
    return CHANNELS_LAST[axes]


def convolution_format(x: Tensor, w: Tensor) -> torch.memory_format:
    """How a convolution lays out its output: with channels last if image or weight are so."""
    format = suggested_format(x)
    return format if format != torch.contiguous_format else suggested_format(w)


def channels_adjacent(x: Tensor) -> bool:
    """Whether the channels of each of several positions lie side by side, as in `channels_last` and in a slice of that."""
    return x.dim() == 4 and x.stride(1) == 1 and not x.is_contiguous()


def goes_by_planes(x: Tensor) -> bool:
    """Whether PyTorch's CPU kernels go through `(N, C, ...)` plane by plane: contiguous ones of several values, not in half precision."""
    contiguous = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.is_contiguous()
    return contiguous and x.shape[2:].numel() > 1


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x scale + shift, of `(N, C, ...)` and `(C,)`."""
    if not goes_by_planes(x) or not x.numel():
        along = (1, -1, *[1] * (x.dim() - 2))
        return torch.addcmul(shift.view(along), x, scale.view(along))
    # With all values of an image in one row, and a channel's value repeated for its positions, one vectorised loop runs over them.
    scale, shift = (values.view(-1, 1).expand(-1, x.shape[2:].numel()).reshape(-1) for values in (scale, shift))
    # Not as a view: see `attrreg.ops`.
    return torch.ops.aten._unsafe_view(torch.addcmul(shift, x.view(x.shape[0], -1), scale), x.shape)
