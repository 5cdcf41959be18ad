"""Replaced operators take what PyTorch's take, and give what these give: values, types, layouts, errors, and what they work on in place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from attrreg.ops import Phase, twice_differentiable
from attrreg.ops.channels import suggested_format
from tests.test_ops import check

pytestmark = pytest.mark.cpu  # of the CPU's kernels, whose layouts and types these are

N, C, SIDE = 4, 16, 8
LAST = torch.channels_last


def image_layouts() -> list[Any]:
    """Every way in which a model may come by images."""
    torch.manual_seed(0)
    whole, wide, high = torch.randn(N, C, SIDE, SIDE), torch.randn(N, 2 * C, SIDE, SIDE), torch.randn(N, C, SIDE, 2 * SIDE)
    found = {
        "contiguous": whole,
        "last": whole.to(memory_format=LAST),
        "slice": wide[:, :C],
        "slice of last": wide.to(memory_format=LAST)[:, :C],
        "columns": high[..., ::2],
        "columns of last": high.to(memory_format=LAST)[..., ::2],
        "transposed": whole.mT,
        "tokens": torch.randn(N, SIDE * SIDE, C).transpose(1, 2).unflatten(2, (SIDE, SIDE)),
        "tokens of one column": torch.randn(N, SIDE, C).transpose(1, 2).unsqueeze(-1),
        "batch last": torch.randn(C, SIDE, SIDE, N).permute(3, 0, 1, 2),
        "expanded": torch.randn(N, 1, SIDE, SIDE).expand(N, C, SIDE, SIDE),
        "one": torch.randn(1, C, SIDE, SIDE),
        "one as pixels": torch.randn(SIDE, SIDE, C).permute(2, 0, 1)[None],
        "one position": torch.randn(N, C, 1, 1),
        "one position, last": torch.randn(N, C, 1, 1).to(memory_format=LAST),
        "no channels": torch.randn(N, SIDE, SIDE)[:, None],
    }
    return [pytest.param(x, id=name) for name, x in found.items()]


def _weights(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _channels(x: Tensor) -> tuple[Tensor, Tensor]:
    return _weights(x.shape[1]), _weights(x.shape[1]).abs() + 1


def _convolution(side: int, stride: int = 1, padding: int = 0) -> dict[str, Callable[[Tensor], Tensor]]:
    def function(x: Tensor, layout: torch.memory_format) -> Tensor:
        return F.conv2d(x, _weights(24, x.shape[1], side, side).to(memory_format=layout), stride=stride, padding=padding)

    name = f"convolution {side} {stride}"
    return {name: lambda x: function(x, torch.contiguous_format), f"{name}, weights last": lambda x: function(x, LAST)}


def _heads(x: Tensor) -> Tensor:
    heads: Tensor = x.flatten(2).transpose(1, 2).unflatten(-1, (min(4, x.shape[1]), -1))
    return heads.transpose(1, 2)


def _same(x: Tensor) -> Tensor:
    return _heads(x)[:1].expand_as(_heads(x))


def _masked(x: Tensor, *shape: int | None) -> Tensor:
    q = _heads(x)
    return F.scaled_dot_product_attention(q, q, q, q.new_zeros([size or q.shape[-2] for size in shape]))


OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    **_convolution(1),
    **_convolution(1, stride=2),
    **_convolution(2, stride=2),
    **_convolution(3, stride=2, padding=1),
    "depthwise": lambda x: F.conv2d(x, _weights(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1]),
    "transposed": lambda x: F.conv_transpose2d(x, _weights(x.shape[1], 8, 2, 2), stride=2),
    "linear": lambda x: F.linear(x.movedim(1, -1), _weights(1, x.shape[1])),
    "group norm": lambda x: F.group_norm(x, 1, *_channels(x)),
    "group norm, plain": lambda x: F.group_norm(x, 1),
    "group norm, bias": lambda x: F.group_norm(x, 1, None, _channels(x)[0]),
    "instance norm": lambda x: F.instance_norm(x, None, None, *_channels(x)),
    "batch norm": lambda x: F.batch_norm(x, None, None, *_channels(x), training=True),
    "batch norm, eval": lambda x: F.batch_norm(x, *_channels(x)),
    "batch norm of tokens, eval": lambda x: F.batch_norm(x.flatten(2).mT.contiguous().mT, *_channels(x)),
    "layer norm": lambda x: F.layer_norm(x.movedim(1, -1), x.shape[1:2]),
    "rms norm": lambda x: F.rms_norm(x, x.shape[2:]),
    "rms norm of channels": lambda x: F.rms_norm(x.movedim(1, -1), x.shape[1:2]),
    "max pooling": lambda x: F.max_pool2d(x, 3, 1, 1),
    "silu": F.silu,
    "gelu": F.gelu,
    "relu6": F.relu6,
    "leaky relu": F.leaky_relu,
    "normalize": F.normalize,
    "norm": lambda x: x.norm(dim=1, keepdim=True),
    "cat": lambda x: torch.cat([x, x], 1),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "attention of heads": lambda x: F.scaled_dot_product_attention(_heads(x), _heads(x), _heads(x)),
    "attention of heads, mask of tokens": lambda x: _masked(x, 1, 1, 1, None),
    "attention of heads, mask of rows": lambda x: _masked(x, None, 1),
    "attention of heads, mask of three axes": lambda x: _masked(x, 1, None, None),
    "attention of heads, keys not dense": lambda x: F.scaled_dot_product_attention(_heads(x), _heads(x).mT.contiguous().mT, _heads(x)),
    "attention of heads, narrow values": lambda x: F.scaled_dot_product_attention(_heads(x), _heads(x), _heads(x)[..., :1]),
    "attention of heads, by the same queries": lambda x: F.scaled_dot_product_attention(_same(x), _heads(x), _heads(x)),
    "attention of matrices": lambda x: F.scaled_dot_product_attention(x[0], x[0], x[0]),
}
EITHER = ("group norm", "batch norm, eval")  # whose layout is not compared at one position or one image, where both are the same in memory


def ours(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    with twice_differentiable(Phase()):
        return function(*inputs)


def order(x: Tensor) -> list[int]:
    return [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1]


@pytest.mark.parametrize("x", image_layouts())
@pytest.mark.parametrize("name", OPERATORS)
def test_results_are_laid_out_as_pytorchs(name: str, x: Tensor) -> None:
    """A dropout that follows draws in the order of memory, and a `view` wants it."""
    try:
        want = OPERATORS[name](x)
    except (RuntimeError, ValueError) as error:
        for images in (x, x.detach().requires_grad_()):
            with pytest.raises(type(error)):
                ours(OPERATORS[name], images)
        return
    for images in (x, x.detach().requires_grad_()):
        got = ours(OPERATORS[name], images)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert order(got) == order(want)
        if (len(x) > 1 and x.shape[2:].numel() > 1) or not name.startswith(EITHER):
            assert suggested_format(got) == suggested_format(want)


@pytest.mark.parametrize("x", image_layouts())
def test_the_suggested_layout_is_pytorchs(x: Tensor) -> None:
    for images in (x, x[:1], x[:, :1], x[:, :, :1], x[:, :, :, :1], x[:, :, :1, :1], x[:0], x.unsqueeze(2)):
        assert suggested_format(images) == torch._prims_common.suggest_memory_format(images)


IN_PLACE_AFTER = {
    "leaky relu": F.leaky_relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "relu6 in place": lambda h: F.relu6(h, inplace=True),
    "hardtanh in place": lambda h: F.hardtanh(h, inplace=True),
    "silu in place": lambda h: F.silu(h, inplace=True),
    "normalize": F.normalize,
    "group norm": lambda h: F.group_norm(h, 2),
    "instance norm": F.instance_norm,
    "layer norm": lambda h: F.layer_norm(h, (SIDE, SIDE)),
    "rms norm": lambda h: F.rms_norm(h, (SIDE,)),
    "batch norm": lambda h: F.batch_norm(h, None, None, training=True),
    "max pooling": lambda h: F.max_pool2d(h, 3, 1, 1),
    "convolution": lambda h: F.conv2d(h, _weights(C, C, 1, 1).double()),
    "convolution, channels last": lambda h: F.conv2d(h.to(memory_format=LAST), _weights(C, C, 1, 1).double()),
    "cat": lambda h: torch.cat([h[:, :4], h[:, 4:]], 1),
}


@pytest.mark.parametrize("name", IN_PLACE_AFTER)
def test_what_follows_may_work_in_place(name: str) -> None:
    check_in_place(IN_PLACE_AFTER[name])


def check_in_place(function: Any) -> None:
    """A residual added in place behind a function, against PyTorch."""
    h = torch.randn(N, C, SIDE, SIDE, dtype=torch.float64, requires_grad=True)
    check(lambda h: function(h * 1).add_(h), [h], 1e-9)


@pytest.mark.parametrize("function", [F.silu, F.hardswish, F.hardsigmoid, F.relu6])
@pytest.mark.parametrize("how", ["read again", "ignored", "a view", "seen by another"])
def test_in_place_means_in_place(function: Any, how: str) -> None:
    def model(x: Tensor, activate: Callable[[Tensor], Tensor]) -> Tensor:
        h = x * 2
        if how == "read again":
            return activate(h) + 0.5 * h
        if how == "ignored":
            activate(h)
            return h.square()
        if how == "a view":
            activate(h[:, :4])
            return h.square()
        other = h.view(N, -1)
        return (activate(h).flatten(1) + other).square()

    def apart(x: Tensor) -> Tensor:
        """The same without working in place, by another's derivatives."""
        h = x * 2
        y: Tensor = function(h)
        if how == "read again":
            return y + 0.5 * y
        if how == "ignored":
            return y.square()
        if how == "a view":
            return torch.cat([function(h[:, :4]), h[:, 4:]], 1).square()
        return (2 * y.flatten(1)).square()

    x = torch.randn(N, C, SIDE, SIDE, dtype=torch.float64, requires_grad=True)
    found = []
    for y in (ours(lambda x: model(x, lambda h: function(h, inplace=True)), x), ours(apart, x)):
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        found.append([y, first, *(torch.autograd.grad(first.square().sum(), x) if first.requires_grad else ())])  # slopes by parts
    torch.testing.assert_close(found[0][0], model(x, lambda h: function(h, inplace=True)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_in_place_without_a_graph() -> None:
    x = torch.randn(N, C)
    want, h = F.silu(x), x.clone()
    assert ours(lambda h: F.silu(h, inplace=True), h) is h
    torch.testing.assert_close(h, want)


def test_what_was_saved_before_is_not_overwritten_in_silence() -> None:
    x = torch.randn(N, C, requires_grad=True)

    def model(x: Tensor) -> Tensor:
        h = x * 2
        squared = h.square()  # needs h as it was
        F.silu(h, inplace=True)
        return squared + h

    def of_a_constant(x: Tensor) -> Tensor:
        h = torch.ones_like(x)
        product = h * x
        F.silu(h, inplace=True)
        return product

    for function in (model, of_a_constant):
        for run in (ours, lambda function, x: function(x)):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                run(function, x).sum().backward()


AXIS: Any = {"axis": 1}  # these are not in PyTorch's stubs
NUMBER: Any = np.int64(1)
TENSOR: Any = torch.tensor(1)
CALLS: dict[str, Callable[[Tensor], Any]] = {
    "cat with a placeholder": lambda h: torch.cat([h, torch.empty(0)], 1),
    "cat, axis": lambda h: torch.cat([h, h], **AXIS),
    "concatenate, axis": lambda h: torch.concatenate([h, h], **AXIS),
    "norm, axis": lambda h: torch.linalg.norm(h, keepdims=True, **AXIS),
    "vector norm, axis": lambda h: torch.linalg.vector_norm(h, **AXIS),
    "norm in another type": lambda h: torch.norm(h, dim=1, dtype=torch.float64),
    "norm of complex numbers": lambda h: torch.fft.rfft2(h).norm(dim=1),
    "vector norm of complex numbers": lambda h: torch.linalg.vector_norm(torch.fft.rfft2(h), dim=1),
    "matrix's norm of complex numbers": lambda h: torch.linalg.norm(torch.fft.rfft2(h), dim=(1, 2)),
    "vector norm, out": lambda h: torch.linalg.vector_norm(h, dim=1, out=None),
    "NumPy's number": lambda h: F.conv2d(h, _weights(8, C, 3, 3), padding=NUMBER, stride=(NUMBER, 1)),
    "a tensor": lambda h: F.conv2d(h, _weights(8, C, 3, 3), padding=TENSOR),
    "a size": lambda h: F.conv_transpose2d(h, _weights(C, 8, 2, 2), stride=torch.Size([2, 2]), output_padding=[NUMBER, 0]),
    "complex": lambda h: F.conv2d(torch.fft.rfft2(h), torch.complex(_weights(8, C, 1, 1), _weights(8, C, 1, 1))).abs(),
    "complex, transposed": lambda h: F.conv_transpose2d(torch.fft.rfft2(h), torch.complex(*[_weights(C, 8, 1, 1)] * 2)).abs(),
    "no scale": lambda h: F.scaled_dot_product_attention(h, h.sin(), h.cos(), scale=0.0),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_pytorch_takes(name: str) -> None:
    h = torch.randn(N, C, SIDE, SIDE, requires_grad=True)
    torch.testing.assert_close(ours(CALLS[name], h), CALLS[name](h))


HALF: dict[str, Callable[[Tensor], Tensor]] = {
    "rms norm": lambda h: F.rms_norm(h * 0.01, (SIDE,)),
    "rms norm, weight": lambda h: F.rms_norm(h * 0.01, (SIDE,), torch.ones(SIDE, dtype=h.dtype)),
    "norm of much": lambda h: (300 * h).norm(dim=1),
    "norm of little": lambda h: (1e-4 * h).norm(dim=1),
    "deviation of much": lambda h: (300 * h).std(1),
    "deviation of little": lambda h: (1e-4 * h).std(1),
    "vector norm": lambda h: torch.linalg.vector_norm(300 * h, dim=1),
    "matrix's norm": lambda h: torch.linalg.norm(1e-4 * h, dim=(1, 2)),
    "distance": lambda h: torch.cdist(300 * h.flatten(1), 300 * h.flatten(1)),
    "normalize": lambda h: F.normalize(300 * h),
    "convolution": lambda h: F.conv2d(h, _weights(8, C, 3, 3).to(h.dtype) / 12),
    "attention": lambda h: F.scaled_dot_product_attention(h, h, h),
    "attention, scale": lambda h: F.scaled_dot_product_attention(h, h, h, scale=1.7),
    "attention, causal": lambda h: F.scaled_dot_product_attention(h, h, h, is_causal=True),
    "layer norm, eps": lambda h: F.layer_norm(0.1 * h, (SIDE,), eps=0.5),
    "group norm": lambda h: F.group_norm(h, 2),
    "group norm, eps": lambda h: F.group_norm(0.1 * h, 2, eps=0.5),
    "instance norm": F.instance_norm,
}


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
def test_half_precision_is_as_pytorchs(name: str, dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    h = torch.randn(N, C, SIDE, SIDE).to(dtype)
    context = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    with context:
        try:
            want = HALF[name](h)
        except RuntimeError as error:  # PyTorch has no such kernel
            with pytest.raises(type(error)):
                ours(HALF[name], h)
            return
        found = [ours(HALF[name], images).detach() for images in (h, h.clone().requires_grad_())]
    exact = HALF[name](h.double())
    rounding = torch.finfo(want.dtype).eps * exact.abs().max()
    for got in found:
        assert got.dtype == want.dtype
        ours_off, theirs_off = ((each.double() - exact).abs().max() for each in (got, want))
        assert ours_off <= 2 * theirs_off + (1 if want.dtype.itemsize == 2 else 16) * rounding


NORMS: list[Callable[[Tensor], Tensor]] = [
    lambda h: F.rms_norm(h, (SIDE,)),
    F.normalize,
    lambda h: F.layer_norm(h, (SIDE,)),
    lambda h: F.group_norm(h, 2),
    F.instance_norm,
    lambda h: h.norm(dim=1),
]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("function", NORMS)
def test_types_of_norms_on_cuda_are_pytorchs(function: Callable[[Tensor], Tensor], autocast: bool) -> None:
    """Of tensors without values, so that no GPU is needed; `torch.autocast` would ask for one."""
    with FakeTensorMode():
        h = torch.empty(N, C, SIDE, SIDE, dtype=torch.float16, device="cuda")
        try:
            torch.set_autocast_enabled("cuda", autocast)
            assert ours(function, h).dtype == function(h).dtype
        finally:
            torch.set_autocast_enabled("cuda", False)
