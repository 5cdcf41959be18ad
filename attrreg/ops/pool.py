"""Max pooling on the CPU, computed with channels last.

PyTorch's kernel goes through contiguous planes value by value, but takes a vector of channels at a time where these are last: that is worth
two copies. PyTorch's double backward also sends zeros back to the input, whose values the gradient does not depend on; ours sends nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from attrreg.ops.channels import goes_by_planes, suggested_format

aten = torch.ops.aten

MIN_CHANNELS, MIN_VALUES = 8, 2**16  # from which on it is worth two copies; a vector holds eight channels
VALUES_AT_ONCE = 2**20  # copied at once, so that the copy stays in the cache


class _MaxPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *settings: Any) -> Tensor:
        """Of `(N, C, H, W)`; settings: kernel, stride, padding, dilation, whether to round up."""
        format = suggested_format(x)
        parts = [x] if format == torch.channels_last else x.split(max(1, VALUES_AT_ONCE // x[0].numel()))
        pooled = []
        for part in parts:
            y, indices = aten.max_pool2d_with_indices(part.contiguous(memory_format=torch.channels_last), *settings)
            if format != torch.channels_last:  # not by `contiguous`, which leaves a single position its strides
                y, indices = (found.clone(memory_format=torch.contiguous_format) for found in (y, indices))
            pooled.append((y, indices))
        y, indices = (torch.cat(found) if len(found) > 1 else found[0] for found in zip(*pooled, strict=True))
        ctx.save_for_backward(x, indices)
        ctx.settings = settings
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, indices = ctx.saved_tensors  # PyTorch's own derivatives from here on, of every order
        return aten.max_pool2d_with_indices_backward(gy, x.detach(), *ctx.settings, indices), *[None] * len(ctx.settings)


def max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """`F.max_pool2d`. `return_indices` is always False: with indices it is another function, which is not replaced."""
    copied = input.dim() == 4 and input.numel() >= MIN_VALUES and input.shape[1] >= MIN_CHANNELS and goes_by_planes(input)
    # With channels last nothing is copied: ours only so that no zeros go back.
    ours = copied or (input.device.type == "cpu" and input.is_floating_point() and suggested_format(input) == torch.channels_last)
    settings = kernel_size, [] if stride is None else stride, padding, dilation
    # PyTorch takes NumPy's numbers and tensors too, `torch.ops` does not.
    if not ours or not all(isinstance(setting, (int, tuple, list)) for setting in settings):
        return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)
    return _MaxPool.apply(input, *settings, ceil_mode)
