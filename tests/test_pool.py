"""Max pooling by PyTorch's kernel for another layout: the same values, and the same choice between equal ones."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attrreg.ops import Phase, pool, twice_differentiable
from attrreg.ops.channels import memory_format
from tests.models import DEVICE
from tests.test_ops import check


@st.composite
def poolings(draw: Any) -> tuple[Tensor, dict[str, Any]]:
    kernel, sides = ([draw(st.integers(1, most)) for _ in range(2)] for most in (4, 9))
    given: dict[str, Any] = {
        "kernel_size": kernel,
        "stride": draw(st.none() | st.integers(1, 3) | st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "padding": [draw(st.integers(0, side // 2)) for side in kernel],
        "dilation": draw(st.integers(1, 2)),
        "ceil_mode": draw(st.booleans()),
    }
    torch.manual_seed(draw(st.integers(0, 2**31)))
    # Whole numbers, so that many are equal, as zeros after a ReLU are.
    x = torch.randint(-2, 3, (draw(st.integers(1, 4)), draw(st.integers(8, 17)), *sides)).double().to(DEVICE)
    return x.contiguous(memory_format=draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))), given


def derivatives(x: Tensor, scale: Tensor, given: dict[str, Any]) -> list[Tensor]:
    """The value, the gradient, and what the sum of its squares sends back."""
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    y = F.max_pool2d(x * scale, **given)
    (gradient,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    return [y, gradient, *torch.autograd.grad(gradient.square().sum() + y.sum(), [x, scale])]


@given(poolings(), st.sampled_from([1, 400, 2**20]))
@settings(deadline=None, max_examples=150)
def test_as_pytorch(case: tuple[Tensor, dict[str, Any]], at_once: int) -> None:
    x, given = case
    scale = torch.rand_like(x).round() + 1  # not to tell equal values apart
    try:
        fits = bool(F.max_pool2d(x, **given).isfinite().all())  # PyTorch 2.14 writes out of bounds for a window of nothing but padding
    except RuntimeError:
        fits = False  # as the kernel is larger than the image
    assume(fits)
    want = derivatives(x, scale, given)
    with patch.multiple(pool, MIN_VALUES=0, VALUES_AT_ONCE=at_once), twice_differentiable(Phase()):
        found = derivatives(x, scale, given)
    for ours, pytorchs in zip(found, want, strict=True):
        torch.testing.assert_close(ours, pytorchs, rtol=1e-12, atol=1e-12)
    assert all(ours.is_contiguous(memory_format=memory_format(x)) for ours in found[:3])


NUMBER: Any = numpy.int64(2)  # not in PyTorch's stubs


@pytest.mark.cpu
@pytest.mark.parametrize("given", [{"kernel_size": NUMBER}, {"kernel_size": [3, NUMBER], "stride": NUMBER, "padding": torch.tensor(1)}])
def test_numbers_that_are_not_pythons(given: dict[str, Any]) -> None:
    x = torch.randn(4, 8, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    check(lambda x: F.max_pool2d(x, **given), [x], 1e-5)


def test_what_is_no_number_stays_so() -> None:
    x = torch.randn(2, 8, 64, 64, device=DEVICE)
    x[0, 0, 3, 3], x[1, 2, :, 7], x[0, 5] = torch.nan, torch.inf, -torch.inf
    with twice_differentiable(Phase()):
        found = F.max_pool2d(x, 3, 2, 1)
    torch.testing.assert_close(found, F.max_pool2d(x, 3, 2, 1), rtol=0, atol=0, equal_nan=True)


@pytest.mark.cpu
def test_which_images_are_pooled_with_channels_last() -> None:
    def used(x: Tensor) -> bool:
        with twice_differentiable(Phase()):
            y = F.max_pool2d(x.requires_grad_(), 3, 2, 1)
        assert y.grad_fn is not None
        return y.grad_fn.name() == "_MaxPoolBackward"

    assert used(torch.randn(4, 16, 32, 32)) and used(torch.randn(4, 16, 32, 32, dtype=torch.float64))
    # With channels last nothing is copied, whatever the size.
    assert used(torch.randn(4, 4, 8, 8).to(memory_format=torch.channels_last)) and not used(torch.randn(4, 16, 32, 64)[..., ::2])
    assert not used(torch.randn(16, 4, 32, 32)) and not used(torch.randn(4, 16, 8, 8)) and not used(torch.randn(16, 64, 64))
    assert not used(torch.randn(4, 16, 32, 32).bfloat16())


def test_indices_are_pytorchs_own() -> None:
    x = torch.randn(4, 16, 32, 32, device=DEVICE)
    with twice_differentiable(Phase()):
        found = F.max_pool2d(x, 2, return_indices=True)
    for ours, pytorchs in zip(found, F.max_pool2d(x, 2, return_indices=True), strict=True):
        assert torch.equal(ours, pytorchs)
