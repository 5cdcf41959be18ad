"""Flags and settings that go with a buffer go back with it; hooks on all modules, and passes of metrics, against a recorded forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import attrreg
from attrreg import baselines, metrics
from attrreg.trace import passes
from tests.models import SmoothNet, smooth_batch

pytestmark = pytest.mark.cpu


class Centre(nn.Module):
    """The first batch sets the centre."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 4, 1, 1))
        self.ready = False

    def forward(self, h: Tensor) -> Tensor:
        if not self.ready:
            self.mean.copy_(h.detach().mean((0, 2, 3), keepdim=True))
            self.ready = True
        return h - self.mean


class Positions(nn.Module):
    """A buffer is made anew for each size."""

    grid: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.size: Any = None
        self.register_buffer("grid", torch.zeros(1, 1, 1, 1), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        if self.size != h.shape[2:]:
            self.size = h.shape[2:]
            grid = torch.linspace(0, 2, h.shape[2] * h.shape[3], dtype=h.dtype).view(1, 1, *h.shape[2:])
            self.register_buffer("grid", grid, persistent=False)
        return h + self.grid


def net(layer: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    parts = nn.Conv2d(2, 4, 3, padding=1), layer(), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    return nn.Sequential(*parts).double()


x, mask, target = smooth_batch()
x = x + 1
FIRST: dict[str, Callable[[nn.Module], Any]] = {
    "layers": lambda model: attrreg.layers(model, x),
    "a map": lambda model: attrreg.InputGradient().attribute(model, x, target),
    "a map of larger images": lambda model: attrreg.InputGradient().attribute(model, torch.cat([x, x], 3), target),
    "a penalty": lambda model: attrreg.InputGradient()(model, x, mask, target),
    "a path": lambda model: attrreg.IntegratedGradients(steps=3)(model, x, mask, target).backward(),
    "occlusion": lambda model: metrics.Occlusion(window=3, stride=3)(model, x, target),
}


@pytest.mark.parametrize("layer", [Centre, Positions])
@pytest.mark.parametrize("first", FIRST)
def test_the_loops_first_forward_is_the_first(layer: type[nn.Module], first: str) -> None:
    model = net(layer)
    FIRST[first](model)
    torch.testing.assert_close(model(x), net(layer)(x))


@pytest.mark.parametrize("layer", [Centre, Positions])
def test_evaluate_is_a_forward_whose_state_stays(layer: type[nn.Module]) -> None:
    model, plain = net(layer), net(layer)
    term = attrreg.ActivationDifference("2", baselines.Zero())
    nearly = torch.ones_like(mask)
    nearly[:, 0, 0] = 0
    found = term.evaluate(model, x, nearly, target)
    torch.testing.assert_close(found.output, plain(x))
    torch.testing.assert_close(model(0.5 * x), plain(0.5 * x))
    torch.testing.assert_close(found.total, term(net(layer), x, nearly, target))


def test_a_forward_under_a_hook_on_all_modules_serves_no_other() -> None:
    model, term = SmoothNet().double(), attrreg.InputGradient(objective=attrreg.objectives.SquaredOutside())
    want = term(model, x, mask, target)
    handle = register_module_forward_hook(lambda module, args, output: 3 * output if isinstance(module, nn.Linear) else None)
    with term.attach(model):
        try:
            model(x)
        finally:
            handle.remove()
        torch.testing.assert_close(term(model, x, mask, target), want)


@pytest.mark.parametrize("between", ["layers", "a map", "occlusion"])
def test_what_looks_at_the_model_leaves_the_recorded_forward(between: str) -> None:
    model, term = SmoothNet().double(), attrreg.InputGradient()
    with term.attach(model):
        model(x)
        FIRST[between](model)
        with passes() as counted:
            term(model, x, mask, target)
    assert counted.forward == 0


class Lazy(nn.Module):
    """Registers its buffer in the first forward, behind a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.size: Any = None

    def forward(self, h: Tensor) -> Tensor:
        if self.size != h.shape[2:]:
            self.size = h.shape[2:]
            self.register_buffer("grid", torch.linspace(0, 2, h.shape[-1], dtype=h.dtype), persistent=False)
        return h + self.get_buffer("grid")


def test_a_buffer_that_a_pass_of_ours_is_the_first_to_register_is_registered_by_the_loops() -> None:
    x, mask, target = smooth_batch()
    for call in (
        lambda model: attrreg.layers(model, x),
        lambda model: attrreg.ActivationDifference().evaluate(model, x, mask).total.backward(),
        lambda model: attrreg.InputGradient()(model, x, mask, target).backward(),
    ):
        model = net(Lazy)
        call(model)
        model(x)
        assert model[1].get_buffer("grid").shape == x.shape[-1:]


class Constant(nn.Module):
    """Holds one value for all channels, and a table that validation made."""

    table: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1, 1, 1, 1).expand(1, 4, 1, 1), persistent=False)
        self.register_buffer("table", None)

    def forward(self, h: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0, 1, h.shape[-1], dtype=h.dtype)
        scaled: Tensor = h * self.get_buffer("scale") + self.get_buffer("table")
        return scaled


def test_evaluate_leaves_buffers_that_nobody_can_write_into() -> None:
    model, (x, mask, target) = net(Constant), smooth_batch()
    model[1].register_buffer("scale", model[1].get_buffer("scale")[:, :1].expand(1, 4, 1, 1))  # `double` has made it dense
    with torch.inference_mode():
        model(x)
    assert model[1].get_buffer("table").is_inference() and model[1].get_buffer("scale").stride()[1] == 0
    found = attrreg.InputGradient().evaluate(model, x, mask, target)
    torch.testing.assert_close(found.total, attrreg.InputGradient()(model, x, mask, target))
    found.total.backward()
