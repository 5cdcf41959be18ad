"""The layer for layer="auto" in models whose way through their layers differs from call to call."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attrreg
from attrreg import engines
from tests.models import SmoothNet, smooth_batch


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
