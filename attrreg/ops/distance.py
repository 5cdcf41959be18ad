"""Norms and distances that can be differentiated twice, at zero too.

PyTorch's second derivative of a 2-norm at zero is NaN, and `cdist` has none but for 2-norms of many rows. Here both derivatives at zero
are zero. Division by the norm, as in cosine attention, is a closed form of few passes over memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from attrreg.ops.phase import once_differentiable
from attrreg.ops.precision import wide, widely

TWO = (2, 2.0, None, "fro")
BY_DIFFERENCES = "donot_use_mm_for_euclid_dist"
MODES = ("use_mm_for_euclid_dist_if_necessary", "use_mm_for_euclid_dist", BY_DIFFERENCES)
MANY = 2**24  # differences of values, from which on there is no tensor of them


def two_norm(x: Tensor, dim: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """sqrt(sum x^2)."""
    if dtype is not None:
        x = x.to(dtype)
    if x.dtype != wide(x):  # which has room for the squares
        return widely(two_norm, x, dim, keepdim)
    squared = x.square().sum(dim=tuple(range(x.dim())) if dim is None else dim, keepdim=keepdim)
    zero = squared == 0
    return torch.where(zero, torch.zeros_like(squared), torch.where(zero, torch.ones_like(squared), squared).sqrt())


def _widens(x: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether floating-point values are computed with in their own type or in a wider one."""
    return x.is_floating_point() and (dtype is None or (dtype.is_floating_point and torch.promote_types(x.dtype, dtype) == dtype))


def vector_norm(
    x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, out: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """`torch.linalg.vector_norm`."""
    if ord != 2 or out is not None or not _widens(x, dtype):
        result: Tensor = torch.linalg.vector_norm(x, ord, dim, keepdim, out=out, dtype=dtype)
        return result
    return two_norm(x, dim, keepdim, dtype)


def norm(input: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, out: Tensor | None = None, dtype: Any = None) -> Tensor:
    """`torch.norm`."""
    matrix = p == "fro" and isinstance(dim, Sequence) and len(dim) > 2  # of which there is none of so many axes
    if p not in TWO or matrix or out is not None or not _widens(input, dtype):
        result: Tensor = torch.norm(input, p, dim, keepdim, out, dtype)
        return result
    return two_norm(input, dim, keepdim, dtype)


def linalg_norm(
    A: Tensor, ord: Any = None, dim: Any = None, keepdim: bool = False, *, out: Tensor | None = None, dtype: Any = None
) -> Tensor:
    """`torch.linalg.norm`, whose 2-norm of a matrix is another."""
    axes = 1 if isinstance(dim, int) else len(dim) if dim is not None else 0 if ord is None else A.dim()
    fits = axes == 1 if ord == 2 else axes == 2 if ord == "fro" else axes < 3
    if ord not in TWO or not fits or out is not None or not _widens(A, dtype):
        result: Tensor = torch.linalg.norm(A, ord, dim, keepdim, out=out, dtype=dtype)
        return result
    return two_norm(A, dim, keepdim, dtype)


class _Normalize(Function):
    """y = x r along some axes, with r = 1 / max(||x||, eps).

    With P(u) = u - a y sum(u y), which is its own adjoint, a = 0 where r is that of eps, and else 1:

        gx = r P(gy)                                        the first order
        for v, the gradient with respect to gx:
        d_gy = r P(v)
        d_x  = a r^2 (y (3 sum(v y) sum(gy y) - sum(v gy)) - v sum(gy y) - gy sum(v y))
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: Any, eps: float) -> Tensor:
        squared = x.square().sum(dim, keepdim=True)
        floor = max(eps**2, float(torch.finfo(x.dtype).tiny))
        r = squared.clamp_min(floor).rsqrt_()
        ctx.save_for_backward(x, r, squared > floor)  # not y, in which a layer may go on to work in place, as with PyTorch's
        ctx.dim = dim
        return x * r

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, r, a = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return _along(gy, x, r, a, ctx.dim)[0], None, None
        return _NormalizeGradient.apply(gy, x, r, a, ctx.dim), None, None


class _NormalizeGradient(Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, r: Tensor, a: Tensor, dim: Any) -> Tensor:
        gx, gy_y = _along(gy, x, r, a, dim)
        ctx.save_for_backward(gy, x, r, a, gy_y)
        ctx.dim = dim
        return gx

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        gy, x, r, a, gy_y = ctx.saved_tensors
        for_gy, v_y = _along(v, x, r, a, ctx.dim)
        squared, v_gy = r.square().mul_(a), (v * gy).sum(ctx.dim, keepdim=True)
        for_x = x * (3 * v_y * gy_y - v_gy).mul_(squared).mul_(r)
        return for_gy, for_x.addcmul_(v, gy_y * squared, value=-1).addcmul_(gy, v_y * squared, value=-1), *[None] * 3


def _along(u: Tensor, x: Tensor, r: Tensor, a: Tensor, dim: Any) -> tuple[Tensor, Tensor]:
    """r P(u) and sum(u y)."""
    along = (u * x).sum(dim, keepdim=True).mul_(r)
    return torch.addcmul(u, x, along * a * r, value=-1).mul_(r), along


def normalize(input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Tensor | None = None) -> Tensor:
    """`F.normalize`: x / max(||x||, eps)."""
    if p not in TWO or out is not None or not input.is_floating_point():
        return F.normalize(input, p, dim, eps, out)
    if input.dtype != wide(input):  # which has room for eps squared
        return widely(normalize, input, p, dim, eps)
    result: Tensor = _Normalize.apply(input, dim, eps)
    return result


class _Euclidean(Function):
    """d, the distances `(..., P, R)` of rows `(..., P, M)` and `(..., R, M)`, without a tensor of all differences.

    With w = gy / d, and 0 where d is, of operations that have derivatives of their own:

        g1 = x1 sum_R(w) - w x2,   g2 = x2 sum_P(w) - w^T x1
    """

    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor, compute_mode: str) -> Tensor:
        y = torch.cdist(x1, x2, compute_mode=compute_mode)
        ctx.save_for_backward(x1, x2, y if compute_mode == BY_DIFFERENCES else None)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x1, x2, d = ctx.saved_tensors
        if d is None:  # equal rows are at zero by differences, by products only nearly
            d = _Euclidean.apply(x1, x2, BY_DIFFERENCES)
        w = gy / d.masked_fill(d == 0, math.inf)
        for_1, for_2 = ctx.needs_input_grad[:2]
        g1 = (x1 * w.sum(-1).unsqueeze(-1) - w @ x2).sum_to_size(x1.shape) if for_1 else None
        g2 = (x2 * w.sum(-2).unsqueeze(-1) - w.mT @ x1).sum_to_size(x2.shape) if for_2 else None
        return g1, g2, None


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
    result: Tensor
    if p == 2 and max(x1.numel() * x2.shape[-2], x2.numel() * x1.shape[-2]) > MANY:
        result = _Euclidean.apply(x1, x2, compute_mode)
        return result
    difference = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    if p == 2:
        return two_norm(difference, dim=-1)
    if p == 1:
        return difference.abs().sum(dim=-1)
    if math.isinf(p):
        return difference.abs().amax(dim=-1)
    result = torch.linalg.vector_norm(difference, p, dim=-1)
    return result
