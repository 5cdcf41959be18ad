"""In which types operators compute, and in which their results go out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attrreg.state import full_precision


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type to compute in, float32 at least: half types have no room for sums, nor for the powers of second derivatives."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def in_compute_dtype(function: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    """Call a function of half types in float32, and round its result once; under a GPU's autocast it stays float32, as PyTorch's."""
    y, device = _cast(function, compute_dtype(x), x, *rest), x.device.type
    return y if device in ("cuda", "xpu") and torch.is_autocast_enabled(device) else y.to(x.dtype)


def autocasts(x: Tensor) -> bool:
    """Whether autocast would cast a tensor: it is on, and the tensor is not float64."""
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def as_autocast(function: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    """Call a function with tensors cast to autocast's type, as autocast calls those on its list, and with autocast off inside."""
    with full_precision(x.device):
        return _cast(function, torch.get_autocast_dtype(x.device.type), x, *rest)


def _cast(function: Callable[..., Tensor], dtype: torch.dtype, *arguments: Any) -> Tensor:
    return function(*(value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value for value in arguments))
