"""Matrix products of layers, in the layouts that are fast in each of the three sweeps.

A linear layer is bilinear in input and weight like a convolution, so each of y(x, w) = x w^T, gx(gy, w) = gy w, gw(gy, x) = gy^T x has the
other two as its derivatives. PyTorch's own double backward computes the same products, but transposed ones, and adds up weight gradients
in new memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from attrreg.ops.phase import Phase, wanted

aten = torch.ops.aten


class _Linear(Function):
    """x w^T + b, of rows `(R, in)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, phase: Phase) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.phase = phase
        return F.linear(x, w, b)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        gx = _input_gradient(gy, w, ctx.phase) if wanted(ctx, 0) else None
        gw = _weight_gradient(gy, x, ctx.phase) if wanted(ctx, 1) else None
        return gx, gw, gy.sum(0) if wanted(ctx, 2) else None, None


class _InputGradient(Function):
    """gy w."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, w: Tensor, phase: Phase) -> Tensor:
        ctx.save_for_backward(gy, w)
        ctx.phase = phase
        return gy @ w

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        gy, w = ctx.saved_tensors
        for_gy = _product(v, w, ctx.phase) if wanted(ctx, 0) else None
        for_w = _weight_gradient(gy, v, ctx.phase) if wanted(ctx, 1) else None
        return for_gy, for_w, None


class _WeightGradient(Function):
    """gy^T x."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, phase: Phase) -> Tensor:
        ctx.save_for_backward(gy, x)
        ctx.phase = phase
        return gy.t() @ x

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        gy, x = ctx.saved_tensors
        for_gy = _product(x, v, ctx.phase) if wanted(ctx, 0) else None
        for_x = _input_gradient(gy, v, ctx.phase) if wanted(ctx, 1) else None
        return for_gy, for_x, None


# A Function costs some 10 us more than what it wraps: none is made where nobody differentiates again.


def _product(x: Tensor, w: Tensor, phase: Phase) -> Tensor:
    y: Tensor = _Linear.apply(x, w, None, phase) if torch.is_grad_enabled() else F.linear(x, w)
    return y


def _input_gradient(gy: Tensor, w: Tensor, phase: Phase) -> Tensor:
    gx: Tensor = _InputGradient.apply(gy, w, phase) if torch.is_grad_enabled() else gy @ w
    return gx


def _weight_gradient(gy: Tensor, x: Tensor, phase: Phase) -> Tensor:
    gw: Tensor = _WeightGradient.apply(gy, x, phase) if torch.is_grad_enabled() else gy.t() @ x
    return gw


def linear(phase: Phase, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`."""
    device = input.device.type
    if torch.is_autocast_enabled(device):  # as autocast does; inside the function it must not cast again
        dtype = torch.get_autocast_dtype(device)
        input, weight, bias = input.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    if weight.dim() != 2 or input.dim() == 0 or not input.is_floating_point():
        return F.linear(input, weight, bias)
    with torch.autocast(device, enabled=False):
        rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
        y: Tensor = _Linear.apply(rows, weight, bias, phase)
    # Not a view, just as the output of `F.linear` is none: what follows may work in place.
    return y if input.dim() == 2 else aten._unsafe_view(y, [*input.shape[:-1], weight.shape[0]])
