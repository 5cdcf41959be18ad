"""Convolutions whose double backward is exact and fast.

PyTorch takes the second-order weight gradient by a convolution of transposed tensors and, for grouped or depthwise
convolutions, loops over the groups. But a convolution is bilinear in image and weight, so every derivative of every order is
one of three operations: the convolution y(x, w), its input gradient gx(gy, w), its weight gradient gw(gy, x). PyTorch has
native kernels for all three, grouped or not, and each is written here with the other two as its derivatives. On the CPU gx is
PyTorch's transposed convolution where nothing is faster: the same kernels, and nodes that start without Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from attrreg.ops import depthwise, patches, pointwise, strided, supported
from attrreg.ops.channels import channels_adjacent, convolution_format, dense, memory_format, suggested_format
from attrreg.ops.linear import PLAIN, linear, product
from attrreg.ops.phase import Phase, wanted
from attrreg.ops.precision import as_autocast, autocasts
from attrreg.ops.supported import per_axis
from attrreg.state import full_precision

aten = torch.ops.aten
PRODUCTS = (torch.float32, torch.float64)  # types in which matrix products can be faster


@dataclass(frozen=True, eq=False)
class Convolution:
    """The settings of a convolution, one number an axis, and how it is computed for images and weights of given shapes.

    Attributes:
        by_patches: patches of several pixels that do not overlap: it is computed as a linear layer (`patches`), and nothing below is used.
        by_pixels: one pixel and a stride of one: the output and the gradient of the images are computed as matrix products (`pointwise`).
        channels_last: the results of these products are laid out with channels last.
        by_remainders: the gradient of the images is computed by `strided`.
        weight_product: computes the weights' gradient from that of the output, the images, the weights and this object. None: PyTorch does.
        unseen: how many pixels at the end of each padded axis the kernel does not reach because of its stride: the output padding of the
            transposed convolution that is the gradient of the images. None: `_InputGradient` takes that gradient.
    """

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    output_padding: list[int]
    transposed: bool
    groups: int
    by_patches: bool = False
    by_pixels: bool = False
    channels_last: bool = False
    by_remainders: bool = False
    weight_product: Callable[[Tensor, Tensor, Tensor, Convolution], Tensor] | None = None
    unseen: list[int] | None = None

    def convolve(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """y(x, w) + b."""
        if torch.is_autocast_enabled(x.device.type):  # entered only then: a context takes longer than to ask
            with full_precision(x.device):
                return self.convolve(x, w, b)
        if self.by_pixels:
            return pointwise.times(w.flatten(1), x, b, self.channels_last)
        return torch.convolution(x, w, b, self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups)

    def backward(self, gy: Tensor, x: Tensor, w: Tensor, image: bool, weight: bool) -> tuple[Tensor | None, Tensor | None]:
        """The gradients with respect to image and weight that are asked for."""
        own = self.by_remainders or self.weight_product is not None
        if own and torch.is_autocast_enabled(gy.device.type):  # where a loop calls backward: it would round products, not PyTorch's kernels
            with full_precision(gy.device):
                return self.backward(gy, x, w, image, weight)
        gx = gw = None
        if self.by_pixels:
            channels_last = memory_format(x) == torch.channels_last  # two layouts in one operation are slow, here and in layers before
            gy = gy.contiguous(memory_format=torch.channels_last) if channels_last else pointwise.copied_once(gy)
            gx = pointwise.input_gradient(gy, w, channels_last) if image else None
        if image and self.by_remainders:
            gx = strided.input_gradient(gy, w, x.shape[2:], self.stride[0], self.padding)
        if weight and self.weight_product is not None:
            gw = self.weight_product(gy, x, w, self)
        mask = [image and gx is None, weight and gw is None, False]
        if mask[0] or mask[1]:
            sizes = (self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups)
            rest = aten.convolution_backward(gy, x, w, None, *sizes, mask)
            gx, gw = rest[0] if mask[0] else gx, rest[1] if mask[1] else gw
        return gx, gw

    def steps(self, image: Sequence[int], weight: Sequence[int]) -> list[tuple[int, int]]:
        """For each axis, how many steps the kernel makes from its first position, and how many pixels it leaves at the end."""
        axes = zip(image[2:], weight[2:], self.stride, self.padding, self.dilation, strict=True)
        return [divmod(size + 2 * pad - step * (kernel - 1) - 1, stride) for size, kernel, stride, pad, step in axes]

    def positions(self, image: Sequence[int], weight: Sequence[int]) -> int:
        """The number of positions of the kernel: of pixels of an output image."""
        return math.prod(moves + 1 for moves, _ in self.steps(image, weight))


@lru_cache(maxsize=4096)  # computing it takes as long as a small convolution
def _convolution(
    image: tuple[int, ...],
    weight: tuple[int, ...],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    products: bool,
    channels_last: bool,
    transposed: bool = False,
    output_padding: Any = 0,
) -> Convolution:
    """How to compute a convolution of these shapes.

    Args:
        image, weight: the shapes of the images, `(N, C, ...)`, and of the layer's weight.
        stride, padding, dilation, groups, output_padding: as PyTorch's functions take them, but lists as tuples, and padding in numbers.
        products: whether products, or another layout, may be faster than PyTorch's kernels.
        channels_last: of 1x1 convolutions, PyTorch's output has channels last; of grouped ones, the images' channels lie side by side.
        transposed: whether it is a transposed convolution.
    """
    axes = len(weight) - 2
    stride, padding, dilation, output_padding = (per_axis(value, axes) for value in (stride, padding, dilation, output_padding))
    plain = Convolution(stride, padding, dilation, output_padding, transposed, groups)
    if not transposed and patches.are_disjoint(weight, stride, padding, dilation, groups):
        return replace(plain, by_patches=True)
    if not products or transposed or 0 in image:
        return plain
    return _with_faster_kernels(plain, image, weight, channels_last)


def _with_faster_kernels(plain: Convolution, image: tuple[int, ...], weight: tuple[int, ...], channels_last: bool) -> Convolution:
    """The same convolution, by what is faster than PyTorch's kernels for these shapes."""
    groups = plain.groups
    if set(weight[2:]) == {1} and groups == 1 and not any(plain.padding):
        images, weights = pointwise.by_products(image[0], plain.positions(image, weight), weight[1], weight[0], channels_last)
        if weights:
            by_pixels = images and set(plain.stride) == {1}
            return replace(plain, by_pixels=by_pixels, channels_last=by_pixels and channels_last, weight_product=_weight_of_pixels)
    elif len(weight) == 4:
        if strided.is_slow(image[1], weight[2:], plain.stride, plain.dilation, groups):
            return replace(plain, by_remainders=True)
        # As in the last stage of a network on small images: PyTorch's library spends most of its time on reordering the many weights.
        if groups == 1 and image[0] * plain.positions(image, weight) <= weight[0] // 4:
            return replace(plain, weight_product=_weight_of_columns)
        if groups == image[1] == weight[0]:
            than_products, than_last = depthwise.is_slow(image[2:], weight[2:], channels_last)
            if than_products or than_last:
                return replace(plain, weight_product=_weight_of_channels if than_products else _weight_in_channels_last)
    return replace(plain, unseen=[rest for _, rest in plain.steps(image, weight)])


def _weight_of_pixels(gy: Tensor, x: Tensor, w: Tensor, kind: Convolution) -> Tensor:
    if set(kind.stride) != {1}:
        channels_last = memory_format(x) == torch.channels_last
        x = x[(slice(None), slice(None), *(slice(None, None, step) for step in kind.stride))]
        if channels_last:
            gy, x = (images.contiguous(memory_format=torch.channels_last) for images in (gy, x))
    return pointwise.weight_gradient(gy, x, w)


def _weight_of_columns(gy: Tensor, x: Tensor, w: Tensor, kind: Convolution) -> Tensor:
    columns = F.unfold(x, tuple(w.shape[2:]), tuple(kind.dilation), tuple(kind.padding), tuple(kind.stride))
    return product(gy.transpose(0, 1).flatten(1), columns.transpose(0, 1).flatten(1)).view(w.shape).data


def _weight_of_channels(gy: Tensor, x: Tensor, w: Tensor, kind: Convolution) -> Tensor:
    return depthwise.weight_gradient(gy, x, w, kind.stride, kind.padding, kind.dilation)


def _weight_in_channels_last(gy: Tensor, x: Tensor, w: Tensor, kind: Convolution) -> Tensor:
    gy, x = (images.contiguous(memory_format=torch.channels_last) for images in (gy, x))
    sizes = kind.stride, kind.padding, kind.dilation, False, kind.output_padding, kind.groups
    return aten.convolution_backward(gy, x, w, None, *sizes, [False, True, False])[1]


class _Convolve(Function):
    """y(x, w) + b, `(N, out, ...)`, of x `(N, in, ...)`, w `(out, in / groups, ...)` (transposed: the other way round) and b `(out,)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, kind: Convolution, phase: Phase) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.kind, ctx.phase = kind, phase
        return kind.convolve(x, w, b)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        for_x, for_w, for_b = wanted(ctx, 3)
        gb = gy.sum(dim=(0, *range(2, gy.dim()))) if for_b else None
        if not torch.is_grad_enabled():  # nobody differentiates again: one call for both
            return *ctx.kind.backward(gy, x, w, for_x, for_w), gb, None, None
        gx = _input_gradient(gy, w, x, ctx.kind, ctx.phase) if for_x else None
        gw = _WeightGradient.apply(gy, x, w.detach(), ctx.kind, ctx.phase) if for_w else None
        return gx, gw, gb, None, None


def _input_gradient(gy: Tensor, w: Tensor, like: Tensor, kind: Convolution, phase: Phase) -> Tensor:
    """gx(gy, w), with the shape and layout of `like`: where nothing is faster, by PyTorch's own node, which starts without Python."""
    if kind.unseen is None:
        return _InputGradient.apply(gy, w, like.detach(), kind, phase)
    format = suggested_format(like)
    if dense(gy) and suggested_format(gy) != format:  # one with gaps, as if expanded, stays: the graph would keep the copy too
        gy = gy.contiguous(memory_format=format)
    return torch.convolution(gy, w, None, kind.stride, kind.padding, kind.dilation, True, kind.unseen, kind.groups)


class _InputGradient(Function):
    """gx(gy, w), of the shape of `like`."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, w: Tensor, like: Tensor, kind: Convolution, phase: Phase) -> Tensor | None:
        ctx.save_for_backward(gy, w)
        ctx.kind, ctx.phase = kind, phase
        return kind.backward(gy, like, w, True, False)[0]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        gy, w = ctx.saved_tensors
        for_gy, for_w = wanted(ctx, 2)
        if not torch.is_grad_enabled():
            v = pointwise.copied_once(v) if ctx.kind.by_pixels else v
            d_gy = ctx.kind.convolve(v, w, None) if for_gy else None
            d_w = ctx.kind.backward(gy, v, w, False, True)[1] if for_w else None
            return d_gy, d_w, None, None, None
        d_gy = _Convolve.apply(v, w, None, ctx.kind, ctx.phase) if for_gy else None
        d_w = _WeightGradient.apply(gy, v, w.detach(), ctx.kind, ctx.phase) if for_w else None
        return d_gy, d_w, None, None, None


class _WeightGradient(Function):
    """gw(gy, x), of the shape of `like`."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, like: Tensor, kind: Convolution, phase: Phase) -> Tensor | None:
        ctx.save_for_backward(gy, x)
        ctx.kind, ctx.phase = kind, phase
        return kind.backward(gy, x, like, False, True)[1]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        gy, x = ctx.saved_tensors
        for_gy, for_x = wanted(ctx, 2)
        d_gy = _Convolve.apply(x, v, None, ctx.kind, ctx.phase) if for_gy else None
        d_x = _InputGradient.apply(gy, v, x.detach(), ctx.kind, ctx.phase) if for_x else None
        return d_gy, d_x, None, None, None


def _hashable(value: Any) -> Any:
    """A setting as a key of a cache: PyTorch takes lists too, and NumPy's numbers and tensors."""
    if type(value) in (int, tuple, str) or isinstance(value, float):  # PyTorch refuses floats
        return value
    return tuple(value) if isinstance(value, Sequence) else int(value)


def _kind(x: Tensor, w: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, *rest: Any) -> Convolution:
    """How to compute a convolution of these tensors; settings as of `_convolution`."""
    format = convolution_format(x, w) if groups == 1 and w.shape[2:].numel() == 1 else None
    channels_last = (format == torch.channels_last) if groups == 1 else channels_adjacent(x)  # read for 1x1 and grouped convolutions alone
    # On the CPU, in the types that its kernels for convolutions are slow in.
    products = x.device.type == "cpu" and x.dtype in PRODUCTS and format != torch.channels_last_3d
    return _convolution(x.shape, w.shape, stride, padding, dilation, groups, products, channels_last, *rest)


def _apply(x: Tensor, w: Tensor, b: Tensor | None, phase: Phase, *settings: Any) -> Tensor:
    if autocasts(x):
        return as_autocast(_apply, x, w, b, phase, *settings)
    if x.dim() < w.dim():
        return _apply(x.unsqueeze(0), w, b, phase, *settings).squeeze(0)
    kind = _kind(x, w, *settings)
    if kind.by_patches:
        return patches.convolve(phase, x, w, b)
    if kind.by_pixels and kind.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)  # products of pixels know whole images only
    if kind.by_pixels and x.shape[2:].numel() == 1:  # a linear layer: nodes of PyTorch's own start faster than ours
        y: Tensor = aten._unsafe_view(linear(phase, x.flatten(1), w.flatten(1), b), (x.shape[0], w.shape[0], *x.shape[2:]))
        # The same memory with other strides: a layer that makes larger images of it, as an upsampling, takes their layout from these.
        return y.clone(memory_format=torch.channels_last) if kind.channels_last else y
    return _Convolve.apply(x, w, b, kind, phase)


def convolve(
    phase: Phase,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    axes: int = 2,
) -> Tensor:
    """`F.conv1d`, `F.conv2d`, `F.conv3d`, of so many axes."""
    stride, padding, dilation = _hashable(stride), _hashable(padding), _hashable(dilation)
    if not supported.convolution(supported.convolution_shapes, axes, input, weight, bias, stride, padding, dilation, groups):
        return (F.conv1d, F.conv2d, F.conv3d)[axes - 1](input, weight, bias, stride, padding, dilation, groups)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(per_axis(dilation, axes), weight.shape[2:], strict=True)]
        if any(t % 2 for t in total):  # the far side gets the one more
            input = F.pad(input, [side for t in reversed(total) for side in (0, t % 2)])
        padding = tuple(t // 2 for t in total)
    elif padding == "valid":
        padding = 0
    return _apply(input, weight, bias, phase, stride, padding, dilation, groups)


def convolve_if_faster(
    phase: Phase,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """`F.conv2d` where it is differentiated once: ours if that has a faster gradient of the weights, else PyTorch's."""
    plain = type(input) in PLAIN and type(weight) in PLAIN and input.dtype == weight.dtype in PRODUCTS
    if plain and input.dim() == weight.dim() and not isinstance(padding, str) and not torch.is_autocast_enabled(input.device.type):
        settings = _hashable(stride), _hashable(padding), _hashable(dilation), groups
        fits = supported.convolution(supported.convolution_shapes, 2, input, weight, bias, *settings)
        if fits and _kind(input, weight, *settings).weight_product is not None:
            return _apply(input, weight, bias, phase, *settings)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


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
    axes: int = 2,
) -> Tensor:
    """`F.conv_transpose1d`, `F.conv_transpose2d`, `F.conv_transpose3d`, of so many axes."""
    stride, padding, output_padding, dilation = map(_hashable, (stride, padding, output_padding, dilation))
    if not supported.convolution(supported.transposed_shapes, axes, input, weight, bias, stride, padding, output_padding, groups, dilation):
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]
        return function(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return _apply(input, weight, bias, phase, stride, padding, dilation, groups, True, output_padding)
