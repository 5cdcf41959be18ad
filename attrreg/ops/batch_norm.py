"""Batch normalisation, with the second derivative of `attrreg.ops.norm` and around PyTorch's slow kernels.

On the CPU, PyTorch's backward takes planes of fewer values than a vector register holds value by value, ten times slower than a pass
over memory. Here that is done by operations on whole rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from attrreg.ops import fused
from attrreg.ops.channels import Channels
from attrreg.ops.phase import Phase, wanted

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Kernel:
    """How a tensor was normalised.

    Attributes:
        channels: its layout.
        eps: as in `F.batch_norm`.
        index: which of PyTorch's kernels it chose, its own or on CUDA that of cuDNN, and `reserve` what that one keeps for its backward.
    """

    channels: Channels
    eps: float
    index: int
    reserve: Tensor


def _product(channels: Channels, u: Tensor, x: Tensor, mu: Tensor, r: Tensor) -> Tensor:
    """r sum(u (x - mu)), one value a channel."""
    if channels.few:
        return channels.total((channels.flat(x) - channels.row(mu)).mul_(channels.flat(u))).mul_(r)
    # What the kernel sums for a tensor with this mean and this deviation. CUDA's reads the type of a weight, here of r.
    product: Tensor = aten.native_batch_norm_backward(u, x, r, None, None, mu, r, True, 0.0, [False, True, False])[1]
    return product


def _first_order(
    kernel: Kernel, gy: Tensor, x: Tensor, g: Tensor, mu: Tensor, r: Tensor, mask: Sequence[bool] = (True, True, True)
) -> tuple[Tensor, Tensor, Tensor]:
    """g r P(gy), sum(gy xhat) and sum(gy), which PyTorch's kernel sums on its way. It leaves out what is masked."""
    channels = kernel.channels
    if not channels.few:
        gradients: tuple[Tensor, Tensor, Tensor]
        gradients = aten._batch_norm_impl_index_backward(kernel.index, x, gy, g, None, None, mu, r, True, kernel.eps, mask, kernel.reserve)
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
        y, mu, r, reserve, index = aten._batch_norm_impl_index(x, g, b, mean, var, True, momentum, eps, torch.backends.cudnn.enabled)
        ctx.save_for_backward(x, g, mu, r)
        ctx.kernel, ctx.phase = Kernel(Channels.of(x), eps, index, reserve), phase
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, g, mu, r = ctx.saved_tensors
        mask = wanted(ctx, 3)
        if not torch.is_grad_enabled():
            gradients = _first_order(ctx.kernel, gy, x, g, mu, r, mask)
            return *(gradient if asked else None for gradient, asked in zip(gradients, mask, strict=True)), *[None] * 5
        axes = [0, *range(2, x.dim())]
        gx = _InputGradient.apply(gy, x, g, mu, r, ctx.kernel) if mask[0] else None
        gg = None
        if mask[1]:  # not in an attribution; by operations that can be differentiated, mean and variance included
            wide = x.to(g.dtype)
            var, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
            gg = (gy * (wide - mean) * (var + ctx.kernel.eps).rsqrt()).sum(axes)
        return gx, gg, gy.sum(axes) if mask[2] else None, *[None] * 5


class _InputGradient(Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, g: Tensor, mu: Tensor, r: Tensor, kernel: Kernel) -> Tensor:
        gx, gy_xhat, gy_sum = _first_order(kernel, gy, x, g, mu, r)
        ctx.save_for_backward(gy, x, g, mu, r, gx, gy_xhat, gy_sum)
        ctx.kernel = kernel
        return gx

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        gy, x, g, mu, r, gx, gy_xhat, gy_sum = ctx.saved_tensors
        channels = ctx.kernel.channels
        for_gy, v_xhat, _ = _first_order(ctx.kernel, v, x, g, mu, r)
        v_gy = _product(channels, v, gy, gy_sum / channels.count, r)  # r sum(v (gy - mean(gy)))
        for_g = torch.addcmul(v_gy, v_xhat, gy_xhat * r, value=-1 / channels.count)
        fast = fused.kernels(x, for_gy, gx)
        if fast is not None:
            return for_gy, fast.planes(x, for_gy, gx, mu, r, g, v_xhat, gy_xhat, for_g), for_g, None, None, None
        q = r / -channels.count
        slope = q * r * g * for_g
        if channels.few:
            for_x = (channels.flat(x) - channels.row(mu)).mul_(channels.row(slope))
        elif x.dtype == mu.dtype:  # of the operators that could compute k (x - mu), the one in a single vectorised pass
            for_x = torch.native_batch_norm(x, slope, None, mu, torch.ones_like(r), False, 0.0, 0.0)[0]
        else:
            for_x = (x - channels.along(mu)).mul_(channels.along(slope))
        for_x.addcmul_(channels.flat(for_gy), channels.along(q * gy_xhat)).addcmul_(channels.flat(gx), channels.along(q * v_xhat))
        return for_gy, channels.unflat(for_x).to(x.dtype), for_g, None, None, None


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
    wide = torch.promote_types(input.dtype, torch.float32)  # of weights and statistics, also where autocast made images narrower
    alike = all(values is None or values.dtype == wide for values in (running_mean, running_var, weight, bias))
    if not alike or not (training or running_mean is not None):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    g = weight if weight is not None else input.new_ones(input.shape[1], dtype=wide)
    b = bias if bias is not None else input.new_zeros(input.shape[1], dtype=wide)
    if training:
        if input.numel() == input.shape[1]:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)  # which refuses it
        result: Tensor = _BatchNorm.apply(input, g, b, running_mean, running_var, momentum, eps, phase)
        return result
    assert running_mean is not None and running_var is not None
    scale = g * (running_var + eps).rsqrt()
    return Channels.of(input).affine(input, scale, b - running_mean * scale).to(input.dtype)
