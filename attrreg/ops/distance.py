"""Norms, distances and standard deviations that can be differentiated twice, at zero too.

PyTorch's second derivative of a 2-norm at zero is NaN, as is that of a standard deviation, and in older versions `cdist` has a second
derivative for 2-norms of many rows alone. Here both derivatives at zero are zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from attrreg.ops.precision import compute_dtype, in_compute_dtype

TWO = (2, 2.0, None, "fro")
BY_DIFFERENCES = "donot_use_mm_for_euclid_dist"
MODES = ("use_mm_for_euclid_dist_if_necessary", "use_mm_for_euclid_dist", BY_DIFFERENCES)
MAX_DIFFERENCES = 2**24  # of values, up to which there is a tensor of them


def two_norm(x: Tensor, dim: Any, keepdim: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """sqrt(sum x^2)."""
    if dtype is not None:
        x = x.to(dtype)
    if x.dtype != compute_dtype(x):  # which has room for the squares
        return in_compute_dtype(two_norm, x, dim, keepdim)
    return _root(x.square().sum(dim=dim, keepdim=keepdim))


def std(input: Tensor, *args: Any, **settings: Any) -> Tensor:
    """`torch.std`."""
    if not input.is_floating_point():
        return torch.std(input, *args, **settings)
    return std_mean(input, *args, **settings)[0]


def std_mean(input: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    """`torch.std_mean`."""
    if not input.is_floating_point():
        return torch.std_mean(input, *args, **settings)
    if input.dtype != (dtype := compute_dtype(input)):  # which has room for the squares
        deviation, mean = std_mean(input.to(dtype), *args, **settings)
        return deviation.to(input.dtype), mean.to(input.dtype)
    variance, mean = torch.var_mean(input, *args, **settings)
    return _root(variance), mean


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """`F.cosine_similarity`, whose norms PyTorch takes where no mode sees them."""
    if not (x1.is_floating_point() and x2.is_floating_point()) or eps <= 0:
        return F.cosine_similarity(x1, x2, dim, eps)
    if x1.dtype != x2.dtype:  # as autocast makes features narrower than prototypes
        dtype = torch.promote_types(x1.dtype, x2.dtype)
        x1, x2 = x1.to(dtype), x2.to(dtype)
    if x1.dtype != compute_dtype(x1):
        return in_compute_dtype(cosine_similarity, x1, x2, dim, eps)
    if x1.shape != x2.shape:
        x1, x2 = torch.broadcast_tensors(x1, x2)  # `dim` is an axis of the common shape
    return (_unit(x1, dim, eps) * _unit(x2, dim, eps)).sum(dim)


def _unit(x: Tensor, dim: int, eps: float) -> Tensor:
    norm = two_norm(x, dim, keepdim=True)
    return x / (norm + (norm.clamp_min(eps) - norm).detach())  # PyTorch clamps the value, not the gradient


def _root(squared: Tensor) -> Tensor:
    """The square root, at zero with derivatives of zero."""
    zero = squared == 0
    return squared.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def _widens(x: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether x is floating-point, and `dtype`, in which to compute, is None or no narrower than its own type."""
    return x.is_floating_point() and (dtype is None or (dtype.is_floating_point and torch.promote_types(x.dtype, dtype) == dtype))


def vector_norm(input: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.linalg.vector_norm`."""
    if ord != 2 or not _widens(input, dtype):
        return torch.linalg.vector_norm(input, ord, dim, keepdim, dtype=dtype)
    return two_norm(input, dim, keepdim, dtype)


def norm(input: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    """`torch.norm`."""
    matrix = p == "fro" and isinstance(dim, Sequence) and len(dim) > 2  # of which there is none of so many axes
    if p not in TWO or matrix or not _widens(input, dtype):
        return torch.norm(input, p, dim, keepdim, dtype=dtype)
    return two_norm(input, dim, keepdim, dtype)


def linalg_norm(input: Tensor, ord: Any = None, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """`torch.linalg.norm`, whose 2-norm of a matrix is another."""
    axes = (0 if ord is None else input.dim()) if dim is None else len(dim) if isinstance(dim, Sequence) else 1
    fits = axes == 1 if ord == 2 else axes == 2 if ord == "fro" else axes < 3
    if ord not in TWO or not fits or not _widens(input, dtype):
        return torch.linalg.norm(input, ord, dim, keepdim, dtype=dtype)
    return two_norm(input, dim, keepdim, dtype)


def matrix_norm(
    input: Tensor, ord: Any = "fro", dim: tuple[int, int] = (-2, -1), keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    """`torch.linalg.matrix_norm`."""
    if ord != "fro" or len(dim) != 2 or not _widens(input, dtype):
        return torch.linalg.matrix_norm(input, ord, dim, keepdim, dtype=dtype)
    return two_norm(input, dim, keepdim, dtype)


class _Euclidean(Function):
    """d, the distances `(..., P, R)` of rows `(..., P, M)` and `(..., R, M)`, without a tensor of all differences.

    With w = gy / d, and 0 where d is, of operations that have derivatives of their own:

        g1 = x1 sum_R(w) - w x2,   g2 = x2 sum_P(w) - w^T x1
    """

    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor) -> Tensor:
        y = torch.cdist(x1, x2, compute_mode=BY_DIFFERENCES)  # by products, equal rows would only nearly be at zero
        ctx.save_for_backward(x1, x2, y)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x1, x2, d = ctx.saved_tensors
        w = gy / d.masked_fill(d == 0, math.inf)
        for_1, for_2 = ctx.needs_input_grad
        g1 = (x1 * w.sum(-1).unsqueeze(-1) - w @ x2).sum_to_size(x1.shape) if for_1 else None
        g2 = (x2 * w.sum(-2).unsqueeze(-1) - w.mT @ x1).sum_to_size(x2.shape) if for_2 else None
        return g1, g2


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = MODES[0]) -> Tensor:
    """`torch.cdist`: the distance of each row of `x1` `(..., P, M)` to each row of `x2` `(..., R, M)`.

    Gradients of 2-norms of many rows are differences of products, as PyTorch's: rows that lie much closer to each other than to zero lose
    the digits that they share.
    """
    if torch.is_autocast_enabled(x1.device.type):  # as autocast does for it
        x1, x2 = (x if x.dtype == torch.float64 else x.float() for x in (x1, x2))
    rows = min(x1.dim(), x2.dim()) > 1 and x1.shape[-1] == x2.shape[-1] > 0
    known = rows and x1.dtype == x2.dtype in (torch.float32, torch.float64) and p >= 0 and compute_mode in MODES
    if not (known and torch.is_grad_enabled() and (x1.requires_grad or x2.requires_grad)):  # as for the nearest code, which has no gradient
        return torch.cdist(x1, x2, p, compute_mode)
    if p == 2 and math.prod(torch.broadcast_shapes(x1.unsqueeze(-2).shape, x2.unsqueeze(-3).shape)) > MAX_DIFFERENCES:
        return _Euclidean.apply(x1, x2)
    difference = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    if p == 2:
        return two_norm(difference, dim=-1)
    if p == math.inf:  # of values that tie, PyTorch's kernel gives each the whole gradient, `vector_norm` a share
        largest = difference.detach().abs().amax(-1, keepdim=True)
        signs = difference.detach().sgn() * (difference.detach().abs() == largest)
        return largest.squeeze(-1) + ((difference - difference.detach()) * signs).sum(-1)
    return torch.linalg.vector_norm(difference, p, dim=-1)
