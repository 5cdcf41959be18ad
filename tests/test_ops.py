"""Replaced operators: PyTorch's values, and derivatives of both orders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attrreg.ops import twice_differentiable


@pytest.mark.parametrize("function", [F.hardsigmoid, F.hardswish])
def test_replaced_activations(function: Any) -> None:
    x = torch.linspace(-4.1, 4.1, 40, dtype=torch.float64, requires_grad=True)  # on no kink
    with pytest.raises(RuntimeError, match="derivative"):  # if PyTorch learns it, the replacement can go
        (slope,) = torch.autograd.grad(F.hardsigmoid(x).sum(), x, create_graph=True)
        torch.autograd.grad((slope * x).sum(), x)
    with twice_differentiable():
        value = function(x)
        assert torch.autograd.gradcheck(function, x, atol=1e-6)
        assert torch.autograd.gradgradcheck(function, x, atol=1e-6)
        in_place = function(x * 1, inplace=True)
    torch.testing.assert_close(value, function(x), rtol=0, atol=1e-15)
    torch.testing.assert_close(in_place, value)
    (slope,), (plain,) = torch.autograd.grad(value.sum(), x), torch.autograd.grad(function(x).sum(), x)
    torch.testing.assert_close(slope, plain, rtol=1e-14, atol=1e-15)


def test_attention_can_be_differentiated_twice_and_settings_return() -> None:
    q = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    enabled = torch.backends.cuda.flash_sdp_enabled()
    with twice_differentiable():
        assert torch.autograd.gradgradcheck(lambda q: F.scaled_dot_product_attention(q, q, q), q)
    assert torch.backends.cuda.flash_sdp_enabled() == enabled


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "normalize": lambda x: F.normalize(x, dim=-1),
    "normalize p=3": lambda x: F.normalize(x, p=3, dim=1),
    "norm": lambda x: x.norm(),
    "norm of all, kept": lambda x: x.norm(2, dim=None, keepdim=True),
    "norm of axes": lambda x: x.norm(p=2, dim=(1, 2), keepdim=True),
    "norm p=3": lambda x: x.norm(p=3, dim=1),
    "torch.norm": lambda x: torch.norm(x, dim=-1),
    "torch.norm in another dtype": lambda x: torch.norm(x, dim=-1, dtype=torch.float64),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=1),
    "linalg.norm": lambda x: torch.linalg.norm(x),
    "linalg.norm of rows": lambda x: torch.linalg.norm(x, 2, dim=-1, keepdim=True),
    "spectral norm": lambda x: torch.linalg.norm(x, 2, dim=(1, 2)),
    "nuclear norm": lambda x: torch.linalg.norm(x, "nuc", dim=(1, 2)),
    "cdist": lambda x: torch.cdist(x, 2 * x + 1),
    "cdist p=1": lambda x: torch.cdist(x, 2 * x + 1, p=1.0),
    "cdist p=3": lambda x: torch.cdist(x, 2 * x + 1, p=3.0),
    "cdist p=inf": lambda x: torch.cdist(x, 2 * x + 1, p=float("inf")),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str) -> None:
    function = NORMS[name]
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    want = function(x)
    (slope,) = torch.autograd.grad(want.sum(), x)
    with twice_differentiable():
        got = function(x)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), x)[0], slope)
        assert torch.autograd.gradcheck(function, x)
        if "p=1" not in name and "inf" not in name:  # piecewise linear: nothing to check, and no graph
            assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("name", ["normalize", "norm", "norm of axes", "torch.norm", "vector_norm", "linalg.norm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_at_zero(name: str, dtype: torch.dtype) -> None:
    x = torch.zeros(2, 3, 4, dtype=dtype, requires_grad=True)
    with twice_differentiable():
        value = NORMS[name](x)
    assert not value.any()
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((slope * torch.randn_like(slope)).sum(), x)
    assert slope.isfinite().all() and second.isfinite().all()
