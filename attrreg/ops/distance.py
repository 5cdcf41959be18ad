"""Norms and distances that can be differentiated twice, at zero too.

PyTorch's second derivative of a 2-norm at zero is NaN, and `cdist` has none at all. Here both derivatives at zero are zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TWO = (2, 2.0, None, "fro")


def two_norm(x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    """sqrt(sum x^2)."""
    squared = x.square().sum(dim=tuple(range(x.dim())) if dim is None else dim, keepdim=keepdim)
    zero = squared == 0
    return torch.where(zero, torch.zeros_like(squared), torch.where(zero, torch.ones_like(squared), squared).sqrt())


def vector_norm(x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.linalg.vector_norm`."""
    if ord not in TWO or not x.is_floating_point():
        result: Tensor = torch.linalg.vector_norm(x, ord, dim, keepdim, dtype=dtype)
        return result
    return two_norm(x if dtype is None else x.to(dtype), dim, keepdim)


def norm(input: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, out: Tensor | None = None, dtype: Any = None) -> Tensor:
    """`torch.norm`."""
    if p not in TWO or out is not None or not input.is_floating_point():
        result: Tensor = torch.norm(input, p, dim, keepdim, out, dtype)
        return result
    return two_norm(input if dtype is None else input.to(dtype), dim, keepdim)


def linalg_norm(
    A: Tensor, ord: Any = None, dim: Any = None, keepdim: bool = False, *, out: Tensor | None = None, dtype: Any = None
) -> Tensor:
    """`torch.linalg.norm`, whose 2-norm of a matrix is another."""
    axes = 1 if isinstance(dim, int) else len(dim) if dim is not None else 0 if ord is None else A.dim()
    if ord not in TWO or (ord == 2 and axes != 1) or out is not None or not A.is_floating_point():
        result: Tensor = torch.linalg.norm(A, ord, dim, keepdim, out=out, dtype=dtype)
        return result
    return two_norm(A if dtype is None else A.to(dtype), dim, keepdim)


def normalize(input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Tensor | None = None) -> Tensor:
    """`F.normalize`: x / max(||x||, eps)."""
    if p not in TWO or out is not None:
        return F.normalize(input, p, dim, eps, out)
    # Clamped before the root, whose derivative at zero is infinite. Half types have no room for eps squared.
    wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    floor = max(eps**2, float(torch.finfo(wide.dtype).tiny))
    return (wide / wide.square().sum(dim=dim, keepdim=True).clamp_min(floor).sqrt()).to(input.dtype)


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = "") -> Tensor:
    """`torch.cdist`: the distance of each row of `x1` `(..., P, M)` to each row of `x2` `(..., R, M)`."""
    difference = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    if p == 2:
        return two_norm(difference, dim=-1)
    if p == 1:
        return difference.abs().sum(dim=-1)
    if math.isinf(p):
        return difference.abs().amax(dim=-1)
    result: Tensor = torch.linalg.vector_norm(difference, p, dim=-1)
    return result
