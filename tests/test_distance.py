"""Norms and distances: PyTorch's values, and derivatives of both orders, at zero too."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attrreg.ops import Phase, distance, twice_differentiable
from tests.models import DEVICE
from tests.test_ops import check

NUMBER: Any = numpy.int64(1)  # not in PyTorch's stubs
NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "normalize": lambda x: F.normalize(x, dim=-1),
    "normalize p=fro": lambda x: F.normalize(x, p="fro", dim=1),  # type: ignore[arg-type]
    "normalize p=3": lambda x: F.normalize(x, p=3, dim=1),
    "norm": lambda x: x.norm(),
    "norm of all, kept": lambda x: x.norm(2, dim=None, keepdim=True),
    "norm of axes": lambda x: x.norm(p=2, dim=(1, 2), keepdim=True),
    "norm of matrices": lambda x: x.norm(dim=(1, 2)),
    "norm p=3": lambda x: x.norm(p=3, dim=1),
    "torch.norm": lambda x: torch.norm(x, dim=-1),
    "torch.norm in another dtype": lambda x: torch.norm(x, dim=-1, dtype=torch.float64),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=1),
    "vector_norm p=1": lambda x: torch.linalg.vector_norm(x, 1, dim=(0, 2)),
    "vector_norm p=3": lambda x: torch.linalg.vector_norm(x, 3.0, dim=1, keepdim=True),
    "vector_norm p=inf": lambda x: torch.linalg.vector_norm(x, float("inf"), dim=2),
    "linalg.norm": lambda x: torch.linalg.norm(x),
    "linalg.norm of matrices": lambda x: torch.linalg.norm(x, dim=(1, 2)),
    "linalg.norm of rows": lambda x: torch.linalg.norm(x, 2, dim=-1, keepdim=True),
    "linalg.norm, NumPy's axis": lambda x: torch.linalg.norm(x, dim=NUMBER),
    "cosine": lambda x: F.cosine_similarity(x, x.flip(0), dim=-1),
    "cosine of broadcast rows": lambda x: F.cosine_similarity(x[:1], 2 * x + 1, 1),
    "cosine with a vector": lambda x: F.cosine_similarity(x, x[0, 0] + 0.1, dim=2),
    "cosine of one value along the axis": lambda x: F.cosine_similarity(x, x[:, :1] + 1, dim=1),
    "Frobenius norm": lambda x: torch.linalg.matrix_norm(x, keepdim=True),
    "Frobenius norm of other axes": lambda x: torch.linalg.matrix_norm(x, dim=(0, 1)),
    "spectral norm of matrices": lambda x: torch.linalg.matrix_norm(x, 2),
    "std and mean": lambda x: torch.stack(torch.std_mean(x, (1, 2), keepdim=True)),
    "spectral norm": lambda x: torch.linalg.norm(x, 2, dim=(1, 2)),
    "nuclear norm": lambda x: torch.linalg.norm(x, "nuc", dim=(1, 2)),
    "cdist": lambda x: torch.cdist(x, 2 * x + 1),
    "cdist from constants": lambda x: torch.cdist(torch.linspace(-1, 1, 8, dtype=x.dtype).view(2, 4), x),
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
    with twice_differentiable(Phase()):
        got = function(x)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), x)[0], slope)
        assert torch.autograd.gradcheck(function, x)
        if "p=1" not in name and "inf" not in name:  # piecewise linear: nothing to check, and no graph
            assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize(
    "name",
    [
        *("normalize", "normalize p=fro", "norm", "norm of axes", "norm of matrices"),
        *("torch.norm", "vector_norm", "linalg.norm", "linalg.norm of matrices", "cosine"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_at_zero(name: str, dtype: torch.dtype) -> None:
    x = torch.zeros(2, 3, 4, dtype=dtype, requires_grad=True)
    with twice_differentiable(Phase()):
        value = NORMS[name](x)
    assert not value.any()
    (plain,) = torch.autograd.grad(NORMS[name](x).sum(), x)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((slope * torch.randn_like(slope)).sum(), x)
    torch.testing.assert_close(slope.detach(), plain)
    assert second.isfinite().all()


@pytest.mark.parametrize("eps", [numpy.float32(1e-3), torch.tensor(1e-3)])
def test_normalize_takes_its_least_norm_in_every_form(eps: Any) -> None:
    size = torch.tensor([[1e-2], [1e-2], [1e-4]], dtype=torch.float64)  # the last row's norm is below it
    x = (size * torch.randn(3, 4, dtype=torch.float64)).requires_grad_()
    check(lambda x: F.normalize(x, eps=eps), [x], 1e-9)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_normalize_of_rows_of_which_some_are_zero(dim: int) -> None:
    x, weight = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    x.transpose(dim, 0)[:, 1] = 0
    x.transpose(dim, 0)[:, 2] *= 1e-6  # below the smallest norm to divide by
    found = []
    for context in (nullcontext(), twice_differentiable(Phase())):
        given = x.clone().requires_grad_()
        with context:
            y = F.normalize(given, dim=dim, eps=1e-3)
        (slope,) = torch.autograd.grad((torch.tanh(y) * weight).sum(), given, create_graph=True)
        found.append([y, slope, *torch.autograd.grad(slope.square().sum(), given)])
    assert found[0][2].isnan().any()  # if PyTorch learns it, this can be compared whole
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, torch.where(want.isnan(), 0, want), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shapes", [((5, 3), (4, 3)), ((2, 1, 5, 3), (4, 4, 3)), ((5, 3), (2, 4, 3)), ((30, 3), (27, 3))], ids=str)
def test_distances_of_many_rows_have_the_derivatives_of_those_of_few(shapes: tuple[tuple[int, ...], ...]) -> None:
    x1, x2 = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    alike = x1.flatten(0, -2)[: x2.shape[-2] // 2]  # at a distance of zero, which by products of rows is only nearly so
    x2[..., : len(alike), :] = alike
    x1.requires_grad_()
    x2.requires_grad_()
    found = []
    for many in (distance.MAX_DIFFERENCES, 0):
        with twice_differentiable(Phase()), patch.object(distance, "MAX_DIFFERENCES", many):
            y = torch.cdist(x1, x2)
        first = torch.autograd.grad(y.sin().sum(), (x1, x2), create_graph=True)
        found.append([y, *first, *torch.autograd.grad(first[0].square().sum() + first[1].sin().sum(), (x1, x2))])
    assert found[1][0].grad_fn.name() == "_EuclideanBackward"  # type: ignore[union-attr]
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_other_distances_of_many_rows_are_pytorchs() -> None:
    x = torch.randn(5, 3, requires_grad=True)
    with twice_differentiable(Phase()), patch.object(distance, "MAX_DIFFERENCES", 0):
        found = torch.cdist(x, x + 1, p=1.0)
    torch.testing.assert_close(found, torch.cdist(x, x + 1, p=1.0))


class _Largest(TorchDispatchMode):
    """How many values the largest tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.values = max(self.values, result.numel())
        return result


def test_distances_of_many_rows_make_no_tensor_of_all_differences() -> None:
    x1, x2 = torch.randn(400, 200, requires_grad=True), torch.randn(300, 200, requires_grad=True)
    with _Largest() as largest, twice_differentiable(Phase()):
        (first,) = torch.autograd.grad(torch.cdist(x1, x2).sin().sum(), x1, create_graph=True)
        torch.autograd.grad(first.square().sum(), (x1, x2))
    assert largest.values == 400 * 300


def test_distances_that_nobody_differentiates_are_pytorchs() -> None:
    x1, x2 = torch.randn(40, 7, requires_grad=True), torch.randn(30, 7)
    with twice_differentiable(Phase()), torch.no_grad(), _Largest() as largest:
        assert torch.equal(torch.cdist(x1, x2), torch.cdist(x1.detach(), x2))
    assert largest.values == 40 * 30


@pytest.mark.cpu  # whose autocast it is
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_distances_under_autocast_have_a_second_derivative(dtype: torch.dtype) -> None:
    x, found = torch.randn(4, 8).to(dtype), []
    x[0] = 0  # at a distance of zero
    for wide in (True, False):
        leaf = (x.double() if wide else x.clone()).requires_grad_()
        if wide:
            squared = (leaf[:, None] + leaf).square().sum(-1)
            y = squared.where(squared > 0, 1).sqrt().where(squared > 0, 0)
        else:
            with torch.autocast("cpu", torch.bfloat16), twice_differentiable(Phase()):
                y = torch.cdist(leaf, -leaf)
            assert y.dtype == torch.float32
        (slope,) = torch.autograd.grad(y.sin().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(slope.double().square().sum(), leaf)[0].double())
    # Each half of the distance gives a gradient of the type, as does their sum, in both orders: some eight roundings.
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 8 * max(torch.finfo(dtype).eps, 1e-6)


AT_ZERO: dict[str, Callable[[Tensor], Tensor]] = {
    "std and mean": lambda x: torch.std_mean(x, -1)[0],
    "Frobenius norm": torch.linalg.matrix_norm,
    "cosine": lambda x: F.cosine_similarity(x, x.detach() + 1, dim=-1),
    "cosine of two types": lambda x: F.cosine_similarity(x.bfloat16(), torch.ones(4), dim=-1),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", AT_ZERO)
def test_second_derivatives_at_zero_are_finite(name: str, autocast: bool) -> None:
    x = torch.zeros(2, 3, 4, requires_grad=True)
    with twice_differentiable(Phase()), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        value = AT_ZERO[name](x.tanh())
    (slope,) = torch.autograd.grad(value.float().sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad((slope - 1).square().sum(), x)
    assert value.isfinite().all() and slope.isfinite().all() and curvature.isfinite().all()


def test_of_coordinates_that_tie_each_has_the_gradient_that_pytorch_gives_it() -> None:
    a, b = torch.tensor([[1.0, -1.0, 0.5], [0.0, 0.0, 0.0]], requires_grad=True), torch.zeros(2, 3)
    want = torch.cdist(a, b, p=float("inf"))
    with twice_differentiable(Phase()):
        found = torch.cdist(a, b, p=float("inf"))
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), a), torch.autograd.grad(want.sum(), a))
