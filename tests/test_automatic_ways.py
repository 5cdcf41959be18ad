"""The layer for `layer="auto"` is found anew where another is right: other images or layers, ones that run twice or are overwritten."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attrreg
from attrreg import engines, scores
from attrreg.trace import passes
from tests.models import WAYS, SmoothNet, assert_close, gradients, loss_by, smooth_batch


class TwoWays(nn.Module):
    """The images decide which layer has the map."""

    def __init__(self) -> None:
        super().__init__()
        self.bright, self.dark, self.head = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 5), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        way = self.bright if x.mean() > 0 else self.dark
        logits: Tensor = self.head(way(x).tanh().mean(dim=(2, 3)))
        return logits


@pytest.mark.parametrize("change", [lambda x: -x, lambda x: x[..., :6]], ids=["other way", "other size"])
def test_the_automatic_layer_is_found_anew_where_another_is_right(change: Callable[[Tensor], Tensor]) -> None:
    model, (x, _, target) = TwoWays().double(), smooth_batch()
    x = x.abs()
    attrreg.GradCAM()(model, x, torch.zeros(8, 8), target)
    x = change(x)
    mask = torch.zeros(x.shape[2:])
    with passes() as counted:
        value = attrreg.GradCAM()(model, x, mask, target)
    assert counted.forward == (2 if x.mean() < 0 else 1)  # the layer that was known did not run
    fresh = copy.deepcopy(model)
    want = attrreg.GradCAM()(fresh, x, mask, target)
    torch.testing.assert_close(value, want, rtol=1e-13, atol=0)
    assert_close(gradients(model, value), gradients(fresh, want), 1e-12)


class ShowsMaps(SmoothNet):
    """Returns its last map."""

    def forward(self, x: Tensor) -> Any:
        maps = self.body(self.act(self.stem(x)))
        return {"logits": self.head(maps.mean((2, 3))), "maps": maps}


def test_a_map_that_the_loop_has_written_into_is_computed_anew() -> None:
    model, (x, mask, target), regularizer = ShowsMaps().double(), smooth_batch(), attrreg.GradCAM()
    want = regularizer(model, x, mask, target, output="logits")
    with regularizer.attach(model):
        for _ in range(2):  # the second time, the layer is known
            model(x)["maps"].mul_(2)
            torch.testing.assert_close(regularizer(model, x, mask, target, output="logits"), want)


class Grown(nn.Module):
    """Its layers run one by one; there may be more of them later."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body:
            x = layer(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def test_the_automatic_layer_is_found_anew_where_it_was_renamed() -> None:
    model, (x, mask, target) = Grown().double(), smooth_batch()
    attrreg.GradCAM()(model, x, mask, target)
    model.body = nn.Sequential(OrderedDict(zip("abcd", model.body, strict=True)))  # there is no layer "body.3" now
    value = attrreg.GradCAM()(model, x, mask, target)
    torch.testing.assert_close(value, attrreg.GradCAM("body.d")(model, x, mask, target), rtol=1e-13, atol=0)


@pytest.mark.parametrize("attach", [False, True])
def test_the_automatic_layer_is_the_last_also_where_layers_were_added(attach: bool) -> None:
    model, (x, mask, target), cam = Grown().double(), smooth_batch(), attrreg.GradCAM()
    with cam.attach(model) if attach else nullcontext():
        model(x)
        cam(model, x, mask, target)
        model.body.extend([nn.Conv2d(4, 4, 3).double(), nn.Tanh()])
        model(x)
        value = cam(model, x, mask, target)
    torch.testing.assert_close(value, attrreg.GradCAM("body.5")(model, x, mask, target))


def test_the_automatic_layer_is_one_for_all_terms() -> None:
    model, (x, mask, target) = Grown().double(), smooth_batch()
    early, late = attrreg.GradCAM(score=scores.RandomProjection("body.2", seed=0)).named("early"), attrreg.GradCAM()
    features = attrreg.GradCAM(score=scores.RandomProjection(seed=0)).named("features")  # another, where the head is a convolution
    for reg, name in ((early + late, "early"), (late + early, "early"), (late + features, "features"), (features + late, "features")):
        with pytest.raises(ValueError, match=rf"layer='auto' is one layer.*{name}.*Name the layer"):
            reg(model, x, mask, target)
    for reg in (early + attrreg.captum.LayerActivation(), attrreg.captum.LayerActivation() + early):
        with pytest.raises(ValueError, match="layer='auto' is one layer"):
            reg(model, x, mask, target)
    early(model, x, mask, target)


class Deep(SmoothNet):
    """Of a depth that its loop says: one layer may run more than once."""

    depth = 1

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Conv2d(4, 5, 3)
        self.again = nn.Conv2d(5, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(self.stem(x).tanh()).tanh()
        for _ in range(self.depth):
            h = self.again(h).tanh()
        logits: Tensor = self.head(h.mean((2, 3)))
        return logits


@pytest.mark.parametrize("attached", [False, True])
def test_an_automatic_layer_that_ran_more_than_once_is_another(attached: bool) -> None:
    model, (x, mask, target), reg = Deep().double(), smooth_batch(), attrreg.GradCAM()
    with reg.attach(model) if attached else nullcontext():
        for depth, layer in ((1, "again"), (1, "again"), (2, "block")):
            model.depth = depth
            want = attrreg.GradCAM(layer)(model, x, mask, target)
            model(x)
            torch.testing.assert_close(reg(model, x, mask, target), want)


class _Overwritten(SmoothNet):
    """Behind the last layer works a function in place, as in torchvision's DenseNet."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.body(self.stem(x).tanh()), inplace=True)
        logits: Tensor = self.head(h.mean((2, 3)))
        return logits


def test_the_map_is_the_same_from_the_second_call_on_behind_frozen_layers_too() -> None:
    model, (x, mask, target), reg = _Overwritten().double(), smooth_batch(), attrreg.GradCAM()
    want = reg(model, x, mask, target).detach()
    model = copy.deepcopy(model)
    model.stem.requires_grad_(False)
    model.body.requires_grad_(False)
    for _ in range(3):
        torch.testing.assert_close(reg(model, x, mask, target).detach(), want)
    with reg.attach(model):
        for _ in range(3):
            model(x)
            torch.testing.assert_close(reg(model, x, mask, target).detach(), want)
    torch.testing.assert_close((reg + attrreg.InputGradient()).evaluate(model, x, mask, target).terms["GradCAM"], want)


def test_finite_differences_do_not_move_what_is_overwritten() -> None:
    model, (x, mask, target) = _Overwritten().double(), smooth_batch()
    with pytest.raises(ValueError, match=r"layer='auto' is 'body', whose output the model overwrites in place.* Name a layer"):
        attrreg.GradCAM().using(engines.FiniteDifference())(model, x, mask, target)
    attrreg.GradCAM("body").using(engines.FiniteDifference())(model, x, mask, target)


class Step(nn.Module):
    """A residual block, whose own output is no map where it pools."""

    def __init__(self, stride: int = 1, pools: bool = False, enters: bool = False) -> None:
        super().__init__()
        self.stride, self.pools = stride, pools
        self.enter = nn.Conv2d(4, 4, 1) if enters else None
        self.conv = nn.Conv2d(4, 4, 3, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.enter is None else self.enter(x)
        x = x[..., :: self.stride, :: self.stride] + self.conv(x).tanh()
        return x.mean((2, 3)) if self.pools else x


class Residual(nn.Module):
    """Steps behind a stem; `long`: a shortcut around all of them, too."""

    def __init__(self, *steps: nn.Module, long: bool = False) -> None:
        super().__init__()
        self.stem, self.stage, self.head, self.long = nn.Conv2d(2, 4, 3, padding=1), nn.Sequential(*steps), nn.Linear(4, 3), long

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        logits: Tensor = self.head(self.stage(x) + (x.mean((2, 3)) if self.long else 0))
        return logits


class Loose(nn.Module):
    """Convolutions in a list, each beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 3)
        self.steps = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for step in self.steps:
            x = x + step(x).tanh()
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    ("build", "layer"),
    [
        (lambda: Residual(Step(), Step(pools=True)), "stage.0"),
        (lambda: Residual(Step(pools=True)), "stem"),
        (lambda: Residual(Step(pools=True, enters=True)), "stem"),
        (lambda: Residual(Step(stride=2, pools=True)), "stage.0.conv"),
        (lambda: Residual(Step(), Step(pools=True), long=True), "stem"),
        (Loose, "steps.1"),
        (lambda: Residual(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())), "stage.0.1"),
    ],
    ids=["last of two", "the only one", "first layer not beside a shortcut", "another size", "longer shortcut", "in a list", "no shortcut"],
)
def test_the_map_that_enters_the_last_block_where_a_shortcut_leads_around_its_branch(build: Callable[[], nn.Module], layer: str) -> None:
    model, (x, mask, target) = build().double(), smooth_batch()
    with attrreg.GradCAM().attach(model) as handle:
        model(x)
        attrreg.GradCAM()(model, x, mask, target)
    assert handle.map == layer


def test_a_layer_that_runs_twice_is_not_the_automatic_one() -> None:
    (x, _, target), act = smooth_batch(), nn.Tanh()
    model = nn.Sequential(nn.Conv2d(2, 4, 3), act, nn.Conv2d(4, 5, 3), act, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)).double()
    assert torch.equal(attrreg.GradCAM().attribute(model, x, target), attrreg.GradCAM("2").attribute(model, x, target))


class Backbone(nn.Module):
    """Its first part runs frozen."""

    def __init__(self, frozen: Any) -> None:
        super().__init__()
        self.context = [frozen]
        self.stem, self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        with self.context[0]():
            h = self.stem(x).tanh()
        logits: Tensor = self.head(self.conv(h.clone()).tanh().mean((2, 3)))
        return logits


@pytest.mark.parametrize("way", WAYS)
def test_a_part_under_inference_mode_has_no_automatic_layer(way: str) -> None:
    found = []
    for frozen in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        model, data = Backbone(frozen).double(), smooth_batch()
        found.append(gradients(model, loss_by(way, attrreg.GradCAM(), model, data)))
    assert_close(found[1], found[0], 1e-12)
