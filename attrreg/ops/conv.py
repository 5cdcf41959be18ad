"""Convolutions whose double backward is exact and fast.

PyTorch takes the second-order weight gradient by a convolution of transposed tensors and, for grouped or depthwise
convolutions, loops over the groups. But a convolution is bilinear in image and weight, so every derivative of every order is
one of three operations: the convolution y(x, w), its input gradient gx(gy, w), its weight gradient gw(gy, x). PyTorch has
native kernels for all three, grouped or not, and each is written here with the other two as its derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from attrreg.ops import depthwise, pointwise
from attrreg.ops.phase import Phase, wanted

aten = torch.ops.aten


@dataclass(frozen=True)
class Geometry:
    """The settings of a convolution, one number an axis."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    output_padding: list[int]
    transposed: bool
    groups: int

    def convolve(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """y(x, w) + b."""
        if self._is_pointwise(x, w):
            return pointwise.convolve(x, w, b)
        return torch.convolution(x, w, b, self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups)

    def backward(self, gy: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients with respect to image, weight and bias that `mask` asks for."""
        if self._is_pointwise(x, w):
            gx = pointwise.input_gradient(gy, w) if mask[0] else None
            return gx, pointwise.weight_gradient(gy, x, w) if mask[1] else None, _bias_gradient(gy) if mask[2] else None
        own = self._weight_products(gy, x, w) if mask[1] else None
        if own is not None:
            gx, _, gb = self.backward(gy, x, w, [mask[0], False, mask[2]]) if mask[0] or mask[2] else (None, None, None)
            return gx, own, gb
        channels = [w.shape[1] * self.groups if self.transposed else w.shape[0]]
        sizes = (self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups)
        gradients: tuple[Tensor, Tensor, Tensor] = aten.convolution_backward(gy, x, w, channels if mask[2] else None, *sizes, mask)
        return gradients

    def input_gradient(self, gy: Tensor, w: Tensor, like: Tensor) -> Tensor:
        """gx(gy, w), of the shape of an image."""
        gx = self.backward(gy, like, w, [True, False, False])[0]
        assert gx is not None
        return gx

    def weight_gradient(self, gy: Tensor, x: Tensor, like: Tensor) -> Tensor:
        """gw(gy, x), of the shape of a weight."""
        gw = self.backward(gy, x, like, [False, True, False])[1]
        assert gw is not None
        return gw

    def _weight_products(self, gy: Tensor, x: Tensor, w: Tensor) -> Tensor | None:
        """The weight gradient by matrix products, where a library's is slower; else None."""
        if x.dim() != 4 or self.transposed or not _by_products(x):
            return None
        # Weights are many and positions few, as in the last stage of a network on small images: a library mostly lays out the weights.
        if self.groups == 1 and gy.shape[0] * gy[0, 0].numel() <= w.shape[0] // 2:
            return self._product_of_columns(gy, x, w)
        if self.groups == x.shape[1] == w.shape[0] and depthwise.is_slow(x, w):
            return depthwise.weight_gradient(gy, x, w, self.stride, self.padding, self.dilation)
        return None

    def _product_of_columns(self, gy: Tensor, x: Tensor, w: Tensor) -> Tensor:
        columns = F.unfold(x, tuple(w.shape[2:]), tuple(self.dilation), tuple(self.padding), tuple(self.stride)).transpose(0, 1).flatten(1)
        gw: Tensor = aten._unsafe_view(gy.transpose(0, 1).flatten(1) @ columns.t(), w.shape)
        return gw

    def _is_pointwise(self, x: Tensor, w: Tensor) -> bool:
        return w[0, 0].numel() == 1 and self.plain and _by_products(x)

    @cached_property
    def plain(self) -> bool:
        """Whether every position is looked at once, by all channels."""
        return not self.transposed and self.groups == 1 and set(self.stride) == {1} and not any(self.padding)


def _by_products(x: Tensor) -> bool:
    """Whether matrix products are worth considering: on the CPU, in the types that its kernels for convolutions are slow in."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.numel() > 0


def _bias_gradient(gy: Tensor) -> Tensor:
    return gy.sum(dim=(0, *range(2, gy.dim())))


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
        return gx, gw, _bias_gradient(gy) if for_b else None, None, None


class _InputGradient(Function):
    """gx(gy, w)."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, w: Tensor, like: Tensor, geometry: Geometry, phase: Phase) -> Tensor:
        ctx.save_for_backward(gy, w)
        ctx.geometry, ctx.phase = geometry, phase
        return geometry.input_gradient(gy, w, like)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        gy, w = ctx.saved_tensors
        if not torch.is_grad_enabled():
            for_gy = ctx.geometry.convolve(v, w, None) if wanted(ctx, 0) else None
            return for_gy, ctx.geometry.weight_gradient(gy, v, w) if wanted(ctx, 1) else None, None, None, None
        for_gy = _Convolve.apply(v, w, None, ctx.geometry, ctx.phase) if wanted(ctx, 0) else None
        for_w = _WeightGradient.apply(gy, v, w.detach(), ctx.geometry, ctx.phase) if wanted(ctx, 1) else None
        return for_gy, for_w, None, None, None


class _WeightGradient(Function):
    """gw(gy, x)."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, like: Tensor, geometry: Geometry, phase: Phase) -> Tensor:
        ctx.save_for_backward(gy, x)
        ctx.geometry, ctx.phase = geometry, phase
        return geometry.weight_gradient(gy, x, like)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        gy, x = ctx.saved_tensors
        for_gy = _Convolve.apply(x, v, None, ctx.geometry, ctx.phase) if wanted(ctx, 0) else None
        for_x = _InputGradient.apply(gy, v, x.detach(), ctx.geometry, ctx.phase) if wanted(ctx, 1) else None
        return for_gy, for_x, None, None, None


def _each(value: int | Sequence[int], axes: int) -> list[int]:
    return [value] * axes if isinstance(value, int) else list(value) * (axes if len(value) == 1 else 1)


@lru_cache(maxsize=4096)  # of a few numbers each; to make one costs as much as a small convolution
def _geometry(
    axes: int, stride: Any, padding: Any, dilation: Any, groups: int, transposed: bool = False, output_padding: Any = 0
) -> Geometry:
    each = [_each(value, axes) for value in (stride, padding, dilation, output_padding)]
    return Geometry(each[0], each[1], each[2], each[3], transposed, groups)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _apply(x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry, phase: Phase) -> Tensor:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        # As autocast does for the convolutions it knows; inside the function it must not cast again.
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return _apply(x.to(dtype), w.to(dtype), b if b is None else b.to(dtype), geometry, phase)
    if x.dim() < w.dim():
        return _apply(x.unsqueeze(0), w, b, geometry, phase).squeeze(0)
    y: Tensor = _Convolve.apply(x, w, b, geometry, phase)
    return y


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
    stride, padding, dilation = _hashable(stride), _hashable(padding), _hashable(dilation)
    if _is_patches(input.dim(), tuple(weight.shape), stride, padding, dilation, groups):
        return _patches(input, weight, bias)
    axes = weight.dim() - 2
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(_each(dilation, axes), weight.shape[2:], strict=True)]
        if any(t % 2 for t in total):  # the far side gets the one more
            input = F.pad(input, [side for t in reversed(total) for side in (0, t % 2)])
        padding = tuple(t // 2 for t in total)
    elif padding == "valid":
        padding = 0
    return _apply(input, weight, bias, _geometry(axes, stride, padding, dilation, groups), phase)


@lru_cache(maxsize=4096)
def _is_patches(dim: int, weight: tuple[int, ...], stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether a convolution looks at patches that do not overlap, and at more than a pixel each."""
    if dim != 4 or len(weight) != 4 or groups != 1:
        return False
    kernel = list(weight[2:])
    padded = padding != "valid" and (padding == "same" or any(_each(padding, 2)))
    return kernel == _each(stride, 2) and min(kernel) > 1 and not padded and _each(dilation, 2) == [1, 1]


def _patches(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    # A matrix product: the input gradient of such a convolution, an ordinary training step's never, is slow on the CPU.
    n, channels, height, width = x.shape
    high, wide = w.shape[2:]
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    rows, columns = height // high, width // wide
    x = x[:, :, : rows * high, : columns * wide].reshape(n, channels, rows, high, columns, wide)
    y = F.linear(x.permute(0, 2, 4, 1, 3, 5).reshape(n, rows, columns, channels * high * wide), w.flatten(1), b)
    # Laid out as a convolution would: code that follows may take a `view`.
    return y.permute(0, 3, 1, 2) if channels_last else y.permute(0, 3, 1, 2).contiguous()


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
    settings = (_hashable(value) for value in (stride, padding, dilation))
    return _apply(input, weight, bias, _geometry(weight.dim() - 2, *settings, groups, True, _hashable(output_padding)), phase)
