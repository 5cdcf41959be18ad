"""Depthwise convolutions, whose weight gradients are products of their own."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attrreg.ops import Phase, depthwise, twice_differentiable
from tests.test_ops import Tensors, check_convolution


@st.composite
def depthwise_convolutions(draw: Any) -> tuple[Tensors, dict[str, Any]]:
    kernel, sides = ([draw(st.integers(1, most)) for _ in range(2)] for most in (7, 12))
    padding, stride, dilation = ([draw(st.integers(low, high)) for _ in range(2)] for low, high in ((0, 4), (1, 3), (1, 2)))
    assume(all(side + 2 * p > d * (k - 1) for side, p, d, k in zip(sides, padding, dilation, kernel, strict=True)))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(draw(st.integers(1, 3)), 5, *sides, dtype=torch.float64)
    if draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    x = x[:, 1:4] if draw(st.booleans()) else x[:, 1:4].clone()  # of a slice, channels or planes lie apart
    w, b = torch.randn(3, 1, *kernel, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    return (x, w, b if draw(st.booleans()) else None), {"padding": padding, "stride": stride, "dilation": dilation, "groups": 3}


@given(depthwise_convolutions())
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
def test_as_pytorch(case: tuple[Tensors, dict[str, Any]]) -> None:
    check_convolution(F.conv2d, *case)


@given(depthwise_convolutions())
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
def test_the_products_are_right_also_where_they_are_not_used(case: tuple[Tensors, dict[str, Any]]) -> None:
    (x, w, _), given = case
    y = F.conv2d(x, w.requires_grad_(), **given)
    gy = torch.randn_like(y)
    (want,) = torch.autograd.grad(y, w, gy)
    for way in (depthwise._by_positions, depthwise._by_rows):
        found = way(gy, x, w.shape[2:], given["stride"], given["padding"], given["dilation"])
        torch.testing.assert_close(found[:, None], want, rtol=1e-10, atol=1e-10)


def test_few_positions_of_many_images_go_by_positions_others_by_rows() -> None:
    def used(images: int, size: int) -> bool:
        x = torch.randn(images, 2, size, size)
        with patch.object(depthwise, "_by_positions", wraps=depthwise._by_positions) as spy:
            depthwise.weight_gradient(x, x, torch.randn(2, 1, 7, 7), [1, 1], [3, 3], [1, 1])
        return spy.called

    assert used(8, 4) and used(32, 8) and used(50, 10)
    assert not used(7, 4) and not used(31, 8) and not used(100, 11)


@pytest.mark.cpu
def test_which_weight_gradients_are_products() -> None:
    def used(size: int, kernel: int, groups: int = 8, channels_last: bool = False, sliced: bool = False, width: int | None = None) -> bool:
        x, w = torch.randn(2, 16 if sliced else 8, size, width or size), torch.randn(8, 8 // groups, kernel, kernel, requires_grad=True)
        x = (x.to(memory_format=torch.channels_last) if channels_last else x)[:, :8]
        with patch.object(depthwise, "weight_gradient", wraps=depthwise.weight_gradient) as spy:
            with twice_differentiable(Phase()):
                y = F.conv2d(x, w, padding=kernel // 2, groups=groups)
            y.sum().backward()
        return spy.called

    assert used(14, 5) and used(7, 7) and used(2, 3) and used(4, 5, channels_last=True)
    assert not used(14, 3) and not used(64, 5) and not used(8, 5, channels_last=True)  # PyTorch's is fast, or the product too large
    assert not used(14, 5, groups=2) and not used(2, 1) and not used(2, 3, width=19) and used(2, 3, width=18)
    assert used(4, 5, channels_last=True, sliced=True) and used(14, 5, sliced=True) and not used(8, 5, channels_last=True, sliced=True)


@pytest.mark.parametrize("size", [4, 9])
def test_on_some_of_the_channels_that_come_last(size: int) -> None:
    def convolve(x: Tensor, w: Tensor, b: None, **given: Any) -> Tensor:
        return F.conv2d(x.to(memory_format=torch.channels_last)[:, 2:5], w, b, **given)

    x, w = torch.randn(4, 6, size, size, dtype=torch.float64), torch.randn(3, 1, 5, 5, dtype=torch.float64)
    check_convolution(convolve, (x, w, None), {"padding": 2, "groups": 3})


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_on_images_much_wider_than_the_kernel(format: torch.memory_format) -> None:
    x, w = torch.randn(2, 3, 9, 40, dtype=torch.float64).to(memory_format=format), torch.randn(3, 1, 5, 5, dtype=torch.float64)
    assert depthwise.is_slow(x.shape[2:], w.shape[2:], channels_last=False) == (False, True)
    check_convolution(F.conv2d, (x, w, None), {"padding": 2, "groups": 3})
