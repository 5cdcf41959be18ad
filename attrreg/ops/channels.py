"""How channels lie in memory, and a scale and a shift a channel, fast."""

from __future__ import annotations

import torch
from torch import Tensor

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of axes


def layout(x: Tensor) -> torch.memory_format:
    """Channels last where a tensor is laid out so, and not also contiguous, as one of a single channel or position is; else contiguous."""
    format = CHANNELS_LAST.get(x.dim(), torch.contiguous_format)
    return format if x.is_contiguous(memory_format=format) and not x.is_contiguous() else torch.contiguous_format


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
