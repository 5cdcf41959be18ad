"""A scale and a shift a channel, fast."""

from __future__ import annotations

import torch
from torch import Tensor


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x scale + shift, of `(N, C, ...)` and `(C,)`."""
    positions = x.shape[2:].numel()
    if not (x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.is_contiguous() and positions > 1 and x.numel()):
        along = (1, -1, *[1] * (x.dim() - 2))
        return torch.addcmul(shift.view(along), x, scale.view(along))
    # With all values of an image in one row, and a channel's value repeated for its positions, one vectorised loop runs over them.
    scale, shift = (values.view(-1, 1).expand(-1, positions).reshape(-1) for values in (scale, shift))
    # Not as a view of rows: a layer may go on to work in place, which on views is slow or refused.
    result: Tensor = torch.ops.aten._unsafe_view(torch.addcmul(shift, x.view(x.shape[0], -1), scale), x.shape)
    return result
