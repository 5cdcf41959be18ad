"""Normalisation whose double backward is a closed form of few passes over memory.

PyTorch composes these second derivatives from many pointwise operations and saves what each of them needs. With
xhat = (x - mu) r, r = 1 / sqrt(var + eps), and P(u) = u - mean(u) - xhat mean(u xhat), which is its own adjoint (means run
over the M values that are normalised together, g is the weight; for what subtracts no mean see `_Divided`):

    gx = r P(g gy)                                      the first order
    for v, the gradient with respect to gx, with a = mean(g gy xhat), b = mean(v xhat), phi = sum(v gx):
    d_gy = g r P(v)                                     the first-order kernel again
    d_x  = -r (a r P(v) + b gx) - (r phi / M) xhat
    d_g  = sum(gy r P(v)) = r (sum(v (gy - mean(gy))) - M mean(v xhat) mean(gy xhat))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from attrreg.ops import fused, supported
from attrreg.ops.channels import affine, suggested_format
from attrreg.ops.distance import TWO
from attrreg.ops.phase import Phase, once_differentiable, wanted
from attrreg.ops.precision import compute_dtype, in_compute_dtype

aten = torch.ops.aten


class _LayerNorm(Function):
    """y, of x `(..., *shape)`, and g and b of this shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, b: Tensor, shape: list[int], eps: float, phase: Phase) -> Tensor:
        y, mu, r = torch.native_layer_norm(x, shape, g, b, eps)
        ctx.save_for_backward(x, g, b, mu, r)
        ctx.shape, ctx.eps, ctx.phase = shape, eps, phase
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, g, b, mu, r = ctx.saved_tensors
        mask = wanted(ctx, 3)
        gy = gy.contiguous()
        if not torch.is_grad_enabled():
            return *aten.native_layer_norm_backward(gy, x, ctx.shape, mu, r, g, b, mask), None, None, None
        gx = _LayerNormInputGradient.apply(gy, x, g, mu, r, ctx.shape) if mask[0] else None
        gg = (gy * F.layer_norm(x, ctx.shape, eps=ctx.eps)).sum_to_size(g.shape) if mask[1] else None
        return gx, gg, gy.sum_to_size(b.shape) if mask[2] else None, *[None] * 3


class _LayerNormInputGradient(Function):
    """gx = r P(g gy)."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, g: Tensor, mu: Tensor, r: Tensor, shape: list[int]) -> Tensor:
        ctx.save_for_backward(gy, x, g, mu, r)
        ctx.shape = shape
        return aten.native_layer_norm_backward(gy, x, shape, mu, r, g, None, [True, False, False])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        gy, x, g, mu, r = ctx.saved_tensors
        count = math.prod(ctx.shape)
        fast = fused.kernels(x, gy, v)
        if fast is not None and count <= fast.MAX_ROW:
            return *fast.layer_norm(v, gy, x, g, mu, r), None, None, None
        # Batch normalisation's kernel over rows as its channels: the same r P(u), which gives sum(u xhat) of each row with it.
        rows = (1, -1, count)
        shaped, mean, inverse, weight = x.view(rows), mu.view(-1), r.view(-1), g.reshape(-1)
        product = (gy * g).reshape(rows)
        gx, a = _of_channels(product, shaped, mean, inverse)  # one pass, not worth keeping
        rpv, b = _of_channels(v.reshape(rows), shaped, mean, inverse)
        torch.mul(gy.view(rows), rpv, out=product)  # a new tensor of this size costs as much as a pass over it
        products, share = product[0], -1 / count  # a and b are sums here
        phi = torch.addmv(mean, products, weight, beta=0, alpha=share)  # since sum(v gx) = sum(g gy r P(v)); no scalars, which take longer
        d_x = (shaped - mean.view(-1, 1)).mul_((phi * inverse).mul_(inverse).view(-1, 1))
        d_x.addcmul_(rpv, a.mul_(inverse).view(-1, 1), value=share).addcmul_(gx, b.mul_(inverse).view(-1, 1), value=share)
        d_g = products.sum(0).view(ctx.shape).data if ctx.needs_input_grad[2] else None
        return rpv.view(v.shape).data.mul_(g), d_x.view(x.shape).data, d_g, None, None, None


def _of_channels(u: Tensor, x: Tensor, mu: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """r P(u) and sum(u xhat), of `(1, channels, M)`."""
    ones = torch.ones_like(r)  # CUDA's kernel makes the gradients of weights like these, and fails without
    rpu, u_xhat, _ = aten.native_batch_norm_backward(u, x, ones, None, None, mu, r, True, 0.0, [True] * 3)
    return rpu, u_xhat


def layer_norm(
    phase: Phase,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`F.layer_norm`."""
    shaped = isinstance(normalized_shape, Sequence) and supported.norm(input, normalized_shape, weight, bias)
    if not (shaped and input.numel()):  # the second derivative's kernel would divide by the number of its channels
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    if input.dtype != compute_dtype(input):  # PyTorch's second derivative has the cube of 1 / deviation
        return in_compute_dtype(partial(layer_norm, phase), input, normalized_shape, weight, bias, eps)
    shape = list(normalized_shape)
    g = weight if weight is not None else input.new_ones(shape)
    b = bias if bias is not None else input.new_zeros(shape)
    return _LayerNorm.apply(input.contiguous(), g, b, shape, eps, phase)


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
    divides = 0 < num_groups <= channels and channels % num_groups == 0 and input.numel() > num_groups  # a single value PyTorch refuses
    if not (divides and supported.norm(input, (channels,), weight, bias)):
        return F.group_norm(input, num_groups, weight, bias, eps)
    if input.dtype != compute_dtype(input):  # as in `layer_norm`; rounded once, as PyTorch's
        return in_compute_dtype(partial(group_norm, phase), input, num_groups, weight, bias, eps)
    grouped = input.reshape(len(input), num_groups, -1)
    y = layer_norm(phase, grouped, grouped.shape[2:], None, None, eps).reshape(input.shape)
    if input.device.type == "cpu":  # as PyTorch's there
        y = y.contiguous(memory_format=suggested_format(input))
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
    fits = input.dim() > 1 and supported.norm(input, input.shape[1:2], weight, bias)
    # PyTorch refuses a single position.
    if not (own and fits and input.numel() and eps > 0) or input.shape[2:].numel() == 1:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    x = input.contiguous()
    # The norm does not change, nor do its derivatives, but a layer norm's kernel loses digits where means are large.
    if x.dtype == compute_dtype(x):
        x = x - x.detach().mean(tuple(range(2, x.dim())), keepdim=True)
    return group_norm(phase, x, input.shape[1], weight, bias, eps).to(input.dtype)


class _Divided(Function):
    """y = g x r along some axes, r = 1 / sqrt(c sum(x^2) + constant): what is divided by its norm, and weighted or not.

    `factors` gives r and q of x; it is kept to compute r with a graph.
    With q = c r, u = g gy, m(u) = q sum(u x), and P(u) = u - x r m(u), which is its own adjoint:

        gx = r P(u)                                         the first order
        for v, the gradient with respect to gx:
        d_gy = g r P(v)
        d_g  = sum(gy r P(v))
        d_x  = r^2 (x (3 r m(v) m(u) - q sum(v u)) - v m(u) - u m(v))
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, g: Tensor | None, axes: Any, factors: Callable[[Tensor], tuple[Tensor, Tensor]], phase: Phase
    ) -> Tensor:
        r, q = factors(x)
        ctx.save_for_backward(x, g, r, q)  # not y, in which a layer may go on to work in place, as with PyTorch's
        ctx.axes, ctx.factors, ctx.phase = axes, factors, phase
        y = x * r
        return y if g is None else y.mul_(g)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, g, r, q = ctx.saved_tensors
        for_x, for_g = wanted(ctx, 2)
        again = torch.is_grad_enabled()
        gx = gg = None
        if for_x and again:
            gx = _DividedInputGradient.apply(gy, x, g, r, q, ctx.axes)
        elif for_x:
            gx, _ = _projected(_weighted(gy, g), x, r, q, ctx.axes)
        if for_g:  # not in an attribution; by operations that can be differentiated
            gg = (gy * x * (ctx.factors(x)[0] if again else r)).sum_to_size(g.shape)
        return gx, gg, None, None, None


class _DividedInputGradient(Function):
    """gx = r P(u)."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, g: Tensor | None, r: Tensor, q: Tensor, axes: Any) -> Tensor:
        gx, m_u = _projected(_weighted(gy, g), x, r, q, axes)
        ctx.save_for_backward(gy, x, g, r, q, m_u)
        ctx.axes = axes
        return gx

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        gy, x, g, r, q, m_u = ctx.saved_tensors
        u = _weighted(gy, g)
        rpv, m_v = _projected(v, x, r, q, ctx.axes)
        d_g = (gy * rpv).sum_to_size(g.shape) if ctx.needs_input_grad[2] else None
        squared, v_u = r.square(), (v * u).sum(ctx.axes, keepdim=True)
        d_x = x * (3 * r * m_v * m_u).sub_(v_u.mul_(q)).mul_(squared)
        d_x.addcmul_(v, m_u * squared, value=-1).addcmul_(u, m_v * squared, value=-1)
        return rpv if g is None else rpv.mul_(g), d_x, d_g, None, None, None


def _weighted(gy: Tensor, g: Tensor | None) -> Tensor:
    return gy if g is None else gy * g


def _projected(u: Tensor, x: Tensor, r: Tensor, q: Tensor, axes: Any) -> tuple[Tensor, Tensor]:
    """r P(u) and m(u)."""
    m = (u * x).sum(axes, keepdim=True).mul_(q)
    return torch.addcmul(u, x, m * r, value=-1).mul_(r), m


def rms_norm(
    phase: Phase, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`F.rms_norm`."""
    shape = tuple(normalized_shape) if isinstance(normalized_shape, Sequence) else ()
    if not (shape and input.shape[-len(shape) :] == shape and supported.norm(input, shape, weight)):
        return F.rms_norm(input, normalized_shape, weight, eps)
    if input.dtype != compute_dtype(input):  # as in `layer_norm`
        return in_compute_dtype(partial(rms_norm, phase), input, normalized_shape, weight, eps)
    axes, added = list(range(-len(shape), 0)), torch.finfo(input.dtype).eps if eps is None else eps

    def factors(x: Tensor) -> tuple[Tensor, Tensor]:
        r = x.square().mean(axes, keepdim=True).add_(added).rsqrt_()
        return r, r / math.prod(shape)

    return _Divided.apply(input.contiguous(memory_format=suggested_format(input)), weight, axes, factors, phase)


def normalize(phase: Phase, input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12) -> Tensor:
    """`F.normalize`: x / max(||x||, eps). At zero its second derivative is zero, of which PyTorch makes NaN."""
    if p not in TWO or isinstance(eps, Tensor) or not input.is_floating_point():
        return F.normalize(input, p, dim, eps)
    if input.dtype != compute_dtype(input):  # which has room for eps squared
        return in_compute_dtype(partial(normalize, phase), input, p, dim, eps)

    def factors(x: Tensor) -> tuple[Tensor, Tensor]:
        squared = x.square().sum(dim, keepdim=True)
        floor = max(float(eps) ** 2, float(torch.finfo(x.dtype).tiny))
        r = squared.clamp_min(floor).rsqrt_()
        return r, aten.threshold_backward(r, squared, floor)  # 0 where it is not above

    return _Divided.apply(input, None, dim, factors, phase)
