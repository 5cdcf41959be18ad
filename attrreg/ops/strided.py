"""Input gradients of strided convolutions with few input channels, as the first of a network: plain training steps never take them.

PyTorch's CPU kernel pads the few channels to a vector register's width. The pixels of an image at one remainder of the stride meet only
the weights at one remainder; taken as channels, they fill the register, and the gradient is a convolution of stride one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

FEW_CHANNELS = 4
WIDE_KERNEL = 5  # kernels of fewer pixels do not cover the remainders


def is_slow(channels: int, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int) -> bool:
    """Whether PyTorch's kernel is the slower one."""
    return groups == 1 and channels <= FEW_CHANNELS and min(kernel) >= WIDE_KERNEL and stride[0] == stride[1] > 1 and set(dilation) == {1}


def input_gradient(gy: Tensor, w: Tensor, size: Sequence[int], stride: int, padding: Sequence[int]) -> Tensor:
    """gx(gy, w), `(N, C, *size)`, contiguous.

    With `front` zeros before the kernel, padding + front is `offset` strides. Then pixel `stride * q + r` of the image meets the weights
    `stride * j + r` of the kernel, for output `q + offset - j` and j below `reach`: for each remainder r a convolution of stride one.
    """
    front = [-pad % stride for pad in padding]  # zeros before the kernel
    reach = [-(-(kernel + zeros) // stride) for kernel, zeros in zip(w.shape[2:], front, strict=True)]
    back = [stride * many - kernel - zeros for many, kernel, zeros in zip(reach, w.shape[2:], front, strict=True)]
    w = F.pad(w, (front[1], back[1], front[0], back[0]))
    w = F.pixel_unshuffle(w, stride).flip(2, 3).transpose(0, 1)
    sides = []
    for length, many, zeros, pad, output in zip(size, reach, front, padding, gy.shape[2:], strict=True):
        offset = (pad + zeros) // stride
        sides.append((many - 1 - offset, -(-length // stride) + offset - output))
    gx = F.pixel_shuffle(F.conv2d(F.pad(gy, (*sides[1], *sides[0])), w), stride)
    return gx[:, :, : size[0], : size[1]].contiguous().data  # else a view, where nothing is cut off
