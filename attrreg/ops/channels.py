"""How channels lie in memory, and a scale and a shift a channel, fast."""

from __future__ import annotations

import torch
from torch import Tensor

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of axes
_ORDER = {4: (1, 3, 2, 0), 5: (1, 4, 3, 2, 0)}  # of the axes there, the densest first


def layout(x: Tensor) -> torch.memory_format:
    """Channels last where a tensor is laid out so, and not also contiguous, as one of a single channel or position is; else contiguous."""
    format = CHANNELS_LAST.get(x.dim(), torch.contiguous_format)
    return format if x.is_contiguous(memory_format=format) and not x.is_contiguous() else torch.contiguous_format


def dense(x: Tensor) -> bool:
    """Whether a tensor is contiguous, in one of the layouts."""
    return x.is_contiguous() or layout(x) != torch.contiguous_format


def suggested(x: Tensor) -> torch.memory_format:
    """How PyTorch's layers lay out what they make of a tensor: with channels last where its axes are in that order, as in a slice of one.

    A layer that follows may ask for a `view`, and a dropout draws in the order of memory. `suggest_memory_format` of PyTorch, which Python
    cannot call: steps in memory never fall from channels over the last axis to the first.
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


def of_convolution(x: Tensor, w: Tensor) -> torch.memory_format:
    """How a convolution lays out its output: with channels last if image or weight are so."""
    format = suggested(x)
    return format if format != torch.contiguous_format else suggested(w)


def adjacent(x: Tensor) -> bool:
    """Whether the channels of each of several positions lie side by side, as in `channels_last` and in a slice of that."""
    return x.dim() == 4 and x.stride(1) == 1 and not x.is_contiguous()


def planes(x: Tensor) -> bool:
    """Whether values of `(N, C, ...)` lie in planes that PyTorch's CPU kernels take one by one."""
    contiguous = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.is_contiguous()
    return contiguous and x.shape[2:].numel() > 1


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x scale + shift, of `(N, C, ...)` and `(C,)`."""
    if not planes(x) or not x.numel():
        along = (1, -1, *[1] * (x.dim() - 2))
        return torch.addcmul(shift.view(along), x, scale.view(along))
    # With all values of an image in one row, and a channel's value repeated for its positions, one vectorised loop runs over them.
    scale, shift = (values.view(-1, 1).expand(-1, x.shape[2:].numel()).reshape(-1) for values in (scale, shift))
    # Not as a view of rows: a layer may go on to work in place, which on views is slow or refused.
    result: Tensor = torch.ops.aten._unsafe_view(torch.addcmul(shift, x.view(x.shape[0], -1), scale), x.shape)
    return result
