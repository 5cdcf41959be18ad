"""Replaced operators called in rarer ways: by subclasses of tensors, by name, on nested and quantised tensors, down to one position."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attrreg
from attrreg.ops import Phase, distance, pool, twice_differentiable
from attrreg.ops.channels import suggested_format
from tests.models import smooth_batch
from tests.test_ops import check

pytestmark = pytest.mark.cpu


class Coded(Tensor):
    """A weight stored as codes: a linear layer multiplies by a tenth of them."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            with torch._C.DisableTorchFunctionSubclass():
                return F.linear(args[0], args[1] * 0.1, *args[2:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def test_a_subclass_keeps_its_own_functions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), coded := nn.Linear(72, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    weight = coded.weight.detach()
    coded.weight = nn.Parameter(weight.as_subclass(Coded))
    plain = nn.Sequential(nn.Flatten(), same := nn.Linear(72, 8), nn.Tanh(), model[3]).double()
    same.weight, same.bias = nn.Parameter(weight * 0.1), coded.bias
    x, mask, target = smooth_batch()
    x = F.interpolate(x, (6, 6))
    want, logits = attrreg.InputGradient()(plain, x, mask, target), model(x)
    with attrreg.InputGradient().attach(model):
        assert torch.equal(model(x), logits)
        found = attrreg.InputGradient()(model, x, mask, target)
    torch.testing.assert_close(found.as_subclass(Tensor), want)


@pytest.mark.parametrize("name", ["max pooling", "a patch"])
def test_a_single_position_lies_as_pytorchs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "MIN_VALUES", 0)
    torch.manual_seed(0)
    h, w = torch.randn(3, 8, 4, 4), torch.randn(16, 8, 4, 4)
    function: Callable[[], Tensor] = (lambda: F.max_pool2d(h, 4)) if name == "max pooling" else lambda: F.conv2d(h, w, stride=4)
    with twice_differentiable(Phase()):
        got = function()
    torch.testing.assert_close(got, want := function())
    assert suggested_format(got) == suggested_format(want) == torch.contiguous_format
    F.interpolate(got, size=(2, 2)).view(3, -1)


ROWS = [torch.randn(n, 8) for n in (2, 3)]
NESTED: dict[str, Callable[[Tensor], Any]] = {
    "in a list": lambda nested: torch.cat([nested, nested], -1),
    "by name": lambda nested: F.linear(input=nested, weight=torch.eye(8)),
}


@pytest.mark.parametrize("name", NESTED)
def test_nested_tensors_are_left_to_pytorch(name: str) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that they are a prototype
        nested = torch.nested.nested_tensor(ROWS, layout=torch.jagged)
        with twice_differentiable(Phase()):
            got = NESTED[name](nested)
        for ours, theirs in zip(got.unbind(), NESTED[name](nested).unbind(), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_quantised_tensors_are_left_to_pytorch() -> None:
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that PyTorch gives them up
        quantised = torch.quantize_per_tensor(x, 0.05, 64, torch.quint8).contiguous(memory_format=torch.channels_last)
        with twice_differentiable(Phase()):
            got = F.max_pool2d(quantised, 2)
        assert torch.equal(got.int_repr(), F.max_pool2d(quantised, 2).int_repr())


def test_out_is_left_to_pytorch() -> None:
    x, w = torch.randn(2, 8), torch.randn(5, 8)
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (F.linear, (x, w)),
        (F.gelu, (x,)),
        (torch.cat, ([x, x],)),
        (torch.linalg.vector_norm, (x,)),
        (torch.norm, (x, 2, 1)),
        (torch.linalg.norm, (x, None, 1)),
        (F.normalize, (x,)),
    ]
    for function, arguments in cases:
        out = torch.empty(0)
        with torch.no_grad(), twice_differentiable(Phase()):
            assert function(*arguments, out=out) is out
        torch.testing.assert_close(out, function(*arguments))


@pytest.mark.parametrize("function", [torch.linalg.norm, torch.linalg.vector_norm])
def test_norms_take_pytorchs_name_of_their_argument(function: Any) -> None:
    x = torch.randn(3, 4)
    with twice_differentiable(Phase()):
        for name in ("input", "x", "a"):
            torch.testing.assert_close(function(**{name: x}), function(x))


DEVIATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda x: x.std(),
    "axes": lambda x: x.std((1, 2), keepdim=True),
    "biased": lambda x: torch.std(x, 1, unbiased=False),
    "correction": lambda x: torch.std(x, dim=-1, correction=0),
    "NumPy's axis": lambda x: torch.std(x, axis=-1),  # type: ignore[call-overload]
}


@pytest.mark.parametrize("name", DEVIATIONS)
def test_standard_deviations(name: str) -> None:
    torch.manual_seed(0)
    check(DEVIATIONS[name], [torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)], 1e-10)
    x = torch.ones(3, 4, 5, dtype=torch.float64, requires_grad=True)
    with twice_differentiable(Phase()):
        y = DEVIATIONS[name](x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope.square().sum(), x)
    assert not y.any() and not slope.any() and not second.any()


def test_a_black_image_in_a_model_that_standardises() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double()
    model.register_forward_pre_hook(lambda model, args: (args[0] - args[0].mean()) / (args[0].std((1, 2, 3), keepdim=True) + 1e-5))
    x, mask, target = smooth_batch()
    x[1] = 0
    value = attrreg.InputGradient()(model, x, mask, target)
    found = torch.autograd.grad(value, list(model.parameters()), materialize_grads=True)
    assert all(gradient.isfinite().all() for gradient in found)


def test_distances_of_broadcast_batches_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    x, prototypes = torch.randn(6, 1, 4, 3, requires_grad=True), torch.randn(1, 5, 2, 3)
    for most, kept in ((6 * 5 * 4 * 2 * 3, True), (6 * 5 * 4 * 2 * 3 - 1, False)):
        monkeypatch.setattr(distance, "MAX_DIFFERENCES", most)
        with twice_differentiable(Phase()):
            y = torch.cdist(x, prototypes)
        assert ("Euclidean" not in str(y.grad_fn)) == kept
        torch.testing.assert_close(y, torch.cdist(x, prototypes))
