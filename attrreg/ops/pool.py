"""Max pooling with channels last inside.

PyTorch's CPU kernel goes through contiguous planes value by value, and takes a vector of channels at a time where these are last: two
copies cost less than the difference. Nor does it say that its gradient does not depend on the values: it sends zeros back to them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from attrreg.ops.channels import planes, suggested

aten = torch.ops.aten

CHANNELS = 8  # that a vector holds, from which on it is worth two copies
MANY = 2**16  # values, likewise
AT_ONCE = 2**20  # values, of which the copies stay near the processor


class _MaxPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *settings: Any) -> Tensor:
        """Of `(N, C, H, W)`; settings: kernel, stride, padding, dilation, whether to round up."""
        format = suggested(x)
        parts = [x] if format == torch.channels_last else x.split(max(1, AT_ONCE // x[0].numel()))
        found = [aten.max_pool2d_with_indices(part.contiguous(memory_format=torch.channels_last), *settings) for part in parts]
        y, indices = (_together([each.contiguous(memory_format=format) for each in kind]) for kind in zip(*found, strict=True))
        ctx.save_for_backward(x, indices)
        ctx.settings = settings
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, indices = ctx.saved_tensors  # PyTorch's own derivatives from here on, of every order
        return aten.max_pool2d_with_indices_backward(gy, x.detach(), *ctx.settings, indices), *[None] * len(ctx.settings)


def _together(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """`F.max_pool2d`; with its indices too, it is a call of another function, which is left as it is."""
    worth_copies = input.dim() == 4 and input.numel() >= MANY and input.shape[1] >= CHANNELS and planes(input)
    as_it_is = input.device.type == "cpu" and suggested(input) == torch.channels_last  # only so that no zeros go back
    settings = kernel_size, [] if stride is None else stride, padding, dilation
    # PyTorch takes NumPy's numbers and tensors too, `torch.ops` does not.
    if not (worth_copies or as_it_is) or not all(isinstance(setting, (int, tuple, list)) for setting in settings):
        return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)
    result: Tensor = _MaxPool.apply(input, *settings, ceil_mode)
    return result
