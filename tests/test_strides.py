"""Replaced operators on tensors of any strides: kernels called by name do not check them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attrreg.ops import Phase, twice_differentiable
from tests.test_linear import always_onednn, needs_onednn
from tests.test_ops import LAYERS


def _stored(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides: what a model may hand an operator, and autograd its backward."""
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "last axes swapped" and tensor.dim() > 1:
        return tensor.mT.contiguous().mT
    if layout == "sliced":
        return torch.cat([tensor, tensor + 1], -1)[..., : tensor.shape[-1]]
    if layout == "every second":
        return torch.stack([tensor, tensor + 1], -1)[..., 0]
    if layout == "expanded":
        return tensor[..., :1].expand_as(tensor)
    return tensor


LAYOUTS = ["dense", "transposed", "last axes swapped", "sliced", "every second", "expanded"]
# Of every kind of operator one.
STORED: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    **{
        name: LAYERS[name]
        for name in (
            "batch norm",
            "layer norm of two axes",
            "RMS norm of two axes",
            "group norm",
            "relu",
            "leaky relu",
            "silu",
            "cat",
            "linear of tokens",
        )
    },
    "convolution": (F.conv2d, [(2, 4, 5, 5), (6, 4, 3, 3), (6,)]),
    "depthwise convolution": (lambda x, w: F.conv2d(x, w, groups=4, padding=1), [(2, 4, 5, 5), (4, 1, 3, 3)]),
    "wide depthwise convolution": (lambda x, w: F.conv2d(x, w, groups=4, padding=2), [(2, 4, 5, 5), (4, 1, 5, 5)]),
    "pointwise convolution": (F.conv2d, [(2, 4, 3, 3), (6, 4, 1, 1)]),
    "patches": (lambda x, w: F.conv2d(x, w, stride=2), [(2, 4, 6, 6), (6, 4, 2, 2)]),
    "wide strided convolution": (lambda x, w: F.conv2d(x, w, stride=2, padding=3), [(2, 3, 8, 8), (4, 3, 7, 7)]),
    "transposed convolution": (F.conv_transpose1d, [(2, 4, 5), (4, 3, 2)]),
    "attention": (F.scaled_dot_product_attention, [(2, 3, 5, 4)] * 3),
}


@given(data=st.data(), name=st.sampled_from(sorted(STORED)))
@settings(deadline=None, max_examples=150)
def test_operators_take_any_strides(data: Any, name: str) -> None:
    function, shapes = STORED[name]
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    layouts = [data.draw(st.sampled_from(LAYOUTS)) for _ in range(len(shapes) + 1)]
    inputs = [
        _stored(torch.randn(shape, dtype=torch.float64), layout).requires_grad_() for shape, layout in zip(shapes, layouts, strict=False)
    ]
    found = []
    for context in (sdpa_kernel(SDPBackend.MATH), twice_differentiable(Phase())):
        with context:
            y = function(*inputs)
        outer = _stored(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape), layouts[-1])
        first = torch.autograd.grad(y, inputs, outer, retain_graph=True)
        first_again = torch.autograd.grad(torch.tanh(y), inputs, outer, create_graph=True)
        directions = [_stored(torch.linspace(-1, 2, g.numel(), dtype=g.dtype).reshape(g.shape), layouts[-1]) for g in first]
        second = torch.autograd.grad(first_again, inputs, directions)
        found.append([y, *first, *first_again, *second])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.detach().abs().max()))


PRODUCTS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "linear of tokens": (F.linear, [(2, 4, 6), (3, 6), (3,)]),
    "linear": (F.linear, [(5, 6), (3, 6)]),
    "few positions": (F.conv2d, [(2, 4, 2, 3), (6, 4, 1, 1), (6,)]),
    "patches": (lambda x, w, b: F.conv2d(x, w, b, stride=2), [(2, 4, 6, 6), (6, 4, 2, 2), (6,)]),
}


@pytest.mark.cpu
@needs_onednn
@given(data=st.data(), name=st.sampled_from(sorted(PRODUCTS)))
@settings(deadline=None, max_examples=60)
def test_products_by_onednn_take_any_strides(data: Any, name: str) -> None:
    function, shapes = PRODUCTS[name]
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    layouts = [data.draw(st.sampled_from(LAYOUTS)) for _ in range(len(shapes) + 1)]
    values = [_stored(torch.randn(shape), layout) for shape, layout in zip(shapes, layouts, strict=False)]
    found = []
    for dtype in (torch.float64, torch.float32):
        inputs = [_stored(value.to(dtype), layout).requires_grad_() for value, layout in zip(values, layouts, strict=False)]
        with always_onednn() as calls, twice_differentiable(Phase()):  # which is for float32 alone
            y = function(*inputs)
            outer = _stored(torch.linspace(-1, 1, y.numel(), dtype=dtype).reshape(y.shape), layouts[-1])
            first = torch.autograd.grad(y, inputs, outer, create_graph=True)
            second = torch.autograd.grad(first[0].square().sum(), inputs[1])
        assert bool(calls) == (dtype == torch.float32)
        found.append([y, *first, *second])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.detach().abs().max()))


@pytest.mark.parametrize(
    "name",
    [
        *("batch norm", "layer norm of two axes", "silu", "convolution", "pointwise convolution", "wide depthwise convolution"),
        *("wide strided convolution", "attention"),
    ],
)
def test_derivatives_are_no_views(name: str) -> None:
    """PyTorch adds the loss's own gradients to the second ones in place then, and users' hooks may write into the first."""
    function, shapes = STORED[name]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    with twice_differentiable(Phase()):
        y = function(*inputs)
    first = torch.autograd.grad(y, inputs, torch.randn_like(y), create_graph=True)
    assert not any(gradient._is_view() for gradient in first if "ViewBackward" not in repr(gradient.grad_fn))  # those PyTorch makes itself
    second = torch.autograd.grad(first[0].square().sum(), inputs, allow_unused=True)
    assert second[0] is not None or "convolution" in name  # which is linear
    assert not any(gradient._is_view() for gradient in second if gradient is not None)
