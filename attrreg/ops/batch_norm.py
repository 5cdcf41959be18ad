"""Batch normalisation, with the second derivative of `attrreg.ops.norm` and around PyTorch's slow kernels.

On the CPU, PyTorch's backward takes planes of fewer values than a vector register holds value by value, ten times slower than a pass
over memory. Here that is done by operations on whole rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from attrreg.ops.channels import Channels
from attrreg.ops.phase import Phase, wanted

aten = torch.ops.aten


def _product(channels: Channels, u: Tensor, x: Tensor, mu: Tensor, r: Tensor) -> Tensor:
    """r sum(u (x - mu)), one value a channel."""
    if channels.few:
        return channels.total((channels.flat(x) - channels.row(mu)).mul_(channels.flat(u))).mul_(r)
    # What the kernel sums for a tensor with this mean and this deviation.
    product: Tensor = aten.native_batch_norm_backward(u, x, None, None, None, mu, r, True, 0.0, [False, True, False])[1]
    return product


def _first_order(
    channels: Channels, gy: Tensor, x: Tensor, g: Tensor, mu: Tensor, r: Tensor, eps: float, mask: Sequence[bool] = (True, True, True)
) -> tuple[Tensor, Tensor, Tensor]:
    """g r P(gy), sum(gy xhat) and sum(gy), which the native kernel sums on its way. It leaves out what is masked."""
    if not channels.few:
        gradients: tuple[Tensor, Tensor, Tensor]
        gradients = aten.native_batch_norm_backward(gy, x, g, None, None, mu, r, True, eps, mask)
        return gradients
    rows, centred = channels.flat(gy), channels.flat(x) - channels.row(mu)
    product = centred * rows
    gy_xhat, gy_sum = channels.total(product) * r, channels.total(rows)
    scale = g * r
    # The product's memory becomes the gradient's.
    torch.addcmul(channels.row(scale * gy_sum / -channels.count), rows, channels.row(scale), out=product)
    gx = product.addcmul_(centred, channels.row(scale * r * gy_xhat / -channels.count))
    return channels.unflat(gx), gy_xhat, gy_sum


class _BatchNorm(Function):
    """Train-mode batch normalisation: by the batch's own statistics."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, g: Tensor, b: Tensor, mean: Tensor | None, var: Tensor | None, momentum: float, eps: float, phase: Phase
    ) -> Tensor:
        y, mu, r = aten.native_batch_norm(x, g, b, mean, var, True, momentum, eps)
        ctx.save_for_backward(x, g, mu, r)
        ctx.channels, ctx.eps, ctx.phase = Channels.of(x), eps, phase
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, g, mu, r = ctx.saved_tensors
        mask = wanted(ctx, 3)
        if not torch.is_grad_enabled():
            gradients = _first_order(ctx.channels, gy, x, g, mu, r, ctx.eps, mask)
            return *(gradient if asked else None for gradient, asked in zip(gradients, mask, strict=True)), *[None] * 5
        axes = [0, *range(2, x.dim())]
        gx = _InputGradient.apply(gy, x, g, mu, r, ctx.channels, ctx.eps) if mask[0] else None
        gg = None
        if mask[1]:  # not in an attribution; by operations that can be differentiated, mean and variance included
            var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
            gg = (gy * (x - mean) * (var + ctx.eps).rsqrt()).sum(axes)
        return gx, gg, gy.sum(axes) if mask[2] else None, *[None] * 5


class _InputGradient(Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, g: Tensor, mu: Tensor, r: Tensor, channels: Channels, eps: float) -> Tensor:
        gx, gy_xhat, gy_sum = _first_order(channels, gy, x, g, mu, r, eps)
        ctx.save_for_backward(gy, x, g, mu, r, gx, gy_xhat, gy_sum)
        ctx.channels, ctx.eps = channels, eps
        return gx

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        gy, x, g, mu, r, gx, gy_xhat, gy_sum = ctx.saved_tensors
        channels = ctx.channels
        for_gy, v_xhat, _ = _first_order(channels, v, x, g, mu, r, ctx.eps)
        v_gy = _product(channels, v, gy, gy_sum / channels.count, r)  # r sum(v (gy - mean(gy)))
        q = r / -channels.count
        b = q * v_xhat
        for_g = torch.addcmul(v_gy, b, gy_xhat)
        slope = q * r * g * for_g
        if channels.few:
            for_x = (channels.flat(x) - channels.row(mu)).mul_(channels.row(slope))
        else:  # of the operators that could compute k (x - mu), the one in a single vectorised pass
            for_x = torch.native_batch_norm(x, slope, None, mu, torch.ones_like(r), False, 0.0, 0.0)[0]
        for_x.addcmul_(channels.flat(for_gy), channels.along(q * gy_xhat)).addcmul_(channels.flat(gx), channels.along(b))
        return for_gy, channels.unflat(for_x), for_g, None, None, None, None


def batch_norm(
    phase: Phase,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm`; where places of a path share the batch, of each place by itself."""
    places = phase.places if training else 1
    if training:
        phase.normalised.add(input.shape[0])
    if places == 1 or input.shape[0] % places:
        return _batch_norm(phase, input, running_mean, running_var, weight, bias, training, momentum, eps)
    # The places of an image lie side by side, so they can be channels. Statistics of a path's passes are thrown away.
    channels = input.reshape(-1, places * input.shape[1], *input.shape[2:])
    weights, biases = (None if values is None else values.repeat(places) for values in (weight, bias))
    return _batch_norm(phase, channels, None, None, weights, biases, training, momentum, eps).reshape(input.shape)


def _batch_norm(
    phase: Phase,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    if input.dtype != torch.promote_types(input.dtype, torch.float32) or not (training or running_mean is not None):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    g = weight if weight is not None else input.new_ones(input.shape[1])
    b = bias if bias is not None else input.new_zeros(input.shape[1])
    if training:
        if input.numel() == input.shape[1]:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)  # which refuses it
        result: Tensor = _BatchNorm.apply(input, g, b, running_mean, running_var, momentum, eps, phase)
        return result
    assert running_mean is not None and running_var is not None
    scale = g * (running_var + eps).rsqrt()
    return Channels.of(input).affine(input, scale, b - running_mean * scale)
