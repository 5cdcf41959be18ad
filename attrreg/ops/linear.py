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

MIN_SIDE = 64  # rows and columns of a result, below which oneDNN is slow where both matrices are stored by columns
PLAIN = (Tensor, torch.nn.Parameter)  # not distributed, quantized or otherwise special

_CAPABILITY = torch.backends.cpu.get_cpu_capability()
# What torch.compile takes for linear layers on the CPU; there is no public name. Measured on x86 only.
_THERE = torch.backends.mkldnn.is_available() and _CAPABILITY in ("AVX2", "AVX512")
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if _THERE else None


def _mkl_is_slow(capability: str, cpu: dict[str, str]) -> bool:
    """Whether MKL, which takes 256 bits at a time on AMD's processors, is half as fast as oneDNN: on those that take 512, since Zen 5."""
    family = cpu.get("cpu family", "")
    return capability == "AVX512" and cpu.get("vendor_id") == "AuthenticAMD" and family.isdigit() and int(family) >= 26


MKL_IS_SLOW = _mkl_is_slow(_CAPABILITY, processor.fields())  # so that oneDNN is worth a copy
MIN_MULTIPLICATIONS = 2**22 if MKL_IS_SLOW else 2**24  # multiplications, below which oneDNN loses more by preparing than it gains


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias, of `(rows, inner)` and `(columns, inner)`."""
    return _faster_product(a, b, bias) if _onednn_may_gain(a, b) else F.linear(a, b, bias)


def _faster_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product` of `(..., inner)` and `(columns, inner)` for which `_onednn_may_gain` holds."""
    if a.shape[-1] == 1:  # oneDNN gains nothing, and the stride of such an axis does not tell how the matrix is stored
        return F.linear(a, b, bias).data
    if a.stride(-1) == 1 or b.stride(-1) == 1:
        return _by_onednn(a, b, bias)
    # Both are stored by columns, as for the gradient of a weight. oneDNN then copies its first argument, which should be the smaller one.
    (rows, inner), columns = a.shape, b.shape[0]
    if _pytorch_is_faster_by_columns(a, b):
        # With a bias of zeros, PyTorch fills the result first: MKL is slow to write to memory that nothing has written to yet.
        return F.linear(a, b, a.new_zeros(columns) if bias is None else bias)
    if bias is None and (rows - columns) * inner > 2 * rows * columns:
        return _by_onednn(b, a, None).t().contiguous()
    return _by_onednn(a, b, bias)


def _pytorch_is_faster_by_columns(a: Tensor, b: Tensor) -> bool:
    """Whether PyTorch's product is the faster one where both are stored by columns."""
    return not MKL_IS_SLOW or min(a.shape[0], b.shape[0]) < MIN_SIDE


def _by_onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    assert ONEDNN is not None
    if not (b.is_contiguous() or b.t().is_contiguous()):  # others it reads in a scalar loop
        b = b.t().contiguous().t()
    if bias is not None:
        bias = bias.contiguous()  # it does not look at a bias's strides
    result: Tensor = ONEDNN.default(a, b, bias, "none", [], "")
    return result.data  # of many axes it is a view


def _onednn_may_gain(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN's product of `(..., inner)` and `(columns, inner)` may be faster than PyTorch's."""
    there = ONEDNN is not None and a.numel() * b.shape[0] >= MIN_MULTIPLICATIONS
    return there and _onednn_takes(a) and _onednn_takes(b) and bool(torch.backends.mkldnn.enabled)


def _onednn_takes(tensor: Tensor) -> bool:
    """Whether oneDNN's product takes a tensor like this."""
    return type(tensor) in PLAIN and tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype == torch.float32


def _times(a: Tensor, b: Tensor, transposed: bool, phase: Phase) -> Tensor:
    """a b^T if `transposed`, else a b; as a `_Product` where it may be differentiated again."""
    if not torch.is_grad_enabled():
        return _faster_product(a, b if transposed else b.t())
    return _Product.apply(a, b, transposed, phase)


def _added(total: Tensor, a: Tensor, b: Tensor, phase: Phase) -> Tensor:
    """total + a b^T, of matrices stored by columns; written into `total` where nobody differentiates again."""
    if torch.is_grad_enabled():
        return total + _times(a, b, True, phase)
    return total.addmm_(a, b.t()) if _pytorch_is_faster_by_columns(a, b) else total.add_(_faster_product(a, b))


def _columns(tensor: Tensor) -> Tensor:
    """`(..., inner)` as a matrix `(inner, rows)`."""
    return tensor.flatten(0, -2).t()


class _Linear(Function):
    """A linear layer, which returns its weight as a second output, for the inner backward to multiply by.

    The gradient that the weight gets from the attribution then arrives here as `earlier`, and the product for the weight's other gradient
    is added to it: no pass over memory of its own sums the two.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, w: Tensor, bias: Tensor | None, phase: Phase) -> tuple[Tensor, Tensor]:
        handed_on = w.detach()
        for_a, for_w, *_ = ctx.needs_input_grad
        # As PyTorch's own: what no derivative needs may be freed or changed.
        ctx.save_for_backward(a if for_w else None, None if not for_a else handed_on if for_w else w)
        ctx.phase, ctx.shape = phase, a.shape
        ctx.set_materialize_grads(False)
        return _faster_product(a, w, bias), handed_on

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, earlier: Tensor | None) -> tuple[Tensor | None, ...]:
        if gy is None:  # only the weight was used. Hooks of a user's on what comes before get zeros: PyTorch would call them with None
            return earlier.new_zeros(ctx.shape) if earlier is not None and ctx.needs_input_grad[0] else None, earlier, None, None
        a, w = ctx.saved_tensors
        for_a, for_w, for_bias = wanted(ctx, 3)
        gy = gy.contiguous()  # so that what reads it does not copy it each time
        ga = _times(gy, w, False, ctx.phase) if for_a else None
        gw = None
        if for_w:
            left, right = _columns(gy), _columns(a)
            gw = _times(left, right, True, ctx.phase) if earlier is None else _added(earlier, left, right, ctx.phase)
        return ga, gw, gy.flatten(0, -2).sum(0) if for_bias else None, None


class _Product(Function):
    """a b^T if `transposed`, else a b, of a `(..., inner)` and a matrix b; its derivatives are products again.

    These have as many multiplications, so if oneDNN gains for one, it does for all. Reshaping and transposing happens inside, so that no
    gradient is a view.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, transposed: bool, phase: Phase) -> Tensor:
        ctx.save_for_backward(a if ctx.needs_input_grad[1] else None, b if ctx.needs_input_grad[0] else None)
        ctx.transposed, ctx.phase = transposed, phase
        return _faster_product(a, b if transposed else b.t())

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        transposed, phase = ctx.transposed, ctx.phase
        for_a, for_b = wanted(ctx, 2)
        gy = gy.contiguous()
        ga = _times(gy, b, not transposed, phase) if for_a else None
        gb = None
        if for_b:  # laid out as b is
            left, right = (gy, a) if transposed else (a, gy)
            gb = _times(_columns(left), _columns(right), True, phase)
        return ga, gb, None, None


def linear(phase: Phase, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`."""
    fits = input.dim() > 1 and weight.dim() == 2 and input.shape[-1] == weight.shape[1]  # else PyTorch says what is wrong
    gains = fits and _onednn_may_gain(input, weight) and (bias is None or (_onednn_takes(bias) and bias.shape == weight.shape[:1]))
    if not gains or torch.is_autocast_enabled("cpu"):
        return F.linear(input, weight, bias)
    return _Linear.apply(input.contiguous(), weight, bias, phase)[0]  # contiguous, so that no derivative copies it again
