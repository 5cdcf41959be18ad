"""Batch normalisation, with the second derivative of `attrreg.ops.norm` and around PyTorch's slow kernels.

On the CPU, PyTorch takes the statistics of contiguous planes value by value, five times as long as it sums their gradients; and the
gradients of planes of fewer values than a vector register holds, which it sums fast where channels come last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from attrreg.ops import fused
from attrreg.ops.channels import affine, goes_by_planes, memory_format, suggested_format
from attrreg.ops.phase import Phase, once_differentiable, wanted
from attrreg.ops.precision import compute_dtype

aten = torch.ops.aten

FEW_POSITIONS = 8  # positions of a plane, below which PyTorch's backward is not vectorised
VALUES_WORTH_COPIES = 2**13  # values, from which on two copies to avoid that are worth it
VALUES_WORTH_SUMS = 2**17  # values, from which on computing the statistics apart is worth two more operations
MAX_MEAN_RATIO = 16.0  # of squared mean to variance, up to which a difference of sums is as exact as PyTorch's variance


@dataclass(eq=False)  # not frozen: one is made in every forward, and that takes longer
class Kernel:
    """What the gradients of a tensor `(N, C, ...)` have to know of its normalisation.

    Attributes:
        count: how many values a channel has.
        small_planes: planes are so small, and the tensor so large, that PyTorch's gradient kernel is faster on copies in `channels_last`.
        format: otherwise, the memory format in which that kernel gets all tensors: with two it goes value by value.
        eps: as in `F.batch_norm`.
        index: which forward kernel PyTorch chose: its own or, on CUDA, cuDNN's.
        reserve: what cuDNN's kernel left for the backward.
    """

    count: int
    small_planes: bool
    format: torch.memory_format
    eps: float
    index: int
    reserve: Tensor

    def prepared(self, x: Tensor) -> Tensor:
        """A tensor as the gradient kernel takes it; `(N, C, positions, 1)` for `small_planes`."""
        if self.small_planes:
            return x.reshape(*x.shape[:2], -1, 1).contiguous(memory_format=torch.channels_last)
        return x.contiguous(memory_format=self.format)

    def restored(self, x: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `prepared`, and no view."""
        return x.contiguous().view(shape).data if self.small_planes else x

    def first_order(
        self, gy: Tensor, x: Tensor, g: Tensor, mu: Tensor, r: Tensor, mask: Sequence[bool] = (True, True, True)
    ) -> tuple[Tensor, Tensor, Tensor]:
        """g r P(gy), sum(gy xhat) and sum(gy), which PyTorch's kernel sums on its way. It leaves out what is masked."""
        return aten._batch_norm_impl_index_backward(self.index, x, gy, g, None, None, mu, r, True, self.eps, mask, self.reserve)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and biased variance of each channel, by sums that PyTorch vectorises; None where its own kernel is as fast or more exact."""
    # Fake tensors have no values to look at.
    if x.numel() < VALUES_WORTH_SUMS or x.shape[2:].numel() < FEW_POSITIONS or not goes_by_planes(x) or type(x) is not Tensor:
        return None
    mu = x.mean((0, *range(2, x.dim())))
    # sum(x (x - mu)), which the kernel sums for a tensor x with a mean mu and a deviation of 1.
    moment = aten.native_batch_norm_backward(x, x, None, None, None, mu, torch.ones_like(mu), True, 0.0, [False, True, False])[1]
    var = moment.div_(x.numel() // x.shape[1])
    return None if bool((mu.square() > MAX_MEAN_RATIO * var).any()) else (mu, var)


class _BatchNorm(Function):
    """Train-mode batch normalisation: by the batch's own statistics."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, g: Tensor, b: Tensor, mean: Tensor | None, var: Tensor | None, momentum: float, eps: float, phase: Phase
    ) -> Tensor:
        count = x.numel() // x.shape[1]
        found = _statistics(x)
        if found is None:
            y, mu, r, reserve, index = torch._batch_norm_impl_index(x, g, b, mean, var, True, momentum, eps, torch.backends.cudnn.enabled)
        else:
            (mu, batch), index, reserve = found, 0, x.new_empty(0, dtype=torch.uint8)
            y, r = torch.native_batch_norm(x, g, b, mu, batch, False, 0.0, eps)[0], (batch + eps).rsqrt_()
            if mean is not None and var is not None:
                # .data, as PyTorch's kernel writes them: without telling autograd, which would refuse an earlier graph that saved them.
                mean.data.lerp_(mu, momentum)
                var.data.lerp_(batch.mul_(count / (count - 1)), momentum)
        ctx.save_for_backward(x, g, mu, r)
        small_planes = x.shape[2:].numel() < FEW_POSITIONS and x.numel() >= VALUES_WORTH_COPIES and goes_by_planes(x)
        ctx.kernel, ctx.phase = Kernel(count, small_planes, memory_format(x), eps, index, reserve), phase
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, g, mu, r = ctx.saved_tensors
        kernel, mask = ctx.kernel, wanted(ctx, 3)
        if not torch.is_grad_enabled():
            gx, gg, gb = kernel.first_order(kernel.prepared(gy), kernel.prepared(x), g, mu, r, mask)
            return kernel.restored(gx, x.shape) if mask[0] else None, gg if mask[1] else None, gb if mask[2] else None, *[None] * 5
        axes = [0, *range(2, x.dim())]
        gx = _InputGradient.apply(gy, x, g, mu, r, kernel) if mask[0] else None
        gg = None
        if mask[1]:  # not in an attribution; by operations that can be differentiated, mean and variance included
            values = x.to(g.dtype)
            var, mean = torch.var_mean(values, axes, correction=0, keepdim=True)
            gg = (gy * (values - mean) * (var + kernel.eps).rsqrt()).sum(axes)
        return gx, gg, gy.sum(axes) if mask[2] else None, *[None] * 5


class _InputGradient(Function):
    """gx = r P(g gy), see `attrreg.ops.norm`."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, g: Tensor, mu: Tensor, r: Tensor, kernel: Kernel) -> Tensor:
        shape, gy, x = x.shape, kernel.prepared(gy), kernel.prepared(x)
        gx, gy_xhat, gy_sum = kernel.first_order(gy, x, g, mu, r)
        ctx.save_for_backward(gy, x, g, mu, r, gx, gy_xhat, gy_sum)
        ctx.kernel = kernel
        return kernel.restored(gx, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        gy, x, g, mu, r, gx, gy_xhat, gy_sum = ctx.saved_tensors
        kernel, shape = ctx.kernel, v.shape
        v = kernel.prepared(v)
        d_gy, v_xhat, _ = kernel.first_order(v, x, g, mu, r)
        # r sum(v (gy - mean(gy))): what the kernel sums for a tensor with this mean and this deviation. CUDA's reads the type of r.
        v_gy = aten.native_batch_norm_backward(v, gy, r, None, None, gy_sum / kernel.count, r, True, 0.0, [False, True, False])[1]
        share, along_gy = -1 / kernel.count, gy_xhat * r
        d_g = torch.addcmul(v_gy, v_xhat, along_gy, value=share)
        fast = fused.kernels(x, d_gy, gx)
        if fast is not None:
            return d_gy, fast.batch_norm(x, d_gy, gx, mu, r, g, v_xhat, gy_xhat, d_g), d_g, None, None, None
        slope = (r * share).mul_(r).mul_(g).mul_(d_g)
        along = (1, -1, *[1] * (x.dim() - 2))
        if x.dtype == mu.dtype:  # of the operators that could compute k (x - mu), the one in a single vectorised pass
            d_x = torch.native_batch_norm(x, slope, None, mu, torch.ones_like(r), False, 0.0, 0.0)[0]
        else:
            d_x = (x - mu.view(along)).mul_(slope.view(along))
        d_x.addcmul_(d_gy, along_gy.view(along), value=share).addcmul_(gx, (v_xhat * r).view(along), value=share)
        return kernel.restored(d_gy, shape), kernel.restored(d_x, shape).to(x.dtype), d_g, None, None, None


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
    if training and phase.places > 1:
        tokens = _tokens(input, phase.rows)
        phase.normalised.add(input.shape[0] // tokens)
        if input.shape[0] % phase.places == 0:  # else the pass will be thrown away
            return _placewise(phase, input, tokens, weight, bias, momentum, eps)
    return _batch_norm(phase, input, running_mean, running_var, weight, bias, training, momentum, eps)


def _placewise(phase: Phase, input: Tensor, tokens: int, weight: Tensor | None, bias: Tensor | None, momentum: float, eps: float) -> Tensor:
    """Of each place by itself: those of an image lie side by side, so they can be channels."""
    places = phase.places
    weights, biases = (None if values is None else values.repeat(places) for values in (weight, bias))

    def normalised(channels: Tensor) -> Tensor:
        return _batch_norm(phase, channels, None, None, weights, biases, True, momentum, eps)  # a path's passes move no statistics

    if memory_format(input) != torch.contiguous_format:
        return _Regroup.apply(normalised(_Regroup.apply(input, places, False)), places, True)
    apart = input.reshape(-1, places, tokens, *input.shape[1:]).transpose(1, 2)
    result = normalised(apart.reshape(-1, places * input.shape[1], *input.shape[2:]))
    if tokens > 1:
        return result.view(apart.shape).transpose(1, 2).reshape(input.shape)
    return aten._unsafe_view(result.contiguous(), input.shape)  # see `Kernel.restored`


class _Regroup(Function):
    """`(N places, C, ...)` with channels last as `(N, places C, ...)`, laid out so, or `back`. No view: a layer may work in place on it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: int, back: bool) -> Tensor:
        ctx.places, ctx.back = places, back
        x = x.movedim(1, -1)
        if back:
            x = x.unflatten(-1, (places, -1)).movedim(-2, 1).flatten(0, 1).contiguous()
        else:
            x = x.unflatten(0, (-1, places)).movedim(1, -2).flatten(-2)
        return x.movedim(-1, 1).data

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, None, None]:
        return _Regroup.apply(gy, ctx.places, not ctx.back), None, None


def _tokens(input: Tensor, rows: int) -> int:
    """How many rows in a row an image has: several where `(images, tokens, C)` was flattened, of which the tensor is a view."""
    base = input._base
    if input.dim() != 2 or base is None or base.dim() != 3 or not (base.is_contiguous() and input.is_contiguous()):
        return 1
    whole = base.numel() == input.numel() and base.shape[0] == rows != base.shape[1]  # else it is not known which axis is the batch
    return base.shape[1] if whole and base.shape[2] == input.shape[1] else 1


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
    dtype, shape = compute_dtype(input), input.shape[1:2]  # of weights and statistics, also where autocast made images narrower
    given = [values for values in (running_mean, running_var, weight, bias) if values is not None]
    fits = input.dim() > 1 and input.is_floating_point() and all(values.dtype == dtype and values.shape == shape for values in given)
    statistics = (running_mean is None) == (running_var is None) and (training or running_mean is not None)
    # PyTorch refuses the statistics of one value a channel, and takes an empty batch.
    if not (fits and statistics and momentum is not None and eps > 0) or (training and input.numel() <= input.shape[1]):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    g = weight if weight is not None else input.new_ones(shape, dtype=dtype)
    b = bias if bias is not None else input.new_zeros(shape, dtype=dtype)
    if training:
        # PyTorch's kernels for channels last and for (N, C) read weights in the order of their memory.
        return _BatchNorm.apply(input, g.contiguous(), b.contiguous(), running_mean, running_var, momentum, eps, phase)
    assert running_mean is not None and running_var is not None
    scale = g * (running_var + eps).rsqrt()
    format = memory_format(input)
    if format == torch.contiguous_format and not input.is_contiguous():
        format = suggested_format(input)  # as PyTorch lays out what it makes of such a tensor
    if format != torch.contiguous_format and input.shape[-1] == 1:  # by the stride of this axis the next layer tells the layout
        input = input.clone(memory_format=format)
    # What is differentiated needs the mean as it is now; the buffer itself may have moved by then.
    input, mean, dtype = input.contiguous(memory_format=format), running_mean.clone(), input.dtype
    # The weight's gradient is sum(gy (x - mean)), and as a difference of two sums it would have few digits. Narrow types have few anyway.
    if g.requires_grad and input.dtype == g.dtype:
        return affine(input - mean.view(1, -1, *[1] * (input.dim() - 2)), scale, b)
    return affine(input, scale, b - mean * scale).to(dtype)
