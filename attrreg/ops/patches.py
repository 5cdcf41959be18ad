"""Convolutions of patches that do not overlap, as linear layers.

Their input gradient, which an ordinary training step never takes, is slow on the CPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attrreg.ops.channels import of_convolution, suggested
from attrreg.ops.linear import linear
from attrreg.ops.phase import Phase
from attrreg.ops.sound import each


@lru_cache(maxsize=4096)
def are(dim: int, weight: tuple[int, ...], stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether a convolution looks at patches that do not overlap, and at more than a pixel each."""
    if dim != 4 or len(weight) != 4 or groups != 1:
        return False
    kernel = list(weight[2:])
    padded = padding != "valid" and (padding == "same" or any(each(padding, 2)))
    return kernel == each(stride, 2) and min(kernel) > 1 and not padded and each(dilation, 2) == [1, 1]


def convolve(phase: Phase, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """y(x, w) + b."""
    n, channels, height, width = x.shape
    high, wide = w.shape[2:]
    laid_out = x.device.type == "cpu" or x.dtype != torch.float64  # for which cuDNN has no kernels of this layout
    channels_last = laid_out and of_convolution(x, w) == torch.channels_last
    rows, columns = height // high, width // wide
    if channels_last and suggested(x) == torch.channels_last and x.numel() > w.numel():
        # Runs of channels stay whole, and the weight, the smaller one, is laid out like them.
        x = x.permute(0, 2, 3, 1)[:, : rows * high, : columns * wide]
        x, w = x.reshape(n, rows, high, columns, wide, channels).permute(0, 1, 3, 2, 4, 5), w.permute(0, 2, 3, 1)
    else:
        x = x[:, :, : rows * high, : columns * wide]
        x = x.reshape(n, channels, rows, high, columns, wide).permute(0, 2, 4, 1, 3, 5)
    y = linear(phase, x.reshape(n, rows, columns, channels * high * wide), w.flatten(1), b)
    # Laid out as a convolution would: code that follows may take a `view`.
    return y.permute(0, 3, 1, 2) if channels_last else y.permute(0, 3, 1, 2).contiguous()
