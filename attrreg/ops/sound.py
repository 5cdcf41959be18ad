"""Arguments that an operator of ours is sure to compute; what is not among them is left to PyTorch, which refuses it or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import index
from typing import Any

import torch
from torch import Tensor

from attrreg.ops.precision import wide


def with_parameters(x: Tensor, shape: Sequence[int], *parameters: Tensor | None) -> bool:
    """Whether parameters have a shape and fit floating-point values, of which half types may have wide ones."""
    kinds = {x.dtype, wide(x)}
    fit = all(values is None or (values.shape == tuple(shape) and values.dtype in kinds) for values in parameters)
    return fit and x.is_floating_point() and len({values.dtype for values in parameters if values is not None}) < 2


def convolves(shapes: Callable[..., bool], axes: int, x: Tensor, w: Tensor, b: Tensor | None, *settings: Any) -> bool:
    """Whether types, `shapes` and settings are of a convolution of so many axes; of complex ones PyTorch makes several."""
    kinds = {tensor.dtype for tensor in (x, w, b) if tensor is not None}
    floating = x.is_floating_point() and w.is_floating_point()
    alike = floating and (len(kinds) == 1 or torch.is_autocast_enabled(x.device.type))
    try:
        return alike and w.dim() == axes + 2 and shapes(x.shape, w.shape, None if b is None else b.shape, *settings)
    except TypeError:  # which no cache keeps: see `each`
        return False


@lru_cache(maxsize=4096)
def convolution(
    image: tuple[int, ...], weight: tuple[int, ...], bias: tuple[int, ...] | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> bool:
    """Of shapes, and settings as `F.conv2d` takes them."""
    axes = len(weight) - 2
    settings = _settings(axes, stride, 0 if isinstance(padding, str) else padding, dilation)
    if settings is None or not _fits(image, weight, groups) or (isinstance(padding, str) and padding not in ("same", "valid")):
        return False
    if image[-axes - 1] != weight[1] * groups or weight[0] % groups or bias not in (None, (weight[0],)):
        return False
    if padding == "same":
        return all(stride == 1 for stride, _, _ in settings)
    return all(
        size + 2 * pad > step * (kernel - 1) for size, kernel, (_, pad, step) in zip(image[-axes:], weight[2:], settings, strict=True)
    )


@lru_cache(maxsize=4096)
def transposed(
    image: tuple[int, ...],
    weight: tuple[int, ...],
    bias: tuple[int, ...] | None,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
) -> bool:
    """Of shapes, and settings as `F.conv_transpose2d` takes them."""
    axes = len(weight) - 2
    settings, added = _settings(axes, stride, padding, dilation), each(output_padding, axes)
    if settings is None or len(added) != axes or min(added) < 0 or not _fits(image, weight, groups):
        return False
    if image[-axes - 1] != weight[0] or weight[0] % groups or bias not in (None, (weight[1] * groups,)):
        return False
    sizes = zip(image[-axes:], weight[2:], settings, added, strict=True)
    return all(
        more < max(by, step) and (size - 1) * by - 2 * pad + step * (kernel - 1) + more >= 0
        for size, kernel, (by, pad, step), more in sizes
    )


def each(value: int | Sequence[int], axes: int) -> list[int]:
    """A setting of a convolution, one number an axis. Floats, which a cache would not tell from these, are a TypeError."""
    return [value] * axes if isinstance(value, int) else [*map(index, value)] * (axes if len(value) == 1 else 1)


def _settings(axes: int, stride: Any, padding: Any, dilation: Any) -> list[tuple[int, int, int]] | None:
    """Stride, padding and dilation of each axis; None: they are none."""
    values = [each(value, axes) for value in (stride, padding, dilation)]
    if any(len(value) != axes for value in values):
        return None
    if min(values[0]) < 1 or min(values[1]) < 0 or min(values[2]) < 1:
        return None
    return list(zip(*values, strict=True))


def _fits(image: tuple[int, ...], weight: tuple[int, ...], groups: int) -> bool:
    return len(image) in (len(weight), len(weight) - 1) and groups > 0 and 0 not in weight and 0 not in image[-len(weight) + 1 :]
