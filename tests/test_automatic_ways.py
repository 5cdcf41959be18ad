"""The layer for layer="auto" in models whose way through their layers differs from call to call."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attrreg
from attrreg import automatic
from attrreg.trace import passes
from tests.models import SmoothNet, smooth_batch


class Depth(nn.Module):
    """Its caller tells how deep it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 3)
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor, depth: int) -> Any:
        h = self.stem(x).tanh()
        for block in self.blocks[:depth]:
            h = block(h).tanh()
        return self.head(h.mean((2, 3)))


@pytest.mark.parametrize("attach", [False, True])
def test_the_automatic_layer_is_that_of_the_depth_asked_for(attach: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "QUESTIONS", 2)
    model, (x, mask, target), found = Depth().double(), smooth_batch(), []
    with attrreg.GradCAM().attach(model) if attach else nullcontext():
        for depth in (1, 2, 1, 2, 3, 3):
            inputs = {"x": x, "depth": depth}
            if attach:
                model(**inputs)
            with passes() as counted:
                value = attrreg.GradCAM()(model, x, mask, target, inputs=inputs)
            found.append(counted.forward)
            torch.testing.assert_close(value, attrreg.GradCAM(f"blocks.{depth - 1}")(model, x, mask, target, inputs=inputs))
    assert attach or found == [2, 2, 1, 1, 2, 2]  # one more finds the layer, of which no more are remembered


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
