"""Activations whose second derivative PyTorch has not, or composes of many operations."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

aten = torch.ops.aten

# PyTorch's backward has this constant in float32 whatever the dtype. Kept, so that gradients agree to the last bit.
SIXTH = float(torch.tensor(1 / 6, dtype=torch.float32))


class _HardSigmoid(Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return F.hardsigmoid(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (input,) = ctx.saved_tensors
        # Linear in grad and piecewise constant in the input: autograd's own second derivative of this line is right.
        result: Tensor = grad * ((input > -3) & (input < 3)) * SIXTH
        return result


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """relu6(x + 3) / 6. Never in place: what was given may be needed by another derivative."""
    result: Tensor = _HardSigmoid.apply(input)
    return result


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """x relu6(x + 3) / 6. Never in place: the product rule needs the input."""
    return input * F.relu6(input + 3) / 6


class _Smooth(Function):
    """An activation f by PyTorch's kernels for f and f'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind = kind
        return F.silu(x) if kind == "silu" else F.gelu(x, approximate=kind)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return _SmoothInputGradient.apply(gy, x, ctx.kind), None


class _SmoothInputGradient(Function):
    """gx = gy f'(x): for v, the gradient with respect to gx, d_gy = v f'(x) and d_x = v gy f''(x)."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(gy, x)
        ctx.kind = kind
        return _slope(gy, x, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        gy, x = ctx.saved_tensors
        for_x = _curvature(x, ctx.kind).mul_(gy).mul_(v) if ctx.needs_input_grad[1] else None
        return _slope(v, x, ctx.kind), for_x, None


def _slope(gy: Tensor, x: Tensor, kind: str) -> Tensor:
    slope: Tensor = aten.silu_backward(gy, x) if kind == "silu" else aten.gelu_backward(gy, x, approximate=kind)
    return slope


def _curvature(x: Tensor, kind: str) -> Tensor:
    """The second derivative f''(x), a new tensor."""
    if kind == "silu":  # s (1 - s) (2 + x (1 - 2 s))
        s = torch.sigmoid(x)
        return (1 - 2 * s).mul_(x).add_(2).mul_(s).mul_(1 - s)
    if kind == "none":  # pdf(x) (2 - x^2)
        square = x * x
        return (square * -0.5).exp_().mul_(1 / math.sqrt(2 * math.pi)).mul_(square.neg_().add_(2))
    # y = x (1 + t) / 2, t = tanh(u), u = k (x + c x^3): y'' = t' + x t'' / 2 with t' = (1 - t^2) u', t'' = (1 - t^2)(u'' - 2 t u'^2)
    k, c = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(k * (x + c * x**3))
    first, second = k * (1 + 3 * c * x * x), 6 * k * c * x
    return (1 - t * t) * (first + 0.5 * x * (second - 2 * t * first * first))


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """`F.silu`. Never in place: its derivatives need the input."""
    result: Tensor = _Smooth.apply(input, "silu")
    return result


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """`F.gelu`."""
    result: Tensor = _Smooth.apply(input, approximate)
    return result
