"""Whether our operators support the arguments. All others are left to PyTorch's function, which computes or refuses them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import index
from typing import Any

import torch
from torch import Tensor

from attrreg.ops.precision import compute_dtype


def norm(x: Tensor, shape: Sequence[int], *parameters: Tensor | None) -> bool:
    """Whether x is floating-point, and all parameters have this shape and one type: that of x, or float32 where x is of a half type."""
    shape = tuple(shape)
    dtype: torch.dtype | None = None
    for values in parameters:
        if values is not None:
            if values.shape != shape or dtype not in (None, values.dtype):
                return False
            dtype = values.dtype
    return x.is_floating_point() and dtype in (None, x.dtype, compute_dtype(x))


def convolution(shapes: Callable[..., bool], axes: int, x: Tensor, w: Tensor, b: Tensor | None, *settings: Any) -> bool:
    """Whether types, shapes and settings are those of a real convolution of so many axes.

    `shapes` is `convolution_shapes` or `transposed_shapes`, which takes `settings` after the shapes of images x, weight w and bias b.
    """
    if any(isinstance(number, float) for value in settings for number in (value if isinstance(value, tuple) else (value,))):
        return False  # PyTorch refuses them; as keys of a cache, 2.0 and 2 are the same
    same = x.dtype == w.dtype and (b is None or b.dtype == x.dtype)
    alike = x.is_floating_point() and w.is_floating_point() and (same or torch.is_autocast_enabled(x.device.type))
    try:
        return alike and w.dim() == axes + 2 and shapes(x.shape, w.shape, None if b is None else b.shape, *settings)
    except TypeError:  # floats, see `per_axis`; `lru_cache` does not keep a call that raised
        return False


@lru_cache(maxsize=4096)
def convolution_shapes(
    image: tuple[int, ...], weight: tuple[int, ...], bias: tuple[int, ...] | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> bool:
    """Whether `F.conv2d`, or its kind for other numbers of axes, takes these shapes and settings."""
    axes = len(weight) - 2
    settings = _settings(axes, stride, 0 if isinstance(padding, str) else padding, dilation)
    if settings is None or groups <= 0 or (isinstance(padding, str) and padding not in ("same", "valid")):
        return False
    if len(image) not in (axes + 1, axes + 2) or 0 in weight or 0 in image[-axes - 1 :]:
        return False
    if image[-axes - 1] != weight[1] * groups or weight[0] % groups or bias not in (None, (weight[0],)):
        return False
    if padding == "same":
        return all(stride == 1 for stride, _, _ in settings)
    return all(
        size + 2 * pad > step * (kernel - 1) for size, kernel, (_, pad, step) in zip(image[-axes:], weight[2:], settings, strict=True)
    )


@lru_cache(maxsize=4096)
def transposed_shapes(image: tuple[int, ...], weight: tuple[int, ...], bias: tuple[int, ...] | None, *settings: Any) -> bool:
    """As `convolution_shapes`, of `F.conv_transpose2d`. PyTorch's own kernel computes it, and refuses what else does not fit."""
    axes = len(weight) - 2
    for value in settings:
        per_axis(value, axes)  # a TypeError where they are no whole numbers
    return len(image) in (axes + 1, axes + 2)


def per_axis(value: int | Sequence[int], axes: int) -> list[int]:
    """A setting of a convolution, one number an axis. Floats are a TypeError, as PyTorch's."""
    return [value] * axes if isinstance(value, int) else [*map(index, value)] * (axes if len(value) == 1 else 1)


def _settings(axes: int, stride: Any, padding: Any, dilation: Any) -> list[tuple[int, int, int]] | None:
    """Stride, padding and dilation of each axis; None: a number is missing or out of range."""
    values = [per_axis(value, axes) for value in (stride, padding, dilation)]
    if any(len(value) != axes for value in values):
        return None
    if min(values[0]) < 1 or min(values[1]) < 0 or min(values[2]) < 1:
        return None
    return list(zip(*values, strict=True))
