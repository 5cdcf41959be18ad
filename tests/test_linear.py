"""Linear layers by the faster of two products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import attrreg
from attrreg.bench import measure, strategies
from attrreg.bench.cases import build
from attrreg.graph import nodes
from attrreg.ops import Phase, linear, pointwise, twice_differentiable

pytestmark = pytest.mark.cpu

there = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
needs_onednn = pytest.mark.skipif(not there, reason="oneDNN's products are for x86 with AVX2")


@contextmanager
def always_onednn() -> Iterator[list[tuple[int, ...]]]:
    """Also where it is slower; the sizes it is called with."""
    calls: list[tuple[int, ...]] = []
    kernel: Any = linear.ONEDNN
    assert kernel is not None, "PyTorch has no torch.ops.mkldnn._linear_pointwise any more"

    class Counted:
        @staticmethod
        def default(a: Tensor, *rest: Any) -> Tensor:
            calls.append(tuple(a.shape))
            result: Tensor = kernel.default(a, *rest)
            return result

    with patch.multiple(linear, MIN_MULTIPLICATIONS=0, MIN_SIDE=0, MKL_IS_SLOW=True, ONEDNN=Counted):
        yield calls


@contextmanager
def switched_off() -> Iterator[None]:
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(True)


def derivatives(function: Any, inputs: list[Tensor]) -> list[Tensor]:
    """The value, the first, second and third derivatives."""
    y = function(*inputs)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    first = torch.autograd.grad((torch.tanh(y) * weight).sum(), inputs, create_graph=True)
    by_input = torch.autograd.grad(first[0].square().sum(), inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
    by_all = torch.autograd.grad(torch.stack([gradient.square().sum() for gradient in first]).sum(), inputs, create_graph=True)
    third = torch.autograd.grad(torch.stack([gradient.square().sum() for gradient in by_all]).sum(), inputs)
    return [each.detach() for each in (y, *first, *by_input, *by_all, *third)]


def compare(function: Any, inputs: list[Tensor]) -> None:
    """By oneDNN, values and derivatives are as exact as PyTorch's own, of which some are small differences of large numbers."""

    def ours(*tensors: Tensor) -> Any:
        with twice_differentiable(Phase()):
            return function(*tensors)

    leaves = [tensor.requires_grad_() for tensor in inputs]
    exact = derivatives(function, [tensor.detach().double().requires_grad_() for tensor in inputs])
    wanted = derivatives(function, leaves)
    with always_onednn() as calls:
        found = derivatives(ours, leaves)
    assert calls or inputs[0].shape[-1] == 1  # of one column each, PyTorch's product is as good
    largest = 0.0
    for got, want, true in zip(found, wanted, exact, strict=True):
        largest = max(largest, float(true.abs().max()))  # of this order and those before it: of numbers that cancel
        error, pytorchs = (float((each - true).abs().max()) for each in (got, want))
        assert error <= 1e-5 * (float(true.abs().max()) + largest) + 2 * pytorchs


@needs_onednn
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from(["dense", "transposed", "strided", "expanded", "overlapping", "weight transposed", "weight strided", "bias strided"]),
    st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=100)
def test_equal_pytorchs_derivatives(places: list[int], inner: int, columns: int, bias: bool, layout: str, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = [torch.randn(*places, inner), torch.randn(columns, inner) / inner**0.5, torch.randn(columns)][: 2 + bias]
    if layout == "transposed":
        inputs[0] = torch.randn(inner, *places).movedim(0, -1)
    elif layout == "strided":
        inputs[0] = torch.randn(*places, 2 * inner)[..., ::2]
    elif layout == "expanded":
        inputs[0] = torch.randn(inner).expand(*places, inner)
    elif layout == "overlapping":
        inputs[0] = torch.randn(60).unfold(0, inner, 1)
    elif layout == "weight transposed":
        inputs[1] = torch.randn(inner, columns).t() / inner**0.5
    elif layout == "weight strided":
        inputs[1] = torch.randn(columns, 2 * inner)[:, ::2] / inner**0.5
    elif layout == "bias strided" and bias:
        inputs[2] = torch.randn(columns, 2)[:, 0]
    compare(lambda *tensors: F.linear(*tensors).mul_(1), inputs)  # in place: it is no view


@needs_onednn
@pytest.mark.parametrize("rows", [3, 60])  # the result is wider than high, or far higher
def test_matrices_that_are_stored_by_columns(rows: int) -> None:
    a, b, bias = torch.randn(200, rows).t(), torch.randn(200, 4).t(), torch.randn(4)
    with always_onednn() as calls:
        for shift in (None, bias):
            torch.testing.assert_close(linear.product(a, b, shift), F.linear(a, b, shift), rtol=1e-5, atol=1e-4)
    assert len(calls) == 2


@needs_onednn
def test_one_output_whose_gradient_comes_transposed() -> None:
    """As of attention pooling: a step of an axis of one value can be any number, and `contiguous` leaves it."""
    inputs = [torch.randn(3, 5, 8), torch.randn(1, 8), torch.randn(1)]
    compare(lambda x, *layer: F.linear(x, *layer).transpose(1, 2) @ x, inputs)


@needs_onednn
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kernel", "side"), [(1, 1), (1, 2), (1, 5), (2, 4), (3, 2)])  # pixels, patches, columns
def test_convolutions_by_products(kernel: int, side: int, format: torch.memory_format) -> None:
    x, w = torch.randn(3, 8, side, side).to(memory_format=format), torch.randn(320, 8, kernel, kernel) / 8
    stride, padding = (2, 0) if kernel == 2 else (1, kernel // 2)
    with patch.object(pointwise, "SMALL_WEIGHT", 0):
        compare(lambda x, w, b: F.conv2d(x, w, b, stride, padding), [x, w, torch.randn(320)])


def test_a_single_position_is_a_linear_layer_and_no_view() -> None:
    x, w = torch.randn(3, 8, 1, 1, requires_grad=True), torch.randn(4, 8, 1, 1, requires_grad=True)
    with twice_differentiable(Phase()):
        y = F.conv2d(x, w).relu_()  # which on a view of a graph takes copies in every backward
    torch.testing.assert_close(y, F.conv2d(x, w).relu())
    names = {type(node).__name__ for node in nodes(y)}
    assert not names & {"CopySlices", "_ConvolveBackward"}


@needs_onednn
def test_a_penalty_by_onednn_trains_as_one_without() -> None:
    block = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    model = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.Flatten(2), nn.Linear(16, 16), block, nn.Flatten(), nn.Linear(256, 4))
    x, mask, target = torch.randn(5, 3, 16, 16), torch.rand(5, 1, 16, 16).round(), torch.arange(5) % 4
    reg = attrreg.InputGradient(score=attrreg.scores.TargetLogit(), objective=attrreg.objectives.SquaredOutside())
    found = []
    for context in (patch.object(linear, "MIN_MULTIPLICATIONS", 10**12), always_onednn()):
        model.zero_grad()
        with context as calls:
            reg(model, x, mask, target=target).backward()
        # What the penalty does not depend on, such as the last hidden layer's bias, gets a gradient of zero, or none.
        found.append([torch.zeros_like(each) if each.grad is None else each.grad.clone() for each in model.parameters()])
    assert calls and sum(bool(gradient.any()) for gradient in found[1]) > 5
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@needs_onednn
def test_the_benchmark_counts_onednns_operations_too() -> None:
    case = build("test_vit", batch=4, size=160, device=torch.device("cpu"))  # so large that patches are worth it anyway
    step = next(way for way in strategies.strategies(strategies.INPUT_GRADIENT, case) if way.name == strategies.ATTACHED).prepare(case)
    plainly = measure._weighed(step)[1]
    with always_onednn() as calls:
        assert measure._weighed(step)[1] == plainly
    assert calls


class Other(Tensor):
    """A kind of tensor that is not PyTorch's."""


@needs_onednn
@pytest.mark.parametrize("why", ["double", "autocast", "subclass", "vector", "mixed", "misfit", "one bias", "wide bias", "off"])
def test_what_onednns_product_does_not_take_is_pytorchs(why: str) -> None:
    x, w = torch.randn(4, 8), torch.randn(6, 8)
    if why == "double":
        x, w = x.double(), w.double()
    elif why == "subclass":
        w = w.as_subclass(Other)
    elif why == "vector":
        x = x[0]
    elif why == "mixed":
        w = w.to(torch.bfloat16)
    elif why == "misfit":
        w = w[:, :4]
    autocast = torch.autocast("cpu", torch.bfloat16) if why == "autocast" else nullcontext()
    off = switched_off() if why == "off" else nullcontext()
    with always_onednn() as calls, twice_differentiable(Phase()), autocast, off:
        if why in ("mixed", "misfit", "wide bias"):
            with pytest.raises(RuntimeError, match="cannot be multiplied" if why == "misfit" else "dtype"):  # PyTorch's own error
                F.linear(x, w, torch.zeros(6).double() if why == "wide bias" else None)
        else:
            bias = torch.zeros(1) if why == "one bias" else None
            assert F.linear(x, w, bias).shape == (*x.shape[:-1], 6)
    assert not calls


@needs_onednn
def test_nothing_is_saved_that_no_derivative_needs() -> None:
    x, w = torch.randn(4, 8), torch.randn(6, 8, requires_grad=True)
    with always_onednn(), twice_differentiable(Phase()):
        frozen, used = F.linear(x.requires_grad_() * 1, w.detach()), F.linear(x, w)
    for y, saved in ((frozen, [False, True]), (used, [True, True])):
        node: Any = y.grad_fn
        assert [tensor is not None for tensor in node.saved_tensors] == saved


@needs_onednn
@pytest.mark.parametrize("slow", [True, False])
def test_gradients_of_a_weight_are_summed_in_place(slow: bool) -> None:
    x, w = torch.randn(2, 4, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    with always_onednn(), twice_differentiable(Phase()):
        y = F.linear(x * 1, w)
    (gradient,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    with always_onednn() as calls, patch.object(linear, "MKL_IS_SLOW", slow), profile(activities=[ProfilerActivity.CPU]) as seen:
        (gradient.square().sum() + y.sum()).backward()
    assert len(calls) == (4 if slow else 2)  # for what the weight meets, of both orders, and for the weight itself
    ours = "evaluate_function: _LinearBackward", "evaluate_function: _ProductBackward"
    inside = [event.name for event in seen.events() for above in _parents(event) if above.endswith(ours)]
    assert ("aten::add_" if slow else "aten::addmm_") in inside and "aten::add" not in inside
    assert w.grad is not None and w.grad.is_contiguous()


def _parents(event: Any) -> Iterator[str]:
    while (event := event.cpu_parent) is not None:
        yield event.name


@needs_onednn
@pytest.mark.parametrize("slow", [True, False])
def test_gradients_of_a_weight_that_several_backwards_used(slow: bool) -> None:
    x, w = torch.randn(2, 4, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    seen: list[Tensor] = []
    w.register_hook(lambda gradient: seen.append(gradient.clone()))

    def penalties(y: Tensor) -> list[Tensor]:
        scores = y.sin().sum(), y.square().sum()
        gradients = [torch.autograd.grad(score, x, create_graph=True)[0] for score in scores]
        return [gradients[0].square().sum() + y.sum(), gradients[1].square().sum(), gradients[0].sum() * gradients[1].sum()]

    want = [torch.autograd.grad(total, w, retain_graph=True)[0] for total in penalties(F.linear(x, w))]
    seen.clear()
    with always_onednn(), patch.object(linear, "MKL_IS_SLOW", slow), twice_differentiable(Phase()):
        totals = penalties(F.linear(x * 1, w))
        for _ in range(2):  # what one of them wrote over is not what the next one reads
            for total in totals:
                total.backward(retain_graph=True)
    assert len(seen) == 6  # each time the whole of it, once
    for got, wanted in zip(seen, want * 2, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert w.grad is not None
    torch.testing.assert_close(w.grad, 2 * sum(want, torch.zeros_like(w)), rtol=1e-4, atol=1e-4 * float(w.grad.abs().max()))


@needs_onednn
def test_hooks_before_a_last_layer_get_a_gradient_of_zero() -> None:
    layer, found = nn.Linear(6, 4), []
    x = torch.randn(3, 6, requires_grad=True)
    with always_onednn() as calls, twice_differentiable(Phase()):
        features = x.tanh()
        features.register_hook(lambda gradient: found.append(gradient.clone()))
        (gradient,) = torch.autograd.grad(layer(features).sum(), features, create_graph=True)
    gradient.square().sum().backward()  # through the weight alone
    assert calls and len(found) == 2 and not found[1].any()
    assert x.grad is not None and not x.grad.any()


@needs_onednn
def test_a_penalty_that_only_reads_the_gradient() -> None:
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    with always_onednn(), twice_differentiable(Phase()):
        (gradient,) = torch.autograd.grad(F.linear(x * 1, w).sum(), x, create_graph=True)
        gradient.square().sum().backward()  # which comes to the weight without a gradient of the layer's output
    assert w.grad is not None
    torch.testing.assert_close(w.grad, 8 * w.detach().sum(0).expand(6, 8))


@pytest.mark.parametrize(
    ("capability", "cpu", "slow"),
    [
        ("AVX512", {"vendor_id": "AuthenticAMD", "cpu family": "26"}, True),
        ("AVX512", {"vendor_id": "AuthenticAMD", "cpu family": "25"}, False),  # whose units have 256 bits
        ("AVX2", {"vendor_id": "AuthenticAMD", "cpu family": "26"}, False),
        ("AVX512", {"vendor_id": "GenuineIntel", "cpu family": "6"}, False),
        ("AVX512", {}, False),  # not Linux
    ],
)
def test_where_mkl_is_slow(capability: str, cpu: dict[str, str], slow: bool) -> None:
    assert linear._mkl_is_slow(capability, cpu) == slow


@needs_onednn
@pytest.mark.parametrize("slow", [True, False])
def test_gradients_of_weights_by_onednn_only_where_mkl_is_slow(slow: bool) -> None:
    x, w = torch.randn(4, 8), torch.randn(6, 8, requires_grad=True)
    with always_onednn() as calls, patch.object(linear, "MKL_IS_SLOW", slow), twice_differentiable(Phase()):
        F.linear(x, w).square().sum().backward()
    assert len(calls) == (2 if slow else 1)
