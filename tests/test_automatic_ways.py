"""The layer for layer="auto" in models whose way through their layers differs from call to call."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import attrreg
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
