"""Convolutions whose double backward is exact and fast.

PyTorch takes the second-order weight gradient by a convolution of transposed tensors and, for grouped or depthwise
convolutions, loops over the groups. But a convolution is bilinear in image and weight, so every derivative of every order is
one of three operations: the convolution y(x, w), its input gradient gx(gy, w), its weight gradient gw(gy, x). PyTorch has
native kernels for all three, grouped or not, and each is written here with the other two as its derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from attrreg.ops.phase import Phase, wanted

aten = torch.ops.aten


@dataclass(frozen=True)
class Geometry:
    """The settings of a convolution, one number an axis."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    def convolve(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """y(x, w) + b."""
        y: Tensor = aten.convolution(x, w, b, self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups)
        return y

    def backward(self, gy: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients with respect to image, weight and bias that `mask` asks for."""
        channels = [w.shape[1] * self.groups if self.transposed else w.shape[0]]
        sizes = (self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups)
        gradients: tuple[Tensor, Tensor, Tensor] = aten.convolution_backward(gy, x, w, channels if mask[2] else None, *sizes, mask)
        return gradients


class _Convolve(Function):
    """y(x, w) + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry, phase: Phase) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry, ctx.phase = geometry, phase
        return geometry.convolve(x, w, b)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        for_x, for_w, for_b = (wanted(ctx, index) for index in range(3))
        if not torch.is_grad_enabled():  # nobody differentiates again: one call for all three
            gx, gw, gb = ctx.geometry.backward(gy, x, w, [for_x, for_w, for_b])
            return gx if for_x else None, gw if for_w else None, gb if for_b else None, None, None
        gx = _InputGradient.apply(gy, w, x.detach(), ctx.geometry, ctx.phase) if for_x else None
        gw = _WeightGradient.apply(gy, x, w.detach(), ctx.geometry, ctx.phase) if for_w else None
        return gx, gw, gy.sum(dim=(0, *range(2, gy.dim()))) if for_b else None, None, None


class _InputGradient(Function):
    """gx(gy, w)."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, w: Tensor, like: Tensor, geometry: Geometry, phase: Phase) -> Tensor:
        ctx.save_for_backward(gy, w)
        ctx.geometry, ctx.phase = geometry, phase
        return geometry.backward(gy, like, w, [True, False, False])[0]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        gy, w = ctx.saved_tensors
        for_gy = _Convolve.apply(v, w, None, ctx.geometry, ctx.phase) if wanted(ctx, 0) else None
        for_w = _WeightGradient.apply(gy, v, w.detach(), ctx.geometry, ctx.phase) if wanted(ctx, 1) else None
        return for_gy, for_w, None, None, None


class _WeightGradient(Function):
    """gw(gy, x)."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, like: Tensor, geometry: Geometry, phase: Phase) -> Tensor:
        ctx.save_for_backward(gy, x)
        ctx.geometry, ctx.phase = geometry, phase
        return geometry.backward(gy, x, like, [False, True, False])[1]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        gy, x = ctx.saved_tensors
        for_gy = _Convolve.apply(x, v, None, ctx.geometry, ctx.phase) if wanted(ctx, 0) else None
        for_x = _InputGradient.apply(gy, v, x.detach(), ctx.geometry, ctx.phase) if wanted(ctx, 1) else None
        return for_gy, for_x, None, None, None


def _each(value: int | Sequence[int], axes: int) -> list[int]:
    return [value] * axes if isinstance(value, int) else list(value) * (axes if len(value) == 1 else 1)


def _apply(x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry, phase: Phase) -> Tensor:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        # As autocast does for the convolutions it knows; inside the function it must not cast again.
        dtype = torch.get_autocast_dtype(device)
        x, w, b = x.to(dtype), w.to(dtype), b if b is None else b.to(dtype)
    batched = x.dim() == w.dim()
    with torch.autocast(device, enabled=False):
        y: Tensor = _Convolve.apply(x if batched else x.unsqueeze(0), w, b, geometry, phase)
    return y if batched else y.squeeze(0)


def convolve(
    phase: Phase,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """`F.conv1d`, `F.conv2d`, `F.conv3d`."""
    axes = weight.dim() - 2
    dilations = _each(dilation, axes)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
        if any(t % 2 for t in total):  # the far side gets the one more
            input = F.pad(input, [side for t in reversed(total) for side in (0, t % 2)])
        padding = [t // 2 for t in total]
    elif padding == "valid":
        padding = 0
    geometry = Geometry(_each(stride, axes), _each(padding, axes), dilations, False, [0] * axes, groups)
    return _apply(input, weight, bias, geometry, phase)


def convolve_transposed(
    phase: Phase,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    """`F.conv_transpose1d`, `F.conv_transpose2d`, `F.conv_transpose3d`."""
    each = [_each(value, weight.dim() - 2) for value in (stride, padding, dilation, output_padding)]
    return _apply(input, weight, bias, Geometry(each[0], each[1], each[2], True, each[3], groups), phase)
