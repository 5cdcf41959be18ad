"""Concatenation whose double backward is a concatenation.

PyTorch's gradient of `cat` takes slices one by one, and differentiates each into a full tensor of zeros around it: quadratic in the
number of parts, which densely connected networks have dozens of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class _Concatenate(Function):
    @staticmethod
    def forward(ctx: Any, dim: int, *parts: Tensor) -> Tensor:
        ctx.dim, ctx.sizes = dim, [part.shape[dim] for part in parts]
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        return None, *gy.split_with_sizes(ctx.sizes, ctx.dim)


def concatenate(tensors: tuple[Tensor, ...] | list[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat`."""
    alike = len({(part.dtype, part.dim()) for part in tensors}) == 1  # others are promoted, or are the old empty placeholders
    if not alike or not tensors[0].is_floating_point() or not -tensors[0].dim() <= dim < tensors[0].dim():
        return torch.cat(tensors, dim)
    return _Concatenate.apply(dim, *tensors)
