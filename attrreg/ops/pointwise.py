"""1x1 convolutions as matrix products.

PyTorch's convolution prepares longer than it computes where there is little to compute, and each of its derivatives calls one more.
Where there is much, it is the faster one: its kernels are generated for the processor at hand, and its products not always (on AMD's
with AVX-512 they run at half the speed). `by_products` says where the line is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
FEW = 8  # positions: products of so few columns are slow, so that all images are put into one
NARROW = 2**12  # values of a weight, up to which products win at any number of positions
MIDDLING = 2**14  # the same at few positions


def by_products(positions: int, weights: int) -> tuple[bool, bool]:
    """Where products are as fast as PyTorch's convolution or faster: for images and their gradients, and for gradients of weights.

    Args:
        positions: of an image.
        weights: values of the weight.
    """
    few = positions <= FEW
    return weights <= NARROW or positions == 1 or (few and weights <= MIDDLING), weights <= NARROW or few


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def is_only_channels_last(x: Tensor) -> bool:
    """Whether a tensor is laid out so, and not also contiguous, as one of a single channel or position is."""
    return _is_channels_last(x) and not x.is_contiguous()


def _rows(x: Tensor) -> bool:
    """Whether to take all images as rows of channels, in one product; else one product an image."""
    return x.shape[2:].numel() <= FEW or _is_channels_last(x)


def _as_rows(x: Tensor) -> Tensor:
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def convolve(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """y(x, w) + b."""
    return _times(w.flatten(1), x, b)


def _times(matrix: Tensor, x: Tensor, b: Tensor | None) -> Tensor:
    """A matrix `(out, in)` times each position of `(N, in, ...)`, laid out as that. No view: autograd functions must not return one."""
    n, out, places = x.shape[0], matrix.shape[0], x.shape[2:]
    if not _rows(x):
        matrices, flat = matrix.expand(n, -1, -1), x.flatten(2)
        product = torch.bmm(matrices, flat) if b is None else torch.baddbmm(b[:, None], matrices, flat)
        result: Tensor = aten._unsafe_view(product, (n, out, *places))
        return result
    format = torch.channels_last if is_only_channels_last(x) else torch.contiguous_format
    y = torch.empty((n, out, *places), dtype=x.dtype, device=x.device, memory_format=format)
    rows = y.movedim(1, -1)
    if not rows.is_contiguous():
        return y.copy_(F.linear(_as_rows(x), matrix, b).view(n, *places, out).movedim(-1, 1))
    if b is None:
        torch.mm(_as_rows(x), matrix.t(), out=rows.view(-1, out))
    else:
        torch.addmm(b, _as_rows(x), matrix.t(), out=rows.view(-1, out))
    return y


def input_gradient(gy: Tensor, w: Tensor) -> Tensor:
    """gx(gy, w)."""
    # Of a transposed matrix, products with each image are slow.
    return _times(w.flatten(1).t() if _rows(gy) else w.flatten(1).t().contiguous(), gy, None)


def weight_gradient(gy: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """gw(gy, x), of the shape of w."""
    (n, channels), out = x.shape[:2], gy.shape[1]
    if _rows(x):
        product = _as_rows(gy).t() @ _as_rows(x)
    elif out * channels <= 2 * (out + channels) * x.shape[2:].numel():
        product = torch.bmm(gy.flatten(2), x.flatten(2).mT).sum(0) if n > 1 else gy[0].flatten(1) @ x[0].flatten(1).t()
    else:  # a matrix for each image would be larger than the images
        product = gy.transpose(0, 1).reshape(out, -1) @ x.transpose(0, 1).reshape(channels, -1).t()
    result: Tensor = aten._unsafe_view(product, w.shape)
    return result
