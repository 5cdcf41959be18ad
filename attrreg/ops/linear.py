"""Linear layers by the faster of two matrix products.

PyTorch's own derivatives of a linear layer are exact and few at every order. What is slow on some processors is the product itself:
PyTorch takes MKL's, which on AMD's since Zen 5 runs at up to half the speed of oneDNN's. Elsewhere it is as fast, but for large products,
and faster for small ones, which oneDNN prepares longer. All derivatives of a layer are such products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from attrreg import processor
from attrreg.ops.phase import Phase, wanted

WIDE = 64  # rows and columns of a result, below which oneDNN is slow where both matrices are stored by columns
PLAIN = (Tensor, torch.nn.Parameter)  # not distributed, quantized or otherwise special

_CAPABILITY = torch.backends.cpu.get_cpu_capability()
# What torch.compile takes for linear layers on the CPU; there is no public name. Measured on x86 only.
_THERE = torch.backends.mkldnn.is_available() and _CAPABILITY in ("AVX2", "AVX512")
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if _THERE else None


def _mkl_is_slow(capability: str, cpu: dict[str, str]) -> bool:
    """Whether it computes half as much at a time as oneDNN: on AMD's, 256 bits, of the 512 that they have units for since Zen 5."""
    family = cpu.get("cpu family", "")
    return capability == "AVX512" and cpu.get("vendor_id") == "AuthenticAMD" and family.isdigit() and int(family) >= 26


MKL_IS_SLOW = _mkl_is_slow(_CAPABILITY, processor.fields())  # so that oneDNN is worth a copy
MUCH = 2**22 if MKL_IS_SLOW else 2**24  # multiplications, below which oneDNN loses more by preparing than it gains


def product(a: Tensor, b: Tensor, shift: Tensor | None = None) -> Tensor:
    """a b^T + shift, of `(rows, inner)` and `(columns, inner)`."""
    return _fast(a, b, shift) if _worth_it(a, b) else F.linear(a, b, shift)


def _fast(a: Tensor, b: Tensor, shift: Tensor | None = None) -> Tensor:
    """The same, of what is worth it, and `(..., inner)`."""
    if a.shape[-1] == 1:  # the step of an axis of one value says nothing, and oneDNN has nothing to gain
        return F.linear(a, b, shift).data  # not a view, as below
    if a.stride(-1) == 1 or b.stride(-1) == 1:
        return _by_onednn(a, b, shift)
    # Both by columns, as for the gradient of weights. oneDNN copies the first, which should be the smaller one then.
    (rows, inner), columns = a.shape, b.shape[0]
    if _by_columns_as_pytorch(a, b):
        # Zeros to be added are written to the result first: MKL is slow to write to memory that nothing has just written.
        return F.linear(a, b, a.new_zeros(columns) if shift is None else shift)
    if shift is None and (rows - columns) * inner > 2 * rows * columns:
        return _by_onednn(b, a, None).t().contiguous()
    return _by_onednn(a, b, shift)


def _by_columns_as_pytorch(a: Tensor, b: Tensor) -> bool:
    """Whether PyTorch's product is the faster one where both are stored by columns."""
    return not MKL_IS_SLOW or min(a.shape[0], b.shape[0]) < WIDE


def _by_onednn(a: Tensor, b: Tensor, shift: Tensor | None) -> Tensor:
    assert ONEDNN is not None
    if not (b.is_contiguous() or b.t().is_contiguous()):  # which it takes only by a scalar loop
        b = b.t().contiguous().t()
    if shift is not None:
        shift = shift.contiguous()  # whose steps it does not look at
    result: Tensor = ONEDNN.default(a, b, shift, "none", [], "")
    return result.data  # not a view, as it is of many axes: a layer may go on to work in place, which on views is slow or refused


def _worth_it(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN may be the faster one, of `(..., inner)` and `(columns, inner)`."""
    return a.numel() * b.shape[0] >= MUCH and _suited(a) and _suited(b)


def _suited(tensor: Tensor) -> bool:
    kind = type(tensor) in PLAIN and tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype == torch.float32
    return kind and ONEDNN is not None and bool(torch.backends.mkldnn.enabled)


def _times(a: Tensor, b: Tensor, across: bool, phase: Phase) -> Tensor:
    """`_Product`, with a graph where somebody differentiates again."""
    if not torch.is_grad_enabled():
        return _fast(a, b.t() if across else b)
    result: Tensor = _Product.apply(a, b, across, phase)
    return result


def _added(total: Tensor, a: Tensor, b: Tensor, phase: Phase) -> Tensor:
    """The sum of `total`, which is written over where nobody differentiates again, and the product of two matrices stored by columns."""
    if torch.is_grad_enabled():
        return total + _times(a, b, False, phase)
    return total.addmm_(a, b.t()) if _by_columns_as_pytorch(a, b) else total.add_(_fast(a, b))


def _columns(tensor: Tensor) -> Tensor:
    """The columns of all rows, `(inner, rows)`."""
    return tensor.flatten(0, -2).t()


class _Linear(Function):
    """The layer, and its weight once more, for the inner backward to multiply by.

    So the gradient that the weight gets there comes here first, and this one is added to it by the product, not in a pass of its own.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, w: Tensor, shift: Tensor | None, phase: Phase) -> tuple[Tensor, Tensor]:
        again = w.detach()
        for_a, for_w, *_ = ctx.needs_input_grad
        # As PyTorch's own: what no derivative needs may be freed or changed.
        ctx.save_for_backward(a if for_w else None, None if not for_a else again if for_w else w)
        ctx.phase = phase
        ctx.set_materialize_grads(False)
        return _fast(a, w, shift), again

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, earlier: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, earlier, None, None
        a, w = ctx.saved_tensors
        for_a, for_w, for_shift = wanted(ctx, 3)
        g = g.contiguous()  # so that what reads it does not copy it each time
        ga = _times(g, w, True, ctx.phase) if for_a else None
        gw = None
        if for_w:
            left, right = _columns(g), _columns(a)
            gw = _times(left, right, False, ctx.phase) if earlier is None else _added(earlier, left, right, ctx.phase)
        return ga, gw, g.flatten(0, -2).sum(0) if for_shift else None, None


class _Product(Function):
    """a b^T, or where it goes `across`, a b, of `(..., inner)` and a matrix; its derivatives are products again.

    These have as many multiplications, so that what is worth it for one is for all. Reshaped and transposed inside: PyTorch sums
    gradients of the same tensor in place where they are no views.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, across: bool, phase: Phase) -> Tensor:
        ctx.save_for_backward(a if ctx.needs_input_grad[1] else None, b if ctx.needs_input_grad[0] else None)
        ctx.across, ctx.phase = across, phase
        return _fast(a, b.t() if across else b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        across, phase = ctx.across, ctx.phase
        for_a, for_b = wanted(ctx, 2)
        g = g.contiguous()
        ga = _times(g, b, not across, phase) if for_a else None
        gb = None
        if for_b:  # laid out as b is
            left, right = (a, g) if across else (g, a)
            gb = _times(_columns(left), _columns(right), False, phase)
        return ga, gb, None, None


def linear(phase: Phase, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`."""
    fits = input.dim() > 1 and weight.dim() == 2 and input.shape[-1] == weight.shape[1]  # else PyTorch says what is wrong
    worth = fits and _worth_it(input, weight) and (bias is None or (_suited(bias) and bias.shape == weight.shape[:1]))
    if not worth or torch.is_autocast_enabled("cpu"):
        return F.linear(input, weight, bias)
    result: Tensor = _Linear.apply(input.contiguous(), weight, bias, phase)[0]  # so that nothing copies it again
    return result
