"""Batch normalisation: how precise its statistics are and how running ones move, layouts, half precision. Derivatives: also test_ops.py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import attrreg
from attrreg.graph import nodes
from attrreg.ops import Phase, batch_norm, twice_differentiable
from tests.models import gradients


@pytest.mark.cpu
def test_batch_norm_of_tensors_without_values() -> None:
    with FakeTensorMode(), twice_differentiable(Phase()):
        y = F.batch_norm(torch.empty(16, 6, 40, 40, requires_grad=True), None, None, training=True)
    assert y.shape == (16, 6, 40, 40)


@pytest.mark.parametrize("offset", [0.0, 1.0, -3.0, 5.0, 100.0, 1e4])
@pytest.mark.parametrize("deviation", [0.0, 1e-3, 1.0])
def test_batch_norm_is_as_precise_as_pytorchs_where_means_are_far(offset: float, deviation: float) -> None:
    x = torch.randn(16, 5, 40, 42).mul_(deviation).add_(torch.linspace(0, 1, 5).view(-1, 1, 1) * offset)
    scale, shift = torch.ones(5), torch.zeros(5)  # by which PyTorch chooses its kernel on CUDA
    settings: dict[str, Any] = {"running_mean": None, "running_var": None, "training": True, "eps": 1e-12}
    want = F.batch_norm(x.double(), weight=scale.double(), bias=shift.double(), **settings)
    theirs = F.batch_norm(x, weight=scale, bias=shift, **settings)
    with twice_differentiable(Phase()):
        ours = F.batch_norm(x, weight=scale, bias=shift, **settings)
    assert float((ours - want).norm()) <= 2 * float((theirs - want).norm()) + 2e-6 * float(want.norm())


@pytest.mark.parametrize("mean", [0.0, 1e3, 65535.0])
@pytest.mark.parametrize("deviation", [0.0, 1.0])
def test_instance_norm_is_as_precise_as_pytorchs_where_means_are_far(mean: float, deviation: float) -> None:
    x = (deviation * torch.randn(4, 3, 16, 16, dtype=torch.float64) + mean).float()
    gradient = torch.randn(4, 3, 16, 16)

    def derivative(x: Tensor) -> Tensor:
        x = x.requires_grad_()
        return torch.autograd.grad(F.instance_norm(x), x, gradient.to(x.dtype))[0]

    want, theirs = derivative(x.double()), derivative(x.clone())
    with twice_differentiable(Phase()):
        ours = derivative(x.clone())
    assert float((ours - want).norm()) <= 4 * float((theirs - want).norm()) + 2e-6 * float(want.norm())


@pytest.mark.parametrize("mean", [0.0, -30.0, 1000.0])
def test_weights_have_precise_gradients_in_eval_mode_where_means_are_far(mean: float) -> None:
    x, gy = torch.randn(8, 6, 14, 14) + mean, torch.randn(8, 6, 14, 14)
    want = (gy.double() * (x.double() - mean)).sum((0, 2, 3))
    scale = torch.ones(6, requires_grad=True)
    with twice_differentiable(Phase()):
        y = F.batch_norm(x, torch.full((6,), mean), torch.ones(6), scale, torch.zeros(6), eps=1e-12)
    (got,) = torch.autograd.grad(y, scale, gy)
    assert float((got - want).norm()) < 1e-6 * float(want.norm())


@pytest.mark.cpu
@pytest.mark.parametrize("shape", [(2, 6, 3, 3), (16, 6, 40, 40)])
def test_these_sizes_are_of_both_ways(shape: tuple[int, ...]) -> None:
    assert (batch_norm._statistics(torch.randn(shape)) is not None) == (shape[0] == 16)


def test_weights_of_half_images_in_eval_mode_take_the_mean_as_it_was() -> None:
    x, mean, scale = torch.randn(4, 6, 5, 5).bfloat16(), torch.zeros(6), torch.ones(6, requires_grad=True)
    with twice_differentiable(Phase()):
        y = F.batch_norm(x, mean, torch.ones(6), scale)
    mean.data.fill_(100)  # as PyTorch's kernel moves it: without telling autograd
    (got,) = torch.autograd.grad(y.float().sum(), scale)
    torch.testing.assert_close(got, x.float().sum((0, 2, 3)), rtol=0.02, atol=0.5)


@pytest.mark.parametrize("shape", [(4, 6, 3, 3), (16, 6, 40, 40), (2, 8192, 4, 2)])  # the last: of few values, by large
def test_batch_norm_moves_its_statistics_as_pytorchs(shape: tuple[int, ...]) -> None:
    x, found = torch.randn(shape), []
    for context in (nullcontext(), twice_differentiable(Phase())):
        layer = torch.nn.BatchNorm2d(shape[1], momentum=0.3)
        with context:
            layer(x)
            layer(x + 1)
        found.append(list(layer.buffers()))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("steady", [False, True])  # by the statistics that it saves, in eval mode
def test_an_earlier_graph_outlives_moves_of_the_statistics(steady: bool) -> None:
    x, found = torch.randn(16, 6, 40, 40, dtype=torch.float64, requires_grad=True), []

    def inside(ours: bool) -> AbstractContextManager[Any]:
        return twice_differentiable(Phase()) if ours else nullcontext()

    for ours in (False, True):
        layer = nn.BatchNorm2d(6).double()
        first = deepcopy(layer) if steady and not ours else layer  # PyTorch's gradient reads the statistics as they are by then
        first.weight, first.bias = layer.weight, layer.bias
        with inside(ours and steady):
            earlier = first.train(not steady)(x)
        with inside(ours):
            later = layer.train()(x + 1)
        found.append([*layer.buffers(), *torch.autograd.grad(earlier.sin().sum() + later.sin().sum(), [x, *layer.parameters()])])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batch_norm_of_places_is_no_view(layout: torch.memory_format, images: int) -> None:
    x = torch.randn(2 * images, 4, 5, 5).contiguous(memory_format=layout).requires_grad_()
    with twice_differentiable(Phase(places=2, rows=2 * images)):
        y = F.batch_norm(x, None, None, training=True)
        y.relu_()  # which on a view of a graph takes copies in every backward
    assert "CopySlices" not in {type(node).__name__ for node in nodes(y)}
    want = torch.stack([F.batch_norm(x[place::2], None, None, training=True).relu() for place in range(2)], dim=1).flatten(0, 1)
    torch.testing.assert_close(y, want)
    assert y.is_contiguous(memory_format=layout)


ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "all of an image's tokens": lambda x: (1 * x).flatten(1),
    "a view of vectors": lambda x: (1 * x.flatten(1)).view(len(x), -1),
    "one token": lambda x: (1 * x)[:, 0],
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_are_one_for_each_image(name: str) -> None:
    x, phase = torch.randn(6, 4, 5), Phase(places=2, rows=6)
    with twice_differentiable(phase):
        y = F.batch_norm(ROWS[name](x), None, None, training=True)
    for place in range(2):
        torch.testing.assert_close(y[place::2], F.batch_norm(ROWS[name](x[place::2]), None, None, training=True))
    assert phase.normalised == {6}


def test_rows_that_places_do_not_divide_are_taken_together() -> None:
    x, phase = torch.randn(5, 4), Phase(places=2, rows=6)
    with twice_differentiable(phase):
        y = F.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True))
    assert phase.normalised == {5}  # which shows that the pass is to be thrown away


class _Layouts(TorchDispatchMode):
    """Takes note of the layouts of the images that the backward of batch normalisation gets."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[set[tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "batch_norm_backward" in str(func):
            self.seen.append({value.stride() for value in args if isinstance(value, Tensor) and value.dim() > 1})
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("of_gradient", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("of_image", [torch.contiguous_format, torch.channels_last])
def test_batch_norm_whose_gradients_come_in_another_layout(of_image: torch.memory_format, of_gradient: torch.memory_format) -> None:
    x, scale, shift = torch.randn(4, 6, 5, 3, dtype=torch.float64), torch.rand(6).double() + 0.5, torch.randn(6).double()
    leaves = [x.contiguous(memory_format=of_image).requires_grad_(), scale.requires_grad_(), shift.requires_grad_()]
    gy, v = (torch.randn(x.shape).double().contiguous(memory_format=of_gradient) for _ in range(2))

    def derivatives() -> list[Tensor]:
        y = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], training=True)
        (gradient,) = torch.autograd.grad(y * y, leaves[0], gy, create_graph=True)
        return [y, gradient, *torch.autograd.grad([gradient, y], leaves, [v, gy])]

    want, layouts = derivatives(), _Layouts()
    with twice_differentiable(Phase()), layouts:
        found = derivatives()
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    assert found[2].is_contiguous(memory_format=of_image)
    # In two layouts PyTorch's kernel takes many times as long.
    assert len(layouts.seen) > 2 and all(len(strides) == 1 for strides in layouts.seen)


class Gain(nn.Module):
    """Batch normalisation with one gain for all channels, or with gains that lie apart in memory."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.apart, self.gains = apart, nn.Parameter(torch.rand(6, 2) + 0.5)

    def forward(self, h: Tensor) -> Tensor:
        gain = self.gains[:, 0] if self.apart else self.gains[0, :1].expand(6)
        return F.batch_norm(h, None, None, gain, None, training=True)


@pytest.mark.parametrize("apart", [True, False])
def test_weights_that_are_not_dense(apart: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), Gain(apart), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).double()
    x, mask, target = torch.randn(4, 3, 8, 8).double(), torch.rand(4, 8, 8) > 0.5, torch.tensor([0, 1, 2, 0])
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout)
        value = attrreg.InputGradient()(model, x.contiguous(memory_format=layout), mask, target)
        found.append([value, *gradients(model, value)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-14)


def test_second_derivatives_of_batch_norm_in_half_precision_are_near_those_in_full() -> None:
    x, gy, v = (torch.randn(6, 4, 5, 5).bfloat16() for _ in range(3))
    scale, shift, found = torch.rand(4) + 0.5, torch.zeros(4), []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [x.to(dtype).add(1).requires_grad_(), gy.to(dtype).requires_grad_()]
        with twice_differentiable(Phase()):
            y = F.batch_norm(leaves[0], None, None, scale, shift, training=True)
        (gradient,) = torch.autograd.grad(y, leaves[0], leaves[1], create_graph=True)
        found.append([each.float() for each in torch.autograd.grad(gradient, leaves, v.to(dtype))])
    for want, got in zip(*found, strict=True):
        assert float((got - want).norm() / want.norm()) < 0.05  # bfloat16 keeps 8 bits
