"""Weight gradients of depthwise convolutions, as matrix products or in another layout.

On the CPU PyTorch's are up to a hundred times as slow as the convolution itself where kernels are wide, least so in `channels_last`. With n
images, rows r and columns s of the output (i of the image), a and b rows and columns of the kernel:

    gw[c, a, b] = sum_s G_a[c, s, s + b],   G_a[c, s, i] = sum_{n, r} gy[n, c, r, s] x[n, c, r + a, i]

so that a row of the kernel is one product a channel, and the sum of its diagonals. It computes more than is asked for, by as much as the
image is wider than the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

WIDE = 5  # kernels of fewer columns have fast weight gradients, but on images smaller than they are
EXCESS = 6  # how much wider than the kernel the image may be: beyond, products compute too much


def is_slow(image: Sequence[int], kernel: Sequence[int], channels_last: bool) -> tuple[bool, bool]:
    """Whether PyTorch's, of images `(H, W)` and kernels `(h, w)`, is slower than products, or than itself in `channels_last`."""
    (height, width), (high, wide) = image, kernel
    if height < high or width < wide:
        return high * wide > 1, False
    if channels_last or wide < WIDE:
        return False, False
    return width <= wide * EXCESS, width > wide * EXCESS


def weight_gradient(gy: Tensor, x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """gw(gy, x), of the shape of w."""
    channels, _, high, wide = w.shape
    rows, columns = gy.shape[2:]
    # Rows before images, so that some of the rows of all images are one matrix without a copy.
    gy = gy.permute(1, 2, 0, 3).contiguous()
    x = F.pad(x, (padding[1], padding[1])).permute(1, 2, 0, 3).contiguous()
    height, width = x.shape[1], x.shape[3]
    gw = gy.new_zeros(channels, high, wide)
    for a in range(high):
        offset = a * dilation[0] - padding[0]
        first, last = max(0, -(offset // stride[0])), min(rows - 1, (height - 1 - offset) // stride[0])
        if first > last:  # this row of the kernel only ever meets padding
            continue
        seen = x[:, first * stride[0] + offset : last * stride[0] + offset + 1 : stride[0]]
        products = torch.bmm(gy[:, first : last + 1].flatten(1, 2).mT, seen.flatten(1, 2))
        diagonals = products.as_strided((channels, columns, wide), (columns * width, width + stride[1], dilation[1]))
        torch.sum(diagonals, 1, out=gw[:, a])
    return gw.view(w.shape)
