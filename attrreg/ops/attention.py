"""Attention whose double backward is a closed form that saves nothing that grows with the square of the tokens.

PyTorch's fused kernels have no double backward (pytorch#116350), and its math path keeps several matrices of weights a layer. Here the
forward is fused, and the derivatives recompute the weights. Where they are at most a few times as large as the queries, the CPU computes
and keeps them instead, which takes less time. With S = s q k^T + mask, P = softmax(S), o = P v:

    gv = P^T go,  dP = go v^T,  dS = P (dP - D),  D = sum_j P dP,  gq = s dS k,  gk = s dS^T q,  gmask = dS

for uq, uk, uv, um, the gradients with respect to those, with A = s (uq k^T + q uk^T) + um, E = sum_j P A, C = P (A - E),
G = dS (A - E) + P (go uv^T) and H = G - P sum_j G:

    d_go = C v + P uv,  d_v = C^T go,  d_q = s (H k + dS uk),  d_k = s (H^T q + dS^T uq),  d_mask = H
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from attrreg.ops.linear import PLAIN
from attrreg.ops.phase import Phase, once_differentiable, wanted
from attrreg.ops.precision import as_autocast, autocasts, compute_dtype, in_compute_dtype
from attrreg.ops.process import BY_MATH, attention_by
from attrreg.state import full_precision

aten = torch.ops.aten
# Values of a mask below which all keys of a query are as good as masked, though it has weights for them. What the CPU's kernel keeps for
# its backward is the logarithm of a sum next to these values, in which the sum is lost.
HIDDEN_BELOW = -64.0
MAX_KEPT = 4  # P is kept if it is at most so many times as large as the queries: a ViT's 197 tokens of 64 values are 3.1 times
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Kind:
    """How attention is computed.

    Attributes:
        scale: s.
        may_hide_all_keys: a query may have all keys masked; by -inf, it gets zeros. True too where a GPU would have to be waited for.
        shape: of P.
        keeps_weights: on the CPU, of so few keys that P is kept for the backward.
    """

    scale: float
    may_hide_all_keys: bool
    shape: tuple[int, ...]
    keeps_weights: bool

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """P, of rows of all heads, `(heads of all images, tokens, width)`."""
        scores = torch.baddbmm(q.new_zeros(()), q, k.mT, beta=0, alpha=self.scale).view(self.shape)
        if mask is not None:
            scores += mask
        weights: Tensor = aten._safe_softmax(scores, -1) if self.may_hide_all_keys else scores.softmax(-1)
        return weights.view(-1, *self.shape[-2:])


def _may_hide_all_keys(mask: Tensor | None) -> bool:
    if mask is None:
        return False
    if mask.device.type != "cpu" or type(mask) not in PLAIN:  # others may have no values to ask for
        return True
    return bool((mask < HIDDEN_BELOW).all(-1).any())


def _with_dense_rows(tensor: Tensor) -> Tensor:
    """The tensor, with its last axis dense. Of any other, the CPU's kernel reads wrong memory without an error."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _fits_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether PyTorch's fused CPU kernel can compute this.

    It gives a mask no gradient; masks of three axes, which PyTorch does not hand to it, get a fourth in `_for_kernel`.
    """
    if q.device.type != "cpu" or q.dim() != 4 or q.shape[-1] != v.shape[-1]:
        return False
    if mask is None:
        return True
    sizes = zip(reversed(mask.shape), reversed((*q.shape[:-1], k.shape[-2])), strict=False)
    return mask.dim() <= 4 and mask.dtype == q.dtype and all(size in (1, of) for size, of in sizes)


def _order_of_axes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> list[int] | None:
    """The axes of the result, outermost in memory first, as PyTorch's fused CPU kernel lays it out; None: PyTorch takes its math path."""
    dense = all(tensor.stride(-1) == 1 for tensor in (q, k, v))
    if not (dense and _fits_kernel(q, k, v, mask)) or (mask is not None and (mask.dim() == 3 or mask.requires_grad)):
        return None
    like = torch.empty_like(q, device="meta") if 0 in q.stride() else q  # an expanded one's axes have no order of their own
    return sorted(range(q.dim()), key=like.stride, reverse=True)


def _for_kernel(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """A mask of four axes, with a value for each query and key."""
    return None if mask is None else _with_dense_rows(mask.expand(*mask.shape[:-2], q.shape[-2], k.shape[-2])[(None,) * (4 - mask.dim())])


def _gradients(
    go: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kept: Sequence[Tensor], kind: Kind, for_mask: bool
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
    """gq, gk, gv, gmask, and what the double backward needs besides q, k, v: go, and P and dS where P is kept.

    Args:
        go: the gradient with respect to o.
        q, k, v, mask, kind: see the formulas above, and `Kind`.
        kept: P, or what the CPU's kernel left for its backward (o and the logarithms of sums), or nothing.
        for_mask: whether gmask is asked for.
    """
    if kept and not (kind.keeps_weights or for_mask):
        kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return (*kernel(_with_dense_rows(go), q, k, v, *kept, 0.0, False, attn_mask=_for_kernel(mask, q, k), scale=kind.scale), None), (go,)
    shapes = q.shape, k.shape, v.shape
    # One copy of what comes as views of a projection; then every product is one call, with its scale.
    go, q, k, v = (_per_head(tensor) for tensor in (go, q, k, v))
    none, s = q.new_zeros(()), kind.scale
    p = kept[0] if kind.keeps_weights else kind.weights(q, k, mask)
    ds = _gradient_of_scores(go, v, p)
    gmask = ds.view(kind.shape).sum_to_size(mask.shape).data if for_mask and mask is not None else None
    found = torch.baddbmm(none, ds, k, beta=0, alpha=s), torch.baddbmm(none, ds.mT, q, beta=0, alpha=s), torch.bmm(p.mT, go)
    gradients = *(gradient.view(shape).data for gradient, shape in zip(found, shapes, strict=True)), gmask
    return gradients, (go, p, ds) if kind.keeps_weights else (go,)


def _per_head(tensor: Tensor) -> Tensor:
    """`(..., tokens, width)` as `(heads of all images, tokens, width)`."""
    return tensor.reshape(-1, *tensor.shape[-2:])


def _gradient_of_scores(go: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """dS, of `_per_head` tensors."""
    return aten._softmax_backward_data(torch.bmm(go, v.mT), p, -1, go.dtype)


# PyTorch's own, whatever a program puts in their place later. A mode is shown these, so the program's function is around the call already.
SDPA, MULTI_HEAD = F.scaled_dot_product_attention, F.multi_head_attention_forward


class _Attention(Function):
    """o, of q `(..., tokens, width)`, k `(..., keys, width)` and v `(..., keys, width of v)`; `order`: see `_order_of_axes`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kind: Kind, order: list[int] | None, phase: Phase
    ) -> Tensor:
        ctx.kind, ctx.phase = kind, phase
        if kind.keeps_weights:
            p = kind.weights(_per_head(q), _per_head(k), mask)
            o = torch.empty_permuted((*q.shape[:-1], v.shape[-1]), order or list(range(q.dim())), dtype=q.dtype, device=q.device)
            o.copy_(torch.bmm(p, _per_head(v)).view(o.shape))
            ctx.save_for_backward(q, k, v, mask, p)
        elif _fits_kernel(q, k, v, mask) and not kind.may_hide_all_keys:  # called by name for what its backward needs
            kernel = aten._scaled_dot_product_flash_attention_for_cpu
            saved, log_sum = kernel(q, k, v, 0.0, False, attn_mask=_for_kernel(mask, q, k), scale=kind.scale)
            # The math path makes a contiguous result and saves none: a layer may work in place on it.
            o = saved.clone(memory_format=torch.contiguous_format) if order is None else saved
            ctx.save_for_backward(q, k, v, mask, saved, log_sum)
        else:
            with attention_by(FUSED):
                o = SDPA(q, k, v, mask, scale=kind.scale)
            ctx.save_for_backward(q, k, v, mask)
        return o

    @staticmethod
    def backward(ctx: Any, go: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, *kept = ctx.saved_tensors
        for_mask = ctx.needs_input_grad[3] and wanted(ctx, 4)[3]  # in this order: a mask seldom has one
        arguments = go, q, k, v, mask, [tensor.detach() for tensor in kept], ctx.kind, for_mask
        with full_precision(q.device):  # as `once_differentiable`
            found = _AttentionGradients.apply(*arguments) if torch.is_grad_enabled() else _gradients(*arguments)[0]
        return *found, None, None, None


class _AttentionGradients(Function):
    """gq, gk, gv and gmask."""

    @staticmethod
    def forward(
        ctx: Any,
        go: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        kept: Sequence[Tensor],
        kind: Kind,
        for_mask: bool,
    ) -> tuple[Tensor | None, ...]:
        found, left = _gradients(go, q, k, v, mask, kept, kind, for_mask)
        ctx.save_for_backward(q, k, v, mask, *left)
        ctx.kind, ctx.shapes = kind, (go.shape, q.shape, k.shape, v.shape)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, go, *kept = ctx.saved_tensors
        s, full = ctx.kind.scale, ctx.kind.shape
        go, q, k, v, uq, uk, uv = (_per_head(tensor) for tensor in (go, q, k, v, *outer[:3]))
        if ctx.kind.keeps_weights:
            p, ds = kept
        else:
            p = ctx.kind.weights(q, k, mask)
            ds = _gradient_of_scores(go, v, p)
        a = torch.bmm(uq, k.mT).baddbmm_(q, uk.mT, beta=s, alpha=s)
        if outer[3] is not None:
            a.view(full).add_(outer[3])
        a -= (p * a).sum(-1, keepdim=True)
        h = (ds * a).addcmul_(p, torch.bmm(go, uv.mT))
        h.addcmul_(p, h.sum(-1, keepdim=True), value=-1)
        c = a.mul_(p)
        d_go = torch.bmm(c, v).baddbmm_(p, uv)
        d_q = torch.bmm(h, k).baddbmm_(ds, uk, beta=s, alpha=s)
        d_k = torch.bmm(h.mT, q).baddbmm_(ds.mT, uq, beta=s, alpha=s)
        d_v = torch.bmm(c.mT, go)
        d_mask = h.view(full).sum_to_size(mask.shape).data if ctx.needs_input_grad[4] else None
        found = (gradient.view(shape).data for gradient, shape in zip((d_go, d_q, d_k, d_v), ctx.shapes, strict=True))
        return *found, d_mask, None, None, None


def attention(
    phase: Phase,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`; PyTorch's math path with dropout, grouped heads or shapes that broadcast or are empty.

    Half precision is computed in float32, as the math path does.
    """
    if autocasts(query):
        return as_autocast(partial(attention, phase), query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    dtype = query.dtype
    alone = attn_mask is None or not is_causal  # PyTorch refuses both
    same = alone and query.shape[:-2] == key.shape[:-2] == value.shape[:-2] and dtype == key.dtype == value.dtype
    fits = attn_mask is None or (attn_mask.dim() > 1 and attn_mask.dtype in (torch.bool, dtype, torch.float32))
    full = query.dim() > 1 and min(query.numel(), key.numel(), value.numel()) > 0  # the matrices of an empty one have no number
    if not (same and fits and full) or dropout_p or not dtype.is_floating_point:
        with attention_by(BY_MATH):
            return SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if dtype != compute_dtype(query):
        return in_compute_dtype(partial(attention, phase), query, key, value, attn_mask, 0.0, is_causal, scale)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=dtype).masked_fill_(~attn_mask, -math.inf)
    # Not inside: what is saved has to be what was given, or the double backward does not reach it.
    order = _order_of_axes(query, key, value, attn_mask)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    keeps_weights = query.device.type == "cpu" and key.shape[-2] <= MAX_KEPT * query.shape[-1]
    kind = Kind(scale, _may_hide_all_keys(attn_mask), (*query.shape[:-1], key.shape[-2]), keeps_weights)
    query, key, value = map(Tensor.contiguous if keeps_weights else _with_dense_rows, (query, key, value))
    return _Attention.apply(query, key, value, attn_mask, kind, order, phase)


def _without_override_check(function: Any) -> Any:
    """A Python function of PyTorch's without its first step, `has_torch_function`, by which a mode sees only the whole call.

    None: it has no such step, as where a program has put a function of its own in its place.
    """
    asks = "has_torch_function"
    if asks not in getattr(getattr(function, "__code__", None), "co_names", ()):
        return None
    names = {**function.__globals__, asks: lambda tensors: False}
    return FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)


def multi_head(mode: TorchFunctionMode, *args: Any, **settings: Any) -> Any:
    """`F.multi_head_attention_forward`, whose parts a mode sees, its linear layers and attention among them."""
    special = any(isinstance(value, Tensor) and type(value) not in PLAIN for value in (*args, *settings.values()))
    opened = None if special else _without_override_check(MULTI_HEAD)  # each time anew: a program may have replaced what it calls meanwhile
    if opened is None:  # such a type may have a function of its own
        return MULTI_HEAD(*args, **settings)
    with mode:
        return opened(*args, **settings)
