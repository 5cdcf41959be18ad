"""Normalisation whose double backward is a closed form of few passes over memory.

PyTorch composes these second derivatives from many pointwise operations and saves what each of them needs. With
xhat = (x - mu) r, r = 1 / sqrt(var + eps), and P(u) = u - mean(u) - xhat mean(u xhat), which is its own adjoint (means run
over the M values that are normalised together, g is the weight; RMS normalisation has no mean: mu = 0, P(u) = u - xhat mean(u xhat)):

    gx = r P(g gy)                                      the first order
    for v, the gradient with respect to gx, with a = mean(g gy xhat), b = mean(v xhat), phi = sum(v gx):
    d_gy = g r P(v)                                     the first-order kernel again
    d_x  = -r (a r P(v) + b gx) - (r phi / M) xhat
    d_g  = sum(gy r P(v)) = r (sum(v (gy - mean(gy))) - M mean(v xhat) mean(gy xhat))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from attrreg.ops import fused, sound
from attrreg.ops.channels import affine, suggested
from attrreg.ops.phase import Phase, once_differentiable, wanted
from attrreg.ops.precision import wide, widely

aten = torch.ops.aten


class _LayerNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, b: Tensor, shape: list[int], eps: float, phase: Phase) -> Tensor:
        y, mu, r = aten.native_layer_norm(x, shape, g, b, eps)
        ctx.save_for_backward(x, g, b, mu, r)
        ctx.shape, ctx.eps, ctx.phase = shape, eps, phase
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, g, b, mu, r = ctx.saved_tensors
        mask = wanted(ctx, 3)
        gy = gy.contiguous()
        if not torch.is_grad_enabled():
            return *aten.native_layer_norm_backward(gy, x, ctx.shape, mu, r, g, b, mask), None, None, None
        rows = list(range(x.dim() - len(ctx.shape)))
        gx = _LayerNormInputGradient.apply(gy, x, g, mu, r, ctx.shape) if mask[0] else None
        gg = (gy * F.layer_norm(x, ctx.shape, eps=ctx.eps)).sum(rows) if mask[1] else None
        return gx, gg, gy.sum(rows) if mask[2] else None, *[None] * 3


class _LayerNormInputGradient(Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, g: Tensor, mu: Tensor, r: Tensor, shape: list[int]) -> Tensor:
        ctx.save_for_backward(gy, x, g, mu, r)
        ctx.shape = shape
        result: Tensor = aten.native_layer_norm_backward(gy, x, shape, mu, r, g, None, [True, False, False])[0]
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        gy, x, g, mu, r = ctx.saved_tensors
        count = math.prod(ctx.shape)
        fast = fused.kernels(x, gy, v)
        if fast is not None and count <= fast.LONGEST:
            return *fast.rows(v, gy, x, g, mu, r), None, None, None
        # Batch normalisation's kernel over rows as its channels: the same r P(u), which gives sum(u xhat) of each row with it.
        rows = (1, -1, count)
        shaped, mean, inverse, weight = x.view(rows), mu.view(-1), r.view(-1), g.reshape(-1)
        product = (gy * g).reshape(rows)
        gx, a, _ = _of_channels(product, shaped, mean, inverse)  # one pass, not worth keeping
        rpv, b, _ = _of_channels(v.reshape(rows), shaped, mean, inverse)
        torch.mul(gy.view(rows), rpv, out=product)  # a new tensor of this size costs as much as a pass over it
        # No views go out: PyTorch adds what else is a gradient of the same tensor to these in place.
        for_g = aten._unsafe_view(product[0].sum(0), ctx.shape) if ctx.needs_input_grad[2] else None
        phi = torch.mv(product[0], weight)  # since sum(v gx) = sum(g gy r P(v))
        scale = inverse * (-1 / count)  # a and b are sums here
        for_x = (shaped - mean[:, None]).mul_((phi * scale * inverse)[:, None])
        for_x.addcmul_(rpv, (a * scale)[:, None]).addcmul_(gx, (b * scale)[:, None])
        return aten._unsafe_view(rpv, v.shape).mul_(g), aten._unsafe_view(for_x, x.shape), for_g, None, None, None


def _of_channels(u: Tensor, x: Tensor, mu: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """r P(u), sum(u xhat) and sum(u), of `(1, channels, M)`."""
    found: tuple[Tensor, Tensor, Tensor] = aten.native_batch_norm_backward(u, x, None, None, None, mu, r, True, 0.0, [True] * 3)
    return found


def layer_norm(
    phase: Phase,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`F.layer_norm`."""
    shaped = isinstance(normalized_shape, Sequence) and sound.with_parameters(input, normalized_shape, weight, bias)
    if not (shaped and input.numel()):  # the second derivative's kernel would divide by the number of its channels
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    if input.dtype != wide(input):  # PyTorch's second derivative has the cube of 1 / deviation
        return widely(partial(layer_norm, phase), input, normalized_shape, weight, bias, eps)
    shape = list(normalized_shape)
    g = weight if weight is not None else input.new_ones(shape)
    b = bias if bias is not None else input.new_zeros(shape)
    result: Tensor = _LayerNorm.apply(input.contiguous(), g, b, shape, eps, phase)
    return result


def group_norm(
    phase: Phase,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`F.group_norm`: a layer norm over each group, and a scale and shift a channel."""
    channels = input.shape[1] if input.dim() > 1 else 0
    divides = num_groups > 0 and channels % num_groups == 0 and input.numel() > num_groups  # of a single value, PyTorch refuses the norm
    if not (divides and sound.with_parameters(input, (channels,), weight, bias)):
        return F.group_norm(input, num_groups, weight, bias, eps)
    if input.dtype != wide(input):  # as in `layer_norm`; rounded once, as PyTorch's
        return widely(partial(group_norm, phase), input, num_groups, weight, bias, eps)
    n = len(input)
    grouped = input.reshape(n, num_groups, channels // num_groups * math.prod(input.shape[2:]))
    y = layer_norm(phase, grouped, grouped.shape[-1:], None, None, eps).reshape(input.shape)
    if input.device.type == "cpu":  # as PyTorch's there
        y = y.contiguous(memory_format=suggested(input))
    if weight is None and bias is None:
        return y
    scale = weight if weight is not None else y.new_ones(channels)
    return affine(y, scale, bias if bias is not None else torch.zeros_like(scale))


def instance_norm(
    phase: Phase,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.instance_norm`: a group norm of one channel a group, where nothing is kept for later images."""
    own = use_input_stats and running_mean is None and running_var is None
    fits = input.dim() > 1 and sound.with_parameters(input, input.shape[1:2], weight, bias)
    if not (own and fits and input.numel()) or input.shape[2:].numel() == 1:  # PyTorch refuses a single position
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return group_norm(phase, input.contiguous(), input.shape[1], weight, bias, eps).to(input.dtype)


class _RMSNorm(Function):
    """As layer normalisation with a mean of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, shape: list[int], eps: float, phase: Phase) -> Tensor:
        r = x.square().mean(_last(shape), keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, g, r)
        ctx.shape, ctx.eps, ctx.phase = shape, eps, phase
        return (x * r).mul_(g)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, g, r = ctx.saved_tensors
        for_x, for_g = wanted(ctx, 2)
        gx = _RMSNormInputGradient.apply(gy, x, g, r, ctx.shape) if for_x else None
        gg = None
        if for_g:  # not in an attribution; by operations that can be differentiated
            r = r if not torch.is_grad_enabled() else x.square().mean(_last(ctx.shape), keepdim=True).add(ctx.eps).rsqrt()
            gg = (gy * x * r).sum_to_size(g.shape)
        return gx, gg, None, None, None


class _RMSNormInputGradient(Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, g: Tensor, r: Tensor, shape: list[int]) -> Tensor:
        u = (gy * g).mul_(r)
        gx = torch.addcmul(u, x, (u * x).mean(_last(shape), keepdim=True) * r * r, value=-1)
        ctx.save_for_backward(gy, x, g, r, gx)
        ctx.shape = shape
        return gx

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        gy, x, g, r, gx = ctx.saved_tensors
        axes, count = _last(ctx.shape), math.prod(ctx.shape)
        a, b = (g * gy * x).mean(axes, keepdim=True) * r, (v * x).mean(axes, keepdim=True) * r
        phi = (v * gx).sum(axes, keepdim=True)
        rpv = torch.addcmul(v, x, b * r, value=-1).mul_(r)
        for_g = (gy * rpv).sum_to_size(g.shape) if ctx.needs_input_grad[2] else None
        for_x = (x * (-r * r * phi / count)).addcmul_(rpv, -r * a).addcmul_(gx, -r * b)
        return rpv.mul_(g), for_x, for_g, None, None


def _last(shape: list[int]) -> list[int]:
    return list(range(-len(shape), 0))


def rms_norm(
    phase: Phase, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`F.rms_norm`."""
    shape = tuple(normalized_shape) if isinstance(normalized_shape, Sequence) else ()
    weighted = weight is None or weight.shape == shape
    if not (shape and input.shape[-len(shape) :] == shape and weighted and input.is_floating_point()):
        return F.rms_norm(input, normalized_shape, weight, eps)
    if input.dtype != wide(input):  # as in `layer_norm`
        return widely(partial(rms_norm, phase), input, normalized_shape, weight, eps)
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    g = weight if weight is not None else input.new_ones(shape)
    result: Tensor = _RMSNorm.apply(input.contiguous(memory_format=suggested(input)), g, list(shape), eps, phase)
    return result
