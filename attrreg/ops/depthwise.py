"""Weight gradients of depthwise convolutions, as matrix products or in another layout.

On the CPU PyTorch's are up to a hundred times as slow as the convolution itself where kernels are wide, least so in `channels_last`. With n
images, rows r and columns s of the output (i of the image), a and b rows and columns of the kernel:

    gw[c, a, b] = sum_s G_a[c, s, s + b],   G_a[c, s, i] = sum_{n, r} gy[n, c, r, s] x[n, c, r + a, i]

so that a row of the kernel is one product a channel, and the sum of its diagonals. It computes more than is asked for, by as much as the
image is wider than the kernel. Where positions are few and images many, one product for the whole kernel is faster, of all positions p of
the output and q of the image:

    gw[c, a, b] = sum_{r, s} H[c, (r, s), (r + a, s + b)],   H[c, p, q] = sum_n gy[n, c, p] x[n, c, q]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attrreg.ops.channels import channels_adjacent
from attrreg.ops.pointwise import as_rows

WIDE_KERNEL = 5  # columns: narrower kernels have fast weight gradients, unless the image is smaller than the kernel
MAX_WIDTH_RATIO = 6  # of image to kernel: of wider images, products compute too much that is not asked for
# Positions of an output, in all and for each image of the batch, up to which all their products are fast.
FEW_POSITIONS, POSITIONS_PER_IMAGE = 100, 2


def is_slow(image: Sequence[int], kernel: Sequence[int], channels_last: bool) -> tuple[bool, bool]:
    """Whether PyTorch's kernel is slower than products, and if not, whether it is slower than with channels last.

    Args:
        image: `(H, W)`.
        kernel: `(kh, kw)`.
        channels_last: the images lie so already.
    """
    (height, width), (kh, kw) = image, kernel
    narrow = width <= kw * MAX_WIDTH_RATIO  # so that products do not compute too much
    if narrow and (height < kh or width < kw):
        return True, False
    if channels_last or kw < WIDE_KERNEL:
        return False, False
    return narrow, not narrow


def weight_gradient(gy: Tensor, x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """gw(gy, x), of the shape of w."""
    way = _by_positions if gy.shape[2:].numel() <= min(FEW_POSITIONS, POSITIONS_PER_IMAGE * gy.shape[0]) else _by_rows
    return way(gy, x, w.shape[2:], stride, padding, dilation).view(w.shape).data


def _by_positions(
    gy: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    positions, image = gy.shape[2:], x.shape[2:]
    products = torch.bmm(_channels(gy).flip(-1).mT, _channels(x))
    # `fold` sums patches where they overlap. Each position of the image, as a channel, gets the patch of its products with all positions of
    # the output, turned round (`flip`): what then falls on one place are the products of positions that are equally far apart.
    reach = [(count - 1) * step for count, step in zip(positions, stride, strict=True)]
    whole = tuple(side + far for side, far in zip(image, reach, strict=True))
    sums = F.fold(products.view(1, -1, products.shape[2]), whole, tuple(positions), tuple(stride))
    margins = []
    for axis in (1, 0):  # to where a kernel starts and ends, which may be inside
        before, size = padding[axis] - reach[axis], (kernel[axis] - 1) * dilation[axis] + 1
        margins += [before, size - before - sums.shape[2 + axis]]
    return F.pad(sums, margins)[0, :, :: dilation[0], :: dilation[1]].contiguous()


def _channels(x: Tensor) -> Tensor:
    """The images of each channel, `(C, N, positions)`."""
    if channels_adjacent(x):  # transposing one dense matrix is fast, so what has gaps is copied first
        return as_rows(x).contiguous().t().contiguous().view(x.shape[1], x.shape[0], -1)
    return x.flatten(2).transpose(0, 1)


def _by_rows(
    gy: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    channels, (kh, kw) = x.shape[1], kernel
    rows, columns = gy.shape[2:]
    # Rows before images, so that some of the rows of all images are one matrix without a copy.
    gy = gy.permute(1, 2, 0, 3).contiguous()
    x = F.pad(x, (padding[1], padding[1])).permute(1, 2, 0, 3).contiguous()
    height, width = x.shape[1], x.shape[3]
    gw = gy.new_zeros(channels, kh, kw)
    for a in range(kh):
        offset = a * dilation[0] - padding[0]
        first, last = max(0, -(offset // stride[0])), min(rows - 1, (height - 1 - offset) // stride[0])
        if first > last:  # this row of the kernel only ever meets padding
            continue
        seen = x[:, first * stride[0] + offset : last * stride[0] + offset + 1 : stride[0]]
        products = torch.bmm(gy[:, first : last + 1].flatten(1, 2).mT, seen.flatten(1, 2))
        diagonals = products.as_strided((channels, columns, kw), (columns * width, width + stride[1], dilation[1]))
        torch.sum(diagonals, 1, out=gw[:, a])
    return gw
