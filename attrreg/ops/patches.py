"""Convolutions of patches that do not overlap, as linear layers, on every device.

On the CPU PyTorch's gradient of the input, which an ordinary training step never takes, is slow for these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attrreg.ops.channels import convolution_format, suggested_format
from attrreg.ops.linear import linear
from attrreg.ops.phase import Phase


def are_disjoint(weight: Sequence[int], stride: list[int], padding: list[int], dilation: list[int], groups: int) -> bool:
    """Whether a convolution with these settings, one number an axis, sees patches of several pixels that do not overlap."""
    kernel = list(weight[2:])
    return groups == 1 and len(kernel) == 2 and kernel == stride and min(kernel) > 1 and not any(padding) and dilation == [1, 1]


def convolve(phase: Phase, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """y(x, w) + b."""
    n, channels, height, width = x.shape
    kh, kw = w.shape[2:]
    # cuDNN has no channels-last kernels for float64, so there PyTorch's output is contiguous.
    laid_out = x.device.type == "cpu" or x.dtype != torch.float64
    channels_last = laid_out and convolution_format(x, w) == torch.channels_last
    rows, columns = height // kh, width // kw
    if channels_last and suggested_format(x) == torch.channels_last and x.numel() > w.numel():
        # Runs of channels stay whole, and the weight, the smaller one, is laid out like them.
        x = x.permute(0, 2, 3, 1)[:, : rows * kh, : columns * kw]
        x, w = x.reshape(n, rows, kh, columns, kw, channels).permute(0, 1, 3, 2, 4, 5), w.permute(0, 2, 3, 1)
    else:
        x = x[:, :, : rows * kh, : columns * kw]
        x = x.reshape(n, channels, rows, kh, columns, kw).permute(0, 2, 4, 1, 3, 5)
    y = linear(phase, x.reshape(n, rows, columns, channels * kh * kw), w.flatten(1), b)
    # Laid out as a convolution would: code that follows may take a `view`. Not by `contiguous`, which leaves a single position its strides.
    return y.permute(0, 3, 1, 2) if channels_last else y.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
