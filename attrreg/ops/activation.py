"""Activations whose double backward is one or few passes over memory.

PyTorch lacks some of these second derivatives, and composes the others from many operations. That of a piecewise linear activation is
zero, yet PyTorch computes it as a tensor of zeros and sends that back through the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from attrreg.ops import fused
from attrreg.ops.phase import once_differentiable
from attrreg.ops.precision import compute_dtype

aten = torch.ops.aten


class _OldValues(Function):
    """The values that a tensor has now, which stay when it is given other memory. Not a view, which would change with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.data

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Tensor:
        return gy


def _storage_uses(x: Tensor) -> int:
    """How many references hold its memory. From some version of PyTorch on, that includes the storage object made here to ask."""
    return torch._C._storage_Use_Count(x.untyped_storage()._cdata)


USES_OF_ONE_TENSOR = _storage_uses(torch.empty(1))


def _shares_memory(x: Tensor) -> bool:
    """Whether its memory is seen by other tensors too, which would have to change with it."""
    return x._is_view() or _storage_uses(x) > USES_OF_ONE_TENSOR


def _in_place(function: type[Function], input: Tensor, kind: Piecewise | Smooth) -> Tensor:
    """`input`, with f of its values in their place. The derivatives need the old values, so these are kept."""
    if torch.is_grad_enabled() and input.requires_grad and not _shares_memory(input):
        return function.apply(_OldValues.apply(input), kind, input)  # the result gets new memory, so that nothing is copied
    return input.copy_(function.apply(input.clone(), kind, None))


def _value(ctx: Any, x: Tensor, kind: Piecewise | Smooth, target: Tensor | None) -> Tensor:
    """f(x). A `target` becomes f(x), as if it had been written over: its memory is replaced."""
    y = kind.value(x)
    if target is None:
        return y
    ctx.mark_dirty(target)
    target.data = y
    return target


@dataclass(frozen=True)
class Piecewise:
    """A piecewise linear activation.

    Attributes:
        value: f(x).
        inplace: writes f(x) over x, where PyTorch then takes the slope from the output. None: it takes it from x, so a layer that follows
            may write over the output.
        slope: (gradient, seen) to gradient times f'(x). `seen` is the output where `inplace` wrote it or with `from_output`, else x.
        from_output: the slope is always taken from the output, as PyTorch takes that of ReLU.
    """

    value: Callable[[Tensor], Tensor]
    inplace: Callable[[Tensor], Tensor] | None
    slope: Callable[[Tensor, Tensor], Tensor]
    from_output: bool = False


class _Piecewise(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: Piecewise, target: Tensor | None) -> Tensor:
        y = _value(ctx, x, kind, target)
        ctx.save_for_backward(y if kind.from_output else x)
        ctx.kind = kind
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        (seen,) = ctx.saved_tensors
        # Detached, because the slope is constant in x: else PyTorch would send zeros back to x through the network.
        return ctx.kind.slope(gy, seen.detach()), None, None


class _PiecewiseInPlace(_Piecewise):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: Piecewise, target: Tensor | None) -> Tensor:
        assert kind.inplace is not None
        ctx.mark_dirty(x)
        y = kind.inplace(x)
        ctx.save_for_backward(y)
        ctx.kind = kind
        return y


RELU = Piecewise(torch.relu, torch.relu_, lambda gy, y: aten.threshold_backward(gy, y, 0), from_output=True)
SIXTH = 0.1666666716337204  # 1 / 6 rounded to float32, by which PyTorch's hardsigmoid multiplies doubles too


def _hardsigmoid_slope(gy: Tensor, x: Tensor) -> Any:
    if torch.is_grad_enabled():  # PyTorch cannot differentiate `hardsigmoid_backward`
        return aten.hardtanh_backward(gy, x, -3.0, 3.0).mul(SIXTH)
    return aten.hardsigmoid_backward(gy, x)


HARDSIGMOID = Piecewise(F.hardsigmoid, None, _hardsigmoid_slope)


def piecewise(input: Tensor, kind: Piecewise, inplace: bool = False) -> Tensor:
    """Such an activation: `F.relu`, `torch.relu`, `F.hardsigmoid`."""
    if not inplace:
        return _Piecewise.apply(input, kind, None)
    if kind.inplace is None:
        return _in_place(_Piecewise, input, kind)
    if input._is_view():
        return kind.inplace(input)  # PyTorch then rebuilds the history of what it is a view of
    return _PiecewiseInPlace.apply(input, kind, None)


@lru_cache
def _hardtanh(low: float, high: float) -> Piecewise:
    return Piecewise(lambda x: F.hardtanh(x, low, high), None, lambda gy, x: aten.hardtanh_backward(gy, x, low, high))


@lru_cache
def _leaky_relu(slope: float) -> Piecewise:
    return Piecewise(
        lambda x: F.leaky_relu(x, slope),
        lambda x: F.leaky_relu(x, slope, inplace=True),
        lambda gy, y: aten.leaky_relu_backward(gy, y, slope, False),
    )


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """`F.hardtanh`, `F.relu6`."""
    # A tensor is left to PyTorch, which refuses one that requires a gradient: float() would drop that.
    if isinstance(min_val, Tensor) or isinstance(max_val, Tensor):
        return F.hardtanh(input, min_val, max_val, inplace)
    return piecewise(input, _hardtanh(float(min_val), float(max_val)), inplace)  # Python's numbers: `torch.ops` takes no others


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """`F.leaky_relu`."""
    # A tensor as in `hardtanh`; of a negative slope, the output's sign does not tell the input's.
    if isinstance(negative_slope, Tensor) or negative_slope < 0:
        return F.leaky_relu(input, negative_slope, inplace)
    return piecewise(input, _leaky_relu(float(negative_slope)), inplace)


@dataclass(frozen=True)
class Smooth:
    """An activation with a second derivative.

    Attributes:
        value: f(x).
        slope: (gradient, x, out) to gradient times f'(x), written to `out`.
        curvature: (gy, v, x, scratch) to gy v f''(x), a new tensor; `scratch` may be written over.
        kernel: which of `kernels.ACTIVATIONS` computes slope and curvature in one pass.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor, Tensor], Tensor]
    curvature: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    kernel: str


class _Smooth(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: Smooth, target: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind = kind
        return _value(ctx, x, kind, target)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        gx = _SmoothGradient.apply(gy, x, ctx.kind) if torch.is_grad_enabled() else ctx.kind.slope(gy, x, torch.empty_like(gy))
        return gx, None, None


class _SmoothGradient(Function):
    """gx = gy f'(x): for v, the gradient with respect to gx, d_gy = v f'(x) and d_x = v gy f''(x)."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, kind: Smooth) -> Tensor:
        ctx.save_for_backward(gy, x)
        ctx.kind = kind
        return kind.slope(gy, x, torch.empty_like(gy))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        gy, x = ctx.saved_tensors
        fast = fused.kernels(x, gy, v) if ctx.needs_input_grad[1] else None
        if fast is not None:
            return *fast.activation(ctx.kind.kernel, v, gy, x), None
        dtype = compute_dtype(x)  # in float16, x**3 overflows above 40
        d_gy, d_x = torch.empty_like(v), None
        if ctx.needs_input_grad[1]:
            scratch = d_gy if v.dtype == dtype else torch.empty_like(v, dtype=dtype)
            d_x = ctx.kind.curvature(gy.to(dtype), v.to(dtype), x.to(dtype), scratch).to(x.dtype)
        return ctx.kind.slope(v, x, d_gy), d_x, None


# These make few new tensors: to allocate one costs as much as a pass over it.


def _silu_curvature(gy: Tensor, v: Tensor, x: Tensor, scratch: Tensor) -> Tensor:
    # f'' = s (1 - s) (2 + x (1 - 2 s)), s the sigmoid
    s = torch.sigmoid(x, out=scratch)
    factor = torch.addcmul(x, x, s, value=-2).add_(2)
    aten.sigmoid_backward.grad_input(gy, s, grad_input=s)
    return factor.mul_(s).mul_(v)


def _gelu_curvature(gy: Tensor, v: Tensor, x: Tensor, scratch: Tensor) -> Tensor:
    # f'' = pdf(x) (2 - x^2), pdf the normal density. With h = -x^2 / 2 <= 0, ELU's backward kernel multiplies a gradient by a factor times
    # exp(h) in a single pass: here 2 pdf(x), to be multiplied by 1 + h.
    h = torch.addcmul(x.new_zeros(()), x, x, value=-0.5, out=scratch)
    density: Tensor = aten.elu_backward(gy, math.sqrt(2 / math.pi), 1.0, 1.0, False, h)
    return density.addcmul_(density, h).mul_(v)


def _tanh_gelu_curvature(gy: Tensor, v: Tensor, x: Tensor, scratch: Tensor) -> Tensor:
    # f = x (1 + t) / 2, t = tanh(u), u = k (x + c x^3): f'' = t' + x t'' / 2 with t' = (1 - t^2) u', t'' = (1 - t^2)(u'' - 2 t u'^2)
    k, c = math.sqrt(2 / math.pi), 0.044715
    x = x.clamp(-64, 64)  # beyond, it is zero, and powers of x overflow
    t = torch.tanh(k * (x + c * x**3))
    first, second = k * (1 + 3 * c * x * x), 6 * k * c * x
    return ((1 - t * t) * (first + 0.5 * x * (second - 2 * t * first * first))).mul_(gy).mul_(v)


def _hardswish_curvature(gy: Tensor, v: Tensor, x: Tensor, scratch: Tensor) -> Tensor:
    # f'' = 1 / 3 between -3 and 3, else 0
    inside: Tensor = aten.hardtanh_backward(gy, x, -3.0, 3.0)
    return inside.mul_(v).div_(3)


SILU = Smooth(F.silu, lambda gy, x, out: aten.silu_backward.grad_input(gy, x, grad_input=out), _silu_curvature, "SILU")
GELU = {
    "none": Smooth(F.gelu, lambda gy, x, out: aten.gelu_backward.grad_input(gy, x, grad_input=out), _gelu_curvature, "GELU"),
    "tanh": Smooth(
        lambda x: F.gelu(x, approximate="tanh"),
        lambda gy, x, out: aten.gelu_backward.grad_input(gy, x, approximate="tanh", grad_input=out),
        _tanh_gelu_curvature,
        "TANH_GELU",
    ),
}
HARDSWISH = Smooth(F.hardswish, lambda gy, x, out: aten.hardswish_backward.out(gy, x, out=out), _hardswish_curvature, "HARDSWISH")


def smooth(input: Tensor, kind: Smooth, inplace: bool = False) -> Tensor:
    """Such an activation: `F.silu`, `F.hardswish`."""
    if inplace:
        return _in_place(_Smooth, input, kind)
    return _Smooth.apply(input, kind, None)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """`F.gelu`."""
    if approximate not in GELU:  # PyTorch says what is wrong
        return F.gelu(input, approximate=approximate)
    return smooth(input, GELU[approximate])
