"""What goes with a model's passes beside its layers: buffers that it makes of its images, and heads that `output=` applies."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attrreg
from tests.models import WAYS, SmoothNet, assert_close, gradients, loss_by, smooth_batch


class Tracking(SmoothNet):
    """Tracks the mean of its images, which a loop does not differentiate by."""

    mean: Tensor

    def __init__(self, assigns: bool) -> None:
        super().__init__()
        self.assigns = assigns
        self.register_buffer("mean", torch.zeros(1, 2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        now = x.mean((0, 2, 3), keepdim=True).square()
        if self.assigns:
            self.mean = 0.9 * self.mean + 0.1 * now
        else:
            self.mean.mul_(0.9).add_(0.1 * now)
        return super().forward(x + x * self.mean)


@pytest.mark.parametrize("assigns", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_buffers_made_of_images_have_no_graph_afterwards(assigns: bool, way: str) -> None:
    model, data = Tracking(assigns).double(), smooth_batch()
    for _ in range(3):
        loss_by(way, attrreg.InputGradient(), model, data).backward()
        assert model.mean.grad_fn is None and not model.mean.requires_grad
    copy.deepcopy(model)


class _Pooling(nn.Module):
    """A head with operators that PyTorch cannot differentiate twice."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, h: Tensor) -> Tensor:
        tokens = F.hardsigmoid(h).flatten(2).mT.unsqueeze(1)
        return self.head(F.scaled_dot_product_attention(tokens, tokens, tokens).mean((1, 2)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["unattached", "attached"])
def test_a_head_has_our_operators_too(way: str) -> None:
    x, mask, target = smooth_batch()
    body, head = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.Tanh()).double(), _Pooling().double()
    whole, reg = nn.Sequential(*body, head), attrreg.InputGradient() + attrreg.GradCAM("1")
    want = gradients(whole, reg.evaluate(whole, x, mask, target).total)
    with reg.attach(body) if way == "attached" else nullcontext():
        body(x)
        value = reg(body, x, mask, target, output=head)
    assert_close(gradients(whole, value), want, 1e-9)
