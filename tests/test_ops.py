"""Replaced operators: PyTorch's values, and derivatives of both orders."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attrreg.ops import Phase, conv, strided, twice_differentiable
from attrreg.ops.channels import CHANNELS_LAST
from tests.models import DEVICE

Tensors = tuple[Tensor, Tensor, Tensor | None]  # image, weight and bias


def test_hardsigmoid_has_a_second_derivative() -> None:
    function = F.hardsigmoid
    x = torch.linspace(-4.1, 4.1, 40, dtype=torch.float64, requires_grad=True)  # on no kink
    with pytest.raises(RuntimeError, match="derivative"):  # if PyTorch learns it, the replacement can go
        (slope,) = torch.autograd.grad(F.hardsigmoid(x).sum(), x, create_graph=True)
        torch.autograd.grad((slope * x).sum(), x)
    with twice_differentiable(Phase()):
        value = function(x)
        assert torch.autograd.gradcheck(function, x, atol=1e-6)
        assert torch.autograd.gradgradcheck(function, x, atol=1e-6)
    torch.testing.assert_close(value, function(x), rtol=0, atol=1e-15)
    slopes = [torch.autograd.grad(value.sum(), x, create_graph=again, retain_graph=True)[0] for again in (False, True)]
    torch.testing.assert_close(slopes, [*torch.autograd.grad(function(x).sum(), x)] * 2, rtol=1e-14, atol=1e-15)


@st.composite
def convolutions(draw: Any) -> tuple[bool, Tensors, dict[str, Any]]:
    axes, transposed, groups = draw(st.integers(1, 3)), draw(st.booleans()), draw(st.sampled_from([1, 1, 2, 4]))
    channels, filters = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3) | st.just(100))  # many: of few positions
    kernel = [draw(st.integers(1, 3)) for _ in range(axes)]
    special = draw(st.sampled_from(["", "", "pointwise", "patches"]))  # which have code of their own
    if special == "pointwise":
        kernel = [1] * axes
    an_axis = st.lists(st.integers(1, 3), min_size=axes, max_size=axes)
    settings: dict[str, Any] = {"stride": draw(st.integers(1, 3) | an_axis), "dilation": draw(st.integers(1, 2)), "groups": groups}
    if transposed:
        settings["padding"] = draw(st.integers(0, (min(kernel) - 1) // 2))
        smallest = min([settings["stride"]] if isinstance(settings["stride"], int) else settings["stride"])
        settings["output_padding"] = draw(st.integers(0, max(smallest, settings["dilation"]) - 1))
    else:
        settings["padding"] = draw(st.sampled_from([0, 1, "valid", "same"]) | an_axis)
        if settings["padding"] == "same":
            settings["stride"] = 1
        if special:
            settings |= {"padding": 0, "dilation": 1, "stride": draw(st.integers(1, 2)) if special == "pointwise" else tuple(kernel)}
    torch.manual_seed(draw(st.integers(0, 2**31)))
    batch = [2] if draw(st.integers(0, 4)) else []
    sides = [draw(st.integers(1 if special == "pointwise" else 5, 7)) for _ in range(axes)]
    x = torch.randn(*batch, channels, *sides, dtype=torch.float64)
    if axes == 2 and batch and draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    shape = (channels, filters // groups) if transposed else (filters, channels // groups)
    bias = torch.randn(filters, dtype=torch.float64) if draw(st.booleans()) else None
    return transposed, (x, torch.randn(*shape, *kernel, dtype=torch.float64), bias), settings


@given(convolutions())
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_convolutions(case: tuple[bool, Tensors, dict[str, Any]]) -> None:
    transposed, tensors, settings = case
    check_convolution(getattr(F, f"conv{'_transpose' if transposed else ''}{tensors[1].dim() - 2}d"), tensors, settings)


def check(
    function: Callable[..., Tensor], inputs: list[Tensor], tolerance: float, pytorchs: AbstractContextManager[Any] | None = None
) -> list[Tensor]:
    """Derivatives of both orders are PyTorch's, and values, which are returned: PyTorch's, which it computes in a context, and ours."""
    found = []
    for context in (pytorchs or nullcontext(), twice_differentiable(Phase())):
        with context:
            y = function(*inputs)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        first = torch.autograd.grad((torch.tanh(y) * weight).sum(), inputs, create_graph=True)
        by_input = torch.autograd.grad(first[0].square().sum(), inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        by_all = torch.autograd.grad(torch.stack([gradient.square().sum() for gradient in first]).sum(), inputs)
        found.append([y, *first, *by_input, *by_all])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.detach().abs().max()))
    return [values[0] for values in found]


def check_convolution(function: Any, tensors: Tensors, settings: dict[str, Any]) -> None:
    inputs = [tensor.requires_grad_() for tensor in tensors if tensor is not None]
    want, got = check(lambda *_: function(*tensors, **settings), inputs, 1e-10)
    assert got.is_contiguous() or not want.is_contiguous()  # code that follows may take a view


@pytest.mark.parametrize(("kernel", "dilation"), [((2, 3), 1), ((4, 2), (1, 3)), ((3, 2), (2, 1))])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_padding_that_is_odd_in_all_goes_to_the_far_side(kernel: tuple[int, int], dilation: int | tuple[int, int]) -> None:
    x, w = torch.randn(2, 3, 7, 6, dtype=torch.float64), torch.randn(4, 3, *kernel, dtype=torch.float64)
    check_convolution(F.conv2d, (x, w, None), {"padding": "same", "dilation": dilation})


@st.composite
def first_convolutions(draw: Any) -> tuple[Tensors, dict[str, Any]]:
    kernel, sides = ([draw(st.integers(low, high)) for _ in range(2)] for low, high in ((5, 9), (9, 16)))
    stride, padding = draw(st.integers(2, 4)), [draw(st.integers(0, 5)) for _ in range(2)]
    torch.manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(2, draw(st.integers(1, 4)), *sides, dtype=torch.float64)
    if draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    w, b = torch.randn(3, x.shape[1], *kernel, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    return (x, w, b if draw(st.booleans()) else None), {"stride": stride, "padding": padding}


@given(first_convolutions())
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.cpu
def test_wide_strided_convolutions_of_few_channels(case: tuple[Tensors, dict[str, Any]]) -> None:
    with patch.object(strided, "input_gradient", wraps=strided.input_gradient) as spy:
        check_convolution(F.conv2d, *case)
    assert spy.called


@pytest.mark.parametrize("channels", [32, 128, 256])
@pytest.mark.parametrize("side", [1, 2, 4, 9])  # up to where only small weights and channels last are by products
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_wide_convolutions_of_one_pixel(side: int, channels: int, stride: int, format: torch.memory_format) -> None:
    x = torch.randn(3, channels, side, side, dtype=torch.float64).to(memory_format=format)
    w, b = torch.randn(96, channels, 1, 1, dtype=torch.float64) / channels, torch.randn(96, dtype=torch.float64)
    check_convolution(F.conv2d, (x, w, b if channels == 128 else None), {"stride": stride})


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("filters", [3, 300])  # the weight is smaller than the images, or larger
@pytest.mark.parametrize("sides", [(8, 6), (9, 7)])  # also with a rest that no patch holds
def test_convolutions_of_patches(format: torch.memory_format, filters: int, sides: tuple[int, int]) -> None:
    x, w = torch.randn(2, 4, *sides, dtype=torch.float64), torch.randn(filters, 4, 2, 3, dtype=torch.float64)
    for weight in (w, w.to(memory_format=torch.channels_last)):
        bias = torch.randn(filters, dtype=torch.float64)
        check_convolution(F.conv2d, (x.to(memory_format=format), weight.detach(), bias), {"stride": (2, 3)})


def test_a_gradient_of_the_input_alone_does_no_work_for_the_weights() -> None:
    x, w = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(4, 1, 3, 3, requires_grad=True)
    phase = Phase()
    with twice_differentiable(phase):
        y = F.conv2d(x, w, groups=4)
    assert "Convolve" in str(y.grad_fn)  # ours
    with phase.attributing(), patch.object(conv, "_WeightGradient", None):  # an error where it is taken
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (by_weight,) = torch.autograd.grad(slope.sum(), w)  # which the phase does not forbid afterwards
    assert by_weight.any()


@pytest.mark.cpu
def test_the_graph_holds_gradients_as_they_come_and_no_copies_besides() -> None:
    x, w = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    for images in (x, x.to(memory_format=torch.channels_last)):
        with twice_differentiable(Phase()):
            y = F.conv2d(images, w)
        (slope,) = torch.autograd.grad(y.sum(), images, create_graph=True)
        assert slope.grad_fn._saved_input.untyped_storage().nbytes() == 4  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["padding", "stride", "dilation"])
@pytest.mark.parametrize("function", [F.conv2d, F.conv_transpose2d])
def test_settings_that_are_no_whole_numbers_are_refused_and_not_remembered(function: Any, name: str) -> None:
    x, w = torch.randn(2, 3, 9, 11), torch.randn(3, 3, 3, 5)
    with twice_differentiable(Phase()):
        for _ in range(2):
            for setting in ((1, 2.0), (1, 2.5), [1, 2.5]):  # of what PyTorch looks at the first number only before it asks us
                with pytest.raises(TypeError, match="must be tuple of ints"):
                    function(x, w, **{name: setting})
            got = function(x, w, **{name: (1, 2)})
    torch.testing.assert_close(got, function(x, w, **{name: (1, 2)}))


@pytest.mark.parametrize("function", [F.conv2d, F.conv_transpose2d])
def test_convolutions_under_autocast(function: Any) -> None:
    x, w = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(4, 4, 3, 3, requires_grad=True)
    found = []
    for context in (nullcontext(), twice_differentiable(Phase())):
        with torch.autocast(DEVICE, dtype=torch.bfloat16), context:
            y = function(x, w)
        (slope,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        found.append([y, slope, *torch.autograd.grad(slope.square().sum(), (x, w))])
    for want, got in zip(*found, strict=True):
        assert got.dtype is want.dtype
        assert float(((got - want).norm() / want.norm()).detach()) < 0.02  # bfloat16 keeps 8 bits


MEAN, VARIANCE = torch.linspace(-1, 1, 6, dtype=torch.float64), torch.linspace(0.5, 2, 6, dtype=torch.float64)


def _by_batch(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.batch_norm(x, MEAN.to(x.dtype, copy=True), VARIANCE.to(x.dtype, copy=True), w, b, training=True)


def _by_running(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    return F.batch_norm(x, MEAN.to(x.dtype), VARIANCE.to(x.dtype), w, b)


NUMBER: Any = numpy.float32(0.3)  # not in PyTorch's stubs

# name -> (the layer of its inputs, the shapes of the inputs)
LAYERS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "batch norm": (_by_batch, [(4, 6, 3, 5), (6,), (6,)]),
    "batch norm without weight": (lambda x: F.batch_norm(x, None, None, training=True), [(4, 6, 3, 5)]),
    "batch norm of small planes": (_by_batch, [(128, 6, 2, 3), (6,), (6,)]),
    "batch norm of many values": (_by_batch, [(16, 6, 37, 38), (6,), (6,)]),
    "batch norm of vectors": (lambda x, w: F.batch_norm(x, None, None, w, training=True, eps=0.1), [(7, 6), (6,)]),
    "batch norm of volumes": (lambda x, w: F.batch_norm(x, None, None, w, training=True), [(2, 6, 2, 3, 2), (6,)]),
    "batch norm, channels last": (
        lambda x, w: F.batch_norm(x.to(memory_format=torch.channels_last), None, None, w, training=True),
        [(4, 6, 3, 5), (6,)],
    ),
    "batch norm, eval": (_by_running, [(4, 6, 3, 5), (6,), (6,)]),
    "batch norm of small planes, eval": (_by_running, [(128, 6, 2, 3), (6,), (6,)]),
    "batch norm, eval, without weight": (_by_running, [(4, 6, 3)]),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (5,), w, b), [(4, 6, 5), (5,), (5,)]),
    "layer norm of two axes": (lambda x, w: F.layer_norm(x, (6, 5), w, eps=0.1), [(4, 6, 5), (6, 5)]),
    "normalised over all axes": (lambda x, w, b: F.layer_norm(x, x.shape, w, b), [(4, 5), (4, 5), (4, 5)]),
    "layer norm without weight": (lambda x: F.layer_norm(x, (5,)), [(2, 3, 6, 5)]),
    "RMS norm": (lambda x, w: F.rms_norm(x, (5,), w), [(4, 6, 5), (5,)]),
    "RMS norm of two axes": (lambda x, w: F.rms_norm(x, (6, 5), w, eps=0.1), [(4, 6, 5), (6, 5)]),
    "RMS norm without weight": (lambda x: F.rms_norm(x, (5,), eps=1e-3), [(2, 3, 6, 5)]),
    "layer norm, strided": (lambda x, w, b: F.layer_norm(x.transpose(1, 2), (5,), w, b), [(4, 5, 6), (5,), (5,)]),
    "group norm": (lambda x, w, b: F.group_norm(x, 3, w, b), [(4, 6, 3, 5), (6,), (6,)]),
    "group norm without weight": (lambda x: F.group_norm(x, 1), [(4, 6, 3)]),
    "instance norm": (lambda x, w, b: F.instance_norm(x, None, None, w, b), [(4, 6, 3, 5), (6,), (6,)]),
    "instance norm without weight": (lambda x: F.instance_norm(x, eps=0.1), [(4, 6, 3)]),
    "instance norm, eval": (
        lambda x, w, b: F.instance_norm(x, MEAN.to(x.dtype), VARIANCE.to(x.dtype), w, b, use_input_stats=False),
        [(4, 6, 3), (6,), (6,)],
    ),
    "relu": (F.relu, [(4, 6)]),
    "relu in place": (lambda x: (x * 1).relu_(), [(4, 6)]),
    "relu in place of a view": (lambda x: F.relu((x * 1)[1:], inplace=True), [(4, 6)]),
    "relu in place, read again": (lambda x: (base := x * 1) + F.relu(base, inplace=True), [(4, 6)]),
    "relu6": (lambda x: F.relu6(3 * x), [(4, 6)]),
    "hardtanh in place": (lambda x: F.hardtanh(x * 1, -0.5, 2.0, inplace=True), [(4, 6)]),
    "leaky relu": (lambda x: F.leaky_relu(x, 0.3), [(4, 6)]),
    "leaky relu, steeper below": (lambda x: F.leaky_relu(x, -0.3), [(4, 6)]),
    "hardtanh, NumPy's numbers": (lambda x: F.hardtanh(x, -NUMBER, NUMBER), [(4, 6)]),
    "leaky relu, NumPy's number": (lambda x: F.leaky_relu(x, NUMBER), [(4, 6)]),
    "hardswish": (F.hardswish, [(4, 6)]),
    "linear": (F.linear, [(4, 6), (3, 6), (3,)]),
    "linear of tokens": (F.linear, [(2, 4, 6), (3, 6)]),
    "linear of tokens, in place after": (lambda x, w: F.relu(F.linear(x, w), inplace=True), [(2, 4, 6), (3, 6)]),
    "linear of a vector": (F.linear, [(6,), (3, 6), (3,)]),
    "cat": (lambda x, z: torch.cat([x, z, 2 * x], 1), [(2, 3, 4), (2, 1, 4)]),
    "cat, last axis": (lambda x, z: torch.cat((x, z), dim=-1), [(2, 3), (2, 5)]),
    "cat with an empty placeholder": (lambda x: torch.cat([x.new_empty(0), x]), [(2, 3)]),
    "silu": (F.silu, [(4, 6)]),
    "silu in place": (lambda x: F.silu(x * 1, inplace=True), [(4, 6)]),
    "gelu": (F.gelu, [(4, 6)]),
    "gelu by tanh": (lambda x: F.gelu(x, approximate="tanh"), [(4, 6)]),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_layers_equal_pytorchs_double_backward(name: str, dtype: torch.dtype, tolerance: float) -> None:
    function, shapes = LAYERS[name]
    check(function, [(2 * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_() for shape in shapes], tolerance)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: F.group_norm(x, 3, torch.ones(6), torch.zeros(6)), id="group norm"),
        pytest.param(lambda x: F.group_norm(x, 1), id="group norm without weight"),
        pytest.param(F.instance_norm, id="instance norm"),
        pytest.param(lambda x: F.batch_norm(x, None, None, training=True), id="batch norm"),
        pytest.param(lambda x: F.batch_norm(x, torch.zeros(6), torch.ones(6)), id="batch norm, eval"),
        pytest.param(F.relu, id="relu"),
        pytest.param(F.hardswish, id="hardswish"),
        pytest.param(F.gelu, id="gelu"),
        pytest.param(F.silu, id="silu"),
        pytest.param(lambda x: torch.cat([x, x], 1), id="cat"),
        pytest.param(lambda x: _filtered(x, 3), id="convolution"),
        pytest.param(lambda x: _filtered(x, 2, stride=2), id="convolution of patches"),
        pytest.param(lambda x: _filtered(x, 1), id="convolution of one pixel"),
    ],
)
def test_channels_last_stay_last_where_pytorchs_do(function: Any, axes: int) -> None:
    x = torch.randn(2, 6, *[4, 5, 3][:axes]).to(memory_format=CHANNELS_LAST[2 + axes]).requires_grad_()
    expected = function(x)
    with twice_differentiable(Phase()):
        assert function(x).stride() == expected.stride()  # a dropout that follows draws in the order of memory


def test_instance_norm_moves_the_statistics_that_it_keeps_as_pytorch_does() -> None:
    layers = [nn.InstanceNorm2d(6, affine=True, track_running_stats=True) for _ in range(2)]
    x = torch.randn(4, 6, 3, 5)
    with twice_differentiable(Phase()):
        got = layers[0](x)
    torch.testing.assert_close(got, layers[1](x), rtol=0, atol=0)
    torch.testing.assert_close(layers[0].state_dict(), layers[1].state_dict(), rtol=0, atol=0)


def test_gelu_by_tanh_is_flat_far_out() -> None:
    x = torch.tensor([-1e30, -1e12, 1e12, 1e30], requires_grad=True)
    with twice_differentiable(Phase()):
        (slope,) = torch.autograd.grad(F.gelu(x, approximate="tanh").sum(), x, create_graph=True)
        assert torch.equal(torch.autograd.grad(slope.sum(), x)[0], torch.zeros(4))


def test_instance_norm_of_one_image_takes_gradients_in_any_layout() -> None:
    # PyTorch's own, of 2.14, reads a gradient with channels last by the strides of another.
    x = torch.randn(1, 6, 3, 5, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(1, 6, 3, 5, dtype=torch.float64)
    with twice_differentiable(Phase()):
        found = [
            torch.autograd.grad(F.instance_norm(x), x, gradient.contiguous(memory_format=kind))[0]
            for kind in (torch.contiguous_format, torch.channels_last)
        ]
    torch.testing.assert_close(found[1], found[0])


def _filtered(x: Tensor, side: int, **settings: Any) -> Tensor:
    convolve = F.conv2d if x.dim() == 4 else F.conv3d
    return convolve(x, torch.ones(4, 6, *[side] * (x.dim() - 2)), **settings)


@pytest.mark.parametrize("name", [name for name in LAYERS if " norm" in name and not name.startswith("instance")])
def test_normalisations_take_an_empty_batch_as_pytorch_does(name: str) -> None:
    function, (images, *others) = LAYERS[name]
    found = []
    for context in (nullcontext(), twice_differentiable(Phase())):
        inputs = [torch.ones(shape, requires_grad=True) for shape in ((0, *images[1:]), *others)]
        with context:
            y = function(*inputs)
        first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        found.append([y, *first, *torch.autograd.grad(first[0].square().sum(), inputs, allow_unused=True, materialize_grads=True)])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want)
